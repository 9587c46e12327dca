"""What `kt-sft export ADAPTER` does: finds the base, looks whether it is the right one, writes."""

from __future__ import annotations

from pathlib import Path

from kt_sft.adapters.base_identity import other_shape, other_weights, read_identity, refuse
from kt_sft.errors import SettingsError
from kt_sft.export.adapter import Adapter
from kt_sft.export.adapter_file import AdapterFile
from kt_sft.export.base import Base
from kt_sft.export.merge import export_merged
from kt_sft.export.writing import write_adapter

_LOAD_MERGED = (
    "model = AutoModelForCausalLM.from_pretrained({out!r}, dtype='auto')",
    "vllm serve {out}",
)


def export_adapter(
    adapter: str | Path,
    to: str,
    out: str | Path,
    *,
    base: str | None = None,
    dequantize: bool = False,
    force: bool = False,
) -> list[str]:
    """Writes an adapter for a program of EXPORT_TARGETS; returns two lines that load the result.

    base: a folder, or a name on the hub; by default what the adapter says that it was trained on.
    dequantize: a quantized base is merged in bf16. force: takes another base of the same shape.
    Raises SettingsError, AdapterMismatchError, CheckpointError, UnsupportedModelError; nothing is
    left of an export that failed.
    """
    adapter, out = Path(adapter), Path(out)
    opened = open_base(adapter, base)
    if not force:
        refuse_other_base(adapter, opened, "--force")
    if to == "merged":
        export_merged(opened.folder, [adapter], out, dequantize=dequantize)
        return [line.format(out=str(out)) for line in _LOAD_MERGED]
    return write_adapter(Adapter(adapter, opened), to, out)


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


def refuse_other_base(adapter: Path, base: Base, force: str) -> None:
    """Raises AdapterMismatchError where an adapter was trained on another base.

    force: how to go on all the same.
    """
    theirs = read_identity(adapter)
    if theirs is not None:
        here = base.identity
        refuse(adapter, other_shape(theirs, here) + other_weights(theirs, here), force)
