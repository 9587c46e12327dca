"""llama.cpp in a process of its own: its converter, and its runtime from a package.

convert ROOT SCRIPT ...     a script of llama.cpp's, which knows no tokenizer of ours and is told
complete BASE LORA IDS N    greedy tokens and all log-probabilities after IDS, as JSON
"""

from __future__ import annotations

import json
import runpy
import sys


def convert(root: str, script: str, *arguments: str) -> None:
    """Runs a converter of llama.cpp's sources at `root`."""
    sys.path[:0] = [root, f"{root}/gguf-py"]
    from conversion import base  # type: ignore[import-not-found]

    for kind in vars(base).values():
        if isinstance(kind, type) and "get_vocab_base_pre" in vars(kind):
            kind.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    sys.argv = [script, *arguments]
    runpy.run_path(f"{root}/{script}", run_name="__main__")


def complete(base: str, lora: str, ids: str, count: str) -> None:
    """Greedy completion on the CPU; lora is `-` for none."""
    import xllamacpp  # type: ignore[import-not-found]

    settings = xllamacpp.CommonParams()
    settings.model.path = base
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 256, 1, 0
    settings.warmup = False
    # Keys and values in fp32: in fp16 they tip routers, which a tiny random model makes worse.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = 1
    if lora != "-":
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = lora, 1.0
        settings.lora_adapters = [adapter]
    server, tokens, found = xllamacpp.Server(settings), json.loads(ids), []
    for _ in range(int(count)):
        answer = server.handle_completions(
            {"prompt": tokens, "n_predict": 1, "temperature": 0, "n_probs": 300,
             "cache_prompt": False}
        )  # fmt: skip
        if isinstance(answer, str | bytes):
            answer = json.loads(answer)
        step = answer["choices"][0]["logprobs"]["content"][0]
        found.append({t["id"]: t["logprob"] for t in step["top_logprobs"]})
        tokens.append(step["id"])
    sys.stdout.write(f"\n{json.dumps({'tokens': tokens, 'logprobs': found})}\n")


if __name__ == "__main__":
    {"convert": convert, "complete": complete}[sys.argv[1]](*sys.argv[2:])
