"""The Trainer's checkpoints, published whole, and resumed only when they are whole.

Transformers has no hook around saving and resuming, so four of its functions are replaced (group
trainer of the patches). A model without hybrid experts is trained and saved as ever.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import trainer_utils
from transformers.trainer import TRAINER_STATE_NAME

from kt_sft.errors import CheckpointError, KtSftError, NonFiniteError
from kt_sft.experts import hybrid_experts_of
from kt_sft.training.accumulation import WaitingGradients
from kt_sft.training.guard import RunGuard
from kt_sft.training.residents import ResidentExperts
from kt_sft.training.savepoints import (
    StagedCheckpoint,
    explain,
    newest_valid,
    require_space,
    require_valid,
    require_writable,
    rotate,
    sweep,
)
from kt_sft.training.stop_signals import ignore_termination

# The order in which torch asks what restores a location; its own go up to 30.
_AFTER_TORCH = 97


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _everywhere(problem: BaseException | None) -> None:
    """A barrier at which the first error of any rank is raised on every rank."""
    if _ranks() == 1:
        if problem is not None:
            raise problem
        return
    problems: list[str | None] = [None] * _ranks()
    dist.all_gather_object(problems, None if problem is None else str(problem))
    if problem is not None:
        raise problem
    for rank, text in enumerate(problems):
        if text is not None:
            raise CheckpointError(f"rank {rank}: {text}")


def _from_first_rank(value: Any) -> Any:
    if _ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _attempt(work: Callable[[], Any], what: Path) -> BaseException | None:
    """The error of `work`, to be raised where every rank learns of it."""
    try:
        work()
    except KtSftError as error:
        return error
    except (OSError, RuntimeError, SafetensorError) as error:
        problem = explain(error, what)
        problem.__cause__ = error
        return problem
    except Exception as error:
        return error
    return None


def _refuse_poisoned(model: Any, step: int) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(
                f"step {step}: {name} holds NaN or Inf, so that nothing is saved; the last "
                "checkpoint is from before. Resume from it with a lower learning_rate"
            )


def _checkpoint_bytes(trainer: Any) -> int:
    """Of the adapter and of the optimizer's state as this process holds them."""
    adapter = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    state = getattr(trainer.optimizer, "state", None)
    if trainer.args.save_only_model or not isinstance(state, dict):
        return adapter
    tensors = (v for entry in state.values() if isinstance(entry, dict) for v in entry.values())
    return adapter + sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


class _Staging:
    """The checkpoint that a Trainer is writing, and how it gets to its place."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.output_dir = trainer.args.output_dir
        name = f"{trainer_utils.PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        identity = _from_first_rank(uuid.uuid4().hex[:12])
        self.staged = StagedCheckpoint(Path(self.output_dir), name, identity)
        self.final = Path(self.output_dir) / name

    def write(self, save: Callable[[], None]) -> None:
        """Runs the stock saving inside the staging folder."""
        trainer, staged = self.trainer, self.staged
        # One process of each machine, as the ranks of several may not share a file system.
        opens = trainer.args.local_process_index == 0

        def prepare() -> None:
            _refuse_poisoned(trainer.model, trainer.state.global_step)
            if opens:
                require_space(Path(self.output_dir), _checkpoint_bytes(trainer))
                staged.open()

        try:
            _everywhere(_attempt(prepare, self.final))
            trainer.args.output_dir = str(staged.root)
            _everywhere(_attempt(save, self.final))
            self._name_best()
        except BaseException:
            self.abandon()
            raise

    def _name_best(self) -> None:
        """The best checkpoint, when it is this one, by the name that it will have."""
        state = self.trainer.state
        if state.best_model_checkpoint == str(self.staged.folder):
            state.best_model_checkpoint = str(self.final)
            if self.trainer.args.should_save:
                state.save_to_json(str(self.staged.folder / TRAINER_STATE_NAME))

    def publish(self) -> None:
        """After the callbacks of `on_save`: every rank's files are there."""
        trainer, staged = self.trainer, self.staged
        trainer.args.output_dir = self.output_dir
        try:
            _everywhere(None)
            first = trainer.args.process_index == 0
            _everywhere(_attempt(staged.publish, self.final) if first else None)
            # A machine that does not share the first one's file system has its own part.
            other = trainer.args.local_process_index == 0 and not first and staged.folder.is_dir()
            _everywhere(_attempt(staged.publish, self.final) if other else None)
            staged.discard()
        except BaseException:
            self.abandon()
            raise
        if trainer.args.should_save:
            limit = trainer.args.save_total_limit or 0
            rotate(self.final, limit, trainer.state.best_model_checkpoint)

    def abandon(self) -> None:
        """Leaves the former checkpoints as they are, and nothing else."""
        self.trainer.args.output_dir = self.output_dir
        self.staged.discard()


