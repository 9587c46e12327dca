"""The typed, checked face of the compiled core: every tensor is verified before its address leaves.

For every room that packs or computes.

Legend: T tokens, D hidden size, F intermediate size, E experts, K top-k, R = T*K routed rows,
r LoRA rank, Dp and Fp are D and F rounded up to a multiple of 64.
"""

from kt_sft.kernels.block import (
    NO_LORA,
    BlockReport,
    Call,
    Gradients,
    Inputs,
    Kept,
    Lora,
    LoraFactors,
    backward,
    backward_bytes,
    forward,
    kept_bytes,
    rows_by_expert,
    rows_within,
)
from kt_sft.kernels.engine import Engine
from kt_sft.kernels.formats import PROJECTIONS, CodedMatrix, Coding, WeightLayout
from kt_sft.kernels.gate import ACTIVATIONS, Gate
from kt_sft.kernels.isa import isa_report, kernel_rows, requested_isa, select_isa
from kt_sft.kernels.weights import ExpertWeights

__all__ = [
    "ACTIVATIONS",
    "NO_LORA",
    "PROJECTIONS",
    "BlockReport",
    "Call",
    "CodedMatrix",
    "Coding",
    "Engine",
    "ExpertWeights",
    "Gate",
    "Gradients",
    "Inputs",
    "Kept",
    "Lora",
    "LoraFactors",
    "WeightLayout",
    "backward",
    "backward_bytes",
    "forward",
    "isa_report",
    "kept_bytes",
    "kernel_rows",
    "requested_isa",
    "rows_by_expert",
    "rows_within",
    "select_isa",
]
