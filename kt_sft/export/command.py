"""What `kt-sft export ADAPTER` does: finds the base, looks whether it is the right one, writes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from kt_sft.adapters.base_identity import (
    earlier_adapters,
    other_shape,
    other_weights,
    read_identity,
    refuse,
)
from kt_sft.errors import SettingsError
from kt_sft.export.adapter import Adapter
from kt_sft.export.adapter_file import AdapterFile
from kt_sft.export.base import Base
from kt_sft.export.merge import export_merged
from kt_sft.export.writing import write_adapter

logger = logging.getLogger(__name__)

_LOAD_MERGED = (
    "from transformers import AutoModelForCausalLM",
    "model = AutoModelForCausalLM.from_pretrained({out!r}, dtype='auto')  # or: vllm serve {out}",
)


def export_adapter(
    adapter: str | Path | Sequence[str | Path],
    to: str,
    out: str | Path,
    *,
    base: str | None = None,
    dequantize: bool = False,
    force: bool = False,
) -> list[str]:
    """Writes an adapter for a program of EXPORT_TARGETS; returns two lines that load the result.

    adapter: its folder, or several for `merged`, each trained on top of those before it.
    base: a folder, or a name on the hub; by default what the adapter says that it was trained on.
    dequantize: a quantized base is merged in bf16. force: takes another base of the same shape,
    and an adapter without those that it was trained on top of.
    Raises SettingsError, AdapterMismatchError, CheckpointError, UnsupportedModelError; nothing is
    left of an export that failed.
    """
    adapters = [Path(adapter)] if isinstance(adapter, str | Path) else list(map(Path, adapter))
    out = Path(out)
    if len(adapters) > 1 and to != "merged":
        raise SettingsError(
            f"--to {to}: got {len(adapters)} adapters, expected one; several are one model with "
            "--to merged"
        )
    opened = open_base(adapters[0], base)
    found: list[str] = []
    for folder in adapters:
        if force:
            found += differences(folder, opened)
            continue
        refuse_other_base(folder, opened, "--force")
        refuse_alone(folder, adapters)
    if found:
        logger.warning("--force: the base is another one (%s)", "; ".join(found))
    if to == "merged":
        where = export_merged(opened, adapters, out, dequantize=dequantize, option="--out")
        return [line.format(out=str(where)) for line in _LOAD_MERGED]
    return write_adapter(Adapter(adapters[0], opened), to, out, forced=bool(found))


def open_base(adapter: Path, name: str | None) -> Base:
    """The base by its name, or the one that the adapter names. Raises SettingsError."""
    name = name or AdapterFile(adapter).config.base_model_name_or_path
    if not name:
        raise SettingsError(f"--base: {adapter} does not say which base it was trained on; give it")
    if Path(name).is_dir():
        return Base.open(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Base.open(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        text = (str(error).splitlines() or [""])[0]
        raise SettingsError(
            f"--base: {name} is no folder here and cannot be had from the hub ({text}); give the "
            "folder of the base checkpoint"
        ) from error


def differences(adapter: Path, base: Base) -> list[str]:
    """What the adapter notes of its base and this one has not; empty where nothing is noted."""
    theirs, here = read_identity(adapter) or {}, base.identity
    return other_shape(theirs, here) + other_weights(theirs, here)


def refuse_other_base(adapter: Path, base: Base, force: str) -> None:
    """Raises AdapterMismatchError where an adapter was trained on another base.

    force: how to go on all the same.
    """
    theirs, here = read_identity(adapter) or {}, base.identity
    shape, weights = other_shape(theirs, here), other_weights(theirs, here)
    refuse(adapter, str(base.folder), shape + weights, "" if shape else force)


def refuse_alone(adapter: Path, given: Sequence[Path]) -> None:
    """Raises SettingsError for an adapter without those that it was trained on top of."""
    earlier = earlier_adapters(adapter)
    names = {path.name for path in given}
    lacking = [path for path in earlier if Path(path).name not in names]
    if lacking:
        raise SettingsError(
            f"{adapter}: was trained on top of {', '.join(lacking)}; merge them together, "
            f"`kt-sft export {','.join([*earlier, str(adapter)])} --to merged`"
        )
