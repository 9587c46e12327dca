"""The programs that adapters are written for: what each reads, and what it does not.

Every limit says which setting would have met it. docs/adapters.md has what was run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import transformers
from packaging import version

from kt_sft.errors import UnsupportedModelError
from kt_sft.export.base import Base
from kt_sft.export.fused import LAYOUTS, Slot, slots_of
from kt_sft.kernels import PROJECTIONS

# How the experts' factors are laid out: by the model's names, the same with a pair that all experts
# share stored once, by the checkpoint's names, or in PEFT's form for stacked parameters.
PER_EXPERT, SHARED, PUBLISHED = "per expert", "shared", "published"
FUSED_0_18, FUSED = LAYOUTS


class Trained(Protocol):
    """An adapter, or one that will be trained."""

    @property
    def base(self) -> Base:
        """What it changes."""

    @property
    def linear_modules(self) -> list[str]:
        """Modules with LoRA beside the experts."""

    @property
    def full(self) -> Mapping[str, str]:
        """What is trained in full, by name."""

    def ranks(self) -> dict[str, int]:
        """The rank of every module with LoRA, all experts of a layer being one."""

    def undivided(self, slot: Slot) -> bool:
        """Whether gate and up of a stacked parameter have one pair."""


@dataclass(frozen=True)
class Program:
    """One row.

    layout: of the experts, for an adapter; None where the program has no form for this base.
    one_rank: rank and alpha are one for all modules, as patterns are not read.
    ranks: those it admits; smaller factors are padded with zeros, which changes nothing.
    whole: every layer, expert and projection must be there; what lacks becomes zeros.
    together: modules of one parent of which it needs all or none.
    full: whether parameters that were trained in full can be in the adapter.
    of_experts: more that LoRA of experts must meet; yields what it does not.
    ignored: names of layers whose LoRA it does not compute.
    load: two lines that load the result, with {out} and {base}.
    """

    title: str
    tested: str
    layout: Callable[[Trained], str | None]
    load: tuple[str, str]
    one_rank: bool = False
    ranks: tuple[int, ...] = ()
    whole: bool = False
    together: tuple[tuple[str, ...], ...] = ()
    full: bool = True
    of_experts: Callable[[Trained], Iterator[str]] = field(default=lambda adapter: iter(()))
    ignored: frozenset[str] = frozenset()

    def admitted_rank(self, rank: int) -> int | None:
        """The smallest admitted rank that is not below; None where there is none."""
        return next((r for r in sorted(self.ranks) if r >= rank), None) if self.ranks else rank


def has_experts(adapter: Trained) -> bool:
    """Whether routed experts have LoRA."""
    return any(name.rpartition(".")[0] in adapter.base.layers for name in adapter.ranks())


def _model_type(adapter: Trained) -> str:
    return str(adapter.base.model.config.model_type)


def _always(layout: str) -> Callable[[Trained], str | None]:
    return lambda adapter: layout


def _separate_on_disk(adapter: Trained) -> bool:
    base = adapter.base
    return all(
        base.published_expert(path, projection, 0) is not None
        for path, layer in base.layers.items()
        for projection in layer.shape.projections
    )


# Families whose LoRA vLLM expects for stacked parameters; in the others the published names tell.
_VLLM_STACKED = ("gpt_oss", "qwen3_vl_moe", "qwen3_5_moe")


def _of_vllm(adapter: Trained) -> str | None:
    if _model_type(adapter).removesuffix("_text") in _VLLM_STACKED:
        return FUSED
    return PUBLISHED if _separate_on_disk(adapter) else None


def _of_llama_cpp(adapter: Trained) -> str | None:
    return PUBLISHED if _separate_on_disk(adapter) else None


def _peft_per_expert(adapter: Trained) -> Iterator[str]:
    """PEFT turns these keys into its own form for some families, and drops them in others."""
    known = ("qwen3_moe", "olmoe")
    if _model_type(adapter) not in known:
        yield (
            f"stock PEFT drops per-expert LoRA of {_model_type(adapter)} without an error (it "
            f"reads that of {' and '.join(known)}); use --to peft-fused"
        )
    beside = [m for m in adapter.linear_modules if m.rpartition(".")[2] in PROJECTIONS]
    if beside:
        yield (
            f"stock PEFT drops LoRA of {beside[0]} beside that of experts; use --to peft-fused, or "
            "train without it: lora_target with the attention's names, and expert_lora: true"
        )


# Families whose experts are other modules in newer releases of Transformers than in the pinned one.
_MOVED = ("aria", "granitemoe", "nemotron_h", "qwen3_omni_moe")
_MOVED_UNTIL = "5.24.0"


def _has_not_moved(adapter: Trained) -> Iterator[str]:
    """PEFT drops LoRA of parameters that are not there."""
    installed = transformers.__version__
    if _model_type(adapter).startswith(_MOVED) and (
        version.parse(installed) < version.parse(_MOVED_UNTIL)
    ):
        yield (
            f"Transformers has moved the experts of {_model_type(adapter)} since {installed}, and "
            "PEFT drops what it does not find, without an error; export with Transformers "
            f"{_MOVED_UNTIL} or later installed, or use --to merged"
        )


def _gated(adapter: Trained) -> Iterator[str]:
    shapes = {layer.shape.projections for layer in adapter.base.layers.values()}
    if PROJECTIONS not in shapes:
        yield "experts without a gate are not known to it; use --to merged"


def _in_peft(releases: str) -> tuple[str, str]:
    return (
        f"import peft, transformers  # {releases}",
        "model = peft.PeftModel.from_pretrained("
        "transformers.AutoModelForCausalLM.from_pretrained({base!r}), {out!r})",
    )


_ATTENTION = (("q_proj", "k_proj", "v_proj"),)

PROGRAMS: Mapping[str, Program] = {
    "kt_sft": Program(
        "kt_sft itself, to go on training, evaluate, chat and merge",
        "this version",
        _always(SHARED),
        (
            "import kt_sft, peft, transformers",
            "model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM."
            "from_pretrained({base!r}, quantization_config=kt_sft.HybridExpertsConfig()), {out!r})",
        ),
    ),
    "peft": Program(
        "stock PEFT 0.21 and later, per expert",
        "peft 0.21.2, transformers 5.24.0",
        _always(PER_EXPERT),
        _in_peft("PEFT 0.21 or later"),
        # It makes its own form of these keys, and of patterns by projection it makes nothing.
        one_rank=True,
        whole=True,
        of_experts=_peft_per_expert,
    ),
    "peft-fused": Program(
        "stock PEFT 0.19 and later",
        "peft 0.21.2, transformers 5.24.0",
        _always(FUSED),
        _in_peft("PEFT 0.19 or later"),
        of_experts=_has_not_moved,
    ),
    "peft-fused-0.18": Program(
        "stock PEFT 0.17 and 0.18",
        "peft 0.18.1, transformers 5.6.0",
        _always(FUSED_0_18),
        _in_peft("PEFT 0.17 or 0.18"),
    ),
    "vllm": Program(
        "vLLM",
        "0.33, its loading code",
        _of_vllm,
        (
            "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={out}",
            "curl localhost:8000/v1/completions -H 'Content-Type: application/json' "
            '-d \'{{"model": "tuned", "prompt": "..."}}\'',
        ),
        one_rank=True,
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        whole=True,
        full=False,
        of_experts=_gated,
    ),
    "sglang": Program(
        "SGLang",
        "0.5.23, its loading code",
        _always(PER_EXPERT),
        (
            "python -m sglang.launch_server --model-path {base} --enable-lora "
            "--lora-paths tuned={out} --lora-strict-loading",
            "curl localhost:30000/generate -H 'Content-Type: application/json' "
            '-d \'{{"text": "...", "lora_path": "tuned"}}\'',
        ),
        one_rank=True,
        whole=True,
        together=_ATTENTION,
        full=False,
        of_experts=_gated,
    ),
    "gguf": Program(
        "llama.cpp",
        "llama.cpp of October 2026",
        _of_llama_cpp,
        (
            "python convert_hf_to_gguf.py {base} --outfile base.gguf && "
            "python convert_lora_to_gguf.py {out} --base {base} --outfile {out}/adapter.gguf",
            "llama-server -m base.gguf --lora {out}/adapter.gguf",
        ),
        one_rank=True,
        whole=True,
        full=False,
        of_experts=_gated,
        # Of latent attention, whose products llama.cpp makes without looking for LoRA.
        ignored=frozenset(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
    ),
}


def widest_rank(program: Program, adapter: Trained) -> int:
    """The largest rank that is written; gate and up in one pair take the sum of theirs."""
    ranks = adapter.ranks()
    if program.layout(adapter) not in (FUSED, FUSED_0_18) or not has_experts(adapter):
        return max(ranks.values(), default=1)
    found = dict(ranks)
    for path, layer in adapter.base.layers.items():
        for slot in slots_of(layer):
            own = [f"{path}.{projection}" for projection in slot.parts]
            ranks_of_slot = [found.pop(name, 0) for name in own]
            undivided = adapter.undivided(slot)
            found[slot.parameter] = max(ranks_of_slot) if undivided else sum(ranks_of_slot)
    return max(found.values(), default=1)


def limits(program: Program, adapter: Trained) -> Iterator[str]:
    """What the adapter does not meet of what the program reads, with what would have met it."""
    if has_experts(adapter) and program.layout(adapter) is None:
        yield (
            f"{program.title} has no form for expert LoRA of {_model_type(adapter)}, whose experts "
            "share a tensor on disk; use --to merged"
        )
    if adapter.full and not program.full:
        yield (
            f"{len(adapter.full)} parameters were trained in full, the first is "
            f"{next(iter(adapter.full))}, and {program.title} takes LoRA only; train without "
            "additional_target and resize_vocab, or use --to merged"
        )
    try:
        rank = widest_rank(program, adapter)
    except UnsupportedModelError as error:
        yield str(error)
        return
    if program.admitted_rank(rank) is None:
        yield (
            f"lora_rank: the largest pair has rank {rank}, {program.title} admits up to "
            f"{max(program.ranks)}; train with a smaller lora_rank, or use --to merged"
        )
    if has_experts(adapter):
        yield from program.of_experts(adapter)
    ignored = [m for m in adapter.linear_modules if m.rpartition(".")[2] in program.ignored]
    if ignored:
        names = sorted({module.rpartition(".")[2] for module in ignored})
        yield (
            f"{program.title} ignores LoRA of {', '.join(names)} ({len(ignored)} layers) without "
            "an error; train with lora_target: o_proj,gate_proj,up_proj,down_proj, or use "
            "--to merged"
        )
