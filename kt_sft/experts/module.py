"""The module that takes the place of a model's stock routed experts."""

from __future__ import annotations

import copy
import weakref

import torch
from torch import Tensor, nn

from kt_sft.adapters.layer import HybridExpertsLinear, common_dropout
from kt_sft.adapters.state_dict import collect_expert_factors, spread_expert_factors
from kt_sft.engines.protocol import PlacedExperts
from kt_sft.errors import CheckpointError
from kt_sft.experts.ahead import run_ahead
from kt_sft.experts.function import LayerPass, run_layer
from kt_sft.experts.runtime import ExpertsRuntime
from kt_sft.families.calls import CALLS
from kt_sft.families.shape import ExpertsShape
from kt_sft.kernels import PROJECTIONS, Call, rows_within


class HybridExperts(nn.Module):
    """Routed experts with frozen, packed weights in host memory and LoRA on the model's device.

    The contract is that of Transformers: (hidden [T, D], top_k_index [T, K] int64, top_k_weights
    [T, K]) -> [T, D] in the dtype of hidden; an index equal to the number of experts is skipped.
    `call` names another one of families/calls.py.

    With LoRA the module has three children, gate_proj, up_proj and down_proj, so that PEFT finds
    them by the names that every other program uses. State dicts hold one pair of matrices per
    expert and projection: `<expert>.gate_proj.lora_A.<adapter>.weight`.
    """

    # Read by the load hook of the whole model, which must not import this module.
    holds_expert_factors = True

    def __init__(
        self,
        shape: ExpertsShape,
        runtime: ExpertsRuntime,
        path: str,
        parent: nn.Module,
        counts_tokens: bool,
        call: str = "routed",
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.runtime = runtime
        self.path = path
        self.counts_tokens = counts_tokens
        self.call = call
        self.top_k = top_k
        self.weights: PlacedExperts | None = None
        self._parent = weakref.ref(parent)
        if runtime.settings.expert_lora:
            for name in shape.projections:
                outputs, inputs = shape.of(name)
                layer = HybridExpertsLinear(
                    shape.experts,
                    inputs,
                    outputs,
                    self.adapter_device,
                    stays=self.adapters_stay,
                    shared=runtime.settings.expert_lora == "shared",
                )
                self.add_module(name, layer)
        self.register_state_dict_post_hook(spread_expert_factors)
        self.register_load_state_dict_pre_hook(collect_expert_factors)

    def __deepcopy__(self, memo: dict) -> HybridExperts:
        # A weak reference cannot be copied; the copy looks at the same parent, which tells the
        # same device, until it is attached elsewhere.
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__ = {
            k: v if k == "_parent" else copy.deepcopy(v, memo) for k, v in self.__dict__.items()
        }
        return copied

    def adapter_device(self) -> torch.device:
        """Where new LoRA parameters belong: with the router, whose output they follow, or here."""
        if self.runtime.adapters_on_host:
            return torch.device("cpu")
        parent = self._parent()
        own = {id(p) for p in self.parameters()}
        for parameter in parent.parameters() if parent is not None else ():
            if id(parameter) not in own and parameter.device.type != "meta":
                return parameter.device
        return torch.device("cpu")

    def train(self, mode: bool = True) -> HybridExperts:
        """As for any module; who swaps averaged weights in for an evaluation is noticed."""
        if mode != self.training and self.weights is not None:
            self.weights.forget_lora()
        return super().train(mode)

    def adapters_stay(self) -> bool:
        """Whether LoRA parameters are left on the host when the model moves."""
        return self.runtime.adapters_on_host

    def lora_layers(self) -> list[HybridExpertsLinear | None]:
        """The LoRA layers of gate, up and down; None where there is none."""
        return [getattr(self, name, None) for name in PROJECTIONS]

    def forward(self, hidden_states: Tensor, *arguments: Tensor) -> Tensor:
        """The weighted sum of each token's experts, called as the stock module is."""
        return CALLS[self.call](self, hidden_states, *arguments)

    def compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts, [T, D]."""
        if self.weights is None:
            raise CheckpointError(f"{self.path}: the expert weights were never loaded")
        if self.counts_tokens:  # once in a pass
            self.runtime.require_weights()
        layers = self.lora_layers()
        stacks = [layer.active_factors() if layer is not None else None for layer in layers]
        empty = hidden_states.new_empty(0)
        lora: list[Tensor] = []
        for stack in stacks:
            lora.extend((stack.a, stack.b) if stack else (empty, empty))
        dropout = common_dropout([s for s in stacks if s], self.path)
        learning = (hidden_states, top_k_weights, *lora)
        layout, compute = self.weights.layout, self.runtime.settings.compute
        layer = LayerPass(
            runtime=self.runtime,
            path=self.path,
            experts=self.weights,
            call=Call(
                compute=layout.arithmetic or compute,
                gate=self.shape.gate,
                dropout=dropout,
                # From torch's CPU generator, which checkpointing restores: recompute drops the
                # same.
                dropout_seed=int(torch.randint(2**62, ()).item()) if dropout > 0 else 0,
                max_rows=rows_within(layout, compute),
            ),
            scalings=tuple(s.scaling if s else None for s in stacks),
            counts_tokens=self.counts_tokens,
            keep=torch.is_grad_enabled() and any(t.requires_grad for t in learning),
        )
        # On the CPU there is nothing to do meanwhile.
        ahead = hidden_states.device.type != "cpu"
        return run_layer(
            layer,
            lambda: run_ahead(self) if ahead else None,
            hidden_states,
            top_k_index,
            top_k_weights,
            *lora,
        )

    def extra_repr(self) -> str:
        """For `print(model)`."""
        s = self.shape
        stored = self.runtime.settings.weights
        return (
            f"experts={s.experts}, hidden={s.hidden}, intermediate={s.intermediate}, "
            f"activation={s.gate.activation}, weights={stored}"
        )


def hybrid_experts_of(model: nn.Module) -> dict[str, HybridExperts]:
    """The hybrid experts of a model by module path; empty when there are none."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HybridExperts)}
