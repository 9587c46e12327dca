"""Weights & Biases: additions to a run that the Trainer's own callback has started."""

from __future__ import annotations

import sys
from typing import Any


def update_config(values: dict[str, Any]) -> None:
    """Adds to the configuration of the current run; without a run, nothing."""
    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    if run is not None:
        run.config.update(values, allow_val_change=True)
