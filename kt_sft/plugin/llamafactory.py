"""LLaMA-Factory: the `kt_sft:` section of a recipe, for train, predict, chat, api and export."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kt_sft.plugin.launching import LauncherSubprocess
from kt_sft.plugin.modes import (
    adjusted,
    as_unquantized,
    outline_of,
    refuse_other_loaders,
    refuse_unsupported,
    resizing_as_unquantized,
    warn_of_quantized_base,
    with_packed_experts,
)
from kt_sft.plugin.section import recipe_dir, show_errors_in_one_message, take_section
from kt_sft.training.savepoints import newest_valid, require_writable

if TYPE_CHECKING:
    from kt_sft.config import HybridExpertsSettings


logger = logging.getLogger(__name__)


def hook_parser(parser_module: Any) -> None:
    """Makes `_parse_args` take the section out of the recipe and act on it. Idempotent."""
    stock = parser_module._parse_args
    if hasattr(stock, "kt_sft_stock"):
        return

    @functools.wraps(stock)
    def parse_args(parser: Any, args: Any = None, allow_extra_keys: bool = False) -> Any:
        args = parser_module.read_args(args)
        if isinstance(args, Mapping):
            show_errors_in_one_message()
            args, section = take_section(args)
            if section is None:
                _deactivate()
            else:
                settings = _activate(section, args)
                refuse_unsupported(args, settings)
                if args.get("do_train") and args.get("output_dir"):
                    require_writable(args["output_dir"])
                args = adjusted(args)
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
        if not isinstance(args, Mapping):
            return stock(args)
        show_errors_in_one_message()
        plain, section = take_section(args)
        if section is None:
            return stock(plain)
        from kt_sft.plugin.exporting import export_recipe

        return export_recipe(args)

    export_model.kt_sft_stock = stock  # type: ignore[attr-defined]
    tuner_module.export_model = export_model


def hook_launcher(launcher_module: Any) -> None:
    """Makes `llamafactory-cli train` pass signals on to the ranks that it starts."""
    if not isinstance(launcher_module.subprocess, LauncherSubprocess):
        launcher_module.subprocess = LauncherSubprocess()


def hook_api(api_module: Any) -> None:
    """Puts a guard before the API where it serves a hybrid model. Idempotent."""
    stock = api_module.create_app
    if hasattr(stock, "kt_sft_stock"):
        return

    @functools.wraps(stock)
    def create_app(chat_model: Any) -> Any:
        from kt_sft.experts import hybrid_experts_of
        from kt_sft.plugin.api_guard import ApiGuard, context_of, guarded_arguments

        app = stock(chat_model)
        engine = chat_model.engine
        model = getattr(engine, "model", None)
        if model is not None and engine.can_generate and hybrid_experts_of(model):
            if not hasattr(engine._process_args, "kt_sft_stock"):
                type(engine)._process_args = staticmethod(guarded_arguments(engine._process_args))
            app.add_middleware(ApiGuard, tokenizer=engine.tokenizer, context=context_of(model))
        return app

    create_app.kt_sft_stock = stock  # type: ignore[attr-defined]
    api_module.create_app = create_app


HOOKS: Mapping[str, Callable[[Any], None]] = {
    "llamafactory.api.app": hook_api,
    "llamafactory.launcher": hook_launcher,
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


# Functions of LLaMA-Factory that are ours while a recipe with the section is in force.
_SWAPPED = (
    ("llamafactory.model.patcher", "configure_quantization"),
    ("llamafactory.hparams.parser", "get_last_checkpoint"),
    ("llamafactory.model.loader", "load_config"),
    ("llamafactory.model.loader", "init_adapter"),
    ("llamafactory.model.loader", "count_parameters"),
    ("llamafactory.model.patcher", "resize_embedding_layer"),
)


def _swap(place: tuple[str, str], make: Callable[[Callable], Callable]) -> None:
    """Replaces a function by what `make` makes of the stock one."""
    module, name = sys.modules[place[0]], place[1]
    known = getattr(module, name)
    stock = getattr(known, "kt_sft_stock", known)
    ours = functools.wraps(stock)(make(stock))
    ours.kt_sft_stock = stock  # type: ignore[attr-defined]
    setattr(module, name, ours)


def _deactivate() -> None:
    """Undoes `_activate` for a later recipe of the same process that has no section."""
    for module_name, name in _SWAPPED:
        module = sys.modules.get(module_name)
        stock = getattr(getattr(module, name, None), "kt_sft_stock", None)
        if stock is not None:
            setattr(module, name, stock)


def _load_config(model_args: Any) -> Any:
    """The configuration by Transformers' own class, `trust_remote_code` or not."""
    from llamafactory.model.loader import _get_init_kwargs

    from kt_sft.checkpoint.configuration import read_config

    hub = _get_init_kwargs(model_args)  # which names a local folder where another hub is used
    del hub["trust_remote_code"]
    return read_config(model_args.model_name_or_path, **hub)


def _activate(section: Any, recipe: Mapping[str, Any]) -> HybridExpertsSettings:
    """Checks the section and makes every model that LLaMA-Factory loads a hybrid one."""
    from kt_sft.config import read_section

    settings = read_section(section, recipe_dir())
    _show_log()
    _warn_of_spinning_threads()
    import llamafactory.model  # noqa: F401  where functions of _SWAPPED live

    from kt_sft.loading.config import HybridExpertsConfig
    from kt_sft.training.callback import register

    register()

    def hybrid_configuration(stock: Callable) -> Callable:
        def configure_quantization(
            config: Any, tokenizer: Any, model_args: Any, is_trainable: bool, init_kwargs: dict
        ) -> None:
            refuse_other_loaders(model_args)
            # For a checkpoint that is quantized already it asks for the packages of that format,
            # which we do without.
            if not getattr(config, "quantization_config", None):
                stock(config, tokenizer, model_args, is_trainable, init_kwargs)
            elif is_trainable:
                warn_of_quantized_base(config)
            ours = HybridExpertsConfig(**settings.as_dict())
            # A reference or reward model only computes forwards.
            ours.outline = outline_of(recipe, config.model_type) if is_trainable else None
            init_kwargs["quantization_config"] = ours

        return configure_quantization

    makers = (
        hybrid_configuration,
        lambda stock: lambda folder: newest_valid(folder),
        lambda stock: _load_config,
        as_unquantized,
        with_packed_experts,
        resizing_as_unquantized,
    )
    for place, make in zip(_SWAPPED, makers, strict=True):
        _swap(place, make)
    return settings
