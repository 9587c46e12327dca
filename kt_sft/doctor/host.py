"""The CPU, its memory and the disk of the stores: what there is, and how fast it is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kt_sft.doctor.findings import NOTE, WARNING, Finding
from kt_sft.errors import StoreFolderError
from kt_sft.kernels import isa_report, kernel_rows, requested_isa
from kt_sft.kernels.peak import measure_peak
from kt_sft.machine.cpus import available_threads, machine_cpus
from kt_sft.machine.disk import existing, free_bytes, read_rate
from kt_sft.machine.memory import available_memory_bytes, total_memory_bytes
from kt_sft.machine.numa import numa_nodes
from kt_sft.machine.pages import swap_bytes, transparent_huge_pages
from kt_sft.machine.report import cpu_name
from kt_sft.store.library import default_folder

_SECTION = "machine"
_SAMPLE_BYTES = 128 << 20
# Below it the experts of a forward wait for memory even where one token is computed at a time.
_LITTLE_MEMORY = 8e9
_SWAP_IN_USE = 0.5e9


def instruction_sets() -> Iterator[Finding]:
    """Each with the CPU's flags that it misses, and the one that is used."""
    section = "instruction sets"
    dots = {isa: f"{integer}, {floating}" for isa, integer, floating in kernel_rows()}
    for isa, missing in isa_report():
        if missing == ["amx_permission"]:
            yield Finding(
                section,
                isa,
                "the CPU has it, the system refuses it",
                WARNING,
                "Linux 5.16 or later grants AMX to a process that asks (arch_prctl "
                "ARCH_REQ_XCOMP_PERM); a container's seccomp profile may forbid asking",
                {"missing": missing},
            )
        else:
            value = f"lacks {', '.join(missing)}" if missing else f"usable: {dots[isa]}"
            yield Finding(section, isa, value, data={"missing": missing})
    used = requested_isa("auto")
    if used == "portable":
        yield Finding(
            section,
            "in use",
            used,
            WARNING,
            "these kernels are for reading and some hundred times slower; kt_sft wants a CPU with "
            "AVX2 (a virtual machine may hide it: set its CPU type to host)",
        )
    else:
        yield Finding(section, "in use", used)


def cpus() -> Iterator[Finding]:
    """Names and numbers; what affinity, quota and hyper-threads leave."""
    usable, allowed = available_threads(), len(os.sched_getaffinity(0))
    yield Finding(_SECTION, "cpu", cpu_name())
    yield Finding(
        _SECTION,
        "threads",
        f"{usable} of {machine_cpus()} logical CPUs (affinity allows {allowed}; quota and "
        "hyper-threads counted)",
        data={"usable": usable, "logical_cpus": machine_cpus(), "affinity": allowed},
    )
    nodes = [sorted(node) for node in numa_nodes()]
    yield Finding(
        _SECTION,
        "memory nodes",
        f"{len(nodes)} ({', '.join(str(len(node)) for node in nodes)} CPUs)",
        data=nodes,
    )


def memory() -> Iterator[Finding]:
    """Its size, huge pages and swap."""
    total = total_memory_bytes()
    free = available_memory_bytes()
    few = free < _LITTLE_MEMORY
    yield Finding(
        _SECTION,
        "memory",
        f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB",
        NOTE if few else "ok",
        "`kt-sft plan RECIPE` says what a model needs" if few else "",
        {"free_bytes": free, "total_bytes": total},
    )
    pages = transparent_huge_pages()
    if pages == "never":
        yield Finding(
            _SECTION,
            "huge pages",
            pages,
            WARNING,
            "reading weights misses the TLB; as root: echo madvise > "
            "/sys/kernel/mm/transparent_hugepage/enabled",
        )
    else:
        yield Finding(_SECTION, "huge pages", pages)
    used, swap = swap_bytes()
    if used > _SWAP_IN_USE:
        yield Finding(
            _SECTION,
            "swap",
            f"{used / 1e9:.1f} of {swap / 1e9:.1f} GB in use",
            WARNING,
            "memory was short here; experts that come back from swap take minutes. End what holds "
            "it, or swapoff",
            {"used_bytes": used, "total_bytes": swap},
        )


def speed() -> Iterator[Finding]:
    """Arithmetic and memory, measured for about three seconds."""
    peak = measure_peak(available_threads(), repeats=2)
    exact, bf16 = peak["exact_tflops"], peak["bf16_tflops"]
    yield Finding(
        _SECTION,
        "arithmetic",
        f"{exact:.2f} TFLOPS exact, {peak['int8_tops']:.2f} TOPS int8, {bf16:.2f} TFLOPS bf16 "
        f"({peak['isa']}, {peak['threads']} threads, in registers)",
        data=peak,
    )
    yield Finding(
        _SECTION,
        "memory bandwidth",
        f"{peak['read_gb_s']:.1f} GB/s read",
        data={"read_bytes_per_second": peak["read_gb_s"] * 1e9},
    )


def disk() -> Iterator[Finding]:
    """The folder of stores: whether it can be written, its space, and how fast it reads."""
    name = "store folder"
    try:
        folder = default_folder()
    except StoreFolderError as error:
        yield Finding(_SECTION, name, "none", WARNING, str(error))
        return
    place = folder
    try:
        place = existing(folder)
        with tempfile.NamedTemporaryFile(dir=place, prefix=".kt-sft-doctor-") as sample:
            sample.write(os.urandom(1 << 20) * (_SAMPLE_BYTES >> 20))
            sample.flush()
            os.fsync(sample.fileno())
            rate = read_rate(Path(sample.name), _SAMPLE_BYTES)
    except OSError as error:
        yield Finding(
            _SECTION,
            name,
            f"{place}: {error.strerror}",
            WARNING,
            "packed experts cannot be kept, and each start packs them again; set KT_SFT_STORE to a "
            "folder that can be written",
        )
        return
    free = free_bytes(place)
    speed = "not known (no direct reads there)" if rate is None else f"{rate / 1e9:.2f} GB/s read"
    yield Finding(
        _SECTION,
        name,
        f"{folder}: {free / 1e9:.0f} GB free, {speed}",
        data={"folder": str(folder), "free_bytes": free, "read_bytes_per_second": rate},
    )
