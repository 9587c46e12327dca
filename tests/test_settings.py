"""The recipe section: every problem at once, with the nearest valid name."""

from pathlib import Path

import pytest

from kt_sft.config import HybridExpertsSettings, read_section
from kt_sft.errors import SettingsError
from kt_sft.kernels import isa_report, requested_isa, select_isa
from kt_sft.machine.cpus import available_threads


def test_defaults() -> None:
    settings = read_section({})
    assert settings == HybridExpertsSettings(
        weights="int8", compute="exact", expert_lora=True, activations="auto", threads="auto",
        memory_check=True, isa="auto", numa="auto", store="auto", resident="auto",
    )  # fmt: skip


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        read_section(
            {
                "weigths": "int8", "compute": "exakt", "threads": 0, "isa": "avx1024",
                "expert_lora": "yes", "colour": 1,
            }
        )  # fmt: skip
    text = str(caught.value)
    assert "6 problems" in text
    assert "weigths: unknown setting; did you mean weights?" in text
    assert "compute: got 'exakt', expected exact or int8; did you mean exact?" in text
    assert "threads: got 0, expected auto or a positive integer" in text
    assert "expert_lora: got 'yes', expected true or false or shared" in text
    assert "isa: got 'avx1024', expected one of auto, amx, avx512_bf16" in text
    assert "colour: unknown setting; expected weights" in text


def test_int8_arithmetic_needs_int8_weights() -> None:
    with pytest.raises(SettingsError, match="compute: int8 needs int8 or int4 weights"):
        HybridExpertsSettings(weights="bf16", compute="int8")


def test_path_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "experts.yaml").write_text("weights: bf16\nthreads: 3\n")
    settings = read_section("experts.yaml", recipe_dir=tmp_path)
    assert (settings.weights, settings.threads) == ("bf16", 3)
    with pytest.raises(SettingsError, match=r"no file 'nowhere.yaml'"):
        read_section("nowhere.yaml", recipe_dir=tmp_path)


@pytest.mark.parametrize("section", [3, ["weights"], 1.5])
def test_other_values_are_refused(section: object) -> None:
    with pytest.raises(SettingsError, match="expected settings such as"):
        read_section(section)


ALL_FLAGS = dict.fromkeys({flag for _, missing in isa_report({}) for flag in missing}, True)


def without(*flags: str) -> dict[str, bool]:
    return {**ALL_FLAGS, **dict.fromkeys(flags, False)}


# The best table of processors that lack what is named.
CHOICES = [
    ("amx", ()),
    ("avx512_bf16", ("amx_tile", "amx_int8", "amx_bf16", "amx_permission")),
    ("avx512_bf16", ("amx_permission",)),
    ("avx512_bf16", ("amx_int8",)),
    ("avx512_vnni", ("amx_tile", "avx512_bf16")),
    ("avx512", ("amx_tile", "avx512_bf16", "avx512_vnni")),
    ("avx_vnni", ("avx512f",)),
    ("avx_vnni", ("avx512bw",)),
    ("avx2", ("avx512f", "avx_vnni")),
    ("portable", ("fma",)),
    ("portable", ("avx512f", "avx_vnni", "avx2")),
]


@pytest.mark.parametrize(("isa", "missing"), CHOICES)
def test_isa_is_chosen_from_the_flags(isa: str, missing: tuple[str, ...]) -> None:
    assert select_isa("auto", without(*missing)) == isa


def test_every_isa_is_chosen_somewhere() -> None:
    assert {isa for isa, _ in CHOICES} == {name for name, _ in isa_report({})}
    assert select_isa("auto", {}) == "portable"
    assert select_isa("portable", ALL_FLAGS) == "portable"


@pytest.mark.parametrize("isa", [name for name, _ in isa_report({})])
def test_each_missing_flag_is_named(isa: str) -> None:
    for flag in dict(isa_report({}))[isa]:
        with pytest.raises(ValueError, match=f"{isa} cannot run on this CPU, which lacks {flag};"):
            select_isa(isa, without(flag))


def test_an_override_is_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="isa: got 'sse', expected one of auto, amx, avx512_bf16"):
        select_isa("sse", ALL_FLAGS)
    with pytest.raises(ValueError, match="cpu flag: got 'mmx'"):
        select_isa("auto", {"mmx": True})
    monkeypatch.setenv("KT_SFT_ISA", "portable")
    assert requested_isa("auto") == "portable"
    monkeypatch.setenv("KT_SFT_ISA", "sse")
    with pytest.raises(SettingsError, match=r"got 'sse'.*from the environment variable KT_SFT_ISA"):
        HybridExpertsSettings()


@pytest.fixture
def machine(tmp_path: Path):
    """Builds fake trees and returns the thread count for them."""

    def build(cpus: int, threads_per_core: int = 1, files: dict[str, str] | None = None,
              cgroup: str = "0::/", ranks: int = 1) -> int:  # fmt: skip
        for cpu in range(cpus):
            folder = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True, exist_ok=True)
            first = cpu // threads_per_core * threads_per_core
            (folder / "thread_siblings_list").write_text(f"{first}-{first + threads_per_core - 1}")
        for name, text in (files or {}).items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (tmp_path / "self").write_text(cgroup + "\n")
        return available_threads(
            cpus=set(range(cpus)), cgroup_root=tmp_path / "cgroup",
            proc_cgroup=tmp_path / "self", topology=tmp_path / "cpu", local_ranks=ranks,
        )  # fmt: skip

    return build


def test_threads_from_affinity_and_cores(machine) -> None:
    assert machine(8) == 8
    assert machine(8, threads_per_core=2) == 4


def test_threads_from_cgroup_v2(machine) -> None:
    assert machine(8, files={"cpu.max": "250000 100000"}) == 2
    assert machine(8, files={"cpu.max": "max 100000"}) == 8
    assert machine(8, files={"cpu.max": "50000 100000"}) == 1


def test_threads_from_a_nested_cgroup(machine) -> None:
    files = {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}
    assert machine(8, files=files, cgroup="0::/a/b") == 3


def test_threads_from_cgroup_v1(machine) -> None:
    files = {
        "cpu,cpuacct/x/cpu.cfs_quota_us": "400000",
        "cpu,cpuacct/x/cpu.cfs_period_us": "100000",
    }
    assert machine(8, files=files, cgroup="3:cpu,cpuacct:/x") == 4
    files["cpu,cpuacct/x/cpu.cfs_quota_us"] = "-1"
    assert machine(8, files=files, cgroup="3:cpu,cpuacct:/x") == 8


def test_ranks_share_the_cores(machine) -> None:
    assert machine(8, ranks=3) == 2
    assert machine(2, ranks=4) == 1
