"""A process that runs a PPO recipe: `ppo_child.py RECIPE.json BASE REPORT.json`.

LLaMA-Factory's PPO takes no trl but the one of early 2024, which its other stages no longer take,
and Transformers 5 has since lost two attributes that it reads. They are put back here, for the
stock run as for ours, and its bf16 autocast is taken out, whose noise would cover differences; its
own code does the training.

The report has, for every pass of the reference, how far its log-probabilities are from those of
the stock base, and from those of the policy.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

for stage, entry in (("dpo", "run_dpo"), ("kto", "run_kto")):
    absent = ModuleType(f"llamafactory.train.{stage}")
    setattr(absent, entry, None)
    sys.modules[absent.__name__] = absent

import llamafactory.train.tuner as tuner  # noqa: E402
import torch  # noqa: E402
from llamafactory.train.ppo.trainer import CustomPPOTrainer  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase  # noqa: E402

recipe, base, report = sys.argv[1:]


def train_in_fp32() -> None:
    build = CustomPPOTrainer.__init__

    def __init__(self: Any, **arguments: Any) -> None:
        build(self, **arguments)
        self.amp_context = nullcontext()

    CustomPPOTrainer.__init__ = __init__


def restore_what_transformers_lost() -> None:
    PreTrainedTokenizerBase.additional_special_tokens_ids = property(lambda self: [])
    CustomPPOTrainer.processing_class = property(lambda self: self.tokenizer)


def watch_the_reference() -> None:
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    passes = CustomPPOTrainer.batched_forward_pass
    rows: list[list[float]] = []

    def log_probabilities(inputs: dict[str, torch.Tensor], model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]

    def batched_forward_pass(self: Any, model: Any, queries: Any, responses: Any, inputs: Any,
                             *rest: Any, **more: Any) -> Any:  # fmt: skip
        result = passes(self, model, queries, responses, inputs, *rest, **more)
        policy = self.accelerator.unwrap_model(model).pretrained_model
        layers = [m for m in policy.modules() if isinstance(m, BaseTunerLayer)]
        if all(layer.disable_adapters for layer in layers):
            mask = result[3].bool()
            got = result[0].detach()
            want = log_probabilities(inputs, stock)
            for layer in layers:
                layer.enable_adapters(True)
            now = log_probabilities(inputs, policy)
            for layer in layers:
                layer.enable_adapters(False)
            rows.append([float((got - x)[mask].abs().max()) for x in (want, now)])
            Path(report).write_text(json.dumps(rows))
        return result

    CustomPPOTrainer.batched_forward_pass = batched_forward_pass


torch.set_num_threads(1)
restore_what_transformers_lost()
train_in_fp32()
watch_the_reference()
tuner.run_exp(json.loads(Path(recipe).read_text()))
