"""Writes an adapter for vLLM and asks it there; without vLLM, says how to start it.

python examples/serve_with_vllm.py MODEL ADAPTER --out outputs/for_vllm
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys


def main() -> None:
    """Exports, and generates where vLLM is installed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("--out", required=True)
    parser.add_argument("--prompt", default="2 and 2 are")
    arguments = parser.parse_args()
    subprocess.run(
        ["kt-sft", "export", arguments.adapter, "--to", "vllm", "--out", arguments.out,
         "--base", arguments.model],
        check=True,
    )  # fmt: skip
    if importlib.util.find_spec("vllm") is None:
        sys.stdout.write(
            "vLLM is not installed here; where it is:\n"
            f"vllm serve {arguments.model} --enable-lora --lora-modules mine={arguments.out}\n"
        )
        return
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(arguments.model, enable_lora=True)
    adapter = LoRARequest("mine", 1, arguments.out)
    answers = engine.generate(
        [arguments.prompt], SamplingParams(max_tokens=64), lora_request=adapter
    )
    sys.stdout.write(f"{answers[0].outputs[0].text}\n")


if __name__ == "__main__":
    main()
