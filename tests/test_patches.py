"""The register of patches: what it promises, and that it fits what is installed."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import kt_sft_autoload
from kt_sft import patches
from kt_sft.errors import PatchError
from kt_sft.patches import PATCHES, Patch

PACKAGE = Path(patches.__file__).parent

_REPORT = """
from kt_sft.patches import states
for state in states():
    print(f"{state.works}|{state.patch.place}|{state.text}")
"""


def report(path: str = "") -> dict[str, tuple[str, str]]:
    """Place -> (whether it works, what there is of it), in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _REPORT],
        env={**os.environ, "PYTHONPATH": path, "KT_SFT_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("|", 2) for line in done.stdout.splitlines() if "|" in line]
    return {place: (works, text) for works, place, text in rows}


def test_every_row_fits_what_is_installed() -> None:
    found = report()
    assert set(found) == {row.place for row in PATCHES}
    assert {place: state for place, state in found.items() if state[0] != "True"} == {}


# The functions of LLaMA-Factory's next release, 0.9.6.dev, by their signatures.
_NEXT = {
    "hparams/parser.py": """
def get_last_checkpoint(folder): ...
def read_args(args=None): ...
def _parse_args(parser, args=None, allow_extra_keys=False): ...
""",
    "train/tuner.py": "def export_model(args=None): ...",
    "launcher.py": "import subprocess",
    "api/app.py": "def create_app(chat_model): ...",
    "chat/hf_engine.py": """
class HuggingfaceEngine:
    @staticmethod
    def _process_args(model, tokenizer, processor, template, generating_args, messages,
                      system=None, tools=None, images=None, videos=None, audios=None,
                      input_kwargs={}): ...
""",
    "model/patcher.py": """
def configure_quantization(config, tokenizer, model_args, is_trainable, init_kwargs): ...
def configure_attn_implementation(config, model_args): ...
def resize_embedding_layer(model, tokenizer, new_tokens=None, new_special_tokens_config=None,
                           init_special_tokens="noise_init"): ...
""",
    "model/loader.py": """
def load_config(model_args): ...
def init_adapter(config, model, model_args, finetuning_args, is_trainable): ...
def count_parameters(model): ...
""",
}


def imitate(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        file = folder / "llamafactory" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        (file.parent / "__init__.py").touch()
    (folder / "llamafactory" / "__init__.py").touch()
    return str(folder)


def test_every_row_fits_the_next_llamafactory(tmp_path: Path) -> None:
    found = report(imitate(tmp_path, _NEXT))
    assert {place: state for place, state in found.items() if state[0] != "True"} == {}


def test_a_function_that_is_gone_or_changed_is_reported(tmp_path: Path) -> None:
    changed = {
        **_NEXT,
        "train/tuner.py": "def export_model(args=None, hub=None): ...",
        "api/app.py": "def make_app(chat_model): ...",
    }
    found = report(imitate(tmp_path, changed))
    wrong = {place: text for place, (works, text) in found.items() if works != "True"}
    export = wrong.pop("llamafactory.train.tuner:export_model")
    app = wrong.pop("llamafactory.api.app:create_app")
    assert wrong == {}
    assert "got (args, hub), expected (args)" in export and "tested: 0.9.5" in export
    assert "got no such place, expected (chat_model)" in app


@pytest.mark.slow
def test_every_row_fits_the_newest_releases(tmp_path: Path) -> None:
    """Of Transformers and PEFT; LLaMA-Factory says itself which of them it takes."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path)]
    subprocess.run([*install, "huggingface-hub", "tokenizers", "safetensors"], check=True)
    subprocess.run([*install, "--no-deps", "peft", "transformers"], check=True)
    found = report(str(tmp_path))
    ours = {p: s for p, s in found.items() if p.startswith(("transformers.", "peft."))}
    assert ours and {place: state for place, state in ours.items() if state[0] != "True"} == {}
    prefixes = ours["peft.tuners.tuners_utils:_get_tuner_state_dict_key_prefixes"][1]
    assert prefixes == "stock", "the newest PEFT has what 0.18 lacks"


def loud(stock: Callable, **given: str) -> Callable:
    def ours(*args: object) -> str:
        return f"ours{given or ''} {stock(*args)}"

    return ours


class Victim:
    """Another program's class."""

    def plain(self, one: int, two: int) -> str:
        return f"plain {one} {two}"

    @classmethod
    def of_class(cls, one: int) -> str:
        return f"{cls.__name__} {one}"

    @staticmethod
    def static(one: int) -> str:
        return f"static {one}"


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets the rows of the register to (name, signature) in a module of another program."""
    module = ModuleType("victims")
    module.Victim = type("Victim", (), dict(vars(Victim)))  # type: ignore[attr-defined]
    module.alone = lambda one: f"alone {one}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "victims", module)
    monkeypatch.setitem(patches.TESTED, "victims", "none")

    def rows(*wanted: tuple[str, str], since: str = "", fallback: str = "") -> None:
        made = (
            Patch("test", f"victims:{n}", signature, f"{__name__}:loud", "is loud", since, fallback)
            for n, signature in wanted
        )
        monkeypatch.setattr(patches, "PATCHES", tuple(made))

    yield rows
    patches.restore("test")


@pytest.mark.parametrize(
    ("name", "signature", "arguments", "stock"),
    [
        ("alone", "one", (1,), "alone 1"),
        ("Victim.plain", "self, one, two", (1, 2), "plain 1 2"),
        ("Victim.plain", "self, ...", (1, 2), "plain 1 2"),
        ("Victim.of_class", "cls, one", (1,), "Victim 1"),
        ("Victim.static", "one", (1,), "static 1"),
    ],
)
def test_installed_and_restored(
    register: Callable, name: str, signature: str, arguments: tuple, stock: str
) -> None:
    register((name, signature))
    victims = importlib.import_module("victims")

    def call() -> str:
        owner = victims.Victim() if "." in name else victims
        return getattr(owner, name.rpartition(".")[2])(*arguments)

    patches.install("test")
    patches.install("test")
    assert call() == f"ours {stock}"
    patches.install("test", voice="high")
    assert call() == f"ours{{'voice': 'high'}} {stock}"
    patches.restore("test")
    patches.restore("test")
    assert call() == stock


def test_what_was_added_by_others_stays(register: Callable) -> None:
    register(("alone", "one"))
    victims = importlib.import_module("victims")
    patches.install("test")
    victims.alone = functools.partial(lambda inner, one: f"theirs {inner(one)}", victims.alone)
    patches.install("test")
    assert victims.alone(1) == "theirs ours alone 1"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("alone", "one"), ("Victim.plain", "self, one")],
         r"victims:Victim.plain: got \(self, one, two\), expected \(self, one\)"),
        ([("alone", "one"), ("Victim.plain", "self, two, ...")], r"got \(self, one, two\)"),
        ([("alone", "one"), ("Victim.gone", "self")], "victims:Victim.gone: got no such place"),
        ([("alone", "one"), ("Nobody.gone", "self")], "victims:Nobody.gone: got no such place"),
    ],
    ids=["fewer", "others", "no function", "no class"],
)  # fmt: skip
def test_a_misfit_is_an_error_and_changes_nothing(
    register: Callable, rows: list[tuple[str, str]], message: str
) -> None:
    register(*rows)
    victims = importlib.import_module("victims")
    with pytest.raises(PatchError, match=message):
        patches.install("test")
    assert victims.alone(1) == "alone 1"


@pytest.mark.parametrize("version", ["1.9", "2.0.dev1"])
def test_a_fallback_is_named(
    register: Callable, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(patches, "_version", lambda program: version)
    register(("gone", "one"), since="2.0", fallback="nothing is loud")
    patches.install("test")
    assert [s.text for s in patches.states()] == ["not needed: before victims 2.0 nothing is loud"]


def test_a_release_that_should_have_the_place_has_no_fallback(
    register: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "_version", lambda program: "2.0")
    register(("gone", "one"), since="2.0", fallback="nothing is loud")
    with pytest.raises(PatchError, match="got no such place"):
        patches.install("test")


def test_what_is_not_installed_is_no_misfit(register: Callable) -> None:
    register(("gone", "one"))
    assert [(s.text, s.works) for s in patches.states()] == [("not installed", True)]


def test_a_broken_installation_is_reported(
    register: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(("alone", "one"))
    monkeypatch.setattr(patches, "_version", lambda program: "2.0")

    def broken(name: str) -> ModuleType:
        raise OSError("no such library")

    monkeypatch.setattr(patches.importlib, "import_module", broken)
    assert [(s.text, s.works) for s in patches.states()] == [("OSError: no such library", False)]


def test_a_module_that_is_imported_anew_is_patched_anew(
    register: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(("alone", "one"))
    patches.install("test")
    again = ModuleType("victims")
    again.alone = lambda one: f"again {one}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "victims", again)
    patches.install("test")
    assert again.alone(1) == "ours again 1"
    patches.restore("test")
    assert again.alone(1) == "again 1"


def test_a_group_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="no group 'trainers'"):
        patches.install("trainers")
    assert set(kt_sft_autoload.HOOKED) <= {row.group for row in PATCHES}


def test_lists_that_others_have_imported_are_extended() -> None:
    """PPO takes DEFAULT_CALLBACKS by its name, before a recipe is read."""
    program = """
from transformers.trainer import DEFAULT_CALLBACKS
from kt_sft.training.callback import register
register()
register()
print([c.__name__ for c in DEFAULT_CALLBACKS])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    ours = ["HybridExpertsMetrics", "RunGuard", "RunHealth"]
    ours += ["WaitingGradients", "ResidentExperts", "RunReport"]
    names = ["DefaultFlowCallback", *ours]
    assert done.stdout.splitlines()[-1] == str(names)


# Of a process that is about to hand over to another program, whose arguments these are.
_ALLOWED = {("recipes.py", "sys.argv")}


def replaced_names(file: Path) -> Iterator[str]:
    """Attributes of other programs that a file assigns, "module.name"."""
    tree = ast.parse(file.read_text())
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("kt_sft"):
            foreign |= {a.asname or a.name for a in node.names}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            targets = [ast.Attribute(node.args[0], ast.unparse(node.args[1]))]
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if root is not target and isinstance(root, ast.Name) and root.id in foreign:
                yield ast.unparse(target)


def test_nothing_is_replaced_outside_of_the_register() -> None:
    for row in PATCHES:
        assert callable(patches._maker(row)), row.make
    found = {(f.name, n) for f in PACKAGE.rglob("*.py") for n in replaced_names(f)}
    assert found == _ALLOWED


def test_a_replaced_function_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("from transformers import Trainer\nTrainer.train = lambda self: None\n")
    assert list(replaced_names(file)) == ["Trainer.train"]
