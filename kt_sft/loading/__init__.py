"""Making a model a hybrid one: settings, swapping, packing, and what PEFT may put in.

For training, plugin, bench and cli. Importing it tells Transformers and PEFT of hybrid models.
"""

from kt_sft import patches
from kt_sft.loading.config import HybridExpertsConfig
from kt_sft.loading.in_memory import hybridize
from kt_sft.loading.quantizer import HybridExpertsQuantizer

for group in ("loading", "peft"):
    patches.install(group)

__all__ = ["HybridExpertsConfig", "HybridExpertsQuantizer", "hybridize"]
