"""The split over NUMA nodes: fake trees, and two pretended nodes against one engine."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest
import torch
from comparators import assert_matches
from test_block import Block, inputs

from kt_sft.config import HybridExpertsSettings
from kt_sft.engines import choose
from kt_sft.engines.cpu import CpuEngine, CpuExperts
from kt_sft.engines.nodes import NodeEngines, share_threads, split_channels
from kt_sft.kernels import PROJECTIONS, Call, Engine, Gate, Inputs, WeightLayout
from kt_sft.machine.numa import cpus_of_rank, numa_nodes


def tree(folder: Path, lists: dict[int, str]) -> Path:
    for node, text in lists.items():
        (folder / f"node{node}").mkdir(parents=True)
        (folder / f"node{node}" / "cpulist").write_text(text + "\n")
    return folder


def test_nodes_from_sysfs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cpus = set(range(8))
    assert numa_nodes(cpus=cpus, sysfs=tmp_path / "nowhere") == [cpus]
    one = tree(tmp_path / "one", {0: "0-7"})
    assert numa_nodes(cpus=cpus, sysfs=one) == [cpus]
    two = tree(tmp_path / "two", {0: "0-1,4-5", 1: "2-3,6-7"})
    assert numa_nodes(cpus=cpus, sysfs=two) == [{0, 1, 4, 5}, {2, 3, 6, 7}]
    assert numa_nodes(cpus={2, 3}, sysfs=two) == [{2, 3}]
    sparse = tree(tmp_path / "sparse", {0: "0-3", 2: "", 10: "4-7"})
    assert numa_nodes(cpus=cpus, sysfs=sparse) == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert numa_nodes(cpus=set(range(9)), sysfs=two) == [set(range(9))]
        odd = tree(tmp_path / "odd", {0: "zero"})
        assert numa_nodes(cpus=cpus, sysfs=odd) == [cpus]
    assert len(caplog.records) == 2


def test_channels_are_cut_between_tiles() -> None:
    assert split_channels(768, [2, 2]) == [(0, 384), (384, 768)]
    assert split_channels(200, [1, 1]) == [(0, 128), (128, 200)]
    assert split_channels(130, [1, 1, 1, 1]) == [(0, 64), (64, 128), (128, 128), (128, 130)]
    assert split_channels(40, [1, 1]) == [(0, 0), (0, 40)]
    # A node with few threads gets few channels.
    assert split_channels(2048, [32, 2]) == [(0, 1920), (1920, 2048)]


def test_threads_are_shared_out_exactly() -> None:
    assert share_threads(7, [8, 8]) in ([4, 3], [3, 4])
    assert share_threads(3, [1, 1, 6]) == [0, 0, 3] or sum(share_threads(3, [1, 1, 6])) == 3
    assert share_threads(34, [32, 2]) == [32, 2]
    assert share_threads(2, [1, 1]) == [1, 1]


def test_ranks_get_nodes_of_their_own() -> None:
    nodes = [{0, 1}, {2, 3}, {4, 5}, {6, 7}]
    assert [cpus_of_rank(nodes, r, 4) for r in range(4)] == nodes
    assert [cpus_of_rank(nodes, r, 8) for r in range(8)] == [n for n in nodes for _ in range(2)]
    assert [cpus_of_rank(nodes, r, 2) for r in range(2)] == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    # Three of one machine's ranks on two nodes would crowd one of them.
    assert cpus_of_rank(nodes[:2], 0, 3) is None and cpus_of_rank(nodes, 0, 3) is None
    assert cpus_of_rank(nodes[:1], 1, 2) is None


def threads_and_cpus() -> dict[str, set[int]]:
    # A thread of somebody else's that is on its way out is none of ours.
    time.sleep(0.05)
    tasks = (path.name for path in Path("/proc/self/task").iterdir())
    return {task: os.sched_getaffinity(int(task)) for task in tasks}


def test_the_threads_of_a_rank_stay_on_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU")
    nodes = [{cpus[0]}, {cpus[1]}]
    monkeypatch.setattr(choose, "numa_nodes", lambda: nodes)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        before = threads_and_cpus()
        engine = choose.choose_engine(HybridExpertsSettings(threads=3))
        made = [cpus for task, cpus in threads_and_cpus().items() if task not in before]
        assert made == [nodes[rank]] * 2, "the calling thread is the third"
        assert isinstance(engine, CpuEngine) and os.sched_getaffinity(0) == set(cpus)
    before = threads_and_cpus()
    free = choose.choose_engine(HybridExpertsSettings(threads=3, numa="off"))
    made = [cpus for task, cpus in threads_and_cpus().items() if task not in before]
    assert made == [set(cpus)] * 2 and free.threads == 3


def test_a_layer_with_fewer_blocks_than_nodes(engines: NodeEngines) -> None:
    weights = engines.new_experts(WeightLayout(2, 64, 40, "int8"))
    assert len(weights.parts) == 1
    for e in range(2):
        for p in PROJECTIONS:
            weights.pack(e, p, torch.ones(weights.layout.shape(p)))
    x, index, weight = inputs(5, 64, 2, 1)
    out = weights.forward(Call("exact", Gate()), Inputs(x, index, weight), None, keep=False).out_TD
    assert torch.isfinite(out).all() and out.abs().sum() > 0


@pytest.fixture(scope="module")
def engines() -> NodeEngines:
    cpus = sorted(os.sched_getaffinity(0))
    return NodeEngines([{cpus[0]}, {cpus[-1]}], 2)


@pytest.mark.parametrize("gate", [Gate("swish"), Gate("relu2", gated=False)], ids=["gated", "not"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stored", ["int8", "bf16", "int4_g32"])
def test_split_layer_is_the_whole_layer(
    engines: NodeEngines, gate: Gate, dropout: float, stored: str
) -> None:
    """Scales, and so the rounding of int formats, belong to a node's part; hence the bounds."""
    block = Block.make(3, 72, 200, stored, 4, is_gated=gate.gated, biased=True)
    weights = engines.new_experts(
        WeightLayout(
            3, 72, 200, stored, gated=gate.gated, biased=frozenset(PROJECTIONS[not gate.gated :])
        )
    )
    assert len(weights.parts) == 2
    for projection in weights.layout.projections:
        for e in range(3):
            source = block.weights.unpack(e, projection)
            weights.pack(e, projection, source)
            weights.set_bias(
                e,
                projection,
                block.bias[PROJECTIONS.index(projection)][e],
            )
            step = {"int8": 0.02, "bf16": 0.0, "int4_g32": 0.12}[stored]
            assert (weights.unpack(e, projection) - source).norm() <= step * source.norm()
    x, index, weight = inputs(31, 72, 3, 2)
    compute = "bf16" if stored == "bf16" else "exact"
    call = Call(compute, gate, dropout, dropout_seed=77)
    taken = Inputs(x, index, weight, tuple(block.lora))
    d_out = torch.randn(31, 72, generator=torch.Generator().manual_seed(3))
    results = []
    for experts in (CpuExperts(Engine(1), block.weights), weights):
        done = experts.forward(call, taken, None, keep=True)
        found, _ = experts.backward(done.context, d_out, None)
        lora = [t for t in found.lora if t is not None]
        results.append([done.out_TD, found.hidden_TD, found.weight_TK, *lora])
    bound = {"int8": 0.02, "bf16": 0.02, "int4_g32": 0.25}[stored]
    for i, (whole, split) in enumerate(zip(*results, strict=True)):
        assert_matches(split, whole, bound, f"result {i}")


def test_a_forked_child_raises(engines: NodeEngines) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            engines.on_nodes(lambda i: i, [0, 1])
        except RuntimeError as error:
            os._exit(0 if "forked child" in str(error) else 2)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
