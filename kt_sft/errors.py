"""The typed errors of kt_sft. Each message says what, got, expected and what to do."""


class KtSftError(Exception):
    """Base of every error that kt_sft raises on purpose."""


class SettingsError(KtSftError, ValueError):
    """One or more settings of the `kt_sft:` section are unknown or wrong; all are listed."""


class UnsupportedModelError(KtSftError, ValueError):
    """The model's experts cannot be computed by kt_sft; names the model and what works."""


class CheckpointError(KtSftError, ValueError):
    """A base checkpoint lacks tensors, has wrong shapes or dtypes, or is malformed."""


class StoreError(KtSftError, ValueError):
    """A file of packed experts is damaged, or cannot be written; names it and what to do."""


class StoreFolderError(StoreError):
    """The folder of stores cannot be used; `store: auto` packs in memory then."""


class AdapterMismatchError(KtSftError, ValueError):
    """An adapter does not fit the base model it is loaded on; lists the differences."""


class KernelArgumentError(KtSftError, ValueError):
    """A tensor handed to the kernels has the wrong dtype, shape, layout or device."""


class ThreadsError(KtSftError, RuntimeError):
    """The system gives fewer threads than asked for; says how many, and its limits."""


class PatchError(KtSftError, RuntimeError):
    """Another program's function is not the one that kt_sft replaces; names both and releases."""


class PeerError(KtSftError, RuntimeError):
    """A peer that a measurement should run against cannot be started or failed."""


class ReportError(KtSftError, ValueError):
    """A run's files are missing, damaged, or do not belong together; says which."""


class RequestError(KtSftError, ValueError):
    """A request to the API that the model cannot serve; says what was got and expected."""


class MemoryPlanError(KtSftError, MemoryError):
    """A run would need more memory than there is; lists every part of its plan."""


class NonFiniteError(KtSftError, ArithmeticError):
    """NaN or Inf reached the gradients; names the step and where it was first seen."""
