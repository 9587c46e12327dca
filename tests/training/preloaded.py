"""What the fork server has ready beside the imports of the children's modules; imported last.

Each of these is loaded by a training when it comes there, and takes longer than a tiny one takes.
"""

import gc

import scipy.io  # noqa: F401  of a metric
import torchdata.stateful_dataloader  # noqa: F401
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForTextToWaveform,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401

# Looking a configuration up imports the configurations of every family.
for _models in (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForTextToWaveform,
):
    _models._model_mapping.keys()
MODEL_MAPPING.keys()

# A collection in a child would look through all of this, and so copy it.
gc.collect()
gc.freeze()
