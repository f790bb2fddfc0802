"""Collecting: prompt files, shards, resumption, and what an interruption leaves."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_star.errors import ConfigError
from sglang_star.predictor import collect
from sglang_star.predictor.folder import claimed, write_manifest
from sglang_star.predictor.prompts import read_prompts, split_of
from sglang_star.predictor.recorder import Recorder
from sglang_star.predictor.samples import (
    ShardWriter,
    collected_rids,
    load_samples,
    shard_paths,
    write_shard,
)
from sglang_star.star_request import star_of
from unit import predictor_cases as cases

TEXTS = ("one", "two\nlines", "drei ✓")


def rows(key: str) -> list[dict[str, Any]]:
    return [{key: text, "source": "made"} for text in TEXTS]


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(json.dumps(row) for row in rows("prompt")),
        "\n".join(json.dumps(row) for row in rows("instruction")) + "\n\n",
        json.dumps(rows("text")),
        json.dumps(list(TEXTS)),
        json.dumps([{"messages": [{"role": "user", "content": t}]} for t in TEXTS]),
        json.dumps(
            [
                {"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": t}]}
                for t in TEXTS
            ]
        ),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_prompt_formats(tmp_path: Path, content: str, zipped: bool) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(gzip.compress(content.encode()) if zipped else content.encode())
    assert {prompt.text for prompt in read_prompts(path)} == set(TEXTS)


def test_plain_text_is_one_prompt_a_line_without_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("b\na\n\nb\n")
    assert sorted(prompt.text for prompt in read_prompts(path)) == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b'{"prompt": "a"}\n{broken',
        b'{"answer": 1}',
        b"[1, 2]",
        b"\x1f\x8bjunk",
        b"\xff",
    ],
)
def test_bad_prompt_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.jsonl"):
        read_prompts(path)


def test_splits_have_their_shares_and_ignore_the_sample_number() -> None:
    splits = [split_of(f"{number:016x}#0") for number in range(4000)]
    assert splits == [split_of(f"{number:016x}#5") for number in range(4000)]
    assert splits.count("train") / 4000 == pytest.approx(0.70, abs=0.03)
    assert splits.count("test") / 4000 == pytest.approx(0.15, abs=0.03)


# --------------------------------------------------------------------------- shards


def test_shards_give_back_what_was_recorded(tmp_path: Path) -> None:
    made = cases.records(50)
    writer = ShardWriter(tmp_path, requests_per_shard=16)
    for record in made:
        writer.add(record)
    writer.flush()
    writer.flush()
    samples = load_samples(tmp_path)
    assert cases.shard_count(tmp_path) == -(-len(made) // 16)
    assert samples.rids == [record.rid for record in made] == list(collected_rids(tmp_path))
    assert np.array_equal(samples.tokens, np.concatenate([r.tokens for r in made]))
    assert np.array_equal(samples.hidden, np.concatenate([r.hidden for r in made]))
    assert all(
        np.array_equal(a, r.output_ids) for a, r in zip(samples.output_ids, made, strict=True)
    )
    assert (samples.remaining == samples.output_tokens[samples.request] - samples.tokens).all()
    half = samples.select(np.arange(len(made)) % 2 == 1)
    assert half.rids == samples.rids[1::2]
    assert np.array_equal(half.tokens, np.concatenate([r.tokens for r in made[1::2]]))


def test_a_second_writer_continues_the_numbers(tmp_path: Path) -> None:
    for record in cases.records(4):
        writer = ShardWriter(tmp_path, requests_per_shard=1)
        writer.add(record)
    assert len({path.name for path in shard_paths(tmp_path)}) == 4


def test_an_unfinished_shard_is_not_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard-000000.safetensors", cases.records(3))
    (tmp_path / "shard-000001.partial").write_bytes(b"half")
    assert len(load_samples(tmp_path).rids) == 3


@pytest.mark.parametrize("size", [0, 5, 200, -10])
def test_a_damaged_shard_is_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "shard-000000.safetensors"
    write_shard(path, cases.records(3))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConfigError, match="shard-000000"):
        load_samples(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="star predictor collect"):
        load_samples(tmp_path)


# --------------------------------------------------------------------------- recorder


def decode(recorder: Recorder, reqs: list[Any], length: int, reason: str) -> np.ndarray:
    """Play ``length`` steps of a batch; every request ends at the last one."""
    states = np.random.default_rng(0).standard_normal((length, len(reqs), 6)).astype(np.float32)
    for step in range(1, length + 1):
        for req in reqs:
            req.output_ids = [7] * step
            if step == length:
                req.finished = lambda: True
                req.finished_reason = SimpleNamespace(to_json=lambda: {"type": reason})
        recorder.step(states[step - 1], reqs, [step] * len(reqs))
    return states


@pytest.mark.parametrize("reason", ["stop", "length", "abort"])
def test_the_recorder_samples_at_intervals_and_pools_between(tmp_path: Path, reason: str) -> None:
    reqs = [cases.request(rid=f"{i:016x}#0") for i in range(3)]
    states = decode(Recorder(tmp_path, interval=20), reqs, 50, reason)
    samples = load_samples(tmp_path)
    assert samples.tokens.tolist() == [1, 21, 41] * 3
    assert samples.output_tokens.tolist() == [50] * 3
    assert samples.censored.tolist() == [reason != "stop"] * 3
    assert samples.cut.tolist() == [reason != "stop"] * 3
    assert samples.hidden[1] == pytest.approx(states[20, 0], abs=2e-3)
    assert samples.pooled[1] == pytest.approx(states[1:21, 0].mean(axis=0), abs=2e-3)


def test_the_recorder_skips_a_request_it_did_not_see_begin(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    req = cases.request()
    recorder.step(np.ones((1, 6), np.float32), [req], [9])
    assert star_of(req).track is None


def test_values_beyond_half_precision_are_kept_finite(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    req = cases.request()
    recorder.step(np.full((1, 6), 1e6, np.float32), [req], [1])
    decode(recorder, [req], 2, "stop")
    assert np.isfinite(load_samples(tmp_path).hidden).all()


# --------------------------------------------------------------------------- the command


def arguments(tmp_path: Path, *more: str) -> Any:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(30)))
    words = ["--model", "m", "--prompts", str(prompts), "--out", str(tmp_path / "out"), *more]
    return collect.parser().parse_args(words)


def test_an_interrupted_collection_goes_on_where_it_stopped(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    prompts = read_prompts(args.prompts)
    writer = ShardWriter(args.out, requests_per_shard=1)
    asked: list[str] = []

    async def answer(job: collect.Job) -> int:
        asked.append(job[0])
        record = cases.records(1)[0]
        record.rid = job[0]
        writer.add(record)
        if len(asked) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0)
        return 1

    def cut() -> None:
        raise AssertionError("one signal must not cut")

    def run() -> collect.Progress:
        jobs = collect.plan(prompts, 2, args.out)
        return asyncio.run(collect.drive(jobs, answer, cut, concurrency=4))

    assert 20 <= run().done < 60
    run()
    assert len(asked) == len(set(asked)) == 60
    # Every prompt once before any twice.
    assert {rid[-2:] for rid in asked[:30]} == {"#0"}
    assert collect.plan(prompts, 2, args.out) == []


def test_a_second_signal_cuts_what_runs() -> None:
    running = asyncio.Event()

    async def scenario() -> collect.Progress:
        async def answer(job: collect.Job) -> int:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0)
            os.kill(os.getpid(), signal.SIGINT)
            await running.wait()
            return 3

        jobs: Any = [(f"{i}#0", None) for i in range(5)]
        return await collect.drive(jobs, answer, running.set, concurrency=1)

    progress = asyncio.run(scenario())
    assert progress.done == 1
    assert progress.tokens == 3


@pytest.mark.parametrize("change", [("--max-new-tokens", "7"), ("--temperature", "1.0")])
def test_a_collection_is_not_continued_with_other_settings(
    tmp_path: Path, change: tuple[str, str]
) -> None:
    first, second = arguments(tmp_path), arguments(tmp_path, *change)
    first.out.mkdir()
    write_manifest(first.out, collect.settings(first, 30))
    write_manifest(first.out, collect.settings(first, 60))
    with pytest.raises(ConfigError, match="was collected with"):
        write_manifest(second.out, collect.settings(second, 30))


def test_two_runs_cannot_collect_into_one_folder(tmp_path: Path) -> None:
    with claimed(tmp_path / "out"):
        other = "from pathlib import Path; from sglang_star.predictor.folder import claimed\n"
        other += f"with claimed(Path({str(tmp_path / 'out')!r})): pass"
        run = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
        assert run.returncode != 0
        assert "another run is collecting into" in run.stderr
    with claimed(tmp_path / "out"):
        pass


def test_a_file_is_no_folder_to_collect_into(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="cannot use"), claimed(tmp_path / "out"):
        pass
