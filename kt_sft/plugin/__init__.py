"""The way in from LLaMA-Factory: the recipe's section, its commands, its API.

For nobody but the hook and cli.
"""
