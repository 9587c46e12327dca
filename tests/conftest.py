"""Shared fixtures; helper modules of this folder are imported by name."""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# No test may reach a network, and each starts from the same defaults.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.pop("KT_SFT_DISABLE", None)
# Tests ask for threads whatever the machine has.
os.environ.setdefault("KT_SFT_OVERSUBSCRIBE", "1")

import torch

# Stores of test models go with the test run; the child processes of a test share them.
_STORES = tempfile.TemporaryDirectory(prefix="kt-sft-stores-")
os.environ["KT_SFT_STORE"] = _STORES.name

# The references are many small operations; threads would only wait for each other.
torch.set_num_threads(1)
