"""The plug-in hook: loaded at the end of `import torch`, standard library only, never raises.

It waits for LLaMA-Factory to be imported and then hands over to `kt_sft.integrations`. With
KT_SFT_DISABLE=1 it does nothing.
"""

import importlib.abc
import importlib.util
import os
import sys

HOOKED = (
    "llamafactory.launcher",
    "llamafactory.hparams.parser",
    "llamafactory.train.tuner",
)


class _AfterImport(importlib.abc.Loader):
    """A module's own loader, followed by our hook."""

    def __init__(self, loader):  # type: ignore[no-untyped-def]
        self._loader = loader

    def __getattr__(self, name):  # type: ignore[no-untyped-def]
        return getattr(self._loader, name)

    def create_module(self, spec):  # type: ignore[no-untyped-def]
        return self._loader.create_module(spec)

    def exec_module(self, module):  # type: ignore[no-untyped-def]
        module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        from kt_sft.integrations.llamafactory import HOOKS

        HOOKS[module.__name__](module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the hooked modules where they are and wraps their loaders, each once."""

    def __init__(self):  # type: ignore[no-untyped-def]
        self._waiting = set(HOOKED)

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname not in self._waiting:
            return None
        self._waiting.discard(fullname)  # the search below must not come back here
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _AfterImport(spec.loader)
        return spec


def install() -> None:
    """Entry point of the group `torch.backends`. Safe to call more than once."""
    try:
        if os.environ.get("KT_SFT_DISABLE", "").lower() in ("1", "true", "yes"):
            return
        if not any(isinstance(f, _Finder) for f in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:
        # Anything raised here would break `import torch` for every program of this environment.
        sys.stderr.write(f"kt_sft: the plug-in hook is off: {error!r}\n")