def staged_save(stock: Callable) -> Callable:
    """`Trainer._save_checkpoint` that writes into a staging folder."""

    def save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        if trial is not None or not hybrid_experts_of(self.model):
            return stock(self, model, trial)
        staging = _Staging(self)
        staging.write(lambda: stock(self, model, trial))
        self.callback_handler.kt_sft_staging = staging
        return None

    return save_checkpoint


def publishing_on_save(stock: Callable) -> Callable:
    """`CallbackHandler.on_save` that publishes what was staged."""

    def on_save(self: Any, *args: Any, **kwargs: Any) -> Any:
        staging = self.__dict__.pop("kt_sft_staging", None)
        if staging is None:
            return stock(self, *args, **kwargs)
        try:
            control = stock(self, *args, **kwargs)
        except BaseException:
            staging.abandon()
            raise
        staging.publish()
        return control

    return on_save


def careful_train(stock: Callable) -> Callable:
    """`Trainer.train` that looks before it resumes, and ends as a signal asks."""

    def train(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not hybrid_experts_of(self.model):
            return stock(self, resume_from_checkpoint, *args, **kwargs)
        if self.args.should_save:
            require_writable(self.args.output_dir)
            sweep(Path(self.args.output_dir))
        if resume_from_checkpoint is True:
            # Where there is none at all, the stock function says so.
            newest = newest_valid(self.args.output_dir)
            resume_from_checkpoint = newest or True
        elif isinstance(resume_from_checkpoint, str | Path):
            require_valid(resume_from_checkpoint)
        callbacks = self.callback_handler.callbacks
        guards = [c for c in callbacks if isinstance(c, RunGuard)]
        for callback in callbacks:
            if isinstance(callback, ResidentExperts):
                known = isinstance(resume_from_checkpoint, str | Path)
                callback.resumes_from = Path(resume_from_checkpoint) if known else None
        try:
            result = stock(self, resume_from_checkpoint, *args, **kwargs)
            stopped_by = next((g.stopped_by for g in guards if g.stopped_by), 0)
            if stopped_by:
                # A rank that ends makes the launcher end the others, whose work is done by then.
                _everywhere(None)
        finally:
            for callback in callbacks:
                if isinstance(callback, RunGuard | WaitingGradients):
                    callback.close()
        if stopped_by:
            if _ranks() > 1:
                ignore_termination()
            raise SystemExit(128 + stopped_by)
        return result

    return train


def _restored_on_cpu(storage: Any, location: str) -> Any:
    return storage if location.startswith("cpu:") else None


# The Trainer restores an optimizer of several ranks to their device, which for ranks on the CPU is
# called cpu:0, a name that torch does not know as a location.
torch.serialization.register_package(_AFTER_TORCH, lambda storage: None, _restored_on_cpu)


def no_step_too_many(stock: Callable) -> Callable:
    """`Trainer._run_epoch`, whose loop looks whether it is at its end only after a step."""

    def run_epoch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hybrid_experts_of(self.model) and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return stock(self, *args, **kwargs)

    return run_epoch
