"""The command `kt-sft`. For people."""

import os

# Before anything imports torch, whose OpenMP library reads it once, on loading: its waiting threads
# would spin on the cores that the experts compute on.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from kt_sft.cli.main import main

__all__ = ["main"]
