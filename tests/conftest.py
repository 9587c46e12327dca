"""Shared settings; helper modules of this folder and of `training` are imported by name."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "accelerator"))
sys.path.insert(0, str(Path(__file__).parent / "training"))
sys.path.insert(0, str(Path(__file__).parent))

# No test may reach a network, and each starts from the same defaults.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.pop("KT_SFT_DISABLE", None)
# Tests ask for threads whatever the machine has.
os.environ.setdefault("KT_SFT_OVERSUBSCRIBE", "1")
# What DeepSpeed compiles, once for each clone: other programs' flags would have it compiled again.
os.environ["TORCH_EXTENSIONS_DIR"] = str(
    Path(__file__).parents[1] / ".cache" / "tests" / "deepspeed"
)

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

# Stores of test models go with the test run; the child processes of a test share them.
_STORES = tempfile.TemporaryDirectory(prefix="kt-sft-stores-")
os.environ["KT_SFT_STORE"] = _STORES.name
# So does what children write that have no other folder.
_CHILDREN = tempfile.TemporaryDirectory(prefix="kt-sft-children-")
os.environ["KT_SFT_TEST_CHILDREN"] = _CHILDREN.name

# The references are many small operations; threads would only wait for each other.
torch.set_num_threads(1)

TESTS = Path(__file__).parent
# What a test costs, by its file or the folder of it; the more expensive ones begin first.
COSTS = {
    "training/test_ranks.py": "ranks",
    "training/test_llamafactory.py": "process",
    "training/test_modes.py": "process",
    "training/test_recipes.py": "process",
    "training/test_survival.py": "process",
    "training/test_trackers.py": "process",
    "training/test_memory_plan.py": "process",
    "training/test_real_model.py": "process",
    "training/test_ppo.py": "process",
    "training/test_images.py": "process",
    "training/test_plugin.py": "process",
    "training/test_activations.py": "model",
    "training/test_gradients.py": "model",
    "training/test_health.py": "model",
    "store/test_library.py": "process",
    "native": "process",
    "accelerator": "process",
    "models": "model",
    "export": "model",
    "bench": "model",
    "doctor": "model",
    "forecast": "model",
    "report": "model",
    "docs/test_page_commands.py": "process",
    "docs/test_examples.py": "process",
    "docs/test_page_scripts.py": "process",
    "docs": "model",
    "test_package.py": "process",
    "test_demo.py": "process",
    "test_cli.py": "process",
    "test_patches.py": "process",
    "kernels": "unit",
    "device": "unit",
    "scheduling": "unit",
    "store": "unit",
    "test_comparators.py": "unit",
    "test_settings.py": "unit",
    "test_layers.py": "unit",
    "test_block_order.py": "unit",
}
_ORDER = list(dict.fromkeys(COSTS.values()))


def cost_of(path: Path) -> str:
    """The mark of a test file; the longest entry of COSTS that leads to it counts."""
    name = path.relative_to(TESTS).as_posix()
    found = [entry for entry in COSTS if name == entry or name.startswith(f"{entry}/")]
    if not found:
        raise pytest.UsageError(f"tests/{name}: has no cost; add it to COSTS in tests/conftest.py")
    return COSTS[max(found, key=len)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by their cost, and lets the expensive ones begin."""
    for item in items:
        item.add_marker(cost_of(item.path))
    items.sort(key=lambda item: _ORDER.index(cost_of(item.path)))


class _ByFile(LoadScopeScheduling):
    """A file stays in one process, which prepares things once; of the kernels, a function does."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, rest = nodeid.partition("::")
        return f"{file}::{rest.partition('[')[0]}" if "tests/kernels/" in file else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """Ours in the place of `--dist loadfile`."""
    return _ByFile(config, log) if config.getvalue("dist") == "loadfile" else None
