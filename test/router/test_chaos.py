"""The chaos matrix: what it counts, and one of its faults for real."""

from __future__ import annotations

import json

from sglang_star_bench.chaos import judge, main
from sglang_star_bench.chaos_load import Stream


def stream(sent: float, first: float = 0.0, ended: float = 0.0, **fields) -> Stream:
    return Stream(sent, first, ended, **({"engine": "a", "tokens": 3, "verdict": "ok"} | fields))


def test_only_what_had_begun_on_the_failed_engine_is_excused():
    streams = [
        stream(0.0, 0.5, 2.0),
        stream(9.0, 9.1, 11.0, verdict="failed"),
        stream(9.0, 9.1, 11.0, verdict="failed", engine="b", detail="neighbour"),
        stream(12.0, 0.0, 13.0, verdict="failed", tokens=0, engine="", detail="early"),
        stream(12.0, 12.1, 14.0, verdict="wrong"),
        stream(12.5, 18.0, 19.0, engine="b"),
        stream(12.0, 0.0, 12.1, verdict="refused", tokens=0, engine=""),
        stream(31.0, 31.1, 32.0),
    ]
    row = judge(streams, at=10.0, ended=30.0, failed_engine="a")
    assert (row["streams"], row["ok"], row["wrong"], row["refused"]) == (8, 3, 1, 1)
    assert (row["begun"], row["others"], row["slow_first"]) == (1, 2, 1)
    assert row["failures"] == ["early", "neighbour"]
    assert row["recovery_s"] == 8.0
    assert 1.0 < row["back_s"] < 1.2


def test_a_fault_is_put_to_real_processes(tmp_path):
    out = tmp_path / "chaos.json"
    main(
        ["--streams", "6", "--tokens", "3", "--itl-ms", "10", "--before-s", "0.5",
         "--fault-s", "1", "--after-s", "0.5", "--fault", "instant 500", "--json", str(out)]
    )  # fmt: skip
    row = json.loads(out.read_text())["faults"]["instant 500"]["star"]
    assert row["ok"] == row["streams"] > 6
    assert row["drawn"] > 0
