"""Plants faults in kernels, families, store and training: the tests must catch each.

    python scripts/mutation_check.py [--only TEXT] [--list]

Works in a copy of this tree: builds it with one fault, runs its tests until the first
failure, and reports the faults that survived. About half a minute for each fault.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The built core, too, would pass for that of the copied sources.
NOT_COPIED = ("*.so", "__pycache__", ".git", ".venv", ".cache", "build", "*.egg-info")
QUICK_TESTS = ("tests/kernels/test_block.py", "tests/kernels/test_single_kernels.py")


@dataclass(frozen=True)
class Fault:
    """`old`, which occurs once in `file`, becomes `new`, and one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = QUICK_TESTS


_ROWS = "csrc/kernels/row_kernels.inl"
_DOTS = "csrc/kernels/vector_dots.inl"
_FORWARD = "csrc/core/experts_forward.cpp"
_BACKWARD = "csrc/core/experts_backward.cpp"
_LORA = "csrc/core/lora_operands.h"
_LORA_GRADIENTS = "csrc/core/lora_gradients.h"
_PACKED = "csrc/core/packed_experts.cpp"
_TABLE = "kt_sft/families/table.py"
_CALLS = "kt_sft/families/calls.py"
_FORMATS_FILE = "kt_sft/checkpoint/published.py"
_FILE = "kt_sft/store/packed_file.py"

_SAVED = "kt_sft/training/savepoints.py"
_SAVING = "kt_sft/training/saving.py"
_GUARD = "kt_sft/training/guard.py"
_KEPT = "kt_sft/experts/recompute.py"
_MODES = "kt_sft/plugin/modes.py"

_QUALITY = "kt_sft/bench/quality.py"

_DEVICE = ("tests/device/test_device_block.py",)
_SPLIT = ("tests/device/test_split.py",)
_ON_DEVICE = ("tests/accelerator/test_experts_on_device.py",)

_QUALITIES = ("tests/bench/test_quality.py",)
_ACTIVATIONS = ("tests/training/test_activations.py",)
_SURVIVAL = "tests/training/test_survival.py::"
_MODE = "tests/training/test_modes.py::"
_ADAPTERS = ("tests/models/test_adapters.py",)
_FAMILIES = ("tests/models/test_families.py",)
_FORMATS = ("tests/models/test_formats.py",)
_STORE = ("tests/store",)

_RUNS = ("tests/kernels/test_block.py::test_a_limit_of_rows_changes_no_bit",)
_EXPORT = "tests/export"
_LINK = "tests/accelerator/test_transport.py::"

