"""The code of vLLM and SGLang that reads an adapter, without an engine: what it makes of a folder.

    vllm FOLDER OUT NAMES EXPERTS    EXPERTS: number of experts of a stacked adapter, 0 for others
    sglang FOLDER OUT BASE

OUT gets the matrices that each would compute with, by the names that it has for them.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch


def vllm(folder: str, out: str, names: str, experts: str) -> None:
    """As its worker does: settings, their check, tensors, and experts stacked by its manager."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora import lora_model
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.peft_helper import PEFTHelper

    lora_model.PIN_MEMORY = False  # which asks a GPU's driver
    helper = PEFTHelper.from_local_dir(folder, None)
    helper.validate_legal(LoRAConfig(max_lora_rank=max(8, helper.r)))
    model = LoRAModel.from_local_checkpoint(
        folder, set(json.loads(names)), helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    count = int(experts)
    manager = SimpleNamespace(
        _is_3d_moe_model=True,
        _get_lora_layer_weights=lambda lora, name: lora.get_lora(name),
    )
    found: dict[str, tuple] = {}
    for name in [n for n in model.loras if count and n.endswith(".experts")]:
        module = SimpleNamespace(
            w13_lora_a_stacked=[torch.zeros(1, count)], global_num_experts=count, ep_rank=0
        )
        LoRAModelManager._stack_moe_lora_weights(manager, model, module, name)
    for name, lora in model.loras.items():
        found[name] = (lora.lora_a, lora.lora_b, float(lora.scaling))
    torch.save(found, out)


def sglang(folder: str, out: str, base: str) -> None:
    """As its manager does, up to the buffers of an accelerator."""
    from safetensors.torch import load_file
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig
    from transformers import AutoConfig

    config, backend = AutoConfig.from_pretrained(base), SimpleNamespace()
    adapter = LoRAAdapter("tuned", LoRAConfig(folder), config, LoadConfig(), backend)
    # Its own iterator over files asks a server for settings.
    adapter.initialize_weights_from_tensors(load_file(f"{folder}/adapter_model.safetensors"))
    found = {name: t for layer in adapter.layers for name, t in layer.weights.items()}
    torch.save({"weights": found, "scaling": adapter.scaling}, out)


if __name__ == "__main__":
    {"vllm": vllm, "sglang": sglang}[sys.argv[1]](*sys.argv[2:])
