"""Versions against what is required and what was tested, the plug-in's hook, and the patches."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement

import kt_sft_autoload
from kt_sft.config import shipped_folder
from kt_sft.doctor.findings import NOTE, PROBLEM, WARNING, Finding
from kt_sft.patches import TESTED, states

_SECTION = "packages"
# Without those that follow the first group some part of LLaMA-Factory or a setting is missing.
_NEEDED = ("torch", "transformers", "peft", "accelerate", "safetensors")
_OPTIONAL = {
    "llamafactory": "recipes need it: pip install 'kt_sft[llamafactory]'",
    "trl": "preference training needs it; LLaMA-Factory brings it",
    "datasets": "recipes need it; LLaMA-Factory brings it",
    "deepspeed": "ZeRO needs it: pip install 'kt_sft[deepspeed]'",
    "bitsandbytes": "quantization_bit needs it: pip install 'kt_sft[quantized]'",
    "wandb": "report_to: wandb needs it: pip install 'kt_sft[wandb]'",
}
_ASKING = ("kt_sft", "llamafactory")


def packages() -> Iterator[Finding]:
    """Every package that matters: its version, what asks for another, and the tested one."""
    yield Finding(_SECTION, "python", platform.python_version())
    yield Finding(_SECTION, "kt_sft", installed("kt_sft") or "not installed, run from its folder")
    tested = _tested()
    for name in (*_NEEDED, *_OPTIONAL):
        found = installed(name)
        if found is None:
            needed = name in _NEEDED
            hint = f"pip install {name}" if needed else _OPTIONAL[name]
            yield Finding(_SECTION, name, "not installed", PROBLEM if needed else NOTE, hint)
            continue
        wrong = [f"{asks} wants {name} {wanted}" for asks, wanted in _wanted(name, found)]
        known = tested.get(name)
        differs = f" (tested: {known})" if known not in (None, found) else ""
        yield Finding(
            _SECTION,
            name,
            f"{found}{differs}",
            WARNING if wrong else NOTE if differs else "ok",
            f"{'; '.join(wrong)}: pip install {name}{'==' + known if known else ''}"
            if wrong
            else "",
            {"installed": found, "tested": known},
        )


def plugin() -> Iterator[Finding]:
    """Whether recipes get their section read, and where the shipped recipes are."""
    off = kt_sft_autoload.plugin_disabled()
    yield Finding(
        _SECTION,
        "plug-in hook",
        "off (KT_SFT_DISABLE)" if off else "on",
        NOTE if off else "ok",
        "llamafactory-cli refuses the kt_sft section; `kt-sft train RECIPE` reads it"
        if off
        else "",
    )
    yield Finding(_SECTION, "recipes", str(shipped_folder() / "recipes"))


def patches() -> Iterator[Finding]:
    """Every function of another program that kt_sft replaces, and whether it is the known one."""
    for state in states():
        tried = TESTED.get(state.patch.program, "the tested set")
        yield Finding(
            "replaced in other programs",
            state.patch.place,
            f"{state.patch.why} ({state.text})",
            "ok" if state.works else WARNING,
            "" if state.works else f"install a release it was tried with: {tried}",
        )


def installed(name: str) -> str | None:
    """The version of a package; None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _tested() -> dict[str, str]:
    """Package -> the version of the tested set; empty where the file is not there."""
    file = shipped_folder() / "constraints.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    pairs = (line.partition("==") for line in lines if "==" in line and line[0] != "#")
    return {name: found for name, _, found in pairs}


def _wanted(name: str, found: str) -> Iterator[tuple[str, str]]:
    """(who, what range) of the installed programs that ask for another version."""
    for program in _ASKING:
        try:
            asked = requires(program) or []
        except PackageNotFoundError:
            continue
        extras = ["", *(metadata(program).get_all("Provides-Extra") or ())]
        for requirement in map(Requirement, asked):
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": e}) for e in extras):
                continue
            if requirement.name == name and not requirement.specifier.contains(found, True):
                yield program, str(requirement.specifier)
