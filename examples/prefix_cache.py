"""Answers several prompts that begin alike, and reads what they have in common once.

python examples/prefix_cache.py MODEL --prefix instructions.txt --prompt "First?" --prompt "Second?"
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import kt_sft


def main() -> None:
    """Prints every answer, whether it is the one without the cache, and what both took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter", help="of kt_sft")
    parser.add_argument("--weights", default="int8", help="int8, int4 or bf16")
    parser.add_argument("--prefix", type=Path, required=True, help="a text file")
    parser.add_argument("--prompt", action="append", required=True)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer at most")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=kt_sft.HybridExpertsConfig(weights=arguments.weights)
    )
    if arguments.adapter:
        model = PeftModel.from_pretrained(model, arguments.adapter)
    model = model.eval()

    def ids_of(text: str) -> torch.Tensor:
        ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        return ids

    def answer(ids: torch.Tensor, cache: DynamicCache | None) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=arguments.tokens,
            do_sample=False,
        )
        return out[0, ids.shape[1] :], time.perf_counter() - start

    # Tokens of the prefix and of a prompt are made apart: together, the last one of the prefix
    # could become another.
    prefix = ids_of(arguments.prefix.read_text())
    read = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prefix, past_key_values=read, use_cache=True)
    for prompt in arguments.prompt:
        ids = torch.cat((prefix, ids_of(prompt)), dim=1)
        # Generation writes into its cache, so that each prompt gets a copy.
        with_cache, short = answer(ids, copy.deepcopy(read))
        without, long = answer(ids, None)
        same = "the same" if torch.equal(with_cache, without) else "another"
        text = tokenizer.decode(with_cache, skip_special_tokens=True)
        sys.stdout.write(
            f"{prompt} {text}\n  {ids.shape[1]} tokens: {short:.2f} s with the cache, {long:.2f} s "
            f"without, whose answer is {same}\n"
        )


if __name__ == "__main__":
    main()
