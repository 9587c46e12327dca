"""The machine and the instruction sets that run on it, for reports."""

from __future__ import annotations

import os
from typing import Any

from kt_sft.kernels.isa import isa_report
from kt_sft.machine.accelerator import current_accelerator, device_name
from kt_sft.machine.cpus import available_threads
from kt_sft.machine.memory import total_memory_bytes
from kt_sft.machine.report import cpu_name


def machine_description() -> dict[str, Any]:
    """Processor, logical CPUs, usable threads, instruction sets and memory."""
    memory = total_memory_bytes()
    device = current_accelerator()
    return {
        "cpu": cpu_name(),
        "logical_cpus": os.cpu_count(),
        "usable_threads": available_threads(),
        "instruction_sets": [name for name, missing in isa_report() if not missing],
        "memory_gb": round(memory / 1e9, 1),
        "accelerator": None if device is None else device_name(device),
    }
