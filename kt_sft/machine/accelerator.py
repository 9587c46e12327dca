"""The accelerator that torch finds, whichever it is, and its memory."""

from __future__ import annotations

from typing import Any

import torch

# Torch 2.6 has these by other names only.
current_device_index = getattr(torch.accelerator, "current_device_index", None) or (
    torch.accelerator.current_device_idx
)
set_device_index = getattr(torch.accelerator, "set_device_index", None) or (
    torch.accelerator.set_device_idx
)


def _module() -> Any:
    """torch.cuda, torch.xpu or another; None without an accelerator that can be used."""
    if not torch.accelerator.is_available():
        return None
    return torch.get_device_module(torch.accelerator.current_accelerator())


def current_accelerator() -> torch.device | None:
    """The current device of it, if there is one."""
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return None if found is None else torch.device(found.type, current_device_index())


def has_accelerator() -> bool:
    """Whether there is one."""
    return _module() is not None


def free_device_memory() -> int | None:
    """Bytes of the current device; None where there is none, or it does not tell."""
    tell = getattr(_module(), "mem_get_info", None)
    return None if tell is None else int(tell()[0])


def peak_device_memory() -> int | None:
    """The most bytes that tensors took on the current device; None as above."""
    tell = getattr(_module(), "max_memory_allocated", None)
    return None if tell is None else int(tell())


def release_device_memory() -> None:
    """Gives back what torch keeps of the current device for later: others are told it is used."""
    release = getattr(_module(), "empty_cache", None)
    if release is not None:
        release()


def device_name(device: torch.device) -> str:
    """What its maker calls it, or its type."""
    if device.type == "cpu":
        return device.type
    tell = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if tell is None else str(tell(device))
