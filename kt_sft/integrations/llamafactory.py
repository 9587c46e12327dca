"""LLaMA-Factory: the `kt_sft:` section of a recipe, for train, predict, chat, api and export."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_sft.checkpoints import newest_valid, require_writable
from kt_sft.errors import KtSftError, SettingsError
from kt_sft.integrations.launching import LauncherSubprocess
from kt_sft.integrations.llamafactory_modes import (
    adjusted,
    as_unquantized,
    outline_of,
    refuse_unsupported,
    resizing_as_unquantized,
    warn_of_quantized_base,
    with_packed_experts,
)

if TYPE_CHECKING:
    from kt_sft.config import HybridExpertsSettings

SECTION = "kt_sft"

logger = logging.getLogger(__name__)


def take_section(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The recipe without the section, in a copy, and the section; None where it is off.

    Off are a recipe without it, null and false; true means every default. Raises SettingsError for
    a section under another name, which LLaMA-Factory would only call an unknown key.
    """
    for key in map(str, recipe):
        plain = re.sub(r"[^a-z]", "", key.lower())
        if key != SECTION and (plain == "ktsft" or get_close_matches(key, [SECTION], cutoff=0.8)):
            raise SettingsError(f"{key}: unknown key of the recipe; did you mean {SECTION}?")
    section = recipe.get(SECTION)
    rest = {k: v for k, v in recipe.items() if k != SECTION}
    return rest, None if section is None or section is False else section


# Programs that a person runs, and what torchrun starts for them.
_COMMANDS = ("llamafactory-cli", "lmf", "launcher.py", "cli.py", "kt-sft")


def show_errors_in_one_message() -> None:
    """Lets our errors end a command without a traceback; KT_SFT_TRACEBACK=1 shows it. Idempotent.

    In other programs an uncaught error is theirs to show.
    """
    stock = sys.excepthook
    if Path(sys.argv[0]).name not in _COMMANDS or hasattr(stock, "kt_sft_stock"):
        return

    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, KtSftError) and not os.environ.get("KT_SFT_TRACEBACK"):
            sys.stderr.write(f"{error}\n")
        else:
            stock(kind, error, trace)

    show.kt_sft_stock = stock  # type: ignore[attr-defined]
    sys.excepthook = show


def _recipe_dir() -> Path | None:
    """The folder of the recipe named on the command line."""
    if len(sys.argv) > 1 and sys.argv[1].endswith((".yaml", ".yml")):
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
        return stock(plain) if section is None else _export(args)

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
        from kt_sft.integrations.api_guard import ApiGuard, context_of, guarded_arguments

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


# Settings of LLaMA-Factory that load the model in another way, past our quantization config.
_OTHER_LOADERS = ("quantization_bit", "use_unsloth", "train_from_scratch", "mixture_of_depths")


def _refuse_other_loaders(model_args: Any) -> None:
    wrong = [name for name in _OTHER_LOADERS if getattr(model_args, name, None)]
    if wrong:
        raise SettingsError(
            "kt_sft: the section does not go together with\n"
            + "\n".join(f"  - {name}: {getattr(model_args, name)}" for name in wrong)
            + "\nRemove these settings, or the section."
        )


def _export(recipe: Mapping[str, Any]) -> Path:
    """Merges the adapter of an export recipe into the original checkpoint."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_infer_args
    from llamafactory.model import load_tokenizer

    from kt_sft.export import export_merged

    model_args, data_args, finetuning_args, _ = get_infer_args(dict(recipe))
    _refuse_other_loaders(model_args)
    problems = []
    if model_args.export_dir is None:
        problems.append("export_dir: is missing")
    for name in ("export_quantization_bit", "export_hub_model_id"):
        if getattr(model_args, name) is not None:
            problems.append(f"{name}: is not supported with hybrid experts")
    adapters = model_args.adapter_name_or_path or []
    if len(adapters) > 1:
        problems.append(f"adapter_name_or_path: got {len(adapters)} adapters, expected one")
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
    out = export_merged(base, adapters[0] if adapters else None, model_args.export_dir)
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
        _copy_value_head(Path(adapters[0]) if adapters else base, out)
    logger.info("exported to %s", out)
    return out


def _vocabulary_size(folder: Path) -> int:
    """As config.json says."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int((config.get("text_config") or config).get("vocab_size") or 0)


def _copy_value_head(source: Path, out: Path) -> None:
    """The head of a reward model, which is saved beside its adapter."""
    found = [source / n for n in ("value_head.safetensors", "value_head.bin")]
    head = next((f for f in found if f.is_file()), None)
    if head is None:
        logger.warning("%s has no value head; the exported model has none either", source)
    else:
        shutil.copy(head, out / head.name)


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

    from kt_sft.integrations.configuration import read_config

    hub = _get_init_kwargs(model_args)  # which names a local folder where another hub is used
    del hub["trust_remote_code"]
    return read_config(model_args.model_name_or_path, **hub)


def _activate(section: Any, recipe: Mapping[str, Any]) -> HybridExpertsSettings:
    """Checks the section and makes every model that LLaMA-Factory loads a hybrid one."""
    from kt_sft.config import read_section

    settings = read_section(section, _recipe_dir())
    _show_log()
    _warn_of_spinning_threads()
    import llamafactory.model  # noqa: F401  where functions of _SWAPPED live

    from kt_sft.integrations.trainer import register
    from kt_sft.integrations.transformers import HybridExpertsConfig

    register()

    def hybrid_configuration(stock: Callable) -> Callable:
        def configure_quantization(
            config: Any, tokenizer: Any, model_args: Any, is_trainable: bool, init_kwargs: dict
        ) -> None:
            _refuse_other_loaders(model_args)
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
