"""An adapter's folder, when PEFT writes or reads it for a hybrid model.

With an adapter goes what tells its base from another one of the same shape, and loading looks at
it: PEFT itself knows names and sizes only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from torch import nn

from kt_sft.adapters.base_identity import (
    identity_of,
    other_shape,
    other_weights,
    read_identity,
    refuse,
    telling_parameters,
    write_identity,
)
from kt_sft.errors import AdapterMismatchError
from kt_sft.experts import hybrid_experts_of
from kt_sft.export.adapter_file import is_foreign

_FORCE = "adapter_base: any in the kt_sft section"


def identify_base(
    model: Any, from_codes: Collection[str] = (), stored_in_fp16: bool = False
) -> None:
    """Notes on a hybrid model, before any adapter, what tells it from others of its shape.

    from_codes: parameters that quantized weights were read into, which other releases have not.
    """
    experts = hybrid_experts_of(model)
    sizes = {path: module.shape.sizes for path, module in experts.items()}
    telling = telling_parameters(model, sizes)
    runtime = next(iter(experts.values())).runtime
    runtime.base_identity = identity_of(
        model.config,
        sizes,
        [name for name in telling if name not in from_codes],
        model.get_parameter,
        rounded=stored_in_fp16,
    )


def with_identity(stock: Callable) -> Callable:
    """`save_pretrained` of a PeftModel that puts the base's identity beside each adapter."""

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        done = stock(self, save_directory, *args, **kwargs)
        identity = _identity(self)
        if identity is not None and kwargs.get("is_main_process", True):
            root = Path(save_directory)
            for folder in (root, *(root / name for name in self.peft_config)):
                if (folder / CONFIG_NAME).is_file():
                    write_identity(folder, identity)
        return done

    return save_pretrained


def looking_at_the_base(stock: Callable) -> Callable:
    """`load_adapter` of a PeftModel that refuses an adapter of another base, or in other forms."""

    def load_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        folder, here = Path(model_id) / str(kwargs.get("subfolder") or ""), _identity(self)
        if here is not None and folder.is_dir() and is_foreign(folder):
            raise AdapterMismatchError(
                f"{folder}: its expert LoRA is in the form of another program; write it in ours "
                f"with `kt-sft export {folder} --to kt_sft --out DIR --base MODEL`"
            )
        theirs = read_identity(folder)
        if here is None or theirs is None or _runtime(self).settings.adapter_base == "any":
            return stock(self, model_id, *args, **kwargs)
        shape = other_shape(theirs, here)
        if not shape:
            refuse(folder, other_weights(theirs, here), _FORCE)
        # Where shapes differ, loading says more of it.
        done = stock(self, model_id, *args, **kwargs)
        refuse(folder, shape, _FORCE)
        return done

    return load_adapter


def _runtime(model: nn.Module) -> Any:
    return next((m.runtime for m in hybrid_experts_of(model).values()), None)


def _identity(model: nn.Module) -> dict[str, Any] | None:
    runtime = _runtime(model)
    return None if runtime is None else runtime.base_identity
