"""The two command lines: results, figures, and errors that name the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_star_bench import policy_bench, simulate, traces

SHORT = ["--duration", "60", "--decode", "2", "--rate-scale", "0.1"]


@pytest.fixture
def trace_file(tmp_path: Path) -> str:
    path = tmp_path / "trace.parquet"
    traces.save(traces.synthetic(0, duration_s=600.0), path)
    return str(path)


def test_simulate_writes_a_row_per_policy_and_a_figure(
    tmp_path: Path, trace_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    args = ["--trace", trace_file, "--policy", "round-robin,star", "--policy", "least-tokens+star"]
    args += [*SHORT, "--seed", "1", "--json", str(out), "--plot", str(figure)]
    assert simulate.main(args) == 0
    rows = json.loads(out.read_text())
    assert [r["policy"] for r in rows] == ["round-robin", "star", "least-tokens+star"]
    assert all(r["completed"] == r["requests"] > 0 for r in rows)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "least-tokens+star" in capsys.readouterr().out


def test_simulate_without_a_trace_draws_one(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert simulate.main([*SHORT, "--policy", "star", "--json", str(out)]) == 0
    assert json.loads(out.read_text())[0]["trace"] == "synthetic-0"


def test_capacity_question(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    args = [
        "--capacity",
        "instances",
        "--policy",
        "star",
        "--duration",
        "60",
        "--attainment",
        "0.9",
    ]
    assert simulate.main([*args, "--rate-scale", "0.2", "--json", str(out)]) == 0
    (answer,) = json.loads(out.read_text())
    count = answer["instances"]
    assert answer["probes"][str(count)] >= 0.9
    assert count == 1 or answer["probes"][str(count - 1)] < 0.9


def test_policy_benchmark_grid_resumes(tmp_path: Path, trace_file: str) -> None:
    out, figure = tmp_path / "grid.json", tmp_path / "grid.png"
    args = ["--trace", trace_file, "--policy", "least-tokens,star", "--decode", "2,3"]
    args += ["--loads", "0.3", "--duration", "60", "--json", str(out), "--resume"]
    assert policy_bench.main([*args, "--seeds", "1"]) == 0
    first = json.loads(out.read_text())
    assert len(first) == 4
    assert policy_bench.main([*args, "--seeds", "2", "--plot", str(figure)]) == 0
    rows = json.loads(out.read_text())
    assert len(rows) == 8
    assert all(row in rows for row in first)
    assert {p.name for p in tmp_path.glob("*.png")} == {"grid-2.png", "grid-3.png"}


def test_decision_times(tmp_path: Path) -> None:
    out, figure = tmp_path / "d.json", tmp_path / "d.png"
    args = ["--decision-time", "2,4", "--json", str(out), "--plot", str(figure)]
    assert policy_bench.main(args) == 0
    rows = json.loads(out.read_text())
    assert {(r["policy"], r["instances"]) for r in rows} >= {("star", 2), ("star", 4)}
    assert all(0 < r["decision_ms"]["p50"] <= r["decision_ms"]["p99"] for r in rows)
    assert figure.exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--trace", "nowhere.parquet"], "no trace file"),
        (["--policy", "best"], "choose from"),
        (["--profile", "8gb"], "no profile"),
        (["--decode", "0"], "at least one decode"),
        (["--duration", "-1"], "must be positive"),
        (["--duration", "nan"], "must be positive"),
        (["--warmup", "600"], "--warmup"),
        (["--rate-scale", "0"], "rate scale"),
        (["--rate-scale", "1e-9"], "--rate-scale"),
        (["--set", "star.foo=1"], "no parameter 'foo'"),
        (["--set", "nonsense"], "GROUP.NAME=VALUE"),
        (["--set", "star.risk_sigma=x"], "no number"),
        (["--error-scale", "-1"], "error scale"),
        (["--link-gbps", "0"], "link speed"),
        (["--error-curve", "nowhere.json"], "not an error curve"),
    ],
)
def test_simulate_says_what_is_wrong(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate.main(["--policy", "star", *args]) == 2
    assert says in capsys.readouterr().err
