"""The register of patches: every function of another program that is replaced, and by what.

A row says where, why, what the stock function looked like when it was written, and what makes ours
of it. One mechanism installs, restores and lists them. Where a release has another signature, or no
such function, installing is a PatchError, or does what the row names as its fallback.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from kt_sft.errors import PatchError

_STOCK = "kt_sft_stock"


@dataclass(frozen=True)
class Patch:
    """One place in another program.

    place: module:name, or module:Class.name. signature: names of the stock function's parameters
    as in its definition, where `...` stands for whatever follows; "" for what is no function.
    make: module:function of ours, called with the stock one (and what `install` is given), whose
    result takes its place. since: the release that brought the place; fallback: what holds in those
    before it.
    instance: it is replaced on hybrid models only, by `install_on`, where `make` gets the model.
    """

    group: str
    place: str
    signature: str
    make: str
    why: str
    since: str = ""
    fallback: str = ""
    instance: bool = False

    @property
    def program(self) -> str:
        """The distribution that the place is in."""
        return self.place.partition(".")[0].partition(":")[0]


# Releases that the rows were tried with, oldest and newest; for LLaMA-Factory's next one, its
# functions' signatures.
TESTED = {
    "llamafactory": "0.9.5, and the signatures of 0.9.6.dev",
    "transformers": "5.6.0 to 5.24.0",
    "peft": "0.18.1 to 0.21.2",
    "sys": "Python 3.11",
}

_PLUGIN = "kt_sft.plugin.llamafactory"
_MODES = "kt_sft.plugin.modes"
_SAVING = "kt_sft.training.saving"
_INJECTION = "kt_sft.loading.peft_injection"
_FOLDERS = "kt_sft.loading.adapter_folders"
_CONVERSION = "peft.utils.transformers_weight_conversion"

PATCHES = (
    # LLaMA-Factory, once the module is imported.
    Patch("llamafactory.hparams.parser", "llamafactory.hparams.parser:_parse_args",
          "parser, args, allow_extra_keys", f"{_PLUGIN}:taking_the_section",
          "takes the section out of a recipe and acts on it"),
    Patch("llamafactory.train.tuner", "llamafactory.train.tuner:export_model",
          "args", f"{_PLUGIN}:exporting_hybrids",
          "merges into the original checkpoint where the recipe has the section"),
    Patch("llamafactory.launcher", "llamafactory.launcher:subprocess",
          "", f"{_PLUGIN}:passing_signals_on",
          "passes signals on to the ranks, which the stock launcher leaves running"),
    Patch("llamafactory.api.app", "llamafactory.api.app:create_app",
          "chat_model", f"{_PLUGIN}:guarding_hybrids",
          "refuses requests that a model cannot serve"),
    Patch("api", "llamafactory.chat.hf_engine:HuggingfaceEngine._process_args",
          "model, ...", "kt_sft.plugin.api_guard:guarded_arguments",
          "keeps an answer to the context, and ends it with its sender"),
    # LLaMA-Factory, while a recipe with the section is in force.
    Patch("section", "llamafactory.model.patcher:configure_quantization",
          "config, tokenizer, model_args, is_trainable, init_kwargs",
          f"{_PLUGIN}:loading_hybrids", "gives every model that is loaded our quantization config"),
    Patch("section", "llamafactory.hparams.parser:get_last_checkpoint",
          "folder", f"{_PLUGIN}:passing_over_damage", "resumes from the newest whole checkpoint"),
    Patch("section", "llamafactory.model.loader:load_config",
          "model_args", f"{_PLUGIN}:reading_configurations",
          "reads configurations by Transformers' own classes, never by a checkpoint's code"),
    Patch("section", "llamafactory.model.loader:init_adapter",
          "config, model, model_args, finetuning_args, is_trainable", f"{_MODES}:as_unquantized",
          "lets in what is refused for quantized models only"),
    Patch("section", "llamafactory.model.loader:count_parameters",
          "model", f"{_MODES}:with_packed_experts", "counts the packed experts"),
    Patch("section", "llamafactory.model.patcher:configure_attn_implementation",
          "config, model_args", f"{_MODES}:attending_with_sinks",
          "gives gpt-oss attention that is there, where stock imports what Transformers 5 lost"),
    Patch("section", "llamafactory.model.patcher:resize_embedding_layer",
          "model, ...", f"{_MODES}:resizing_as_unquantized",
          "resizes embeddings, which are not quantized"),
    # Transformers: loading.
    Patch("loading", "transformers.quantizers.auto:AutoHfQuantizer.merge_quantization_configs",
          "cls, quantization_config, quantization_config_from_args",
          "kt_sft.loading.config:merging_ours", "lets ours read a checkpoint of another quantizer"),
    Patch("model", "transformers.modeling_utils:PreTrainedModel.save_pretrained",
          "self, ...", "kt_sft.loading.swap:refusing_to_save",
          "would write a checkpoint without experts", instance=True),
    Patch("checkpointing",
          "transformers.modeling_utils:PreTrainedModel._set_gradient_checkpointing",
          "self, ...", "kt_sft.experts.recompute:keeping",
          "lets gradient checkpointing compute the experts once", instance=True),
    # Transformers: the Trainer, which has no hook around saving and resuming.
    Patch("trainer", "transformers.trainer:Trainer._save_checkpoint",
          "self, model, trial", f"{_SAVING}:staged_save", "writes into a staging folder"),
    Patch("trainer", "transformers.trainer_callback:CallbackHandler.on_save",
          "self, args, state, control, ...", f"{_SAVING}:publishing_on_save",
          "publishes a checkpoint when it has all its files"),
    Patch("trainer", "transformers.trainer:Trainer.train",
          "self, resume_from_checkpoint, ...", f"{_SAVING}:careful_train",
          "looks before it resumes, and ends with the status of a signal"),
    Patch("trainer", "transformers.trainer:Trainer._run_epoch",
          "self, ...", f"{_SAVING}:no_step_too_many",
          "trains nothing in a run that is resumed after its last step"),
    Patch("trainer", "transformers.trainer:DEFAULT_CALLBACKS",
          "", "kt_sft.training.callback:with_our_callbacks",
          "adds metrics and guard, before the trackers' callbacks"),
    # PEFT.
    Patch("peft", "peft.tuners.tuners_utils:BaseTuner.inject_adapter",
          "self, model, adapter_name, ...", f"{_INJECTION}:checked",
          "refuses what hybrid experts do not have, where PEFT attaches nothing and says nothing"),
    Patch("peft", "peft.tuners.tuners_utils:_get_tuner_state_dict_key_prefixes",
          "model, adapter_name", f"{_INJECTION}:with_expert_names",
          "names expert LoRA, which would not be saved",
          since="0.21", fallback="everything by the name of LoRA is saved"),
    Patch("peft", f"{_CONVERSION}:convert_peft_config_for_transformers",
          "peft_config, model, conversions", f"{_INJECTION}:without_config_conversion",
          "leaves the targets of hybrid models alone",
          since="0.19", fallback="nothing is converted"),
    Patch("peft", f"{_CONVERSION}:convert_peft_adapter_state_dict_for_transformers",
          "model, peft_config, adapter_state_dict, ...", f"{_INJECTION}:without_state_conversion",
          "leaves the adapters of hybrid models alone",
          since="0.19", fallback="nothing is converted"),
    Patch("peft", "peft.peft_model:PeftModel.save_pretrained",
          "self, save_directory, ...", f"{_FOLDERS}:with_identity",
          "puts what tells the base from others beside an adapter"),
    Patch("peft", "peft.peft_model:PeftModel.load_adapter",
          "self, model_id, adapter_name, ...", f"{_FOLDERS}:looking_at_the_base",
          "refuses an adapter of another base of the same shape, or in another program's form"),
    Patch("peft", "peft.tuners.tuners_utils:BaseTuner._unload_and_optionally_merge",
          "self, merge, ...", f"{_FOLDERS}:noting_merges",
          "notes which adapters are a part of the model, on which others are trained"),
    # Python.
    Patch("errors", "sys:excepthook", "", "kt_sft.plugin.section:one_message",
          "ends a command with our message, without a traceback"),
)  # fmt: skip


@dataclass(frozen=True)
class State:
    """A row and what there is of it here: installed, stock, or the problem or fallback."""

    patch: Patch
    text: str
    works: bool = True


def install(group: str, **given: Any) -> None:
    """Replaces the functions of a group.

    given: keyword arguments of `make`, with which ours are made anew; without any, a second call
    does nothing. Raises PatchError before anything of the group is changed.
    """
    rows = [row for row in PATCHES if row.group == group and not row.instance]
    if not rows:
        raise ValueError(f"patches: no group {group!r}")
    found = [(row, _found(row)) for row in rows]
    for row, place in found:
        if place is not None and (given or row.place not in _installed):
            _replace(row, *place, given)


def install_on(instance: Any, group: str, **given: Any) -> None:
    """The same on one object of a patched class, which stays as it is; again is no more.

    An object of another class, without the function, is left alone.
    """
    for row in PATCHES:
        if row.group != group or not row.instance:
            continue
        name = _name(row)
        there = hasattr(instance, name) and name not in vars(instance)
        if there and _found(row) is not None:
            setattr(instance, name, _maker(row)(instance, **given))


def restore(group: str) -> None:
    """Puts the stock functions of a group back, where their modules are imported."""
    for row in PATCHES:
        if row.group == group and not row.instance and row.place in _installed:
            _, (owner, name, value) = _installed.pop(row.place)
            setattr(owner, name, value)


def states() -> Iterator[State]:
    """Every row, with what there is of it in the installed releases. Imports their modules."""
    for row in PATCHES:
        if row.program != "sys" and _version(row.program) == "none":
            yield State(row, "not installed")
            continue
        try:
            place = _found(row)
        except Exception as error:  # a broken installation is what this is asked about
            yield State(row, f"{type(error).__name__}: {error}", works=False)
            continue
        if place is None:
            yield State(row, f"not needed: before {row.program} {row.since} {row.fallback}")
        elif row.instance:
            yield State(row, "of hybrid models")
        else:
            yield State(row, "installed" if row.place in _installed else "stock")


# (owner, name, stock value as it lies in the owner)
Place = tuple[Any, str, Any]
# Of what is installed: the module that it was installed in, and where.
_installed: dict[str, tuple[Any, Place]] = {}


def _name(row: Patch) -> str:
    return row.place.rpartition(":")[2].rpartition(".")[2]


def _found(row: Patch) -> Place | None:
    """A row's place, the stock one even where ours is installed; None for its fallback.

    Raises PatchError where the place is another one than the row was written for.
    """
    module, _, path = row.place.partition(":")
    *outer, name = path.split(".")
    if row.place in _installed:
        patched, place = _installed[row.place]
        if patched is sys.modules.get(module):
            return place
        del _installed[row.place]  # the module was imported anew
    try:
        owner: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not module.startswith(str(error.name)):
            raise  # something that the other program needs
        _require_place(row, error)
        return None
    try:
        for part in outer:
            owner = getattr(owner, part)
        value = inspect.getattr_static(owner, name)
    except AttributeError as error:
        _require_place(row, error)
        return None
    if row.signature:
        function = getattr(value, "__func__", value)
        got = _parameters(function) if callable(function) else type(value).__name__
        want = row.signature.removesuffix(", ...")
        if got != want and not (want != row.signature and got.startswith(f"{want}, ")):
            raise PatchError(_misfit(row, f"({got})"))
    return owner, name, value


def _require_place(row: Patch, error: Exception) -> None:
    """Raises PatchError, but for a release from before the place."""
    if not row.since or Version(_version(row.program)) >= Version(row.since):
        raise PatchError(_misfit(row, "no such place")) from error


def _parameters(function: Callable) -> str:
    marks: dict[Any, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    return ", ".join(
        f"{marks.get(p.kind, '')}{p.name}" for p in inspect.signature(function).parameters.values()
    )


def _misfit(row: Patch, got: str) -> str:
    without = ", or start with KT_SFT_DISABLE=1" if row.program == "llamafactory" else ""
    return (
        f"{row.place}: got {got}, expected ({row.signature}), which kt_sft replaces because it "
        f"{row.why}. Installed: {row.program} {_version(row.program)}; tested: "
        f"{TESTED[row.program]}. Install one of those{without}"
    )


def _version(program: str) -> str:
    try:
        return version(program)
    except PackageNotFoundError:
        return "none"


def _maker(row: Patch) -> Callable[..., Any]:
    module, _, name = row.make.partition(":")
    return getattr(importlib.import_module(module), name)


def _replace(row: Patch, owner: Any, name: str, value: Any, given: dict[str, Any]) -> None:
    kind = type(value) if isinstance(value, classmethod | staticmethod) else None
    stock = value.__func__ if kind else value
    ours = _maker(row)(stock, **given)
    if inspect.isfunction(ours):
        ours = functools.wraps(stock)(ours)
        setattr(ours, _STOCK, stock)
    module = sys.modules.get(row.place.partition(":")[0])
    _installed[row.place] = module, (owner, name, value)
    setattr(owner, name, kind(ours) if kind else ours)
