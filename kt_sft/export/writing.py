"""An adapter written in the form that another program reads.

Factors are padded with zeros, put side by side, or transposed, and alpha takes up what a program
does not read; where modules differ in alpha and it reads one, lora_B is multiplied. What was done
is said in the manifest beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from kt_sft import __version__
from kt_sft.adapters import names
from kt_sft.adapters.base_identity import write_identity
from kt_sft.errors import CheckpointError, SettingsError
from kt_sft.export import fused
from kt_sft.export.adapter import Adapter
from kt_sft.export.forms import Form, Item
from kt_sft.export.programs import PER_EXPERT, PROGRAMS, SHARED, Program, limits
from kt_sft.export.texts import copy_texts
from kt_sft.files import durable
from kt_sft.files.safetensors_writer import DTYPES, Entry, write_safetensors
from kt_sft.kernels import PROJECTIONS

MANIFEST = "kt_sft_export.json"


class _Written:
    """The pairs of an adapter, at the ranks and scalings that are written."""

    def __init__(self, adapter: Adapter, program: Program) -> None:
        self._adapter, self._program = adapter, program
        self._form = Form(adapter, program)
        self.items = list(self._form.items())
        usual = Counter((item.rank, item.scaling) for item in self.items).most_common(1)
        self.rank, self.scaling = usual[0][0] if usual else (adapter.file.config.r, 1.0)
        if program.one_rank:
            # limits() has looked whether there is one.
            self.rank = program.admitted_rank(max(i.rank for i in self.items)) or self.rank

    def rank_of(self, item: Item) -> int:
        """With the zeros behind it."""
        return self.rank if self._program.one_rank else item.rank

    def entries(self) -> dict[str, Entry]:
        """Every tensor of the file."""
        file = self._adapter.file
        found: dict[str, Entry] = {}
        for item in self.items:
            a, b = _keys(item)
            rank = self.rank_of(item) * item.experts
            found[a] = Entry((rank, item.columns), file.dtype)
            found[b] = Entry((item.rows, rank), file.dtype)
        for key in self._adapter.full.values():
            found[key] = Entry(file.shape(key), DTYPES[file.stored_dtype(key)])
        return found

    def tensors(self) -> Iterator[tuple[str, list[Tensor]]]:
        """The same in the same order, read one after the other."""
        for item in self.items:
            scaling = self.scaling if self._program.one_rank else item.scaling
            pair = item.read(self._adapter, self.rank_of(item), scaling)
            for key, matrix in zip(_keys(item), pair, strict=True):
                stored = matrix.to(self._adapter.file.dtype)
                if bool(torch.isfinite(matrix).all()) and not bool(torch.isfinite(stored).all()):
                    raise CheckpointError(
                        f"{key}: with one alpha for all modules its values are too large for "
                        f"{stored.dtype}; train with one lora_alpha, or save the adapter in float32"
                    )
                yield key, [stored]
        for key in self._adapter.full.values():
            yield key, [self._adapter.file.get(key)]

    def folded(self) -> list[str]:
        """What was done beside changing the form."""
        done = []
        if self._adapter.file.config.use_rslora:
            done.append("alpha takes up the square root of the rank (rsLoRA)")
        if self._program.one_rank:
            padded = sum(item.rank != self.rank for item in self.items)
            scaled = sum(item.scaling != self.scaling for item in self.items)
            if padded:
                done.append(f"{padded} pairs padded with zeros to rank {self.rank}")
            if scaled:
                done.append(f"lora_B of {scaled} pairs multiplied, so that one alpha is right")
        together = sum(item.experts > 1 for item in self.items)
        if together:
            done.append(f"experts of {together} parameters put side by side, gate and up together")
        if "shared" in self._adapter.layouts and self._form.layout != SHARED:
            done.append("pairs that all experts share repeated for each")
        zeros = sum(type(item) is Item for item in self.items)
        if zeros:
            done.append(f"{zeros} pairs of zeros where the program needs them")
        if self._adapter.file.config.lora_dropout and self._form.stacked:
            done.append("lora_dropout is 0, as PEFT has none for stacked parameters")
        return done

    def config(self) -> LoraConfig:
        """The adapter's settings for the program."""
        given, form = self._adapter.file.config, self._form
        modules = list(dict.fromkeys(i.target for i in self.items if i.experts == 1))
        parameters = list(dict.fromkeys(i.target for i in self.items if i.experts > 1))
        if form.stacked:
            # PEFT from 0.19 on takes every target that ends so for one of experts.
            taken = [m for m in modules if m.rpartition(".")[2] in PROJECTIONS]
            modules = [m for m in modules if m not in taken]
            parameters += [f"{m}.weight" for m in taken]
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        alpha = _whole(self.scaling * self.rank)
        for item in () if self._program.one_rank else self.items:
            stacked = f"{item.target}.weight" in parameters
            name = f"{item.target}.weight" if stacked else item.target
            if item.rank != self.rank:
                ranks[name] = item.rank
            if (own := _whole(item.scaling * item.rank)) != alpha:
                alphas[name] = own
        full = sorted({p.rpartition(".")[0].rpartition(".")[2] for p in self._adapter.full})
        return LoraConfig(
            peft_version=fused.WRITTEN_BY.get(str(form.layout), peft.__version__),
            task_type=given.task_type,
            base_model_name_or_path=given.base_model_name_or_path or str(self._adapter.base.folder),
            inference_mode=True,
            r=self.rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            lora_dropout=0.0 if form.stacked else given.lora_dropout,
            target_modules=self._names(modules),
            target_parameters=parameters or None,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            modules_to_save=full or None,
        )

    def _names(self, modules: list[str]) -> list[str]:
        """Leaves where a leaf means these modules and no others, whole paths elsewhere."""
        if self._form.published:
            return sorted({item.path.rpartition(".")[2] for item in self.items})
        found: list[str] = []
        base = self._adapter.base
        every = [
            *base.model.modules,
            *(
                f"{path}.{p}"
                for path, layer in base.layers.items()
                for p in layer.shape.projections
            ),
        ]
        for leaf in sorted({m.rpartition(".")[2] for m in modules}):
            chosen = {m for m in modules if m.rpartition(".")[2] == leaf}
            same = {m for m in every if m.rpartition(".")[2] == leaf}
            # Programs other than PEFT look at leaves alone.
            plain = same <= chosen or self._form.layout == PER_EXPERT
            found += [leaf] if plain else sorted(chosen)
        return found


