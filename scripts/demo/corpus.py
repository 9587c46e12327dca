"""The demo's text: the documentation that every Python installation carries of itself.

Pure-Python modules are parsed and never imported, so that collecting has no side effects; only
built-in and extension modules, whose docstrings have no source to parse, are imported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import BuiltinImporter, ExtensionFileLoader, ModuleSpec, SourceFileLoader
from types import ModuleType

_SKIPPED_MODULES = frozenset(
    # Easter eggs, GUIs, test suites, data tables, and `readline`, whose import writes to the
    # terminal.
    [
        "antigravity",
        "this",
        "idlelib",
        "turtledemo",
        "turtle",
        "lib2to3",
        "test",
        "tests",
        "__main__",
        "__phello__",
        "readline",
        "_tkinter",
        "encodings",
        "pydoc_data",
    ]
)
_SKIPPED_PREFIXES = ("_test", "_xx", "xx", "_ctypes_test")
_HELD_OUT_ONE_IN = 50
_PUBLIC_HOME = {"posix": "os", "nt": "os"}


@dataclass(frozen=True)
class Entry:
    """One documented object of the standard library, or one topic of the language reference."""

    name: str
    """Dotted name as a user writes it (`shutil.copytree`, `str.join`), or the topic's title."""
    kind: str
    """One of `module`, `class`, `function`, `property`, `topic`."""
    signature: str
    """The parenthesised parameters, as in `(src, dst)`; empty where there are none to show."""
    text: str
    """The documentation itself, without common indentation or trailing white space."""

    @property
    def document(self) -> str:
        """The entry as a reference manual prints it: a heading, a blank line, the text."""
        prefix = "" if self.kind in ("function", "property") else f"{self.kind} "
        return f"{prefix}{self.name}{self.signature}\n\n{self.text}\n"

    @property
    def is_public(self) -> bool:
        """Whether no part of the name is private; special methods (`__len__`) count as public."""
        return not any(
            part.startswith("_") and not part.endswith("__") for part in self.name.split(".")
        )


def collect() -> list[Entry]:
    """Return every documented object once, sorted by name; the same on each call.

    Of objects that share a text (a method and its overrides) only the first is kept.
    """
    found: list[Entry] = list(_topics())
    for spec in _module_specs():
        if isinstance(spec.loader, SourceFileLoader):
            found.extend(_entries_of_source(spec))
        elif spec.loader is BuiltinImporter or isinstance(spec.loader, ExtensionFileLoader):
            found.extend(_entries_of_extension(spec.name))
    found.sort(key=lambda entry: (not entry.is_public, entry.name.count("."), entry.name))
    entries: list[Entry] = []
    names: set[str] = set()
    texts: set[str] = set()
    for entry in found:
        text = " ".join(entry.text.split())
        if entry.name not in names and text not in texts:
            names.add(entry.name)
            texts.add(text)
            entries.append(entry)
    return sorted(entries, key=lambda entry: entry.name)


