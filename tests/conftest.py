"""Shared fixtures; helper modules of this folder are imported by name."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# No test may reach a network, and each starts from the same defaults.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.pop("KT_SFT_DISABLE", None)

import torch

# The references are many small operations; threads would only wait for each other.
torch.set_num_threads(1)