def _keys(item: Item) -> tuple[str, str]:
    prefix = f"{names.FILE_PREFIX}{item.path}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def write_adapter(adapter: Adapter, name: str, out: Path, forced: bool = False) -> list[str]:
    """Writes an adapter for a program of PROGRAMS; returns the two lines that load it there.

    forced: the base is not the one that it was trained on, and is named in its place.

    The folder appears complete or not at all. Raises SettingsError that lists the limits of the
    program that the adapter does not meet, before anything is written.
    """
    program = PROGRAMS[name]
    problems = list(limits(program, adapter))
    if problems:
        raise SettingsError(
            f"--to {name}: {program.title} cannot read this adapter:\n"
            + "\n".join(f"  - {p}" for p in problems)
        )
    out = durable.new_folder(out, "--out", SettingsError)
    written = _Written(adapter, program)
    entries = written.entries()
    out.parent.mkdir(parents=True, exist_ok=True)
    durable.require_space(
        out.parent,
        sum(entry.nbytes for entry in entries.values()),
        f"{out}: the adapter needs",
        "free some, or give a folder on another disk by --out",
        CheckpointError,
    )
    with durable.whole_folder(out) as partial:
        write_safetensors(partial / SAFETENSORS_WEIGHTS_NAME, entries, written.tensors())
        config = written.config()
        if forced:
            config.base_model_name_or_path = str(adapter.base.folder.resolve())
        config.save_pretrained(str(partial))
        copy_texts(adapter.file.folder, partial, whole=name == "kt_sft")
        write_identity(partial, adapter.base.identity)
        manifest = json.dumps(_manifest(adapter, name, written.folded(), forced), indent=2)
        (partial / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    rank = max((written.rank_of(item) for item in written.items), default=0)
    return [
        line.format(out=str(out), base=str(adapter.base.folder.resolve()), rank=rank)
        for line in program.load
    ]


def _manifest(adapter: Adapter, name: str, folded: list[str], forced: bool) -> dict[str, Any]:
    program = PROGRAMS[name]
    return {
        "to": name,
        "program": program.title,
        "tested": program.tested,
        "read_from": sorted(adapter.layouts),
        "folded": folded,
        "forced": forced,
        "versions": {
            "kt_sft": __version__,
            "peft": peft.__version__,
            "transformers": transformers.__version__,
        },
    }


def _whole(value: float) -> float:
    """Whole numbers as such, which is how LoraConfig writes alpha."""
    return int(value) if float(value).is_integer() else value
