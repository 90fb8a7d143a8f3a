"""The device check: a rehearsal of all of it, and what its tables and sums say."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from device_check import __main__ as check
from device_check import figures, kernels, machine, parity, report
from device_check.plan import STAGES, Stage
from device_check.sizes import SIZES

ROOT = Path(__file__).parents[1]


def run_check(directory, *options):
    return subprocess.run(
        [sys.executable, "-m", "device_check", f"--output_dir={directory}", *options],
        cwd=ROOT,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    directory = tmp_path_factory.mktemp("check")
    ended = run_check(directory, "--sizes=tiny")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return directory, ended.stdout


def test_every_stage_leaves_its_figures(rehearsal):
    directory, printed = rehearsal
    done = json.loads((directory / "device_check.json").read_text())["figures"]
    assert list(dict.fromkeys(figure["stage"] for figure in done)) == [s.name for s in STAGES]
    assert done == figures.read(directory / "figures.jsonl")
    table = (directory / "device_check.md").read_text()
    assert table == report.markdown(done)
    for stage in STAGES:
        assert f"{stage.name}: " in printed
    for title in ("Parity", "Decode steps", "Prefill and training", "Where a step's time goes"):
        assert f"## {title}" in table
    assert "did not end by themselves" not in table


def test_the_device_computes_what_the_cpu_does(rehearsal):
    directory, _ = rehearsal
    rows = [f for f in figures.read(directory / "figures.jsonl") if f["stage"] == "parity"]
    steps = {(row["plan"], row["dtype"]) for row in rows if row["what"] == "fused step"}
    assert steps == set(SIZES["tiny"].compared)
    assert all(row["holds"] for row in rows)
    assert {row["tokens"] for row in rows if row["dtype"] == "float32" and row["tokens"]} == {
        "48 of 48"
    }


def test_every_kind_of_step_is_timed(rehearsal):
    directory, _ = rehearsal
    rows = [f for f in figures.read(directory / "figures.jsonl") if f["stage"] == "decode"]
    kinds = {(row["plan"], row["dtype"], row["drawn"], row["prompt"]) for row in rows}
    timed = [*SIZES["tiny"].timed, ("M alone", "bfloat16"), ("M alone", "int8")]
    assert kinds == {
        (*kind, *how) for kind in timed for how in (("greedy", 8), ("sampled", 8), ("greedy", 40))
    }
    assert all(("over_alone" in row) == (row["plan"] != "M alone") for row in rows)


def test_the_trace_is_kept(rehearsal):
    directory, _ = rehearsal
    data = gzip.decompress((directory / kernels.TRACE).read_bytes())
    found, _ = kernels.device_events(jax.profiler.ProfileData.from_serialized_xspace(data))
    (row,) = [f for f in figures.read(directory / "figures.jsonl") if f["stage"] == "kernels"]
    assert row["kernels"] == len(found) / row["steps"] > 10
    assert row["span_us"] == pytest.approx(row["busy_us"] + row["gap_us"])


def test_the_full_check_leaves_out_no_kind():
    kinds = {
        (plan, dtype)
        for plan in ("separate", "stacked", "shared")
        for dtype in ("float32", "bfloat16", "int8")
    }
    assert set(SIZES["full"].compared) == kinds
    assert sum(stage.seconds for stage in STAGES) <= 8 * 60


def test_another_result_is_seen(monkeypatch):
    """Weights that differ by a thousandth are more than rounding."""

    def changed(loaded, device):
        params = jax.tree.map(lambda x: x * 1.001, loaded.params)
        return dataclasses.replace(loaded, params=params)

    monkeypatch.setattr(parity, "_moved", changed)
    row = parity.decoding(("separate", "float32"))
    assert not row["holds"]
    assert row["error"] > row["bound"] == 1e-4


def test_without_an_accelerator(tmp_path):
    ended = run_check(tmp_path)
    assert ended.returncode == 2
    line = "error: no accelerator is here: --sizes=tiny rehearses the check on a CPU"
    assert line in ended.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stages=parity,speed",), "--stages: 'speed' is not one of machine, parity"),
        (("--wheels=/no/such",), "error: --wheels: no .whl in /no/such"),
    ],
)
def test_what_is_refused(tmp_path, options, message):
    ended = run_check(tmp_path, "--sizes=tiny", *options)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_stage_out_of_time(tmp_path, capsys):
    stage = Stage("decode", 1)
    environment = check.stage_environment(tmp_path, None)
    check.run(stage, "tiny", tmp_path, time.monotonic() + 0.2, environment)
    (figure,) = figures.read(tmp_path / "figures.jsonl")
    assert figure["ended"].startswith("stopped after ")
    table = (tmp_path / "device_check.md").read_text()
    assert "did not end by themselves\n\n- `decode`: stopped after" in table
    assert "The machine has not said yet" in table


def test_a_line_that_is_being_written(tmp_path):
    path = tmp_path / "figures.jsonl"
    figures.recorder(path, "machine")({"flops": 1.0})
    with path.open("a") as file:
        file.write('{"stage": "mach')
    assert [figure["flops"] for figure in figures.read(path)] == [1.0]


def test_kernels_are_summed():
    """Two threads: one kernel within another's time, and a gap of 50."""
    events = [
        ("gemm_fusion.12", 100.0, 200.0),
        ("loop_fusion.3", 120.0, 160.0),
        ("gemm_fusion.13", 250.0, 300.0),
        ("gemm_fusion", 300.0, 310.0),
    ]
    row = kernels.summary(events, 2)
    assert row["span_us"] == pytest.approx(0.210 / 2)
    assert row["busy_us"] == pytest.approx(0.160 / 2)
    assert row["gap_us"] == pytest.approx(0.050 / 2)
    assert row["kernels"] == 2
    assert row["kinds"] == [["gemm_fusion", pytest.approx(0.08), 1.5], ["loop_fusion", 0.02, 0.5]]
    assert kernels.summary([], 2)["kernels"] == 0


