"""What the engine benchmarks conclude from their samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_star.errors import ConfigError, PeerError
from sglang_star_bench import kv_copy, migration, overhead
from sglang_star_bench.disturbance import Window, steps
from sglang_star_bench.engines import Stream
from sglang_star_bench.migration_stalls import Outcome, Plan, Round, client_stall, summarise
from sglang_star_bench.overhead import HEAD, OFF, PLAIN, Sample

PLAN = Plan(context=100, batch=1, moves=2, gap=4, overlap=True)


def stream(gaps_s: list[float]) -> Stream:
    times = [1000.0]
    for gap in gaps_s:
        times.append(times[-1] + gap)
    made = Stream(token_ids=list(range(len(times))))
    made.arrivals = [(at, number + 1) for number, at in enumerate(times)]
    return made


def report(**fields: Any) -> dict[str, Any]:
    return {
        "outcome": "moved",
        "source": "a",
        "target": "b",
        "output_tokens": 11,
        "started_at": 1000.85,
        "finished_at": 1001.25,
        "stall_ms": 50.0,
        "stall_steps": 0.5,
        "step_ms": 100.0,
        "context_tokens": 110,
        "precopied_tokens": 99,
        "transport_bytes": 4000,
        "detail": "",
        **fields,
    }


def outcome(moved: Stream, *reports: dict[str, Any], twin: Stream | None = None) -> Outcome:
    made = Round([moved], [[], []], sets=[[one] for one in reports])
    return Outcome(names=["a", "b"], twins=[twin or moved], rounds=[made], carried=8000)


def test_a_stall_is_the_gap_around_the_move_beyond_a_step() -> None:
    moved = stream([0.1] * 9 + [0.35] + [0.1] * 5)
    stall_ms, step_ms = client_stall(moved, report())
    assert stall_ms == pytest.approx(250, abs=1)
    assert step_ms == pytest.approx(100, abs=1)


def test_a_migration_row_is_of_the_moves_that_succeeded() -> None:
    moved = stream([0.1] * 9 + [0.35] + [0.1] * 5)
    failed = report(outcome="refused", stall_ms=9e9)
    row = summarise(PLAN, outcome(moved, report(), failed))
    assert (row["moves"], row["failed"], row["identical"]) == (1, 1, True)
    assert row["stall_ms"]["max"] == 50.0
    assert row["client_stall_steps"]["p50"] == pytest.approx(2.5, abs=0.05)
    assert row["precopied"] == pytest.approx(0.9)
    assert row["bytes_per_s"] == pytest.approx(10000, rel=0.01)
    assert row["carried_per_byte"] == 2.0
    assert "bystander_p99_longer" not in row


def test_moves_together_share_the_link() -> None:
    moved = stream([0.1] * 9 + [0.35] + [0.1] * 5)
    first, second = report(), report(started_at=1000.95, finished_at=1001.35)
    together = Outcome(
        names=["a", "b"],
        twins=[moved] * 2,
        rounds=[Round([moved] * 2, [[], []], sets=[[first, second]])],
    )
    row = summarise(PLAN, together)
    assert row["link_bytes_per_s"] == pytest.approx(8000 / 0.5)
    assert row["bytes_per_s"] == pytest.approx(10000, rel=0.01)


def test_a_plan_has_room_for_all_and_streams_of_bounded_length() -> None:
    plan = Plan(context=1000, batch=2, moves=200, gap=10, overlap=True, at_once=4, longest=500)
    assert plan.tokens == 500
    assert plan.room == 4 * 1500 + 32 + 2 * 500 + 4 * 1000 // 64
    assert Plan(context=1, batch=1, moves=200, gap=10, overlap=True, at_once=4).tokens == 1020


# --------------------------------------------------------------------------- bystanders

MOVE = Window(began=1001.02, ended=1001.26, source="a", target="b")


def test_steps_during_a_move_are_compared_with_those_before() -> None:
    seen = steps(stream([0.1] * 10 + [0.15, 0.1, 0.1] + [0.1] * 10), [MOVE], since=0.0)
    assert seen.ratios == pytest.approx([1.5, 1.0, 1.0], rel=1e-3)
    assert seen.ratios_without == pytest.approx([1.0] * 20, rel=1e-3)
    assert seen.disturbed == [(0, 1)]


def test_a_batch_that_grows_is_no_disturbance() -> None:
    seen = steps(stream([0.1] * 12 + [0.12] * 10), [MOVE], since=0.0)
    assert seen.disturbed == [(0, 0)]
    assert max(seen.ratios_without) == pytest.approx(1.0, rel=1e-3)
    early = Window(began=1000.62, ended=1001.26, source="a", target="b")
    assert steps(stream([0.1] * 7 + [0.12] * 20), [early], since=0.0).disturbed == [(0, 2)]


def test_steps_before_all_were_there_count_for_nothing() -> None:
    seen = steps(stream([9.0] + [0.1] * 20), [], since=1009.0)
    assert seen.ratios_without == pytest.approx([1.0] * 20, rel=1e-3)


def test_windows_without_steps_beside_them_are_left_out() -> None:
    windows = [MOVE, Window(began=1001.3, ended=1001.5, source="b", target="a")]
    seen = steps(stream([0.1] * 25), windows, since=0.0)
    assert seen.disturbed == []
    assert len(seen.ratios_without) > 0


def test_source_and_target_are_told_apart() -> None:
    moved = stream([0.1] * 9 + [0.35] + [0.1] * 5)
    quiet, struck = stream([0.1] * 30), stream([0.1] * 10 + [0.2, 0.2] + [0.1] * 18)
    made = Round([moved], [[quiet], [struck, struck]], sets=[[report(started_at=1001.02)]])
    row = summarise(PLAN, Outcome(names=["a", "b"], twins=[moved], rounds=[made]))
    assert row["disturbed_steps"]["source"]["max"] == 0
    assert row["disturbed_steps"]["target"]["max"] == 2
    assert row["bystander_p99_longer"] == pytest.approx(1.0, rel=0.05)


def test_a_stream_that_differs_is_said_to_differ() -> None:
    moved = stream([0.1] * 15)
    twin = Stream(token_ids=[*moved.token_ids[:-1], 7])
    row = summarise(PLAN, outcome(moved, report(), twin=twin))
    assert row["identical"] is False


def test_a_migration_row_needs_a_move() -> None:
    refused = report(outcome="refused", detail="draining")
    with pytest.raises(PeerError, match="draining"):
        summarise(PLAN, outcome(Stream(), refused))


def test_overhead_is_paired_by_round() -> None:
    # The machine is five times slower in the second round; within each, the head costs a tenth.
    rounds = [
        {
            PLAIN: Sample(speed, 100 / speed),
            OFF: Sample(speed, 100 / speed),
            HEAD: Sample(0.9 * speed, 110 / speed),
        }
        for speed in (100.0, 20.0, 60.0)
    ]
    plain, off, head = overhead.summarise(rounds, batch=16)
    assert "throughput" not in plain
    assert plain["tokens_per_s"] == 60.0
    assert off["throughput"]["ci"] == [1.0, 1.0]
    assert head["throughput"]["median"] == pytest.approx(0.9)
    assert head["cpu"]["median"] == pytest.approx(1.1)
    assert overhead.describe(head).count("x") == 2


def test_variants_differ_in_star_alone() -> None:
    specs = overhead.variants("m", "builtin", ("--page-size", "16"))
    assert [(s.star, s.predictor) for s in specs.values()][1:] == [(True, "off"), (True, "builtin")]
    assert not specs[PLAIN].star
    assert {s.engine_arguments for s in specs.values()} == {("--page-size", "16")}
    assert HEAD not in overhead.variants("m", "off", ())


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (migration.main, ["--moves", "0"]),
        (migration.main, ["--context", "100", "0"]),
        (migration.main, ["--gap", "1"]),
        (overhead.main, ["--batch", "0"]),
        (overhead.main, ["--minutes", "-1"]),
        (overhead.main, ["--tokens", "1"]),
    ],
)
def test_senseless_numbers_are_refused_before_anything_starts(main: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError):
        main(words)


def test_kv_copy_measures_and_draws(tmp_path: Path) -> None:
    words = ["--model", "smollm2-135m", "--tokens", "64", "--page-size", "1", "16", "--rounds", "1"]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert kv_copy.main([*words, "--device", "cpu", *files]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["page_size"] for row in rows] == [1, 16]
    assert all(row["nbytes"] == 64 * 60 * 384 and row["gather"] > 0 for row in rows)
    assert (tmp_path / "a.png").stat().st_size > 5_000


@pytest.mark.parametrize("words", [["--tokens", "100", "--page-size", "16"], ["--rounds", "0"]])
def test_kv_copy_refuses_numbers_that_make_no_sense(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        kv_copy.main(words)
