"""Trains a model whose packed experts are larger than its memory, in a control group (as root).

    python scripts/disk_tier.py [--limit GB] [--tokens N] [--layers N] [--folder FOLDER]

Three children: with all the memory there is, and limited, with and without reading ahead. A table
at the end: seconds of a step, bytes that came from the disk, their rate, and what part that is of
what the disk reads past the page cache. The losses must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ROOT = Path("/sys/fs/cgroup")
_STEPS = 4
SHAPE = {
    "vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 1024,
    "moe_intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True,
}  # fmt: skip


@contextmanager
def memory_limit(nbytes: int) -> Iterator[Path]:
    """A control group with so much memory, page cache included; the folder to enter it by.

    Raises OSError where this system gives none.
    """
    first = (_ROOT / "memory" / "cgroup.procs").exists()
    parent = _ROOT / "memory" if first else _ROOT
    group = parent / f"kt-sft-{os.getpid()}"
    group.mkdir()
    try:
        limit = "memory.limit_in_bytes" if first else "memory.max"
        (group / limit).write_text(str(nbytes))
        yield group
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:  # its last process is on its way out
                time.sleep(0.1)


def make_checkpoint(folder: Path, layers: int) -> None:
    """Random weights, the same numbers again and again."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen3_moe", num_hidden_layers=layers, **SHAPE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    drawn = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            tile = torch.ones(1) if p.dim() == 1 else drawn * p.shape[-1] ** -0.5
            for part in p.view(-1).split(1 << 20):
                part.copy_(tile[: len(part)] if len(tile) > 1 else tile)
    model.save_pretrained(folder, max_shard_size="1GB")


def read_bytes() -> int:
    """Of this process, from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def child(arguments: argparse.Namespace) -> None:
    """One way of training; prints a line of JSON."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from kt_sft import HybridExpertsConfig
    from kt_sft.experts import hybrid_experts_of

    torch.manual_seed(0)
    config = HybridExpertsConfig(
        disk_tier=True, activations="recompute", store=str(arguments.folder / "stores")
    )
    model = AutoModelForCausalLM.from_pretrained(
        arguments.folder / "model", quantization_config=config, dtype=torch.bfloat16
    )
    targets = ["q_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    modules = list(hybrid_experts_of(model).values())
    if arguments.child == "without":
        modules[0].runtime.read_ahead = lambda direction, path: None
    model.train().enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, 1000, (1, arguments.tokens))
    seconds, losses, read = [], [], 0
    for step in range(_STEPS + 1):
        if step == 1:  # the first one warms everything up
            read = read_bytes()
        start = time.perf_counter()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item().hex())
    result = {
        "seconds": sorted(seconds[1:])[_STEPS // 2],
        "read": (read_bytes() - read) / _STEPS,
        "losses": losses,
        "experts": sum(m.weights.nbytes for m in modules if m.weights is not None),
    }
    sys.stdout.write(json.dumps(result) + "\n")


def run(arguments: argparse.Namespace, way: str, limit: int | None) -> dict[str, Any]:
    """A child, in a group of its own if there is a limit."""
    words = [sys.executable, __file__, "--child", way, "--folder", str(arguments.folder)]
    words += ["--tokens", str(arguments.tokens)]

    def start(group: Path | None) -> dict[str, Any]:
        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
        if done.returncode:
            raise SystemExit(f"{way}: exit status {done.returncode}")
        return json.loads(done.stdout.splitlines()[-1])

    # What is cached already belongs to whoever has read it.
    for store in (arguments.folder / "stores").glob("*.safetensors"):
        with store.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if limit is None:
        return start(None)
    with memory_limit(limit) as group:
        return start(group)


def main(argv: Sequence[str] | None = None) -> int:
    """1 where losses differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=float, default=1.5, help="GB of memory")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="for the model and its store")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        child(arguments)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        arguments.folder = Path(folder)
        make_checkpoint(arguments.folder / "model", arguments.layers)
        return compare(arguments)


def compare(arguments: argparse.Namespace) -> int:
    """Runs the children and prints the table."""
    from kt_sft.machine.disk import read_rate

    limit = int(arguments.limit * 1e9)
    found = {
        "enough memory": run(arguments, "ahead", None),
        "limited, reading ahead": run(arguments, "ahead", limit),
        "limited, without": run(arguments, "without", limit),
    }
    (store,) = (arguments.folder / "stores").glob("*.safetensors")
    rate = read_rate(store, nbytes=1 << 30, seconds=10.0) or 0.0
    experts = next(iter(found.values()))["experts"]
    sys.stdout.write(
        f"experts {experts / 1e9:.2f} GB, limit {arguments.limit} GB, {arguments.tokens} tokens, "
        f"disk {rate / 1e9:.2f} GB/s\n| | s a step | GB read | GB/s | of the disk's rate |\n"
        "|---|---|---|---|---|\n"
    )
    for name, one in found.items():
        reads = one["read"] / one["seconds"]
        part = f"{reads / rate:.2f}" if rate else "-"
        sys.stdout.write(
            f"| {name} | {one['seconds']:.2f} | {one['read'] / 1e9:.2f} | {reads / 1e9:.2f} "
            f"| {part} |\n"
        )
    same = len({tuple(one["losses"]) for one in found.values()}) == 1
    sys.stdout.write(f"losses are {'the same' if same else 'DIFFERENT'}\n")
    return 0 if same and found["limited, reading ahead"]["read"] > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
