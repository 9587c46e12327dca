"""Where a layer's experts lie in a checkpoint, per-expert or fused, and reading them one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kt_sft.errors import CheckpointError
from kt_sft.experts.shape import ExpertsShape
from kt_sft.families import Family
from kt_sft.kernels import PROJECTIONS
from kt_sft.store.checkpoint import SafetensorsCheckpoint

FUSED_GATE_UP = "gate_up_proj"
FUSED_DOWN = "down_proj"


@dataclass(frozen=True)
class ExpertsOnDisk:
    """The tensors of one layer's experts.

    prefix: path of the experts in the checkpoint, without a dot at the end.
    names: projection -> name in per-expert keys; None when the experts are fused as
        gate_up_proj [E, 2F, D] and down_proj [E, D, F].
    """

    prefix: str
    names: Mapping[str, str] | None

    @classmethod
    def find(
        cls,
        checkpoint: SafetensorsCheckpoint,
        family: Family,
        module_path: str,
        shape: ExpertsShape,
    ) -> ExpertsOnDisk:
        """Locates the experts and checks every shape. Raises CheckpointError naming what lacks."""
        bare = module_path.removeprefix("model.")
        prefixes = [p for path in (module_path, bare) for p in family.disk_prefixes(path)]
        for prefix in prefixes:
            if f"{prefix}.0.{family.projections['down_proj']}.weight" in checkpoint:
                found = cls(prefix, family.projections)
                break
            if f"{prefix}.{FUSED_DOWN}" in checkpoint:
                found = cls(prefix, None)
                break
        else:
            raise CheckpointError(
                f"{module_path}: no experts in the checkpoint; looked for "
                + " and ".join(
                    f"{p}.0.{family.projections['down_proj']}.weight, {p}.{FUSED_DOWN}"
                    for p in prefixes
                )
            )
        found._check(checkpoint, shape)
        return found

    def read(
        self, checkpoint: SafetensorsCheckpoint, expert: int, projection: str, intermediate: int
    ) -> Tensor:
        """One expert's projection, [outputs, inputs]."""
        if self.names is not None:
            return checkpoint.get(self._key(expert, projection))
        if projection == "down_proj":
            return checkpoint.get_index(f"{self.prefix}.{FUSED_DOWN}", expert)
        both = checkpoint.get_index(f"{self.prefix}.{FUSED_GATE_UP}", expert)
        return both[:intermediate] if projection == "gate_proj" else both[intermediate:]

    def _key(self, expert: int, projection: str) -> str:
        assert self.names is not None
        return f"{self.prefix}.{expert}.{self.names[projection]}.weight"

    def _check(self, checkpoint: SafetensorsCheckpoint, shape: ExpertsShape) -> None:
        narrow = (shape.intermediate, shape.hidden)
        wide = (shape.hidden, shape.intermediate)
        expected: dict[str, tuple[int, ...]] = {}
        if self.names is None:
            double = (shape.experts, 2 * shape.intermediate, shape.hidden)
            expected[f"{self.prefix}.{FUSED_GATE_UP}"] = double
            expected[f"{self.prefix}.{FUSED_DOWN}"] = (shape.experts, *wide)
        else:
            for e in range(shape.experts):
                for p in PROJECTIONS:
                    expected[self._key(e, p)] = wide if p == "down_proj" else narrow
        missing = [k for k in expected if k not in checkpoint]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} of {len(expected)} expert tensors, "
                f"the first is {missing[0]}; download it again"
            )
        for key, want in expected.items():
            got = checkpoint.shape(key)
            if got != want:
                raise CheckpointError(
                    f"{key}: got shape {got}, the model's configuration says {want}; "
                    "config.json and the weights do not belong together"
                )
