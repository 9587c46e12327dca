"""The demo's knowledge: what every Python installation documents of itself.

Pure-Python modules are parsed and never imported, so that collecting has no side effects; only
built-in and extension modules, whose docstrings have no source to parse, are imported.
"""

from __future__ import annotations

import ast
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

# Easter eggs, GUIs, test suites, data tables, and `readline`, whose import writes to the terminal.
_SKIPPED_MODULES = frozenset(
    {"antigravity", "this", "tkinter", "_tkinter", "idlelib", "turtle", "turtledemo", "lib2to3"}
    | {"test", "tests", "__main__", "__phello__", "readline", "encodings", "pydoc_data"}
)
_SKIPPED_PREFIXES = ("_test", "_xx", "xx", "_ctypes_test")
_PUBLIC_HOME = {"posix": "os", "nt": "os"}


@dataclass(frozen=True)
class Function:
    """One documented function or method of the standard library."""

    module: str
    """Where users import it from (`xml.dom.minidom`, `builtins`)."""
    name: str
    """Its name within the module (`copytree`, `Thread.join`)."""
    signature: str
    """The parenthesised parameters without self, as in `(src, dst=None)`."""
    text: str
    """The documentation, without common indentation or trailing white space."""


def documented_functions() -> list[Function]:
    """Every public function with its signature, sorted by name; the same list on each call.

    Of functions that share a text (a method and its overrides) only the first is kept.
    """
    found: list[Function] = []
    for spec in _module_specs():
        if isinstance(spec.loader, SourceFileLoader):
            found.extend(_of_source(spec))
        elif spec.loader is BuiltinImporter or isinstance(spec.loader, ExtensionFileLoader):
            found.extend(_of_extension(spec.name))
    kept: dict[str, Function] = {}
    texts: set[str] = set()
    for function in sorted(found, key=lambda f: (f.name.count("."), f.module, f.name)):
        dotted, text = f"{function.module}.{function.name}", " ".join(function.text.split())
        public = not any(part.startswith("_") for part in dotted.split("."))
        if public and text and function.signature and dotted not in kept and text not in texts:
            kept[dotted] = function
            texts.add(text)
    return [kept[dotted] for dotted in sorted(kept)]


def language_reference() -> str:
    """The chapters of Python's language reference that its help() shows, as one text."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(_clean(topics[name]) for name in sorted(topics))


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


def _of_source(spec: ModuleSpec) -> Iterator[Function]:
    assert spec.origin is not None
    with tokenize.open(spec.origin) as file:
        tree = ast.parse(file.read())
    yield from _of_body(tree.body, spec.name, "", inside_class=False)


def _of_body(
    body: Iterable[ast.AST], module: str, prefix: str, inside_class: bool
) -> Iterator[Function]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _of_body(node.body, module, f"{prefix}{node.name}.", inside_class=True)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            if not any(decorator.endswith("property") for decorator in decorators):
                bound = inside_class and "staticmethod" not in decorators
                text = _clean(ast.get_docstring(node))
                yield Function(module, prefix + node.name, _signature(node, bound), text)
        else:
            # Definitions may sit under a platform test or in a try statement.
            yield from _of_body(ast.iter_child_nodes(node), module, prefix, inside_class)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool) -> str:
    parameters = node.args
    if bound:
        (parameters.posonlyargs or parameters.args)[:1] = []
    return f"({ast.unparse(parameters)})"


def _of_extension(name: str) -> Iterator[Function]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = importlib.import_module(name)
            home = _public_home(name)
    except ImportError:  # an optional extension whose shared library is not installed
        return
    for attribute, value in sorted(vars(module).items()):
        # An accelerator's object is documented where users import it from.
        if getattr(home, attribute, None) is not value or _is_alias(home, attribute, value):
            continue
        if inspect.isclass(value):
            for method, descriptor in sorted(vars(value).items()):
                if inspect.ismethoddescriptor(descriptor):
                    yield _of_object(descriptor, home.__name__, f"{attribute}.{method}", bound=True)
        elif inspect.isbuiltin(value):
            yield _of_object(value, home.__name__, attribute, bound=False)


def _public_home(name: str) -> ModuleType:
    public = _PUBLIC_HOME.get(name, name.lstrip("_"))
    return importlib.import_module(public if public in sys.stdlib_module_names else name)


def _is_alias(home: ModuleType, attribute: str, value: object) -> bool:
    own = getattr(value, "__name__", attribute)
    return own != attribute and getattr(home, own, None) is value


def _of_object(value: object, module: str, name: str, bound: bool) -> Function:
    text = _clean(getattr(value, "__doc__", None))
    signature = _text_signature(value, bound)
    # Extensions older than `__text_signature__` open their docstring with the call.
    call = re.match(rf"(?:\w+\.)*{re.escape(name.rpartition('.')[2])}(\(.*\))(?: ->.*)?", text)
    if call and not signature:
        signature = call[1]
        text = text[call.end() :].lstrip("\n :-")
    return Function(module, name, signature, text)


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
