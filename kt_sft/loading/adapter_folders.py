"""An adapter's folder, when PEFT writes or reads it for a hybrid model.

With an adapter goes what tells its base from another one of the same shape, and loading looks at
it: PEFT itself knows names and sizes only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from torch import nn

from kt_sft.adapters.base_identity import (
    earlier_adapters,
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

logger = logging.getLogger(__name__)

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
            earlier = _runtime(self).adapters_merged
            note = {**identity, **({"on_top_of": earlier} if earlier else {})}
            root = Path(save_directory)
            for folder in (root, *(root / name for name in self.peft_config)):
                if (folder / CONFIG_NAME).is_file():
                    write_identity(folder, note)
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
        if here is None:
            return stock(self, model_id, *args, **kwargs)
        theirs, runtime = read_identity(folder) or {}, _runtime(self)
        shape, weights = other_shape(theirs, here), other_weights(theirs, here)
        if runtime.settings.adapter_base == "any":
            if shape or weights:
                logger.warning("%s: of another base (%s)", folder, "; ".join(shape + weights))
            shape = weights = []
        name = str(getattr(self.config, "_name_or_path", "") or "this one")
        if not shape:
            refuse(folder, name, weights, _FORCE)
        # Where shapes differ, loading says more of it.
        done = stock(self, model_id, *args, **kwargs)
        refuse(folder, name, shape, "")
        here_already = {*runtime.adapters_loaded, *runtime.adapters_merged}
        lacking = set(earlier_adapters(folder)) - here_already
        if lacking:
            logger.warning(
                "%s was trained on top of %s, which this model has not got: load them together, in "
                "this order",
                folder,
                ", ".join(sorted(lacking)),
            )
        runtime.adapters_loaded.append(str(folder.resolve()))
        return done

    return load_adapter


def noting_merges(stock: Callable) -> Callable:
    """`_unload_and_optionally_merge` that tells a hybrid model what has become a part of it."""

    def unload(self: Any, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        runtime = _runtime(self.model)
        done = stock(self, merge, *args, **kwargs)
        if runtime is not None:
            runtime.unload_adapters(merge)
        return done

    return unload


def _runtime(model: nn.Module) -> Any:
    return next((m.runtime for m in hybrid_experts_of(model).values()), None)


def _identity(model: nn.Module) -> dict[str, Any] | None:
    runtime = _runtime(model)
    return None if runtime is None else runtime.base_identity
