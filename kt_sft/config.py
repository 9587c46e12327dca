"""The settings of the `kt_sft:` section: what may be written, checked all at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from kt_sft.errors import SettingsError
from kt_sft.machine.cpus import machine_cpus
from kt_sft.scheduling.residents import ResidentBudget

# What `kt-sft export --to` writes for; export/programs.py says what each of them reads.
EXPORT_TARGETS = (
    "kt_sft",
    "peft",
    "peft-fused",
    "peft-fused-0.18",
    "vllm",
    "sglang",
    "gguf",
    "merged",
)
_CHOICES = {
    "compute": ("exact", "int8"),
    "activations": ("auto", "keep", "recompute"),
    "adapters": ("auto", "device", "host"),
    "embeddings": ("device", "host"),
    "adapter_base": ("check", "any"),
    "expert_lora": (True, False, "shared"),
    "numa": ("auto", "off"),
    "resident": ("auto", True, False),
    "memory_check": (True, False),
    "schedule": ("host", "auto", "device", "resident"),
    "disk_tier": (True, False),
}


@dataclass(frozen=True)
class HybridExpertsSettings:
    """How the routed experts are stored and computed.

    weights: storage of the frozen experts: int8 (per output channel), bf16, int4 in groups of 32
        or 128 (integer multipliers on the channel's scale; int4 means groups of 32), or checkpoint
        (as published: fp8, mxfp4 and int4 codes keep their scales, bf16 stays bf16).
    compute: how int8 and int4 weights are multiplied: exact (activations in 16 bits, error about
        3e-5) or int8 (activations in 8 bits, about 1e-2, faster). bf16 weights and published codes
        use bf16 products.
    expert_lora: LoRA on the routed experts, with the recipe's rank, alpha and dropout: true (a pair
        of matrices per expert), shared (one pair per layer and projection for all its experts,
        and saved so; `kt-sft export` writes it for every expert where a program needs it) or
        false.
    activations: what gradient checkpointing does with the experts: keep (their forward is computed
        once and held in host memory until backward), recompute (a second time, less memory) or auto
        (keep, and recompute the layers for which host memory is too small).
    adapters: where the experts' LoRA, its gradients and its optimizer's states are: device (with
        the router), host (nothing of them crosses the link, the optimizer steps on the CPU; one
        process only) or auto (on the device, unless the memory plan says that they do not fit).
    embeddings: where the table of input embeddings is: device, or host (its tokens' rows go up;
        it must be frozen, and not be the output head too).
    adapter_base: which base an adapter is loaded on: check (the one that it was trained on, by what
        lies beside it) or any (of the same shape).
    export_for: programs that will read the adapter (`kt-sft export --help` lists them); a recipe
        whose adapter one of them cannot read is refused before anything is loaded.
    threads: CPU threads for the experts, at most as many as the machine has CPUs, or auto
        (affinity, container quota, physical cores).
    isa: auto, or the name of an instruction set that `kt-sft doctor` lists; the environment
        variable KT_SFT_ISA overrides it.
    numa: auto (where there are several memory nodes, each holds and computes its part of the
        intermediate channels) or off.
    store: where the packed experts are kept as a file that later starts and other processes map:
        a folder, auto (KT_SFT_STORE, or kt_sft/stores in the user's cache folder), or memory (no
        file; each process packs its own).
    resident: true copies the experts into memory of this process, in huge pages, and false
        computes on the mapped file. auto copies where memory nodes share the work and it fits.
    memory_check: before loading, refuse a run whose planned memory is more than there is; false
        starts it all the same, with a warning.
    disk_tier: true lets a model run whose packed experts do not fit memory: they are read from the
        store's file in every pass, the next layer while one is computed. false refuses it.
    schedule: where routed experts are computed when the model is on an accelerator: host; auto
        (each pass is parted between host and accelerator so that both end together, by what was
        measured of the machine; experts that are not in the accelerator's memory are streamed to
        it); device (all of them there); or resident (there those of gpu_experts, the others on the
        host).
    gpu_experts: experts whose packed weights stay in the accelerator's memory, those that get the
        most rows: 0, a number for each layer, memory for all of them as "6 GB", or auto (what the
        memory plan leaves free).
    """

    weights: str = "int8"
    compute: str = "exact"
    expert_lora: bool | str = True
    activations: str = "auto"
    adapters: str = "auto"
    embeddings: str = "device"
    adapter_base: str = "check"
    export_for: tuple[str, ...] = ()
    threads: int | str = "auto"
    isa: str = "auto"
    numa: str = "auto"
    store: str = "auto"
    resident: str | bool = "auto"
    memory_check: bool = True
    disk_tier: bool = False
    schedule: str = "host"
    gpu_experts: int | str = 0

    def __post_init__(self) -> None:
        given: Any = self.export_for
        if isinstance(given, list | str):  # from YAML and JSON
            names = [given] if isinstance(given, str) else given
            object.__setattr__(self, "export_for", tuple(names))
        problems = list(_problems(asdict(self)))
        if problems:
            raise SettingsError(_report(problems))

    @classmethod
    def from_mapping(cls, section: Mapping[str, Any]) -> HybridExpertsSettings:
        """Settings from a recipe's section; raises SettingsError that lists every problem."""
        known = [f.name for f in fields(cls)]
        problems = []
        for key in section:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}"
                problems.append(f"{key}: unknown setting; {hint}")
        values = {f.name: section.get(f.name, f.default) for f in fields(cls)}
        problems.extend(_problems(values))
        if problems:
            raise SettingsError(_report(problems))
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def choices() -> dict[str, tuple[Any, ...]]:
    """The values of every setting that has a fixed set of them."""
    from kt_sft.kernels.formats import WEIGHTS

    return {"weights": WEIGHTS, **_CHOICES}