# Long lines: a fault reads best beside what it replaces.
# ruff: noqa: E501
FAULTS = (
    Fault("sign of the slope", _ROWS, "slope = s + alpha * value * (1.0f - s)",
          "slope = s - alpha * value * (1.0f - s)"),
    Fault("clamp without its zero gradient", _ROWS, "dgate[j] = kClamped && g > limit ? 0.0f : d_gate",
          "dgate[j] = d_gate"),
    Fault("offset of up left out of the gradient", _ROWS,
          "(kClamped ? clamp_both(up[j], limit) : up[j]) + offset;\n        h[j]",
          "(kClamped ? clamp_both(up[j], limit) : up[j]);\n        h[j]"),
    Fault("row sum left out", _ROWS, "const int32_t offset0 = 128 * row_sum[m * terms];",
          "const int32_t offset0 = 0 * row_sum[m * terms];"),
    Fault("row sum of the low term left out", _ROWS,
          "const int32_t offset1 = 128 * row_sum[m * terms + 1];",
          "const int32_t offset1 = 128 * row_sum[m * terms];"),
    Fault("channel scale left out", _ROWS, "if (col_scale)\n      for",
          "if (false)\n      for"),
    Fault("scale not folded into the gradient", _ROWS,
          "pack_int_row_as<true>(terms, n, x, fold, out, scale, sums);",
          "pack_int_row_as<false>(terms, n, x, fold, out, scale, sums);"),
    Fault("low term truncated", _ROWS, "const int32_t lo = q - 256 * hi;",
          "const int32_t lo = (q - 256 * hi) & ~1;"),
    Fault("int4 multiplier of the other group", _ROWS, "multiplier[g] + v * kLanes",
          "multiplier[1 - g] + v * kLanes"),
    Fault("int4 offset stale", _ROWS, "const VecU byte = 128 - (8 - (stored >> 7)) * m;",
          "const VecU byte = 128 - (8 - (stored >> 7)) * m + (m & 1);"),
    Fault("last rank dropped", _ROWS, "for (; q < rank; ++q) outer_block<1>",
          "for (; q < rank - 1; ++q) outer_block<1>"),
    Fault("routing weights ignored in the sum", _ROWS, "acc += splat(weight[k]) * load(rows[k] + j)",
          "acc += load(rows[k] + j)"),
    Fault("dropout scale left out", _ROWS, "threshold ? 0.0f : x[j] * keep", "threshold ? 0.0f : x[j]"),
    Fault("accumulate ignored", _DOTS, "if (kDrain == Drain::kWhole && accumulate) acc.read(c);", ""),
    Fault("last step dropped", _DOTS, "for (int s = 0; s < Step::kSteps; ++s) {",
          "for (int s = 0; s < Step::kSteps - (b + 1 == blocks); ++s) {"),
    Fault("second half of the outputs from the first", _DOTS, "panel + half * Step::kHalf", "panel"),
    Fault("16-bit sums emptied too late", _DOTS, "constexpr int64_t kSplitBlocks = 8;",
          "constexpr int64_t kSplitBlocks = 16;"),
    Fault("AMX: lower rows read the upper ones", "csrc/arch/x86/amx.cpp",
          "const char* a_lower = a + kTileRows * stride;", "const char* a_lower = a;"),
    Fault("AMX: right outputs from the left", "csrc/arch/x86/amx.cpp",
          "static constexpr int64_t kRight = 1024;", "static constexpr int64_t kRight = 0;"),
    Fault("transposed tile in the wrong order", "csrc/arch/x86/avx512_transposes.inl",
          "_mm512_shuffle_epi8(_mm512_shuffle_i32x4(low01, low23, 0xdd), order)",
          "_mm512_shuffle_epi8(_mm512_shuffle_i32x4(low01, low23, 0x88), order)"),
    Fault("widened weights not centred", "csrc/kernels/placements.inl",
          "reinterpret_cast<VecS16>(high) - 128", "reinterpret_cast<VecS16>(high) - 127"),
    Fault("gate and up swapped", _FORWARD, "activate(row, rows, col, y[0], y[1]);",
          "activate(row, rows, col, y[1], y[0]);"),
    Fault("scales of the other half", _FORWARD,
          "col_scale(item.expert, Projection::kDown, col + kPanelCols)}",
          "col_scale(item.expert, Projection::kDown, col)}"),
    Fault("bias left out", _FORWARD, "kernels_.add_row(rows, bias + col, tile);", ";"),
    Fault("down's bias left out of the routing gradient", _BACKWARD,
          "bias ? kernels_.dot_row(dp, dout_of_row(r), bias) : 0.0f", "0.0f"),
    Fault("LoRA gradient without the routing weight", _LORA_GRADIENTS,
          "          weigh(count, r, weight_R + begin, factor, weighted);\n          factor = weighted;\n", ""),
    Fault("idle experts keep stale gradients", _LORA_GRADIENTS, "if (!routing_.count(e)) add(e);",
          "if (routing_.count(e) < 0) add(e);"),
    Fault("LoRA B transposed", _LORA_GRADIENTS, "out[n * r + j] = sum;",
          "out[j * outputs + n] = sum;"),
    Fault("LoRA scaling left out of the gradient", _LORA,
          "bt(p, expert), op.ldb, lora.scaling,", "bt(p, expert), op.ldb, 1.0f,"),
    Fault("LoRA dropout of another projection", _LORA, "static_cast<uint64_t>(p) + 1)", "1)"),
    Fault("first row of a block skipped", "csrc/core/work_items.h",
          "std::min(units, begin + group), base + rows * part / parts,",
          "std::min(units, begin + group), base + rows * part / parts + (part > 0),"),
    Fault("skipped choices routed", "csrc/core/routing.cpp", "if (index[s] == experts) continue;",
          "if (index[s] == experts - 1) continue;"),
    Fault("published: small fp8 codes read as normal", _ROWS, "(magnitude < 8 ? float_bits(small) : normal) | sign",
          "(magnitude < 1 ? float_bits(small) : normal) | sign"),
    Fault("published: zero point left out", _ROWS, "(kIntegers ? value - zero[j] : value) * scale[j]",
          "value * scale[j]"),
    Fault("published: groups of the first half for both", "csrc/formats/coded.h",
          "if (half && group == block * kBlock / coding.group_inputs) {", "if (half) {"),
    Fault("int4: raised levels ignored", _ROWS, "const VecU byte = 128 - (8 - (stored >> 7)) * m;",
          "const VecU byte = 128 - 8 * m;"),
    Fault("channels: taken from the front", _PACKED, "const int64_t output = down ? 0 : first, input",
          "const int64_t output = 0, input"),
    Fault("families: gate and up exchanged", _TABLE, '(_gpt_oss_row(("even", "odd")),)',
          '(_gpt_oss_row(("odd", "even")),)', _FAMILIES),
    Fault("families: halves exchanged", _TABLE, 'rows: tuple[str, str] = ("first", "second"),',
          'rows: tuple[str, str] = ("second", "first"),', _FAMILIES),
    Fault("families: offset of up lost", _TABLE, '_clamped("limit", "alpha", up_offset=1.0)',
          '_clamped("limit", "alpha")', _FAMILIES),
    Fault("families: biases left out", "kt_sft/loading/packing.py", "if bias is not None:",
          "if bias is not None and False:", _FAMILIES),
    Fault("families: identity experts left out", _CALLS, "return out + (hidden_TD * share_T1).to(out.dtype)",
          "return out", _FAMILIES),
    Fault("families: router's order not undone", _CALLS, "experts_R[back_R].view(shape), gate_R[back_R]",
          "experts_R[back_R].view(shape), gate_R", _FAMILIES),
    Fault("families: one layout for all on disk", "kt_sft/checkpoint/sources.py", "for transposed in (False, True):",
          "for transposed in (False,):", _FAMILIES),
    Fault("formats: gptq without its one", _FORMATS_FILE, "zeros = (zeros + 1) & 15", "zeros = zeros & 15", _FORMATS),
    Fault("formats: nibbles of awq in plain order", _FORMATS_FILE, "_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)",
          "_AWQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)", _FORMATS),
    Fault("formats: blocks of mxfp4 high nibble first", _FORMATS_FILE, "(blocks & 15, blocks >> 4)",
          "(blocks >> 4, blocks & 15)", _FORMATS),
    Fault("formats: attention left in codes", "kt_sft/loading/quantizer.py",
          "parameter.copy_(checkpoint.dequantized(key))", "parameter.mul_(1)", _FORMATS),
    Fault("store: digests not compared", _FILE, "wrong = digest(view[begin:end]) != self._digests[name]",
          "wrong = False", _STORE),
    Fault("store: manifest not verified", _FILE, 'or digest(encoded) != metadata.get("manifest_digest")',
          "or False", _STORE),
    Fault("store: length of the file not compared", _FILE, "or self._start + offset != len(self._map)",
          "or False", _STORE),
    Fault("store: builders do not wait", "kt_sft/store/library.py",
          "                fcntl.flock(lock, fcntl.LOCK_EX)\n", "                pass\n", _STORE),
    Fault("store: dead builders are not swept", "kt_sft/store/library.py", "stale.unlink()", "pass", _STORE),
    Fault("store: space not checked", "kt_sft/files/durable.py", "if free < needed + _SPARE:", "if False:", _STORE),
    Fault("store: a failed write leaves its file", "kt_sft/store/library.py",
          "            writer.abandon()\n            raise\n", "            raise\n", _STORE),
    Fault("store: remembered digest of a changed file", "kt_sft/files/identity.py",
          'if known["stamp"] == stamp else None', 'if known["stamp"] else None', _STORE),
    Fault("training: kept for another routing", "kt_sft/engines/host.py",
          "if not torch.equal(held.index_TK, staged.index_TK):", "if False:", _ACTIVATIONS),
    Fault("training: kept bytes never released", _KEPT, "self.nbytes -= size", "pass", _ACTIVATIONS),
    Fault("training: kept by a forward without gradients", _KEPT,
          "Checkpoint(keeps=torch.is_grad_enabled())", "Checkpoint(keeps=True)", _ACTIVATIONS),
    Fault("training: no limit on what is kept", _KEPT, "if self.nbytes + size > self._limit:", "if False:",
          _ACTIVATIONS),
    Fault("training: digests of a checkpoint not compared", _SAVED, "if file_digest(path) != digest:", "if False:",
          (f"{_SURVIVAL}test_damage_is_named_and_passed_over",)),
    Fault("training: damaged checkpoints are taken", _SAVED, "        if wrong is None:\n            return str(path)",
          "        if True:\n            return str(path)", (f"{_SURVIVAL}test_damage_is_named_and_passed_over",)),
    Fault("training: removed under its name", _SAVED, "path.rename(hidden)", "hidden = path",
          (f"{_SURVIVAL}test_a_rotation_that_is_cut_off_leaves_no_half_of_a_checkpoint",)),
    Fault("training: published before its manifest", _SAVED, "        write_manifest(self.folder)\n        if final",
          "        if final", (f"{_SURVIVAL}test_killed_at_each_point_of_saving",)),
    Fault("training: moved aside and lost", _SAVED, "_restore_replaced(root, output_dir)\n", "pass\n",
          (f"{_SURVIVAL}test_a_checkpoint_moved_aside_comes_back",)),
    Fault("training: space not looked for", "kt_sft/training/savepoints.py", "    durable.require_space(output_dir, needed, what, advice, CheckpointError)\n", "",
          (f"{_SURVIVAL}test_space_is_looked_for_before_anything_is_written",)),
    Fault("training: not staged", _SAVING, "trainer.args.output_dir = str(staged.root)", "pass",
          (f"{_SURVIVAL}test_killed_at_each_point_of_saving",)),
    Fault("training: poisoned parameters are saved", _SAVING,
          "            _refuse_poisoned(trainer.model, trainer.state.global_step)\n", "",
          (f"{_SURVIVAL}test_a_poisoned_parameter_is_not_saved",)),
    Fault("training: a step after the last one", _SAVING,
          "if hybrid_experts_of(self.model) and self.state.global_step >= self.state.max_steps:", "if False:",
          (f"{_SURVIVAL}test_a_finished_run_that_is_resumed_trains_no_more",)),
    Fault("training: ranks that stop do not wait for the last", _SAVING,
          "                _everywhere(None)\n        finally", "                pass\n        finally",
          ("tests/training/test_ranks.py::test_a_signal_to_one_rank_stops_all_after_the_same_step",)),
    Fault("training: a rank that ends is ended", "kt_sft/training/stop_signals.py",
          "signal.signal(signal.SIGTERM, signal.SIG_IGN)", "pass",
          ("tests/training/test_ranks.py::test_a_signal_to_one_rank_stops_all_after_the_same_step",)),
    Fault("training: stopped by a signal without saving", _GUARD, "control.should_save = True", "pass",
          (f"{_SURVIVAL}test_a_signal_stops_after_the_step",)),
    Fault("training: gradients not looked at", _GUARD, "        if _largest_of_ranks(int(poisoned), args.device):", "        if False:",
          (f"{_SURVIVAL}test_nan_is_named_and_not_saved",)),
    Fault("training: every signal counts", "kt_sft/training/stop_signals.py", "_SAME_REQUEST_SECONDS = 2.0",
          "_SAME_REQUEST_SECONDS = 0.0", (f"{_SURVIVAL}test_one_request_that_arrives_several_times",)),
    Fault("training: create_new_adapter continues the old one", _MODES,
          "bool(adapters) and is_trainable and finetuning_args.create_new_adapter", "False",
          (f"{_MODE}test_a_new_adapter_on_a_frozen_one",)),
    Fault("training: the auxiliary loss under reentrant checkpointing", _MODES,
          'changed["use_reentrant_gc"] = False', "pass", (f"{_MODE}test_the_auxiliary_loss_reaches_the_router",)),
    Fault("training: the reference sees the experts' LoRA", "kt_sft/adapters/layer.py",
          "active = [] if self.disable_adapters else self.active_adapters", "active = self.active_adapters",
          (f"{_MODE}test_the_reference_is_the_base",)),
    Fault("training: merged factors are lost", "kt_sft/adapters/layer.py",
          "bare.merged_a, bare.merged_b = (t.detach().clone() for t in joined)", "pass", _ADAPTERS),
    Fault("training: shared LoRA learns from one expert", "kt_sft/engines/host.py",
          "gradient.sum(0, keepdim=True)", "gradient[:1]", _ADAPTERS),
    Fault("core: chosen experts are the first ones", _PACKED,
          "from.section(s) + chosen[static_cast<size_t>(expert)] * bytes", "from.section(s) + expert * bytes"),
    Fault("core: shared LoRA is read at the expert's place", "csrc/core/experts_block.h",
          "int64_t pair(int64_t expert) const { return shared ? 0 : expert; }",
          "int64_t pair(int64_t expert) const { return expert; }"),
    Fault("channels: cut inside of a group", "csrc/formats/coded.h",
          "std::lcm(std::lcm(kBlock, layout.coding.group_outputs)", "std::max(std::max(kBlock, layout.coding.group_outputs)"),
    Fault("patches: signatures are not compared", "kt_sft/patches.py", "if got != want and", "if False and",
          ("tests/test_patches.py",)),
    Fault("patches: a second install starts from ours", "kt_sft/patches.py",
          "            return place\n", "            pass\n", ("tests/test_patches.py",)),
    Fault("training: kept activations left out of the plan", "kt_sft/planning/plan.py",
          "held = sum(kept) if keeps or not work.checkpointing else max(kept, default=0)",
          "held = max(kept, default=0)", ("tests/training/test_memory_plan.py",)),
    Fault("training: reference models left out of the plan", "kt_sft/planning/plan.py",
          "shared, work.frozen_models * experts)", "shared, 0 * experts)", ("tests/training/test_memory_plan.py",)),
    Fault("training: page cache counts as taken", "kt_sft/machine/memory.py", "max(0, used - cache)", "used",
          ("tests/store/test_library.py",)),
    Fault("training: limits of outer groups are not seen", "kt_sft/machine/cgroups.py", "(relative, *relative.parents)",
          "(relative,)", ("tests/store/test_library.py", "tests/test_settings.py")),
    Fault("training: threads of ranks are not bound", "kt_sft/engines/choose.py",
          "with ThreadPoolExecutor(1, \"kt-sft-bound\", os.sched_setaffinity, (0, cpus)) as bound:",
          "with ThreadPoolExecutor(1) as bound:", ("tests/kernels/test_numa.py",)),
    Fault("training: a signal stays with its rank", _GUARD, "dist.all_reduce(box, op=dist.ReduceOp.MAX)", "pass",
          ("tests/training/test_ranks.py::test_a_signal_to_one_rank_stops_all_after_the_same_step",)),
    Fault("training: a forked child enters the threads", "csrc/core/process_guard.h", "if (is_owner()) return;",
          "return;", ("tests/training/test_gradients.py",)),
    Fault("training: quotas are rounded up", "kt_sft/machine/cpus.py", "limit = min(limit, int(quota))",
          "limit = min(limit, int(quota) + 1)", ("tests/test_settings.py",)),
    Fault("training: hyper-threads count as cores", "kt_sft/machine/cpus.py", "cores.add(siblings.read_text().strip())",
          "cores.add(str(cpu))", ("tests/test_settings.py",)),
    Fault("training: dropout of its own randomness", "kt_sft/experts/module.py",
          "dropout_seed=int(torch.randint(2**62, ()).item())", "dropout_seed=id(object()) + __import__('time').time_ns()",
          ("tests/training/test_llamafactory.py::test_resume_is_bit_identical",)),
    Fault("training: memory not asked for", "kt_sft/loading/quantizer.py",
          "        check_memory(plan, settings)\n", "", ("tests/training/test_memory_plan.py",)),
    Fault("training: signals stay with the launcher", "kt_sft/plugin/launching.py",
          "os.kill(rank, signal.SIGTERM if number == signal.SIGHUP else number)", "pass",
          ("tests/training/test_ranks.py::test_a_signal_to_the_launcher_saves_and_stops",)),
    Fault("training: evaluations count in the metrics", "kt_sft/training/metrics.py",
          "            self._meter.leave_out(self._before_evaluation)\n", "",
          ("tests/training/test_gradients.py::test_metrics_leave_evaluations_out",)),
    Fault("training: an evaluation's time counts", "kt_sft/experts/meter.py",
          "since=begin.sums.since + passed", "since=begin.sums.since",
          ("tests/training/test_gradients.py::test_metrics_leave_evaluations_out",)),
    Fault("quality: compute mode is not switched", _QUALITY, "runtime.settings, compute=compute", "runtime.settings",
          _QUALITIES),
    Fault("quality: tokens are shifted by none", _QUALITY, "ids_1T[0, 1:].to", "ids_1T[0, :-1].to",
          _QUALITIES),
    Fault("quality: error against the copy itself", _QUALITY, "matrix if origin is source else origin.read(expert, projection)",
          "matrix", _QUALITIES),
    Fault("quality: windows from the beginning only", _QUALITY, "length * (i * there // chosen)", "length * i",
          _QUALITIES),
    Fault("upcycle: gate and up exchanged", "scripts/upcycle.py", '{"w1": "gate_proj", "w3": "up_proj"',
          '{"w3": "gate_proj", "w1": "up_proj"', ("tests/models/test_upcycle.py",)),
    Fault("runs: sums of the runs before are left out", "csrc/core/activation_rows.h",
          "if (!run_.first) {", "if (false) {", _RUNS),
    Fault("runs: kept rows begin at the first", _FORWARD,
          "kept.from(routing.offset[run.begin], in), waiting, out, phases", "kept, waiting, out, phases", _RUNS),
    Fault("link: an optimizer's step is not noticed", "kt_sft/engines/mirror.py",
          "parameter._version, _steps().taken", "parameter._version, 0", (f"{_LINK}test_changed_lora_is_fetched_once",)),
    Fault("link: a gradient that waited is dropped", "kt_sft/engines/mirror.py",
          "return gradient if waiting is None else waiting.add_(gradient)", "return gradient",
          (f"{_LINK}test_gradients_that_wait_are_the_same_to_the_bit",)),
    Fault("link: an early result of another input", "kt_sft/experts/ahead.py",
          ") and given._version == self.version", ")", (f"{_LINK}test_early_results_serve_their_input_only",)),
    Fault("link: shared experts move past a writer of their input", "kt_sft/experts/order.py",
          "_writes_in_place(other)\n        or uses", "uses", ("tests/test_block_order.py",)),
    Fault("link: shared experts stay first", "kt_sft/experts/ahead.py",
          "if self.order.routed_first is None or", "if True or",
          (f"{_LINK}test_shared_experts_run_while_the_host_computes",)),
    Fault("export: experts are the slow index of lora_B", "kt_sft/export/fused.py",
          "b.permute(1, 2, 0).flatten(1)", "b.permute(1, 0, 2).flatten(1)", (f"{_EXPORT}/test_stock_peft.py",)),
    Fault("export: the halves of gate and up change places", "kt_sft/export/fused.py",
          "slice(place * rank // 2, (place + 1) * rank // 2)", "slice((1 - place) * rank // 2, (2 - place) * rank // 2)",
          (f"{_EXPORT}/test_layouts.py",)),
    Fault("export: the release that wrote a pair does not count", "kt_sft/export/fused.py",
          "return as_it_lies != transposed", "return transposed", (f"{_EXPORT}/test_stock_peft.py",)),
    Fault("export: another alpha is forgotten", "kt_sft/export/forms.py",
          "b if factor == 1 else b * factor", "b", (f"{_EXPORT}/test_layouts.py",)),
    Fault("export: modules that stand for each other win in silence", "kt_sft/export/adapter.py",
          "self._problems.append(f\"{path}: {module} has", "list().append(f\"{path}: {module} has",
          (f"{_EXPORT}/test_layouts.py",)),
    Fault("merge: codes that lie the other way round", "kt_sft/export/delta.py",
          "(matrix.T if key in self._transposed else matrix)", "matrix", (f"{_EXPORT}/test_merging.py",)),
    Fault("merge: embeddings stay tied", "kt_sft/export/delta.py",
          "self.untied = True", "self.untied = False", (f"{_EXPORT}/test_merging.py",)),
    Fault("adapters: the base's weights do not count", "kt_sft/adapters/base_identity.py",
          "if not _same(theirs[name], ours[name])", "if False", (f"{_EXPORT}/test_base_identity.py",)),
    Fault("rest: routers are quantized", "kt_sft/loading/quantized_rest.py",
          "[*kept, *_routers(model)]", "[*kept]", ("tests/models/test_quantized_rest.py",)),
    Fault("device: dropout of every projection is the same", "kt_sft/device/dropout.py",
          "len(PROJECTIONS) + (projection + 1)", "len(PROJECTIONS) + 1", _DEVICE),
    Fault("device: raised levels of int4 are as others", "kt_sft/device/packed.py",
          "torch.where(factors >= _RAISED, 7, 8)", "torch.where(factors >= 256, 7, 8)", _DEVICE),
    Fault("device: routing weights are not in LoRA's gradients", "kt_sft/device/block.py",
          "outer((weight_M1 * q_Mr).to(seen_MC.dtype), seen_MC, self.groups),",
          "outer(q_Mr, seen_MC, self.groups),", _DEVICE),
    Fault("device: down's bias is not in the weights' gradient", "kt_sft/device/block.py",
          "d_weight_M += (d_y_MD.float() * self.groups.spread(bias)).sum(1)", "pass", _DEVICE),
    Fault("device: rows that wait are summed for the first window only", "kt_sft/device/block.py",
          "            self._first = row\n", "            self._first = self._first or row\n", _DEVICE),
    Fault("device: the clamp has a slope", "kt_sft/device/gates.py",
          "d_value * slope * (first <= kind.limit)", "d_value * slope", _DEVICE),
    Fault("split: both sides compute", "kt_sft/engines/split.py",
          "places[list(share.places.on_device)] = experts", "places[[]] = experts", _SPLIT),
    Fault("split: gradients of LoRA are the host's alone", "kt_sft/engines/split.py",
          "a if b is None else b if a is None else a.add_(b)", "a if a is not None else b", _SPLIT),
    Fault("split: a second run is taken wherever its tokens go", "kt_sft/engines/split.py",
          "        if not torch.equal(held.index_TK, staged.index_TK):\n            return None\n"
          "        rest = ", "        rest = ", _SPLIT),
    Fault("streaming: a buffer is refilled while it is computed with", "kt_sft/engines/streaming.py",
          "            if buffer.used is not None:\n                self._stream.wait_event(buffer.used)\n"
          "            with", "            with", _ON_DEVICE),
    Fault("streaming: nobody waits for what comes", "kt_sft/engines/streaming.py",
          "self._link.current_stream().wait_event(buffer.copied)", "pass", _ON_DEVICE),
    Fault("split: measuring draws the model's random numbers", "kt_sft/engines/calibration.py",
          "layout.hidden, generator=torch.Generator().manual_seed(0))", "layout.hidden)",
          ("tests/accelerator/test_training_on_device.py::"
           "test_a_training_whose_device_has_experts",)),
    Fault("residents: resumed in other places", "kt_sft/training/residents.py",
          "restore_residents(self._experts, saved)", "place_residents(self._experts)",
          ("tests/accelerator/test_training_on_device.py::"
           "test_a_training_whose_device_has_experts",)),
    Fault("residents: no place is kept", "kt_sft/scheduling/residents.py",
          "_GAIN = 1.25", "_GAIN = 1.0", ("tests/scheduling/test_residents.py",)),
    Fault("costs: the link is free", "kt_sft/scheduling/costs.py",
          "np.where(resident, 0.0, costs.stream)", "np.where(resident, 0.0, 0.0)",
          ("tests/scheduling/test_costs.py",)),
    Fault("costs: single experts are not moved", "kt_sft/scheduling/costs.py",
          "        for _ in range(self._STEPS):", "        for _ in range(0):",
          ("tests/scheduling/test_costs.py",)),
    Fault("disk: the way down is not known", "kt_sft/store/read_ahead.py",
          'down = direction == "backward" or', 'down = direction == "backward" and',
          ("tests/store/test_read_ahead.py",)),
    Fault("plan: experts on the disk take memory", "kt_sft/planning/plan.py",
          "needed += min(self.of(\"machine\"), self.two_layers) - self.of(\"machine\")", "pass",
          ("tests/training/test_memory_plan.py",)),
    Fault("plan: experts come once whatever is recomputed", "kt_sft/forecast/timing.py",
          "load.micro_batches * passes.experts * ahead", "load.micro_batches * ahead", ("tests/forecast/test_forecast.py",)),
    Fault("plan: matrices are left out", "kt_sft/forecast/timing.py",
          "if p.dim() >= 2 and id(p) not in embeddings", "if p.dim() >= 3 and id(p) not in embeddings", ("tests/forecast/test_forecast.py",)),
    Fault("plan: cases with fewer experts than a token has", "kt_sft/engines/calibration.py",
          "max(1, min(count, most) // self._top_k)", "(min(count, most) // self._top_k)",
          ("tests/forecast/test_forecast.py::test_any_number_of_experts_per_token_is_measured",)),
    Fault("plan: a kind of layers counts once", "kt_sft/forecast/probe.py",
          "forward + count * ahead, training + count * both", "forward + ahead, training + both",
          ("tests/forecast/test_probe.py::test_what_is_measured_is_made_the_whole",)),
    Fault("plan: attention to what comes before is left out", "kt_sft/forecast/probe.py",
          "if sample.length > some.length:", "if False:",
          ("tests/forecast/test_probe.py::test_what_is_measured_is_made_the_whole",)),
    Fault("plan: measured layers have no LoRA", "kt_sft/forecast/probe.py",
          "        if names:", "        if False:",
          ("tests/forecast/test_probe.py::test_every_family_is_measured",)),
    Fault("plan: changes that are not needed stay", "kt_sft/forecast/forecast.py",
          "        if not _excess(_with(question, fewer)):\n", "        if False:\n", ("tests/forecast/test_forecast.py",)),
    Fault("plan: too few scales of mxfp4", "kt_sft/checkpoint/layouts.py",
          'Coding("e2m1", "e8m0", 1, 32)', 'Coding("e2m1", "e8m0", 1, 64)', ("tests/forecast/test_forecast.py",)),
    Fault("plan: a device without a number fits", "kt_sft/forecast/forecast.py",
          "return UNKNOWN if device is not None", "return FITS if device is not None", ("tests/forecast/test_forecast.py",)),
    Fault("doctor: gradients are not compared", "kt_sft/doctor/trials.py",
          "got = [out_TD, found.hidden_TD, found.weight_TK]", "got = [out_TD, out_TD, found.weight_TK]", ("tests/doctor/test_doctor.py",)),
    Fault("doctor: any result of a step is right", "kt_sft/doctor/trials.py",
          "right = apart < 1e-3 and", "right = apart < 1e3 and", ("tests/doctor/test_doctor.py",)),
    Fault("doctor: ranges are not looked at", "kt_sft/doctor/installation.py",
          "not requirement.specifier.contains(found, True)", "False", ("tests/doctor/test_doctor.py",)),
    Fault("report: text is not escaped", "kt_sft/report/page.py", "autoescape=True", "autoescape=False",
          ("tests/report/test_report.py",)),
    Fault("report: curves upside down", "kt_sft/report/charts.py", "(high - y) / (high - low)", "(y - low) / (high - low)",
          ("tests/report/test_report.py",)),
    Fault("report: a page wider than a phone", "kt_sft/report/page.html.j2", "svg { display: block; width: 100%;",
          "svg { display: block; width: 900px;", ("tests/report/test_report.py",)),
    Fault("report: dark as light", "kt_sft/report/page.html.j2", "--page: #14171d;", "--page: #ffffff;",
          ("tests/report/test_report.py",)),
    Fault("health: alerts again and again", "kt_sft/training/health.py", "                self._said.add(title)\n", "",
          ("tests/training/test_health.py",)),
    Fault("health: one uneven log is a collapse", "kt_sft/training/health.py", "_COLLAPSED, _LOGS = 0.9, 3",
          "_COLLAPSED, _LOGS = 0.9, 1", ("tests/training/test_health.py",)),
    Fault("init: settings that are needed are not written", "kt_sft/forecast/starter.py",
          "    if subject.rest_bytes is not None:\n", "    if False:\n", ("tests/forecast/test_starting.py",)),
    Fault("progress: time left from the wrong end", "kt_sft/files/progress.py", "(self._total - self._done) / max(1, self._done)",
          "self._done / max(1, self._total)", ("tests/store/test_progress.py",)),
    Fault("recipes: gpt-oss as LLaMA-Factory has it", "kt_sft/plugin/modes.py",
          'if getattr(config, "model_type", None) != "gpt_oss":', "if True:", ("tests/training/test_recipes.py",)),
    Fault("demo: parameters are not compared", "scripts/demo/cards.py", '("module", "function", "parameters")',
          '("module", "function")', ("tests/test_demo.py",)),
)  # fmt: skip


