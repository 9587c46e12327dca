"""The plug-in hook of kt_sft: loaded at the end of `import torch`, standard library only.

A module beside the package, so that nothing of the package is imported with torch: whatever has
happened to the package, `import torch` works. It waits for LLaMA-Factory to be imported and then
hands over to `kt_sft.plugin`. With KT_SFT_DISABLE=1 it does nothing.
"""

import importlib.abc
import importlib.util
import os
import sys

HOOKED = (
    "llamafactory.api.app",
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
        try:
            from kt_sft.plugin.llamafactory import hook

            hook(module.__name__)
        except (Exception, SystemExit) as error:
            # LLaMA-Factory goes on, and refuses a recipe with our section as unknown.
            _say(error)


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


def _say(error):  # type: ignore[no-untyped-def]
    sys.stderr.write(f"kt_sft: the plug-in hook is off: {error!r}\n")


def plugin_disabled() -> bool:
    """Whether KT_SFT_DISABLE switches the hook off; 0, false, no, off and nothing do not."""
    return os.environ.get("KT_SFT_DISABLE", "").strip().lower() not in (
        "", "0", "false", "no", "off",
    )  # fmt: skip


def install() -> None:
    """Entry point of the group `torch.backends`. Safe to call more than once."""
    try:
        if plugin_disabled():
            return
        if not any(isinstance(f, _Finder) for f in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:
        # Anything raised here would break `import torch` for every program of this environment.
        _say(error)
