"""Tests on the simulated device: each is a child process, which the device changes for good."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from children import finish, own_folder
from simulated_device import SimulatedDevice

DEVICE = "simulated"


@dataclasses.dataclass
class OnDevice:
    """What such a child does."""

    body: Callable[..., None]
    arguments: tuple[Any, ...]
    folder: str = dataclasses.field(default_factory=own_folder)

    def __call__(self) -> None:
        torch.set_num_threads(1)
        self.body(SimulatedDevice(), *self.arguments)


def on_device(body: Callable[..., None], *arguments: Any) -> None:
    """`body(device, *arguments)` in a child; an error there is one here."""
    code, output = outcome(body, *arguments)
    assert code == 0, output


def outcome(body: Callable[..., None], *arguments: Any) -> tuple[int, str]:
    """(exit code, output) of `body(device, *arguments)` in a child; -11 is a crash."""
    return finish(OnDevice(body, arguments), seconds=300)
