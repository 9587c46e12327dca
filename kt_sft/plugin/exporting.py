"""The recipe's `export`: an adapter merged into the original checkpoint, with its tokenizer."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kt_sft.config import HybridExpertsSettings
from kt_sft.errors import SettingsError
from kt_sft.export.base import Base
from kt_sft.export.command import refuse_alone, refuse_other_base
from kt_sft.export.merge import VALUE_HEADS, export_merged
from kt_sft.plugin.modes import refuse_other_loaders

logger = logging.getLogger(__name__)


def export_recipe(recipe: Mapping[str, Any], settings: HybridExpertsSettings) -> Path:
    """Merges the adapters of an export recipe into the original checkpoint."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_infer_args
    from llamafactory.model import load_tokenizer

    model_args, data_args, finetuning_args, _ = get_infer_args(dict(recipe))
    refuse_other_loaders(model_args)
    problems = []
    if model_args.export_dir is None:
        problems.append("export_dir: is missing")
    for name in ("export_quantization_bit", "export_hub_model_id"):
        if getattr(model_args, name) is not None:
            problems.append(f"{name}: is not supported with hybrid experts")
    adapters = model_args.adapter_name_or_path or []
    if problems:
        raise SettingsError("export:\n" + "\n".join(f"  - {p}" for p in problems))
    # The tokenizer as LLaMA-Factory saves it: with the template's chat format and stop tokens.
    # Loading it turns the name on another hub into that of a local folder.
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    base = Path(model_args.model_name_or_path)
    if not base.is_dir():
        from huggingface_hub import snapshot_download

        base = Path(
            snapshot_download(
                model_args.model_name_or_path,
                revision=model_args.model_revision,
                cache_dir=model_args.cache_dir,
                token=model_args.hf_hub_token,
            )
        )
    opened = Base.open(base)
    if settings.adapter_base == "check":
        for adapter in adapters:
            refuse_other_base(Path(adapter), opened, "adapter_base: any in the kt_sft section")
            refuse_alone(Path(adapter), list(map(Path, adapters)))
    out = export_merged(opened, adapters, model_args.export_dir)
    grown, known = _vocabulary_size(out), _vocabulary_size(base)
    if grown > known >= len(tokenizer):
        logger.warning(
            "the adapter has a vocabulary of %d, its base one of %d, and this tokenizer knows %d "
            "tokens: export with the add_tokens or add_special_tokens of the training",
            grown,
            known,
            len(tokenizer),
        )
    tokenizer.padding_side = "left"  # for generation, as the stock command leaves it
    tokenizer.init_kwargs["padding_side"] = "left"
    tokenizer.save_pretrained(out)
    (out / "Modelfile").write_text(template.get_ollama_modelfile(tokenizer), encoding="utf-8")
    if finetuning_args.stage == "rm":
        _require_value_head(base, out)
    logger.info("exported to %s", out)
    return out


def _vocabulary_size(folder: Path) -> int:
    """As config.json says."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int((config.get("text_config") or config).get("vocab_size") or 0)


def _require_value_head(base: Path, out: Path) -> None:
    """The head of a reward model; where no adapter had one, the base's."""
    if any((out / name).is_file() for name in VALUE_HEADS):
        return
    head = next((f for name in VALUE_HEADS if (f := base / name).is_file()), None)
    if head is None:
        logger.warning("neither adapter nor %s has a value head; %s has none either", base, out)
    else:
        shutil.copy(head, out / head.name)
