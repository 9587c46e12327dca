"""PEFT: what it is asked to put into a hybrid model, looked at before and after it does so.

Every way to an adapter (get_peft_model, add_adapter, load_adapter) goes through
`BaseTuner.inject_adapter`. Asked for what hybrid experts do not have, PEFT attaches nothing and
says nothing, or lists the classes that it knows. From 0.19 on it also rewrites the targets of MoE
models into parameters of the stock experts, which are gone here, and from 0.21 on it saves only
what lies below a tuner's layer by its name: hybrid models are left alone by the first, and the
second is told of the names that expert LoRA has in a state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peft import LoraConfig, LoraModel, PeftType
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from kt_sft.adapters.layer import HybridExpertsLinear, variants_without_kernels
from kt_sft.adapters.names import expert_key
from kt_sft.errors import SettingsError
from kt_sft.experts import HybridExperts, hybrid_experts_of
from kt_sft.families.table import STOCK_EXPERT_NAMES
from kt_sft.planning.lora_targets import LoraTargets


def _projections(experts: Mapping[str, HybridExperts]) -> tuple[str, ...]:
    return next(iter(experts.values())).shape.projections


def _matched(tuner: Any, config: Any, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for key, module in model.named_modules():
        if key and tuner._check_target_module_exists(config, key):
            yield key, module


def _problems(
    tuner: Any, config: Any, model: nn.Module, experts: Mapping[str, HybridExperts]
) -> Iterator[str]:
    method = getattr(config.peft_type, "value", config.peft_type)
    instead = f"write target_modules: {', '.join(_projections(experts))}"
    for target in getattr(config, "target_parameters", None) or ():
        owner, _, name = target.rpartition(".")
        of_experts = owner and any(f".{path}".endswith(f".{owner}") for path in experts)
        if of_experts or name in STOCK_EXPERT_NAMES:
            yield f"target_parameters: {target}: packed experts have no such parameter; {instead}"
    matched = list(_matched(tuner, config, model))
    targets = getattr(config, "target_modules", None)
    names = {targets} if isinstance(targets, str) else set(targets or ())
    for name in sorted(n for n in names if n.rpartition(".")[2] in STOCK_EXPERT_NAMES):
        if not any(key == name or key.endswith(f".{name}") for key, _ in matched):
            yield f"target_modules: {name}: no module of a hybrid model has that name; {instead}"
    if any(isinstance(module, HybridExpertsLinear) for _, module in matched):
        if method == "LORA":
            yield from variants_without_kernels(vars(config))
        else:
            yield (
                f"{method}: routed experts take LoRA only; set peft_type LORA, or name only "
                "layers beside the experts"
            )
    blocks = {path.rpartition(".")[0] for path in experts}
    routers = {
        key.rpartition(".")[2]: key
        for key, module in reversed(matched)
        if key.rpartition(".")[0] in blocks and _is_router(module)
    }
    for name, key in sorted(routers.items()):
        yield (
            f"target_modules: {key} is a router, which PEFT has no {method} for; train it in "
            f"full by modules_to_save: {name} (additional_target in a recipe)"
        )


def _refuse(problems: Iterator[str]) -> None:
    listed = "\n".join(f"  - {p}" for p in problems)
    if listed:
        raise SettingsError(f"the adapter does not go with hybrid experts:\n{listed}")


def refuse_targets(model: nn.Module, targets: LoraTargets, rank: int) -> None:
    """Raises SettingsError for LoRA that a hybrid model without weights could not be given.

    The same as is said where the adapter is made, hours of packing earlier.
    """
    if not targets.everything and not targets.anywhere:
        config = LoraConfig(r=rank, target_modules=sorted(targets.names))
        _refuse(_problems(LoraModel, config, model, hybrid_experts_of(model)))


def _is_router(module: nn.Module) -> bool:
    """A module of its own kind that holds the router's matrix; a Linear takes LoRA."""
    own = dict(module.named_parameters(recurse=False))
    return not isinstance(module, nn.Linear) and "weight" in own


def _has_adapter(module: nn.Module) -> bool:
    if isinstance(module, HybridExpertsLinear):
        return bool(module.lora_A)
    return isinstance(module, BaseTunerLayer)


def checked(stock: Callable) -> Callable:
    """`inject_adapter` that refuses what hybrid experts cannot be given, before and after."""

    def inject_adapter(
        self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        experts = hybrid_experts_of(model)
        if not experts:
            return stock(self, model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if getattr(config, "target_modules", None) == "all-linear":
            # By the names of all Linear layers, of which the experts' may or may not be some.
            resolved: Any = tuners_utils._maybe_include_all_linear_layers(config, model)
            named = resolved.target_modules
            lora = config.peft_type == PeftType.LORA
            config.target_modules = {*named, *(_projections(experts) if lora else ())}
        _refuse(_problems(self, config, model, experts))
        asked = [
            (key, module)
            for key, module in _matched(self, config, model)
            if isinstance(module, HybridExpertsLinear)
        ]
        if not any(_has_adapter(m) for m in model.modules()):
            # From 0.21 on PEFT takes our empty layers for an earlier adapter, and what trains then
            # for what is to go on training; without one it freezes everything.
            model.requires_grad_(False)
        done = stock(self, model, adapter_name, *args, **kwargs)
        without = [key for key, module in asked if adapter_name not in module.lora_A]
        if without:
            raise SettingsError(
                f"target_modules name {len(asked)} projections of routed experts, and "
                f"{len(without)} of them got no LoRA, the first {without[0]}; this release of PEFT "
                "is not one that kt_sft was tested with"
            )
        return done

    return inject_adapter


def with_expert_names(stock: Callable) -> Callable:
    """The prefixes of an adapter's keys, and those of expert LoRA: `<experts>.<e>.<projection>`."""

    def prefixes_of(model: nn.Module, adapter_name: str | None = None) -> set[str]:
        found = stock(model, adapter_name)
        for path, experts in hybrid_experts_of(model).items():
            path = path.removeprefix("_fsdp_wrapped_module.")
            for expert in range(experts.shape.experts):
                if adapter_name is None:
                    found.add(f"{path}.{expert}")
                    continue
                for projection in experts.shape.projections:
                    for factor in ("lora_A", "lora_B"):
                        key = expert_key(expert, projection, factor, adapter_name)
                        found.add(f"{path}.{key.removesuffix('.weight')}")
        return found

    return prefixes_of


def _unless_hybrid(stock: Callable, model_of: Callable, unchanged: Callable) -> Callable:
    """A conversion that leaves what it is given as it is where the model is hybrid."""

    def convert(*args: Any, **kwargs: Any) -> Any:
        if hybrid_experts_of(model_of(*args, **kwargs)):
            return unchanged(*args, **kwargs)
        return stock(*args, **kwargs)

    return convert


def without_config_conversion(stock: Callable) -> Callable:
    """`convert_peft_config_for_transformers` that lets a hybrid model's targets be."""
    return _unless_hybrid(
        stock,
        lambda peft_config, model, conversions: model,
        lambda peft_config, model, conversions: None,
    )


def without_state_conversion(stock: Callable) -> Callable:
    """`convert_peft_adapter_state_dict_for_transformers` that lets a hybrid model's adapter be."""
    return _unless_hybrid(
        stock,
        lambda model, peft_config, adapter_state_dict, adapter_name="default": model,
        lambda model, peft_config, adapter_state_dict, adapter_name="default": adapter_state_dict,
    )
