"""Models that see: recipes with images train what stock LLaMA-Factory trains, with its losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from children import finish
from llamafactory_runs import RECIPE, Workplace
from PIL import Image
from recipe_runs import Recipe
from safetensors.torch import load_file
from tiny_configs import TINY_FAMILIES
from tiny_models import make_tokenizer, take_effective_weights
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from kt_sft import HybridExpertsConfig

EXPERTS = {"weights": "int8", "threads": 1}
TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}


def make_place(folder: Path, family: str) -> Workplace:
    """A model whose experts are exactly what int8 storage makes of them, and eight pictures."""
    tokenizer = make_tokenizer(folder / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS.values())})
    size = {"size": {"shortest_edge": 64, "longest_edge": 4096}}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**PATCHES, **size),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**PATCHES),
    ).save_pretrained(folder / "model")
    tiny = TINY_FAMILIES[family]
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in TOKENS.items()}
    text = {
        **tiny.config["text_config"], "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(tiny.model_type, **{**tiny.config, **ids, "text_config": text})
    stock = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    stock.save_pretrained(folder / "raw")
    hybrid = AutoModelForImageTextToText.from_pretrained(
        folder / "raw", quantization_config=HybridExpertsConfig(), dtype=torch.float32
    )
    take_effective_weights(stock, hybrid)
    stock.save_pretrained(folder / "model")
    data = folder / "data"
    data.mkdir()
    rows = []
    for i in range(8):
        Image.new("RGB", (32, 24 + 8 * (i % 2)), (30 * i, 255 - 30 * i, 90)).save(data / f"{i}.png")
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"<image>which {i}"},
                    {"role": "assistant", "content": "red green blue"[: 4 + i]},
                ],
                "images": [str(data / f"{i}.png")],
            }
        )
    (data / "seen.json").write_text(json.dumps(rows))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user",
            "assistant_tag": "assistant"}  # fmt: skip
    entry = {
        "file_name": "seen.json", "formatting": "sharegpt", "tags": tags,
        "columns": {"messages": "messages", "images": "images"},
    }  # fmt: skip
    (data / "dataset_info.json").write_text(json.dumps({"seen": entry}))
    return Workplace(folder)


@pytest.fixture(
    scope="module", params=["qwen3_vl_moe", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)]
)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_place(tmp_path_factory.mktemp(request.param), request.param)


def train(place: Workplace, name: str, **settings: Any) -> list[float]:
    recipe = {
        **RECIPE, "model_name_or_path": str(place.folder / "model"), "template": "qwen3_vl_nothink",
        "dataset_dir": str(place.folder / "data"), "dataset": "seen", "cutoff_len": 256,
        "output_dir": str(place.folder / name), "max_steps": 3, "image_max_pixels": 1024,
        "per_device_train_batch_size": 2, **settings,
    }  # fmt: skip
    code, text = finish(Recipe(str(place.folder / name), recipe))
    assert code == 0, text[-5000:]
    return place.losses(name)


def trained(place: Workplace, name: str) -> set[str]:
    return set(load_file(place.folder / name / "adapter_model.safetensors"))


FROZEN = {
    "tower frozen": {},
    "tower trained": {"freeze_vision_tower": False},
    "projector trained": {"freeze_vision_tower": False, "freeze_multi_modal_projector": False},
    "language frozen": {"freeze_vision_tower": False, "freeze_language_model": True},
}


@pytest.mark.parametrize("name", FROZEN)
def test_images_follow_stock(name: str, place: Workplace) -> None:
    """The same parameters beside the experts, the same losses; then LoRA on the experts, too."""
    settings, folder = FROZEN[name], name.replace(" ", "-")
    stock = train(place, f"{folder}-stock", **settings)
    section = {**EXPERTS, "expert_lora": False}
    hybrid = train(place, f"{folder}-hybrid", kt_sft=section, **settings)
    assert hybrid == pytest.approx(stock, abs=2e-3)
    assert trained(place, f"{folder}-hybrid") == trained(place, f"{folder}-stock")
    assert any("visual" in key for key in trained(place, f"{folder}-hybrid")) == (
        name != "tower frozen"
    )
    experts = train(place, f"{folder}-experts", kt_sft=EXPERTS, **settings)
    assert experts[0] == pytest.approx(stock[0], abs=2e-3)
    has_experts = any(".experts." in key for key in trained(place, f"{folder}-experts"))
    assert has_experts == (name != "language frozen")
