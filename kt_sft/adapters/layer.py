"""LoRA over all experts of one projection, as a layer that stock PEFT creates and switches.

The frozen weights are packed and shared, so merging an adapter does not touch them: its factors
stay beside them as a frozen low-rank part that no switch turns off.

For a module that already is a `LoraLayer`, PEFT calls `update_layer` instead of replacing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from kt_sft.adapters.names import scaling
from kt_sft.errors import SettingsError
from kt_sft.kernels.block import MAX_RANK

_PLAIN = "the kernels compute plain LoRA"
# Settings of LoraConfig that ask for another LoRA than W + BA, of any release.
_VARIANTS = {
    "use_dora": "DoRA needs the norms of the frozen experts' weights",
    "lora_bias": "experts have no bias to train",
    **dict.fromkeys(
        (
            "use_qalora", "use_bdlora", "arrow_config", "alora_invocation_tokens", "kasa_config",
            "velora_config", "monteclora_config",
        ),
        _PLAIN,
    ),
}  # fmt: skip


def variants_without_kernels(settings: Mapping[str, Any]) -> list[str]:
    """The settings of a LoraConfig that routed experts cannot follow, each with the reason."""
    return [f"{name}: {why}" for name, why in _VARIANTS.items() if settings.get(name)]


@dataclass(frozen=True)
class ActiveFactors:
    """The LoRA in force: a [E, r, inputs], b [E, outputs, r], or [1, ...] for one shared pair.

    dropout is 0 in evaluation.
    """

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float


def _follows() -> bool:
    return False


class HybridExpertsLinear(nn.Module, LoraLayer):
    """One projection of all experts: no weight of its own, LoRA A [E, r, in] and B [E, out, r].

    With `shared` the factors are [1, r, in] and [1, out, r], used by every expert.

    The class name holds "Linear" because LLaMA-Factory's `lora_target: all` looks for it.
    """

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")

    def __init__(
        self,
        experts: int,
        inputs: int,
        outputs: int,
        device: Callable[[], torch.device],
        shared: bool = False,
        stays: Callable[[], bool] | None = None,
    ) -> None:
        """device: where new factors belong. stays: whether they are left there by `.to()`."""
        # LoraLayer.__init__ reads the weight of a base layer, which does not exist here.
        nn.Module.__init__(self)
        self.experts: int = experts
        self.in_features: int = inputs
        self.out_features: int = outputs
        self.shared: bool = shared
        self._device = device
        self._stays = stays or _follows
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.use_dora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.lora_variant: dict[str, Any] = {}
        self.lora_dropout = nn.ModuleDict()
        # PEFT types these as ModuleDict; ours hold the stacked matrices themselves.
        self.lora_A: Any = nn.ParameterDict()
        self.lora_B: Any = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.kwargs: dict[str, Any] = {}
        # Of merged adapters; b is scaled. Not part of any adapter, so not saved with one.
        self.merged_a: Tensor | None
        self.merged_b: Tensor | None
        self.register_buffer("merged_a", None, persistent=False)
        self.register_buffer("merged_b", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """Absent: the frozen weights are packed in host memory, outside torch."""
        raise AttributeError("the weights of hybrid experts are packed in host memory")

    @property
    def in_proj_weight(self) -> Tensor:
        """Empty; of a layer without a weight PEFT asks the device so, when it unloads."""
        return torch.empty(0, device=self._device())

    def update_layer(  # type: ignore[override]
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: LoraConfig | None = None,
        **settings: Any,
    ) -> None:
        """Creates an adapter's factors in fp32; SettingsError for variants without kernels.

        PEFT hands over the settings of LoraConfig one by one up to 0.18, and all in `config` later.
        """
        given = vars(config) if config is not None else settings
        lora_dropout, use_rslora = given["lora_dropout"], given["use_rslora"]
        init_lora_weights = given["init_lora_weights"]
        problems = []
        if not 1 <= r <= MAX_RANK:
            problems.append(f"lora_rank: got {r}, expected 1 to {MAX_RANK}")
        if init_lora_weights not in (True, False, "gaussian"):
            problems.append(
                f"init_lora_weights: got {init_lora_weights!r}, expected true, false or gaussian"
            )
        problems += variants_without_kernels(given)
        if problems:
            raise SettingsError(
                "LoRA on hybrid experts:\n"
                + "\n".join(f"  - {p}" for p in problems)
                + "\nChange the recipe, or set expert_lora: false to adapt the other layers only."
            )
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = scaling(r, lora_alpha, use_rslora)
        self.use_rslora[adapter_name] = use_rslora
        self.use_dora[adapter_name] = False
        self.lora_bias[adapter_name] = False
        drop: nn.Module = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.lora_dropout[adapter_name] = drop
        device = self._device()
        copies = 1 if self.shared else self.experts
        a = torch.empty(copies, r, self.in_features, device=device)
        b = torch.zeros(copies, self.out_features, r, device=device)
        if init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / r)
        else:
            # kaiming_uniform with a = sqrt(5) of one expert's [r, in], as PEFT does for a Linear.
            nn.init.uniform_(a, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))
            if init_lora_weights is False:
                nn.init.uniform_(b, -1 / math.sqrt(r), 1 / math.sqrt(r))
        self.lora_A[adapter_name] = nn.Parameter(a)
        self.lora_B[adapter_name] = nn.Parameter(b)
        self.set_adapter(self.active_adapters, inference_mode=given.get("inference_mode", False))

    def active_factors(self) -> ActiveFactors | None:
        """The factors of the active and the merged adapters, or None where there are none.

        Several adapters are one of the summed rank.
        """
        active = [] if self.disable_adapters else self.active_adapters
        names = [n for n in active if n in self.lora_A]
        rates = {n: getattr(self.lora_dropout[n], "p", 0.0) for n in names if self.training}
        if len(set(rates.values())) > 1:
            raise SettingsError(
                f"lora_dropout: the active adapters differ ({rates}); give them the same rate"
            )
        dropout = max(rates.values(), default=0.0)
        if dropout and self.merged_a is not None:
            raise SettingsError(
                f"lora_dropout: got {dropout}, expected 0 beside an adapter that was merged, which "
                "dropout must not touch; leave lora_dropout out"
            )
        if len(names) == 1 and self.merged_a is None:
            name = names[0]
            return ActiveFactors(self.lora_A[name], self.lora_B[name], self.scaling[name], dropout)
        joined = self._joined(names)
        return ActiveFactors(*joined, 1.0, dropout) if joined else None

    def _joined(self, names: list[str]) -> tuple[Tensor, Tensor] | None:
        """a [E, sum of r, in] and scaled b of what is merged and of these adapters."""
        merged = (
            [(self.merged_a, self.merged_b)]
            if self.merged_a is not None and self.merged_b is not None
            else []
        )
        pairs = [*merged, *((self.lora_A[n], self.lora_B[n] * self.scaling[n]) for n in names)]
        if not pairs:
            return None
        rank = sum(a.shape[1] for a, _ in pairs)
        if rank > MAX_RANK:
            raise SettingsError(
                f"LoRA on hybrid experts: {len(pairs)} adapters together have rank {rank}, "
                f"expected at most {MAX_RANK}; use fewer of them at a time"
            )
        copies = max(a.shape[0] for a, _ in pairs)
        a, b = (
            torch.cat([pair[i].expand(copies, -1, -1) for pair in pairs], dim=i + 1) for i in (0, 1)
        )
        return a, b

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HybridExpertsLinear:
        """As for any module; factors that stay change their dtype only."""

        def in_place(tensor: Tensor) -> Tensor:
            return fn(tensor) if tensor.is_meta else tensor.to(fn(tensor.new_empty(0)).dtype)

        return super()._apply(in_place if self._stays() else fn, recurse)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT looks for a weight's device; the router tells ours.
        for factors in (self.lora_A, self.lora_B):
            if adapter_name in factors and factors[adapter_name].device.type != "meta":
                there = self._device() if device is None or self._stays() else device
                factors[adapter_name].data = factors[adapter_name].data.to(there)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused in place; `merge_and_unload` keeps the factors beside the packed weights."""
        raise NotImplementedError(
            "merge_adapter: LoRA cannot be merged into packed experts; use merge_and_unload, or "
            "`kt-sft export recipe.yaml`, which merges it into the original checkpoint"
        )

    def unmerge(self) -> None:
        """Nothing to undo: nothing is ever merged."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> HybridExpertsLinear:
        """The layer without adapters, for `unload` and `merge_and_unload` of a PeftModel.

        Merged factors go on as a frozen part of the layer. Raises SettingsError where their ranks
        are too many together, and ValueError for factors that are not finite when `safe_merge`.
        """
        names = [n for n in adapter_names or self.active_adapters if n in self.lora_A]
        joined = self._joined(names if merge else [])
        if safe_merge and joined and not all(bool(torch.isfinite(t).all()) for t in joined):
            raise ValueError(f"NaN or Inf in the expert LoRA of {names}; nothing was merged")
        bare = HybridExpertsLinear(
            self.experts,
            self.in_features,
            self.out_features,
            self._device,
            self.shared,
            self._stays,
        )
        if joined:
            bare.merged_a, bare.merged_b = (t.detach().clone() for t in joined)
        return bare

    def extra_repr(self) -> str:
        """For `print(model)`."""
        shared = ", shared" if self.shared else ""
        return f"experts={self.experts}, in={self.in_features}, out={self.out_features}{shared}"


def common_dropout(active: list[ActiveFactors], path: str) -> float:
    """The dropout rate of the active LoRA of one block; the three projections share it."""
    rates = {f.dropout for f in active}
    if len(rates) > 1:
        raise SettingsError(f"lora_dropout: the projections of {path} differ: {sorted(rates)}")
    return rates.pop() if rates else 0.0
