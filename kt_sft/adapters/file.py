"""An adapter as PEFT has saved it: what was trained, by the modules of the base model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from kt_sft.adapters import names
from kt_sft.errors import SettingsError
from kt_sft.files.safetensors import SafetensorsCheckpoint

_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class LoraMatrices:
    """The change of one module's weight: scaling * b @ a, with a [r, inputs], b [outputs, r]."""

    a: Tensor
    b: Tensor
    scaling: float


class AdapterFile:
    """Plain LoRA, and modules that were trained in full. Tensors are read when asked for."""

    def __init__(self, folder: str | Path) -> None:
        """Raises SettingsError for another method, CheckpointError for a damaged file."""
        config = PeftConfig.from_pretrained(str(folder))
        if config.peft_type != "LORA" or config.use_dora or config.bias != "none":
            raise SettingsError(
                f"{folder}: only plain LoRA can be merged by kt_sft, got peft_type "
                f"{config.peft_type}, use_dora {config.use_dora}, bias {config.bias}"
            )
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise SettingsError(
                f"{folder}: init_lora_weights {config.init_lora_weights!r} replaced the base's "
                "weights by a residual before training, so the original ones cannot take the "
                "adapter; merge it with the program that made the residual"
            )
        self._config = config
        self._tensors = SafetensorsCheckpoint([Path(folder) / SAFETENSORS_WEIGHTS_NAME])
        self._lora: list[str] = []
        self._in_full: dict[str, str] = {}
        for key in self._tensors:
            path = key.removeprefix(names.FILE_PREFIX)
            if path.endswith(_A):
                self._lora.append(path.removesuffix(_A))
            elif not path.endswith(_B):
                inside = names.wrapped(path)
                if inside is not None:
                    path, trained = inside
                    # With a resized vocabulary PEFT also saves what its wrapper holds inside.
                    if not trained or f"{names.FILE_PREFIX}{path}" in self._tensors:
                        continue
                self._in_full[path] = key

    def lora_modules(self) -> Iterator[str]:
        """The paths of the modules that have LoRA, an expert's projection being one."""
        yield from self._lora

    def full_parameters(self) -> Iterator[str]:
        """The paths of the parameters that were trained in full."""
        yield from self._in_full

    def matrices(self, module: str, trained_as: str) -> LoraMatrices:
        """The LoRA of a module, in fp32. trained_as: its path in the model that trained."""
        a = self._tensors.get(f"{names.FILE_PREFIX}{module}{_A}").float()
        b = self._tensors.get(f"{names.FILE_PREFIX}{module}{_B}").float()
        alpha = names.alpha_of(self._config, trained_as)
        return LoraMatrices(a, b, names.scaling(a.shape[0], alpha, self._config.use_rslora))

    def full(self, parameter: str) -> Tensor:
        """A parameter that was trained in full."""
        return self._tensors.get(self._in_full[parameter])

    def full_shape(self, parameter: str) -> tuple[int, ...]:
        """Its shape."""
        return self._tensors.shape(self._in_full[parameter])
