"""What can be seen without measuring or trying anything, in no time."""

from __future__ import annotations

from collections.abc import Iterator

from kt_sft.doctor import host, installation
from kt_sft.doctor.findings import Finding


def looked_at() -> Iterator[Finding]:
    """Packages, the plug-in's hook, CPUs, memory and instruction sets."""
    yield from installation.packages()
    yield from installation.plugin()
    yield from host.cpus()
    yield from host.memory()
    yield from host.instruction_sets()
