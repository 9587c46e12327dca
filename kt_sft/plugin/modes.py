"""Which of LLaMA-Factory's ways of fine-tuning go with hybrid experts, and how they are let in."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kt_sft.checkpoint.published import own_quantization
from kt_sft.errors import SettingsError
from kt_sft.planning.lora_targets import LoraTargets

if TYPE_CHECKING:
    from kt_sft.config import HybridExpertsSettings
    from kt_sft.planning.outline import TrainingOutline

logger = logging.getLogger(__name__)

_FROZEN = (
    "the routed experts' weights are frozen, packed in host memory and shared. Possible are "
    "finetuning_type: lora on every layer, experts included, and training the router, the "
    "embeddings or the head in full by additional_target: gate,embed_tokens,lm_head"
)
# (setting, values that are refused, whether only LoRA on the experts stands against it, reason)
_REFUSED: tuple[tuple[str, tuple[Any, ...], bool, str], ...] = (
    ("finetuning_type", ("full", "freeze"), False, _FROZEN),
    (
        "finetuning_type",
        ("oft",),
        True,
        "the kernels compute LoRA on the experts; set expert_lora: false to train OFT on the rest",
    ),
    (
        "use_dora",
        (True,),
        True,
        "DoRA scales by the norms of W + BA for every output channel, and its gradient needs them "
        "at each step from the packed experts; set expert_lora: false to train DoRA on the rest",
    ),
    (
        "pissa_init",
        (True,),
        True,
        "PiSSA moves the principal part of W into the adapter, which changes W, and the packed "
        "experts are frozen; set expert_lora: false to train PiSSA on the rest",
    ),
    (
        "use_muon",
        (True,),
        True,
        "LLaMA-Factory hands Muon matrices and everything else to AdamW, the stacked factors of "
        "the experts included; leave use_muon out, or set expert_lora: false to use it on the rest",
    ),
)
# Parts of a model of several parts that get no adapter -> (the recipe's setting, its default).
_FROZEN_PARTS = {
    "vision_model_keys": ("freeze_vision_tower", True),
    "projector_keys": ("freeze_multi_modal_projector", True),
    "language_model_keys": ("freeze_language_model", False),
}


def _names(value: Any) -> list[str]:
    """A recipe's list, written as one or with commas."""
    parts = value.split(",") if isinstance(value, str) else value or []
    return [str(part).strip() for part in parts]


def _targets(recipe: Mapping[str, Any], model_type: str = "") -> LoraTargets:
    """As LLaMA-Factory's `patch_target_modules` settles them for a type of model; for plans also
    where it is not installed, then without its list of models of several parts."""
    names = frozenset(_names(recipe.get("lora_target", "all")))
    try:
        from llamafactory.model.model_utils.visual import COMPOSITE_MODELS
    except ImportError:
        return LoraTargets(names)
    composite = COMPOSITE_MODELS.get(model_type)
    if composite is None:
        return LoraTargets(names)
    frozen = {
        part
        for keys, (setting, default) in _FROZEN_PARTS.items()
        if recipe.get(setting, default)
        for part in getattr(composite, keys)
    }
    return LoraTargets(names, frozenset({*frozen, *composite.lora_conflict_keys}), anywhere=True)


def changes_embeddings(recipe: Mapping[str, Any]) -> str:
    """The settings by which a training changes the table of input embeddings; empty without."""
    changed = [n for n in ("add_tokens", "add_special_tokens", "resize_vocab") if recipe.get(n)]
    trained = "embed_tokens" in _names(recipe.get("additional_target"))
    return ", ".join(changed) or ("additional_target: embed_tokens" if trained else "")


def refuse_unsupported(recipe: Mapping[str, Any], settings: HybridExpertsSettings) -> None:
    """Raises SettingsError that lists what cannot train, before any weight is read."""
    if recipe.get("use_kt") or os.environ.get("USE_KT", "0").lower() in ("1", "true", "y", "yes"):
        raise SettingsError(
            "use_kt: is LLaMA-Factory's own way to other kernels, which needs forks of "
            "Transformers and Accelerate and does not go together with the kt_sft section; remove "
            "use_kt and the kt_... settings, and the environment variable USE_KT"
        )
    if not recipe.get("do_train"):
        return
    changed = changes_embeddings(recipe)
    if settings.embeddings == "host" and changed:
        raise SettingsError(
            f"embeddings: got host with {changed}, expected device; a table on the host is frozen"
        )
    on_experts = bool(settings.expert_lora) and _targets(recipe).may_mean_experts()
    problems = [
        f"{name}: {recipe[name] if not isinstance(recipe[name], bool) else 'true'}: {reason}"
        for name, values, for_experts, reason in _REFUSED
        if recipe.get(name) in values and (on_experts or not for_experts)
    ]
    if problems:
        raise SettingsError(
            "kt_sft: not possible with hybrid experts\n" + "\n".join(f"  - {p}" for p in problems)
        )


