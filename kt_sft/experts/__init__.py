"""Routed experts as a torch module with the Transformers contract.

For loading, training and everything above them.
"""

from kt_sft.experts.meter import ExpertsMeter, MeterMark
from kt_sft.experts.module import HybridExperts, hybrid_experts_of
from kt_sft.experts.runtime import ExpertsRuntime

__all__ = [
    "ExpertsMeter",
    "ExpertsRuntime",
    "HybridExperts",
    "MeterMark",
    "hybrid_experts_of",
]