def _problems(values: Mapping[str, Any]) -> list[str]:
    found = []
    for name, offers in choices().items():
        value = values[name]
        # 1 equals True but is not what the setting offers.
        if any(value == c and type(value) is type(c) for c in offers):
            continue
        near = difflib.get_close_matches(str(value), map(str, offers), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        offered = " or ".join(str(c).lower() if isinstance(c, bool) else c for c in offers)
        found.append(f"{name}: got {value!r}, expected {offered}{hint}")
    if values["weights"] == "bf16" and values["compute"] == "int8":
        found.append(
            "compute: int8 needs int8 or int4 weights, got weights: bf16; "
            "set weights: int8 or leave compute out"
        )
    threads = values["threads"]
    is_count = isinstance(threads, int) and not isinstance(threads, bool) and threads >= 1
    if threads != "auto" and not is_count:
        found.append(f"threads: got {threads!r}, expected auto or a positive integer")
    elif is_count and threads > machine_cpus() and not os.environ.get("KT_SFT_OVERSUBSCRIBE"):
        found.append(
            f"threads: got {threads}, this machine has {machine_cpus()} CPUs; more threads than "
            "that wait for each other. Set auto or fewer (KT_SFT_OVERSUBSCRIBE=1 allows it, for "
            "tests)"
        )
    programs = values["export_for"]
    programs = [programs] if isinstance(programs, str) else programs
    unknown = [p for p in programs if p not in EXPORT_TARGETS] if _is_list(programs) else programs
    if unknown or not _is_list(programs):
        found.append(f"export_for: got {unknown!r}, expected a list of {', '.join(EXPORT_TARGETS)}")
    found += _device_problems(values)
    if values["disk_tier"] is True and (values["store"] == "memory" or values["resident"] is True):
        found.append(
            "disk_tier: true needs a mapped store; leave store: memory and resident: true out"
        )
    if not isinstance(values["store"], str) or not values["store"]:
        found.append(f"store: got {values['store']!r}, expected auto, memory or a folder")
    if not isinstance(values["isa"], str):
        found.append(f"isa: got {values['isa']!r}, expected auto or a name of `kt-sft doctor`")
        return found
    # The compiled core is asked last so that a broken build does not hide the other problems.
    from kt_sft.kernels import requested_isa

    try:
        requested_isa(values["isa"])
    except ValueError as error:
        found.append(str(error))
    return found


def _device_problems(values: Mapping[str, Any]) -> list[str]:
    given, schedule = values["gpu_experts"], values["schedule"]
    try:
        budget = ResidentBudget.of(given)
    except ValueError as error:
        return [f"gpu_experts: got {given!r}, {error}"]
    if schedule == "host" and budget != ResidentBudget(per_layer=0):
        return [
            f"gpu_experts: got {given!r} with schedule: host, which leaves the accelerator without "
            "experts; set schedule: auto"
        ]
    if schedule == "resident" and budget == ResidentBudget(per_layer=0):
        return ["schedule: resident needs gpu_experts, as gpu_experts: auto"]
    return []


def _report(problems: list[str]) -> str:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"kt_sft: {count} in the settings\n" + "\n".join(f"  - {p}" for p in problems)


def shipped_folder() -> Path:
    """Of recipes/, configs/ and constraints.txt: in a wheel the package, in a clone around it."""
    package = Path(__file__).parent
    return package if (package / "configs").is_dir() else package.parent


def read_section(section: Any, recipe_dir: Path | None = None) -> HybridExpertsSettings:
    """Settings from the value of `kt_sft:` in a recipe: a mapping, or the path of a YAML file.

    A relative path is looked up in the working directory, then beside the recipe, then among the
    settings that come with the package, as `configs/experts_int8.yaml`. Raises SettingsError.
    """
    if section is True:
        return HybridExpertsSettings()
    if isinstance(section, str):
        places = [Path(section), *([recipe_dir / section] if recipe_dir else [])]
        places.append(shipped_folder() / section)
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            raise SettingsError(
                f"kt_sft: no file {section!r} (looked at {', '.join(map(str, places))}); "
                "write the settings inline or give the path of a YAML file"
            )
        section = yaml.safe_load(path.read_text())
        if section is None:
            section = {}
    if not isinstance(section, Mapping):
        raise SettingsError(
            f"kt_sft: got {type(section).__name__} {section!r}, expected settings such as "
            "`weights: int8` or the path of a YAML file that holds them"
        )
    return HybridExpertsSettings.from_mapping(section)
