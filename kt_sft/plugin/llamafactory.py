"""LLaMA-Factory: the `kt_sft:` section of a recipe, for train, predict, chat, api and export."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kt_sft import patches
from kt_sft.plugin.launching import LauncherSubprocess
from kt_sft.plugin.modes import (
    adjusted,
    outline_of,
    refuse_other_loaders,
    refuse_unread_adapter,
    refuse_unsupported,
    warn_of_quantized_base,
)
from kt_sft.plugin.section import recipe_dir, show_errors_in_one_message, take_section
from kt_sft.training.savepoints import newest_valid, require_writable

if TYPE_CHECKING:
    from kt_sft.config import HybridExpertsSettings


logger = logging.getLogger(__name__)


def hook(module: str) -> None:
    """What the import hook calls after a module of LLaMA-Factory has been imported.

    Raises PatchError.
    """
    patches.install(module)


def taking_the_section(stock: Callable) -> Callable:
    """`_parse_args` that takes the section out of the recipe and acts on it."""

    def parse_args(parser: Any, args: Any = None, allow_extra_keys: bool = False) -> Any:
        from llamafactory.hparams.parser import read_args

        args = read_args(args)
        if isinstance(args, Mapping):
            show_errors_in_one_message()
            args, section = take_section(args)
            if section is None:
                patches.restore("section")
            else:
                settings = _activate(section, args)
                refuse_unsupported(args, settings)
                if args.get("do_train") and args.get("output_dir"):
                    require_writable(args["output_dir"])
                args = adjusted(args)
        return stock(parser, args, allow_extra_keys)

    return parse_args


def exporting_hybrids(stock: Callable) -> Callable:
    """`export_model` that merges into the original checkpoint when the section is there."""

    def export_model(args: Any = None) -> Any:
        from llamafactory.hparams import read_args

        args = read_args(args)
        if not isinstance(args, Mapping):
            return stock(args)
        show_errors_in_one_message()
        plain, section = take_section(args)
        if section is None:
            return stock(plain)
        from kt_sft.config import read_section
        from kt_sft.plugin.exporting import export_recipe

        return export_recipe(args, read_section(section, recipe_dir()))

    return export_model


def passing_signals_on(stock: Any) -> LauncherSubprocess:
    """The launcher's module `subprocess`."""
    return LauncherSubprocess()


def guarding_hybrids(stock: Callable) -> Callable:
    """`create_app` with a guard before it where it serves a hybrid model."""

    def create_app(chat_model: Any) -> Any:
        from kt_sft.experts import hybrid_experts_of
        from kt_sft.plugin.api_guard import ApiGuard, context_of

        app = stock(chat_model)
        engine = chat_model.engine
        model = getattr(engine, "model", None)
        if model is not None and engine.can_generate and hybrid_experts_of(model):
            patches.install("api")
            app.add_middleware(ApiGuard, tokenizer=engine.tokenizer, context=context_of(model))
        return app

    return create_app


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

    from kt_sft.machine.accelerator import has_accelerator

    policy = os.environ.get("OMP_WAIT_POLICY", "").upper()
    if not has_accelerator() and policy != "PASSIVE" and torch.get_num_threads() > 1:
        logger.warning(
            "no accelerator, and OMP_WAIT_POLICY is %s: waiting OpenMP threads of torch spin on "
            "the cores that the experts need, which can slow a step down many times; "
            "start with OMP_WAIT_POLICY=PASSIVE, or with `kt-sft`, which sets it",
            policy or "not set",
        )


def reading_configurations(stock: Callable, **given: Any) -> Callable:
    """`load_config` by Transformers' own class, `trust_remote_code` or not."""

    def load_config(model_args: Any) -> Any:
        from llamafactory.model.loader import _get_init_kwargs

        from kt_sft.checkpoint.configuration import read_config

        hub = _get_init_kwargs(model_args)  # which names a local folder where another hub is used
        del hub["trust_remote_code"]
        return read_config(model_args.model_name_or_path, **hub)

    return load_config


def passing_over_damage(stock: Callable, **given: Any) -> Callable:
    """`get_last_checkpoint` that knows which ones are whole."""
    return lambda folder: newest_valid(folder)


def loading_hybrids(
    stock: Callable, settings: HybridExpertsSettings, recipe: Mapping[str, Any]
) -> Callable:
    """`configure_quantization` that makes every model a hybrid one."""
    from kt_sft.loading import HybridExpertsConfig

    def configure_quantization(
        config: Any, tokenizer: Any, model_args: Any, is_trainable: bool, init_kwargs: dict
    ) -> None:
        refuse_other_loaders(model_args)
        # For a checkpoint that is quantized already it asks for the packages of that format,
        # which we do without.
        quantized = getattr(config, "quantization_config", None)
        if quantized and is_trainable:
            warn_of_quantized_base(config)
        if not quantized or model_args.quantization_bit is not None:
            plain = copy.copy(config)
            plain.quantization_config = None
            stock(plain, tokenizer, model_args, is_trainable, init_kwargs)
        # With `quantization_bit` this is what bitsandbytes makes of everything but the experts.
        rest = init_kwargs.get("quantization_config")
        ours = HybridExpertsConfig(**settings.as_dict(), rest=rest)
        # A reference or reward model only computes forwards.
        ours.outline = outline_of(recipe, config.model_type) if is_trainable else None
        if ours.outline is not None and settings.export_for:
            refuse_unread_adapter(settings, ours.outline, model_args.model_name_or_path)
        init_kwargs["quantization_config"] = ours

    return configure_quantization


def _activate(section: Any, recipe: Mapping[str, Any]) -> HybridExpertsSettings:
    """Checks the section and makes every model that LLaMA-Factory loads a hybrid one."""
    from kt_sft.config import read_section

    settings = read_section(section, recipe_dir())
    _show_log()
    _warn_of_spinning_threads()
    from kt_sft.training.callback import register

    register()
    patches.install("section", settings=settings, recipe=recipe)
    return settings
