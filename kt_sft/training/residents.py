"""A Trainer whose accelerator keeps the experts that get the most rows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kt_sft.experts import HybridExperts, hybrid_experts_of
from kt_sft.experts.residents import place_residents, placement_of, restore_residents
from kt_sft.scheduling.profile import FILE_NAME

logger = logging.getLogger(__name__)

# Steps after which the places are chosen anew: soon, then now and then.
_SOON = (1, 4, 16, 64)
_EVERY = 128


class ResidentExperts(TrainerCallback):
    """Chooses the resident experts between steps, and keeps what it knows of the routing: in every
    checkpoint, so that a training resumes with the same places, in the run's folder, and beside the
    store for the next run.

    resumes_from: the checkpoint that a training goes on from.
    """

    def __init__(self) -> None:
        self.resumes_from: Path | None = None
        self._experts: dict[str, HybridExperts] = {}

    def _name(self, args: TrainingArguments) -> str:
        path = Path(FILE_NAME)
        each = f"{path.stem}_{args.process_index}{path.suffix}"
        return each if args.world_size > 1 else FILE_NAME

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Places experts by the profile of the checkpoint, or of an earlier run."""
        self._experts = hybrid_experts_of(model) if model is not None else {}
        if not self._experts:
            return
        saved = self.resumes_from / self._name(args) if self.resumes_from is not None else None
        if saved is not None and saved.is_file():
            restore_residents(self._experts, saved)
        else:
            place_residents(self._experts)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """No forward waits for its backward now."""
        step = state.global_step
        if self._experts and (step in _SOON or step % _EVERY == 0):
            place_residents(self._experts)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Into the checkpoint, which is being written."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self._experts and folder.is_dir():
            # Saving brings the checkpoint to the disk as a whole.
            profile = next(iter(self._experts.values())).runtime.routing
            text = profile.text(placement_of(self._experts))
            (folder / self._name(args)).write_text(text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """For people, and for the next run."""
        runtime = next((m.runtime for m in self._experts.values()), None)
        if runtime is None or not state.is_world_process_zero:
            return
        for path in (Path(str(args.output_dir)) / FILE_NAME, runtime.routing_file):
            if path is None or not path.parent.is_dir():
                continue
            try:
                runtime.routing.save(path, placement_of(self._experts))
            except OSError as error:
                logger.info("%s: %s; the routing profile is not kept there", path, error)