# Stages that run two answers to a prompt through the model at once.
_PAIRED = ("rm", "dpo", "kto")


# Models with experts for which LLaMA-Factory 0.9.5 knows Liger's loss; others go on without.
_FUSED_LOSS = ("mixtral", "qwen3_moe", "qwen3_next", "gpt_oss")


def outline_of(recipe: Mapping[str, Any], model_type: str = "") -> TrainingOutline | None:
    """What the memory plan needs to know, with LLaMA-Factory's defaults; None without training."""
    if not recipe.get("do_train"):
        return None
    from kt_sft.planning.outline import TrainingOutline

    sequences = int(recipe.get("per_device_train_batch_size", 8))
    if recipe.get("stage", "sft") in _PAIRED:
        sequences *= 2
    return TrainingOutline(
        tokens=sequences * int(recipe.get("cutoff_len", 2048)),
        rank=int(recipe.get("lora_rank", 8)),
        targets=_targets(recipe, model_type),
        trained=frozenset(_names(recipe.get("additional_target"))),
        checkpointing=not recipe.get("disable_gradient_checkpointing"),
        on_host=bool(recipe.get("use_cpu")),
        frozen_models=bool(recipe.get("ref_model")) + (recipe.get("reward_model_type") == "full"),
        accumulates=int(recipe.get("gradient_accumulation_steps", 1)) > 1,
        offloads=bool(recipe.get("use_unsloth_gc")),
        fused_loss=bool(recipe.get("enable_liger_kernel")) and model_type in _FUSED_LOSS,
        one_kind=bool(recipe.get("deepspeed") or recipe.get("fsdp")),
        length=int(recipe.get("cutoff_len", 2048)),
        eager=_eager(recipe, model_type),
        references=int(_asks_a_reference(recipe)),
    )


def _eager(recipe: Mapping[str, Any], model_type: str) -> bool:
    """Whether attention makes a matrix of all pairs of tokens."""
    wanted = recipe.get("flash_attn", "auto")
    return wanted == "disabled" or (model_type == "gpt_oss" and wanted != "fa3")


# Losses of DPO that compare with nothing.
_WITHOUT_REFERENCE = ("orpo", "simpo")


def _asks_a_reference(recipe: Mapping[str, Any]) -> bool:
    """Whether each micro batch goes through the base, or a reference model, too."""
    stage = recipe.get("stage", "sft")
    return stage == "kto" or (
        stage == "dpo" and recipe.get("pref_loss", "sigmoid") not in _WITHOUT_REFERENCE
    )


def refuse_unread_adapter(
    settings: HybridExpertsSettings, outline: TrainingOutline, base: str
) -> None:
    """Raises SettingsError for what the programs of `export_for` could not read, before training.

    A base that is not on the disk yet is only looked at when the adapter is exported.
    """
    from kt_sft.export.planned import PlannedAdapter, local_base, refuse_unread

    opened = local_base(base)
    if opened is None:
        logger.warning("export_for: %s is no folder here, so that export will look", base)
        return
    planned = PlannedAdapter(
        opened,
        outline.rank,
        outline.targets.means,
        outline.trained,
        expert_lora=bool(settings.expert_lora),
    )
    refuse_unread(planned, settings.export_for)


def warn_of_quantized_base(config: Any) -> None:
    """Of what a training on such a base ends with, before it begins."""
    method = own_quantization(getattr(config, "quantization_config", None)).get("quant_method")
    if method is not None:
        logger.warning(
            "the base is quantized (%s), and a merged model would be quantized twice: serve the "
            "adapter beside the base, merge it into the bf16 checkpoint of the model, or write the "
            "base in bf16, `kt-sft export ADAPTER --to merged --dequantize`",
            getattr(method, "value", method),
        )


