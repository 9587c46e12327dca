"""The machine that a forecast is for: this one, measured in seconds, or one that was described.

Rates are per second: operations (two for a product) and bytes.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass

import torch

from kt_sft.config import HybridExpertsSettings
from kt_sft.errors import SettingsError
from kt_sft.kernels import isa_report, requested_isa
from kt_sft.kernels.peak import ReadBandwidth
from kt_sft.machine.accelerator import current_accelerator, device_name, release_device_memory
from kt_sft.machine.cpus import threads_of
from kt_sft.machine.link import copy_rates
from kt_sft.machine.numa import numa_nodes
from kt_sft.machine.report import cpu_name
from kt_sft.planning.outline import Surroundings

logger = logging.getLogger(__name__)

# What a core of a described machine makes of a layer's experts, operations a second, forward with
# LoRA; medians of docs/measurements.md. A core with half-width units (Zen 4, many laptops) makes
# half of the AVX-512 rows.
CORE_RATES: dict[str, dict[str, float]] = {
    "amx": {"exact": 270e9, "int8": 410e9, "bf16": 300e9},
    "avx512_bf16": {"exact": 200e9, "int8": 330e9, "bf16": 200e9},
    "avx512_vnni": {"exact": 180e9, "int8": 300e9, "bf16": 90e9},
    "avx512": {"exact": 160e9, "int8": 160e9, "bf16": 90e9},
    "avx_vnni": {"exact": 110e9, "int8": 200e9, "bf16": 50e9},
    "avx2": {"exact": 95e9, "int8": 95e9, "bf16": 50e9},
}
# Time of a backward over that of its forward.
BACKWARD = 1.25
# Words for an instruction set that a person may say.
_SETS = {"vnni": "avx512_vnni", "avxvnni": "avx_vnni"}
# Bytes a second that a socket reads, where nobody says: many cores are a server's.
_DESKTOP, _SERVER, _MANY_CORES = 60e9, 220e9, 16
# Of an accelerator that nobody describes further: a card of 2022 on PCI Express 4.0 with 16 lanes.
_DEVICE_RATE, _DEVICE_BANDWIDTH, _LINK = 120e12, 9e11, 22e9
# Of the products that a card is sold with, what a training's matrix products reach.
_REACHED = 0.5

_GB = 1e9
_SAMPLE = 1024
_SECONDS = 0.3


@dataclass(frozen=True)
class Device:
    """An accelerator. rate: of matrix products in bf16; bandwidth: of its memory; link: one way."""

    name: str
    free: int | None
    rate: float
    bandwidth: float
    link: float


@dataclass(frozen=True)
class Machine:
    """What a forecast needs to know.

    core_rates: of the experts' kernels on one thread by compute mode, where the layer's own form
    was not measured. rate: of matrix products of torch on the CPU. measured: here, not by a table.
    nodes: of memory.
    """

    name: str
    isa: str
    threads: int
    host_free: int
    bandwidth: float
    rate: float
    device: Device | None
    measured: bool
    core_rates: dict[str, float] | None = None
    nodes: int = 1

    def surroundings(self) -> Surroundings:
        """As the memory plan asks for them: one process."""
        device = self.device
        free = None if device is None else device.free
        return Surroundings(self.isa, self.threads, self.host_free, device is not None, free)


def this_machine(settings: HybridExpertsSettings) -> Machine:
    """Measured: reading memory, products of torch, the link. About two seconds."""
    around = Surroundings.here(settings)
    threads, isa = threads_of(settings.threads), requested_isa(settings.isa)
    found = current_accelerator()
    device = None
    if found is not None:
        try:
            link = min(copy_rates(found))
            rate, bandwidth = _product_rate(found), _device_bandwidth(found)
        except RuntimeError as error:  # full, or without memory that can be pinned
            logger.warning("%s could not be measured (%s); its rates are assumed", found, error)
            rate, bandwidth, link = _DEVICE_RATE * _REACHED, _DEVICE_BANDWIDTH, _LINK
        finally:
            release_device_memory()
        device = Device(device_name(found), around.device_free, rate, bandwidth, link)
    reads = ReadBandwidth(isa, threads)
    bandwidth = max(reads.measure() for _ in range(3))
    rate = _product_rate(torch.device("cpu"))
    name, nodes = cpu_name(), len(numa_nodes())
    return Machine(name, isa, threads, around.host_free, bandwidth, rate, device, True, nodes=nodes)


def _product_rate(device: torch.device) -> float:
    """Operations a second of bf16 products of a size as layers have it."""
    rows = _SAMPLE if device.type == "cpu" else 8 * _SAMPLE
    a = torch.ones(rows, 2 * _SAMPLE, dtype=torch.bfloat16, device=device)
    b = torch.ones(2 * _SAMPLE, 2 * _SAMPLE, dtype=torch.bfloat16, device=device)
    seconds = _repeated(lambda: a @ b, device)
    return 2 * rows * (2 * _SAMPLE) ** 2 / seconds


def _device_bandwidth(device: torch.device) -> float:
    """Bytes a second of a copy within its memory, read and written."""
    a = torch.ones(256 << 20, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / _repeated(lambda: b.copy_(a), device)


def _repeated(work: object, device: torch.device) -> float:
    """Seconds of one call."""
    assert callable(work)

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    work()
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        work()
        wait()
        count += 1
    return (time.perf_counter() - start) / count


# (pattern, what it sets); each part of a description is one of them.
_PARTS = (
    (re.compile(r"(?:([1-9]\d*)\s*x\s*)?([1-9]\d*)\s*cores?(?:\s+(\w+))?", re.I), "cores"),
    (re.compile(r"(\d+(?:\.\d+)?)\s*(gi?b|ti?b)(?:\s+(?:ram|memory|host))?", re.I), "host"),
    (re.compile(r"(\d+(?:\.\d+)?)\s*gi?b\s+(?:gpu|vram|device)", re.I), "device"),
    (re.compile(r"(\d+(?:\.\d+)?)\s*gb/s(?:\s+(?:memory|ram))?", re.I), "bandwidth"),
    (re.compile(r"(\d+(?:\.\d+)?)\s*gb/s\s+link", re.I), "link"),
    (re.compile(r"(\d+(?:\.\d+)?)\s*tflops", re.I), "flops"),
    (re.compile(r"no\s+gpu", re.I), "none"),
)
_EXAMPLE = '"2x64 cores amx, 512 GB, 24 GB gpu"'


def described(text: str) -> Machine:
    """The machine of `--machine`. Raises SettingsError that lists every part not understood.

    Parts are separated by commas: "2x64 cores amx" (sockets, physical cores of each, instruction
    set), "512 GB", "24 GB gpu" or "no gpu", and where known "400 GB/s memory", "50 GB/s link" and
    "300 TFLOPS" (of the accelerator in bf16, as it is sold).
    """
    found: dict[str, re.Match[str]] = {}
    wrong = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        matches = [(name, m) for pattern, name in _PARTS if (m := pattern.fullmatch(part))]
        if len(matches) != 1 or matches[0][0] in found:
            wrong.append(f"{part!r}: " + ("said twice" if matches else "not understood"))
        else:
            found[matches[0][0]] = matches[0][1]
    needed = {"cores": "cores", "host": "host memory"}
    missing = [f"no {what}" for name, what in needed.items() if name not in found]
    wrong += [
        f"{m[0]!r}: expected more than 0"
        for name, m in found.items()
        if name not in ("cores", "none") and float(m[1]) <= 0
    ]
    if "device" not in found:
        wrong += [f"{found[name][0]!r}: of no gpu" for name in ("link", "flops") if name in found]
    if "device" in found and "none" in found:
        wrong.append("'no gpu' and a gpu")
    if wrong or missing:
        raise SettingsError(
            f"--machine: got {text!r} ({'; '.join(wrong + missing)}), expected parts such as "
            f'{_EXAMPLE}, and as known "400 GB/s memory", "50 GB/s link", "300 TFLOPS"'
        )
    sockets, cores = int(found["cores"][1] or 1), int(found["cores"][2])
    isa = _isa_of(found["cores"][3])
    each = _SERVER if cores >= _MANY_CORES else _DESKTOP
    bandwidth = _number(found, "bandwidth") * _GB or sockets * each
    host = float(found["host"][1]) * (1e12 if found["host"][2].lower().startswith("t") else 1e9)
    device = None
    if "device" in found:
        rate = _number(found, "flops") * 1e12 * _REACHED or _DEVICE_RATE * _REACHED
        link = _number(found, "link") * _GB or _LINK
        memory = int(_number(found, "device") * _GB)
        device = Device("an accelerator", memory, rate, _DEVICE_BANDWIDTH, link)
    threads = sockets * cores
    rates = CORE_RATES[isa]
    # What torch makes of a core's vector units, beside a layer that is all weights.
    rate = threads * rates["bf16"] * 0.5
    return Machine(text, isa, threads, int(host), bandwidth, rate, device, False, rates, sockets)


def _number(found: dict[str, re.Match[str]], name: str) -> float:
    return float(found[name][1]) if name in found else 0.0


def _isa_of(word: str | None) -> str:
    if word is None:
        return "avx2"
    name = _SETS.get(word.lower(), word.lower())
    if name not in CORE_RATES:
        known = ", ".join(n for n, _ in isa_report() if n in CORE_RATES)
        raise SettingsError(f"--machine: got instruction set {word!r}, expected one of {known}")
    return name
