"""The configuration of a checkpoint by the classes that Transformers has, never by its own code.

Checkpoints of DeepSeek and Kimi bring a modelling file along, written for inference, whose experts
are one Linear layer each; where Transformers has the family, its own class is what trains.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from kt_sft.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

# Types by another name for a family that Transformers has -> the family.
_SAME_AS = {"kimi_k2": "deepseek_v3"}
# Types that a newer Transformers has, and from when on.
_SINCE = {"kimi_k25": "5.17"}


def own_class(found: Mapping[str, Any], where: str) -> type[PretrainedConfig]:
    """Transformers' class for the content of a config.json. Raises UnsupportedModelError."""
    model_type = found.get("model_type")
    name = _SAME_AS.get(str(model_type), str(model_type))
    if name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name]
    since = f"Transformers has it from {_SINCE[name]} on; upgrade" if name in _SINCE else "upgrade"
    raise UnsupportedModelError(
        f"{where}: model_type: got {model_type!r}, which the installed transformers "
        f"{transformers.__version__} does not have: {since} it. A checkpoint's own modelling code "
        "is never used"
    )


def read_config(name: str, **hub: Any) -> PretrainedConfig:
    """The configuration of a model on disk or on the Hub, without a trace of remote code.

    hub: revision, cache_dir and token, as Transformers takes them.
    """
    found, _ = PretrainedConfig.get_config_dict(name, **hub)
    known = own_class(found, f"{name}: config.json")
    remote = found.pop("auto_map", None)
    if remote or known.model_type != found.get("model_type"):
        logger.info(
            "%s: model type %s: computed by Transformers' own %s%s",
            name,
            found.get("model_type"),
            known.__name__.removesuffix("Config"),
            ", not by the modelling file of the checkpoint" if remote else "",
        )
    found["model_type"] = known.model_type
    config = known.from_dict(found)
    config._name_or_path = name
    return config
