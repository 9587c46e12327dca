"""The accelerators that torch finds, their memory, driver and link."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kt_sft.doctor.findings import NOTE, WARNING, Finding
from kt_sft.machine.accelerator import current_accelerator, device_name, free_device_memory
from kt_sft.machine.link import copy_rates

_SECTION = "accelerator"
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# PCI Express 3.0 with 8 lanes; less is a slot, a riser or a virtual machine to look at.
_SLOW_LINK = 6e9


def accelerators() -> Iterator[Finding]:
    """Of the current one everything, of the others that they are there."""
    yield Finding(_SECTION, "torch", f"{torch.__version__}, built for {_built_for()}")
    device = current_accelerator()
    if device is None:
        yield _none()
        return
    count = torch.accelerator.device_count()
    free = free_device_memory()
    yield Finding(
        _SECTION,
        "device",
        f"{device_name(device)} ({device}, one of {count})"
        + ("" if free is None else f", {free / 1e9:.1f} GB free"),
        data={"name": device_name(device), "count": count, "free_bytes": free},
    )
    driver = nvidia_driver()
    if driver:
        yield Finding(_SECTION, "driver", driver)
    down, up = copy_rates(device)
    slow = min(down, up) < _SLOW_LINK
    yield Finding(
        _SECTION,
        "link",
        f"{down / 1e9:.1f} GB/s to it, {up / 1e9:.1f} GB/s from it",
        WARNING if slow else "ok",
        "every layer sends hidden states there and back; look whether the slot has all its lanes "
        "(nvidia-smi -q -d PCIE)"
        if slow
        else "",
        {"to_bytes_per_second": down, "from_bytes_per_second": up},
    )


def nvidia_driver(file: Path = _NVIDIA_DRIVER) -> str:
    """Its version; empty without one."""
    try:
        words = file.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return ""
    return next((w for w in words if w[:1].isdigit() and "." in w), "")


def _built_for() -> str:
    versions: dict[str, Any] = {
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
        "XPU": getattr(torch.version, "xpu", None),
    }
    return next((f"{name} {v}" for name, v in versions.items() if v), "the CPU alone")


def _none() -> Finding:
    driver = nvidia_driver()
    if driver:
        return Finding(
            _SECTION,
            "device",
            f"torch finds none, and NVIDIA's driver {driver} is there",
            WARNING,
            f"torch is built for {_built_for()}; install a build for a CUDA that the driver knows "
            "(nvidia-smi shows which), and look at CUDA_VISIBLE_DEVICES",
        )
    return Finding(_SECTION, "device", "none; everything is computed on the CPU", NOTE)