def is_held_out(entry: Entry) -> bool:
    """Whether no model of the demo may be trained on `entry`: one entry of 50, by its name."""
    digest = hashlib.sha256(entry.name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def _module_specs() -> Iterator[ModuleSpec]:
    for name in sorted(sys.stdlib_module_names - _SKIPPED_MODULES):
        if name.startswith(_SKIPPED_PREFIXES):
            continue
        spec = importlib.util.find_spec(name)
        if spec is not None:
            yield spec
            yield from _submodule_specs(spec)


def _submodule_specs(package: ModuleSpec) -> Iterator[ModuleSpec]:
    for finder, name, _ in pkgutil.iter_modules(package.submodule_search_locations or []):
        if name in _SKIPPED_MODULES:
            continue
        spec = finder.find_spec(f"{package.name}.{name}", None)
        if spec is not None:
            yield spec
            yield from _submodule_specs(spec)


def _topics() -> Iterator[Entry]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in topics.items():
        yield Entry(name, "topic", "", _clean(text))


def _entries_of_source(spec: ModuleSpec) -> Iterator[Entry]:
    assert spec.origin is not None
    with tokenize.open(spec.origin) as file:
        tree = ast.parse(file.read())
    if text := _clean(ast.get_docstring(tree)):
        yield Entry(spec.name, "module", "", text)
    yield from _entries_of_body(tree.body, spec.name, inside_class=False)


def _entries_of_body(body: Iterable[ast.AST], prefix: str, inside_class: bool) -> Iterator[Entry]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            name = f"{prefix}.{node.name}"
            if text := _clean(ast.get_docstring(node)):
                yield Entry(name, "class", _class_signature(node), text)
            yield from _entries_of_body(node.body, name, inside_class=True)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if text := _clean(ast.get_docstring(node)):
                decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
                name = f"{prefix}.{node.name}"
                if any(decorator.endswith("property") for decorator in decorators):
                    yield Entry(name, "property", "", text)
                else:
                    bound = inside_class and "staticmethod" not in decorators
                    yield Entry(name, "function", _signature(node, bound), text)
        else:
            # Definitions may sit under a platform test or in a try statement.
            yield from _entries_of_body(ast.iter_child_nodes(node), prefix, inside_class)


def _class_signature(node: ast.ClassDef) -> str:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _signature(item, bound=True)
    return ""


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool) -> str:
    parameters = node.args
    if bound:
        (parameters.posonlyargs or parameters.args)[:1] = []
    return f"({ast.unparse(parameters)})"


def _entries_of_extension(name: str) -> Iterator[Entry]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = importlib.import_module(name)
            home = _public_home(name)
    except ImportError:  # an optional extension whose shared library is not installed
        return
    if home is module and (text := _clean(inspect.getdoc(module))):
        yield Entry(name, "module", "", text)
    prefix = "" if name == "builtins" else f"{home.__name__}."
    for attribute, value in sorted(vars(module).items()):
        # An accelerator's object is documented where users import it from.
        if getattr(home, attribute, None) is not value or _is_alias(home, attribute, value):
            continue
        if inspect.isclass(value):
            yield from _entries_of_type(value, prefix + attribute)
        elif inspect.isbuiltin(value):
            yield from _described(value, prefix + attribute, "function", bound=False)


def _public_home(name: str) -> ModuleType:
    public = _PUBLIC_HOME.get(name, name.lstrip("_"))
    return importlib.import_module(public if public in sys.stdlib_module_names else name)


def _is_alias(home: ModuleType, attribute: str, value: object) -> bool:
    own = getattr(value, "__name__", attribute)
    return own != attribute and getattr(home, own, None) is value


def _entries_of_type(cls: type, name: str) -> Iterator[Entry]:
    yield from _described(cls, name, "class", bound=False)
    for attribute, value in sorted(vars(cls).items()):
        if inspect.ismethoddescriptor(value):
            yield from _described(value, f"{name}.{attribute}", "function", bound=True)
        elif inspect.isdatadescriptor(value):
            yield from _described(value, f"{name}.{attribute}", "property", bound=True)


def _described(value: object, name: str, kind: str, bound: bool) -> Iterator[Entry]:
    text = _clean(getattr(value, "__doc__", None))
    signature = ""
    if kind != "property":
        signature = _text_signature(value, bound)
        # Extensions older than `__text_signature__` open their docstring with the call.
        call = re.match(rf"(?:\w+\.)*{re.escape(name.rpartition('.')[2])}(\(.*\))(?: ->.*)?", text)
        if kind == "function" and call and not signature:
            signature = call[1]
            text = text[call.end() :].lstrip("\n :-")
    if text:
        yield Entry(name, kind, signature, text)


def _text_signature(value: object, bound: bool) -> str:
    try:
        signature = inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError):  # no signature, or one `inspect` cannot read
        return ""
    parameters = list(signature.parameters.values())[1 if bound else 0 :]
    return str(signature.replace(parameters=parameters))


def _clean(text: object) -> str:
    if not isinstance(text, str):  # no docstring, or a type whose instances have their own
        return ""
    return "\n".join(line.rstrip() for line in inspect.cleandoc(text).splitlines()).strip()
