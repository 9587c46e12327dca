"""The command `kt-sft`."""

from kt_sft.cli.main import main

__all__ = ["main"]