def adjusted(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what would silently train something else put right, and said."""
    changed = dict(recipe)
    checkpointing = recipe.get("do_train") and not recipe.get("disable_gradient_checkpointing")
    reentrant = recipe.get("use_reentrant_gc", True)
    if recipe.get("moe_aux_loss_coef") and checkpointing and reentrant:
        # Router outputs of a reentrant checkpoint carry no gradient.
        changed["use_reentrant_gc"] = False
        logger.warning(
            "moe_aux_loss_coef: under reentrant gradient checkpointing the auxiliary loss has no "
            "gradient; use_reentrant_gc is set to false"
        )
    adapters = _names(recipe.get("adapter_name_or_path"))
    if recipe.get("do_train") and (
        len(adapters) > 1 or (adapters and recipe.get("create_new_adapter"))
    ):
        logger.warning(
            "this adapter is trained on top of others: keep all of them, and load and export them "
            "together, in this order, or continue the last one (create_new_adapter: false)"
        )
    return changed


@contextmanager
def _unquantized(model: Any) -> Iterator[None]:
    method = model.quantization_method
    model.quantization_method = None
    try:
        yield
    finally:
        model.quantization_method = method


def as_unquantized(stock: Callable, **given: Any) -> Callable:
    """`init_adapter` that treats a hybrid model as an ordinary one where that is what it can do.

    For quantized models LLaMA-Factory takes one adapter, ignores `create_new_adapter`, and refuses
    DoRA and PiSSA. Here the layers beside the experts are not quantized, and expert LoRA can be
    merged.
    """

    def init_adapter(
        config: Any, model: Any, model_args: Any, finetuning_args: Any, is_trainable: bool
    ) -> Any:
        adapters = model_args.adapter_name_or_path or []
        merges = len(adapters) > 1 or (
            bool(adapters) and is_trainable and finetuning_args.create_new_adapter
        )
        if not (merges or finetuning_args.use_dora or finetuning_args.pissa_init):
            return stock(config, model, model_args, finetuning_args, is_trainable)
        with _unquantized(model):
            return stock(config, model, model_args, finetuning_args, is_trainable)

    return init_adapter


_FROM_HUB = "kernels-community/vllm-flash-attn3"


def attending_with_sinks(stock: Callable, **given: Any) -> Callable:
    """`configure_attn_implementation` that leaves gpt-oss to us.

    Its attention has sinks. LLaMA-Factory 0.9.5 always fetches a kernel for Hopper from the Hub, by
    a function that Transformers 5 lacks. `flash_attn: fa3` does so by Transformers' own way;
    everything else is computed by Transformers' eager attention, which has sinks everywhere.
    """

    def configure_attn_implementation(config: Any, model_args: Any) -> None:
        if getattr(config, "model_type", None) != "gpt_oss":
            stock(config, model_args)
            return
        wanted = getattr(model_args.flash_attn, "value", model_args.flash_attn)
        config._attn_implementation = _FROM_HUB if wanted == "fa3" else "eager"
        logger.info("gpt-oss: attention by %s", config._attn_implementation)

    return configure_attn_implementation


def with_packed_experts(stock: Callable, **given: Any) -> Callable:
    """`count_parameters` whose total holds the packed experts, which are no parameters."""

    def count_parameters(model: Any) -> tuple[int, int]:
        from kt_sft.training.trained import packed_weights

        trainable, total = stock(model)
        return trainable, total + packed_weights(model)

    return count_parameters


def resizing_as_unquantized(stock: Callable, **given: Any) -> Callable:
    """`resize_embedding_layer` for hybrid models, whose embeddings are not quantized."""

    def resize_embedding_layer(model: Any, *args: Any, **kwargs: Any) -> None:
        with _unquantized(model):
            stock(model, *args, **kwargs)

    return resize_embedding_layer


# Settings of LLaMA-Factory that load the model in another way, past our quantization config.
_OTHER_LOADERS = ("use_unsloth", "train_from_scratch", "mixture_of_depths")


def refuse_other_loaders(model_args: Any) -> None:
    """Raises SettingsError that names each of them that is set."""
    wrong = {name: value for name in _OTHER_LOADERS if (value := getattr(model_args, name, None))}
    method = getattr(model_args, "quantization_method", "bnb")
    if getattr(model_args, "quantization_bit", None) and method != "bnb":
        wrong["quantization_method"] = f"{method}, expected bnb"
    if wrong:
        raise SettingsError(
            "kt_sft: the section does not go together with\n"
            + "\n".join(f"  - {name}: {value}" for name, value in wrong.items())
            + "\nRemove these settings, or the section."
        )
