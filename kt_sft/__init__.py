"""Fine-tuning of Mixture-of-Experts models whose routed experts stay in host memory.

Names are imported on first use: `kt-sft --help` and the settings need neither torch nor
Transformers. The plug-in hook of LLaMA-Factory is the module `kt_sft_autoload` beside this package.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "HybridExpertsConfig": "kt_sft.loading",
    "HybridExpertsCallback": "kt_sft.training.callback",
    "hybridize": "kt_sft.loading",
    "HybridExpertsSettings": "kt_sft.config",
}

__all__ = ["HybridExpertsCallback", "HybridExpertsConfig", "HybridExpertsSettings", "hybridize"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'kt_sft' has no attribute {name!r}")