def plane(name, **lines):
    """As jax.profiler.ProfileData has them."""
    fields = ("name", "start_ns", "duration_ns", "stats")

    def line(name, events):
        made = [SimpleNamespace(**dict(zip(fields, event, strict=True))) for event in events]
        return SimpleNamespace(name=name, events=made)

    return SimpleNamespace(name=name, lines=[line(*pair) for pair in lines.items()])


def test_the_first_gpu_is_read():
    """Its kernels, not the loop around them nor what sums them, and what it copies to the host."""
    streams = {
        "Stream_7": [
            ("cutlass_80", 20, 5, {"hlo_op": "gemm_fusion.1"}),
            ("while.2", 0, 50, {"hlo_op": "while.2"}),
            ("in_a_graph", 10, 2, {}),
        ],
        "Stream_9": [("MemcpyD2H", 30, 1, {})],
        "Steps": [("1", 0, 60, {})],
    }
    planes = [
        plane("/host:CPU", threads=[("f", 0, 9, {"hlo_op": "on_host"})]),
        plane("/device:GPU:1", Stream_1=[("other", 0, 9, {})]),
        plane("/device:GPU:0", **streams),
    ]
    found, copies = kernels.device_events(SimpleNamespace(planes=planes))
    assert found == [("in_a_graph", 10, 12), ("gemm_fusion.1", 20, 25)]
    assert [name for name, *_ in copies] == ["MemcpyD2H"]


def test_the_table_of_steps():
    """By hand: 8e9 bytes at 4e12 a second are 2 ms."""
    row = {"stage": "decode", "dtype": "bfloat16", "drawn": "greedy", "batch": 8, "prompt": 128}
    timed = {"ms": 2.5, "bytes": 8e9, "prefill_seconds": 0.5}
    table = report.markdown(
        [
            {"stage": "machine", "bandwidth": 4e12, "device": "H", "devices": 1, "platform": "gpu",
             "memory": 2**37, "python": "3.12", "versions": {"jax": "1"},
             "missing": {"gguf": "GGUF files"}},
            {**row, **timed, "plan": "M alone"},
            {**row, **timed, "plan": "separate", "ms": 2.1, "over_alone": 0.84},
            {**row, "plan": "shared", "left_out": "needs more"},
            {"stage": "torch", "plan": "trio", "batch": 8, "prompt": 128, "ms": 21.0},
        ]
    )  # fmt: skip
    assert "1 rows fall short of 85% of it" in table
    assert "| M alone | bfloat16 | greedy | 8 | 128 | 2.50 | 2.00 | 80% |  |  | 0.500 |" in table
    assert "| 2.10 | 2.00 | 95% | 0.84 | 21.0 (10.0 x) | 0.500 |" in table
    assert "| shared | bfloat16 | greedy | 8 | 128 | does not fit |" in table
    assert "128.0 GiB of memory" in table
    assert "Not installed here: gguf, for GGUF files." in table


def test_what_is_missing(monkeypatch):
    """torch, which the stages hide from transformers, is there; a wheel that nobody has is not."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(machine.NEEDED_BY, "no-such-wheel", "nothing")
    recorded: list[dict] = []
    monkeypatch.setattr(machine.timing, "bandwidth", lambda: 1.0)
    monkeypatch.setattr(machine, "product_flops", lambda dtype, size: 1.0)
    machine.run(SIZES["tiny"], recorded.append)
    assert recorded[0]["missing"] == {"no-such-wheel": "nothing"}
    assert "torch" in recorded[0]["versions"]