def _run(command: list[str], folder: Path, seconds: int) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(
            f"{' '.join(command)}: longer than {seconds} s; nothing is proved"
        ) from None
    return done.returncode, done.stdout + done.stderr


def _build_and_test(folder: Path, tests: tuple[str, ...], seconds: int = 600) -> tuple[str, str]:
    """("passed" | "caught" | "not built", the line that tells)."""
    code, output = _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder, 600)
    if code:
        return "not built", output.strip().splitlines()[-1]
    code, output = _run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        folder,
        seconds,
    )
    last = [line for line in output.splitlines() if line.startswith("FAILED")]
    return ("caught" if code else "passed"), (last or output.strip().splitlines() or [""])[-1][:110]


def _plant(folder: Path, fault: Fault) -> str:
    """Returns the file's former text."""
    path = folder / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(
            f"{fault.name}: {fault.old!r} occurs {text.count(fault.old)} times in {fault.file}, "
            "expected once; adapt the fault to the code"
        )
    path.write_text(text.replace(fault.old, fault.new))
    return text


def main() -> int:
    """0 when every fault was caught."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name contains this text")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    arguments = parser.parse_args()
    faults = [f for f in FAULTS if arguments.only in f.name]
    if arguments.list:
        sys.stdout.write("\n".join(f.name for f in faults) + "\n")
        return 0
    if not faults:
        parser.error(f"--only: no fault's name contains {arguments.only!r}; --list prints them")
    survivors = []
    with tempfile.TemporaryDirectory(prefix="kt_sft_mutation_") as temporary:
        folder = Path(temporary)
        ignore = shutil.ignore_patterns(*NOT_COPIED)
        shutil.copytree(ROOT, folder, ignore=ignore, dirs_exist_ok=True)
        state, line = _build_and_test(
            folder, tuple(sorted({t for f in faults for t in f.tests})), 3600
        )
        sys.stdout.write(f"{state:<10} without a fault: {line}\n")
        if state != "passed":
            return 1
        for fault in faults:
            start = time.perf_counter()
            path = folder / fault.file
            before = _plant(folder, fault)
            state, line = _build_and_test(folder, fault.tests)
            path.write_text(before)
            seconds = time.perf_counter() - start
            sys.stdout.write(f"{state:<10} {fault.name} ({seconds:.0f} s): {line}\n")
            sys.stdout.flush()
            if state != "caught":
                survivors.append(fault.name)
    sys.stdout.write(f"{len(faults) - len(survivors)} of {len(faults)} faults caught\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
