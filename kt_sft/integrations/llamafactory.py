"""LLaMA-Factory: the `kt_sft:` section of a recipe, for train, predict, chat, api and export."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SECTION = "kt_sft"

logger = logging.getLogger(__name__)


def _recipe_dir() -> Path | None:
    """The folder of the recipe named on the command line."""
    if len(sys.argv) > 1 and sys.argv[1].endswith((".yaml", ".yml", ".json")):
        return Path(sys.argv[1]).absolute().parent
    return None


def hook_parser(parser_module: Any) -> None:
    """Makes `_parse_args` take the section out of the recipe and act on it. Idempotent."""
    stock = parser_module._parse_args
    if hasattr(stock, "kt_sft_stock"):
        return

    @functools.wraps(stock)
    def parse_args(parser: Any, args: Any = None, allow_extra_keys: bool = False) -> Any:
        args = parser_module.read_args(args)
        if isinstance(args, Mapping) and SECTION in args:
            _activate(args[SECTION])
            # A copy: the same recipe is parsed again, for other argument classes.
            args = {k: v for k, v in args.items() if k != SECTION}
        return stock(parser, args, allow_extra_keys)

    parse_args.kt_sft_stock = stock  # type: ignore[attr-defined]
    parser_module._parse_args = parse_args


def hook_tuner(tuner_module: Any) -> None:
    """Makes `export_model` merge into the original checkpoint when the section is there."""
    stock = tuner_module.export_model
    if hasattr(stock, "kt_sft_stock"):
        return

    @functools.wraps(stock)
    def export_model(args: Any = None) -> Any:
        args = tuner_module.read_args(args)
        if not (isinstance(args, Mapping) and SECTION in args):
            return stock(args)
        from kt_sft.export import export_recipe

        return export_recipe(args)

    export_model.kt_sft_stock = stock  # type: ignore[attr-defined]
    tuner_module.export_model = export_model


HOOKS: Mapping[str, Callable[[Any], None]] = {
    "llamafactory.hparams.parser": hook_parser,
    "llamafactory.train.tuner": hook_tuner,
}


def _show_log() -> None:
    """Lets our messages through where LLaMA-Factory shows its own: on the first rank."""
    package = logging.getLogger("kt_sft")
    if package.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(levelname)s|%(asctime)s] %(name)s >> %(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING)


def _warn_of_spinning_threads() -> None:
    """Without an accelerator torch computes on the experts' cores, and its threads spin there."""
    import torch

    policy = os.environ.get("OMP_WAIT_POLICY", "").upper()
    if not torch.cuda.is_available() and policy != "PASSIVE" and torch.get_num_threads() > 1:
        logger.warning(
            "no accelerator, and OMP_WAIT_POLICY is %s: waiting OpenMP threads of torch spin on "
            "the cores that the experts need, which can slow a step down many times; "
            "start with OMP_WAIT_POLICY=PASSIVE, or with `kt-sft`, which sets it",
            policy or "not set",
        )


def _activate(section: Any) -> None:
    """Checks the section and makes every model that LLaMA-Factory loads a hybrid one."""
    from kt_sft.config import read_section

    settings = read_section(section, _recipe_dir())
    _show_log()
    _warn_of_spinning_threads()
    from llamafactory.model import patcher

    from kt_sft.integrations.trainer import register_metrics
    from kt_sft.integrations.transformers import HybridExpertsConfig

    register_metrics()
    stock = getattr(patcher.configure_quantization, "kt_sft_stock", patcher.configure_quantization)

    @functools.wraps(stock)
    def configure_quantization(
        config: Any, tokenizer: Any, model_args: Any, is_trainable: bool, init_kwargs: dict
    ) -> None:
        stock(config, tokenizer, model_args, is_trainable, init_kwargs)
        init_kwargs["quantization_config"] = HybridExpertsConfig(**settings.as_dict())

    configure_quantization.kt_sft_stock = stock  # type: ignore[attr-defined]
    patcher.configure_quantization = configure_quantization
