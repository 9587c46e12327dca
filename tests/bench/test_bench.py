"""The measuring commands on tiny layers: what they print and write, not how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kt_sft.bench.case import LayerCase, LayerData
from kt_sft.bench.layer import OurLayer, measure_layer
from kt_sft.bench.peers import PEERS, kt_kernel
from kt_sft.cli import main
from kt_sft.errors import PeerError

TINY = {
    "hidden": 128, "intermediate": 64, "experts": 4, "top_k": 2, "tokens": 8, "rank": 2,
    "rounds": 1, "threads": 1,
}  # fmt: skip


def test_peak_has_the_documented_keys(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "peak", "--json", "--threads", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    keys = {"bf16_tflops", "int8_tops", "fp32_tflops", "read_gb_s", "isa", "threads"}
    assert keys <= result.keys()
    assert result["int8_tops"] > 0 and result["exact_tflops"] > 0
    # An arithmetic that the compiler has optimized away would show as an absurd rate.
    assert 1e-4 < result["fp32_tflops"] < 5 and 0.1 < result["read_gb_s"] < 2000


@pytest.mark.parametrize("peer", ["torch", "transformers"])
def test_layer_against_a_peer(peer: str) -> None:
    result = measure_layer(LayerCase(**TINY), peer)
    assert result["forward_ms"] > 0 and 0 < result["forward_of_peak"] < 1
    assert result["ratios"].keys() == result["peers_ms"].keys()
    assert all(ratio > 0 for ratio in result["ratios"].values())
    json.dumps(result)


def test_peers_compute_the_same_layer() -> None:
    """Ours in bf16 against the torch loop and Transformers' module: equal work, equal results."""
    case = LayerCase(**{**TINY, "weights": "bf16", "compute": "exact", "rank": 0})
    data = LayerData.make(case)
    ours = OurLayer(case, data)
    out = ours.forward()
    from kt_sft.bench.case import one_expert
    from kt_sft.bench.peers.torch_loop import TorchExpertsLoop

    loop = TorchExpertsLoop(
        one_expert(case), case.experts, data.index_TK, data.weight_TK, data.lora
    )
    want = loop(data.hidden_TD).float()
    assert (out.float() - want).norm() < 0.02 * want.norm()


def test_skew_names_one_expert() -> None:
    case = LayerCase(**{**TINY, "tokens": 500, "skew": 0.5})
    share = (LayerData.make(case).index_TK == 0).float().mean()
    assert 0.55 < share < 0.7
    balanced = LayerData.make(LayerCase(**{**TINY, "tokens": 500})).index_TK
    assert abs(float((balanced == 0).float().mean()) - 0.25) < 0.06


def test_sweep_writes_three_files(tmp_path: Path) -> None:
    arguments = ["bench", "sweep", "--out", str(tmp_path), "--threads", "1", "--rounds", "1"]
    for name in ("hidden", "intermediate", "experts", "rank"):
        arguments += [f"--{name}", str(TINY[name])]
    arguments += ["--top-k", "2", "--tokens", "1", "8", "--weights", "int8", "bf16"]
    assert main(arguments) == 0
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert len(document["layers"]) == 6  # int8 in two modes and bf16, two sizes each
    assert (tmp_path / "sweep.md").read_text().count("\n|") == 8
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_peer_is_an_error_that_says_so(tmp_path: Path) -> None:
    case = LayerCase(**TINY)
    with (
        pytest.raises(PeerError, match="no interpreter"),
        kt_kernel.start(case, LayerData.make(case), tmp_path / "nowhere"),
    ):
        pass
    broken = tmp_path / "env" / "bin"
    broken.mkdir(parents=True)
    (broken / "python").write_text("#!/bin/sh\necho 'no module named kt_kernel' >&2; exit 1\n")
    (broken / "python").chmod(0o755)
    with (
        pytest.raises(PeerError, match="the process ended:\nno module named kt_kernel"),
        kt_kernel.start(case, LayerData.make(case), tmp_path / "env"),
    ):
        pass
    assert set(PEERS) == {"torch", "transformers", "kt-kernel"}
