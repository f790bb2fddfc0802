"""Judging predictors: the floor, calibration under a limit, held-out sources, the error curve."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from sglang_star.errors import ConfigError, SetupError
from sglang_star.model import reasoning_model
from sglang_star.predictor import (
    auxiliary,
    collect,
    dataset,
    encoders,
    errorcurve,
    floor,
    metrics,
    resample,
)
from sglang_star.predictor.baselines import AgeMean, ByAge
from sglang_star.predictor.evaluate import main as evaluate
from sglang_star.predictor.head import load
from sglang_star.predictor.prompts import split_of
from sglang_star.predictor.recipe import Recipe
from sglang_star.predictor.samples import (
    MANIFEST,
    MODEL,
    SOURCES,
    Samples,
    load_samples,
    write_shard,
)
from sglang_star.predictor.train import main as train
from sglang_star.predictor.windows import View, windows
from sglang_star.protocol import QUANTILE_LEVELS
from sglang_star_bench import ablations, calibration
from sglang_star_bench.simulator.emulated import ErrorCurve
from unit import predictor_cases as cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of 400 requests, half of their prompts from each of two sources."""
    result = tmp_path_factory.mktemp("samples")
    made = cases.records(400)
    write_shard(result / "shard-000000.safetensors", made)
    (result / MODEL).write_bytes(msgspec.json.encode(cases.MODEL))
    manifest = {
        "format": 1,
        "model": "/somewhere/made",
        "chat_template": True,
        "max_new_tokens": 400,
        "sampling": {"temperature": 0.5, "top_p": None, "top_k": None},
    }
    (result / MANIFEST).write_text(json.dumps(manifest))
    keys = [record.rid.partition("#")[0] for record in made]
    sources = {key: ("odd" if i % 2 else "even") for i, key in enumerate(keys)}
    (result / SOURCES).write_text(json.dumps(sources))
    return result


@pytest.fixture(scope="module")
def test_part(folder: Path) -> Samples:
    return dataset.split(load_samples(folder)).test


# --------------------------------------------------------------------------- the floor


def made_floor(samples: Samples, spread: float, seed: int = 0) -> floor.Floor:
    """Draws that are uniform, ``spread`` to either side of the truth."""
    generator = np.random.default_rng(seed)
    rows = np.arange(len(samples.tokens))
    draws = [samples.remaining[i] + generator.uniform(-spread, spread, 17) for i in rows]
    return floor.Floor(rows, draws)


def test_the_floor_is_the_error_of_the_best_predictor(test_part: Samples) -> None:
    spread = 40.0
    by_age = np.full((len(test_part.tokens), 5), 100.0)
    best = test_part.remaining.astype(float)
    found = made_floor(test_part, spread).report(test_part, {"by_age": by_age, "best": best}, 0)
    # A uniform distribution is half its half-width away from its median.
    assert found["mae"] == pytest.approx(spread / 2, rel=0.1)
    assert found["mae_seen"] < found["mae"]
    assert found["predictors"]["by_age"]["removed"] == 0
    assert found["predictors"]["best"]["removed"] == pytest.approx(1.0, abs=0.1)
    assert all(q == pytest.approx(spread / 2, rel=0.2) for q in found["mae_by_quarter"])


def test_without_chance_the_floor_is_nothing(test_part: Samples) -> None:
    by_age = np.full((len(test_part.tokens), 5), 100.0)
    found = made_floor(test_part, 0.0).report(test_part, {"by_age": by_age}, 0)
    assert found["mae"] == 0


def test_points_are_a_draw_of_the_test_samples_that_only_grows(
    folder: Path, test_part: Samples
) -> None:
    few, more = resample.plan(folder, 5, set()), resample.plan(folder, 20, set())
    names = [(point.rid, point.tokens) for point in more]
    assert [(point.rid, point.tokens) for point in few] == names[:5]
    assert {rid for rid, _ in names} <= set(test_part.rids)
    left = resample.plan(folder, 20, set(names[:5]))
    assert [(point.rid, point.tokens) for point in left] == names[5:]
    for point in more:
        request = test_part.rids.index(point.rid)
        whole = [*test_part.prompt_ids[request], *test_part.output_ids[request]]
        assert point.ids.tolist() == whole[: 10 + point.tokens]
        assert point.limit == test_part.max_new_tokens[request] - point.tokens


def test_a_resampling_goes_on_after_an_interruption(folder: Path, tmp_path: Path) -> None:
    points = resample.plan(folder, 6, set())
    reasons = iter(["stop", "length", "abort", "stop", "stop", "stop", "stop"])

    class Engine:
        async def async_generate(self, input_ids: list[int], sampling_params: Any) -> Any:
            reason = next(reasons)
            assert sampling_params["n"] == 3
            meta = {"completion_tokens": len(input_ids), "finish_reason": {"type": reason}}
            return [{"meta_info": meta}] * 3

    async def go(some: list[resample.Point]) -> None:
        again = resample.continuer(Engine(), {"temperature": 0.5}, 3, tmp_path)
        for point in some:
            await again(point)

    asyncio.run(go(points[:3]))
    path = tmp_path / resample.FILE
    with path.open("a") as file:
        file.write('{"rid": "half a li')
    found = resample.read(tmp_path)
    assert set(found) == {(p.rid, p.tokens) for p in points[:2]}  # the aborted one is not there
    asyncio.run(go(resample.plan(folder, 6, set(found))))
    found = resample.read(tmp_path)
    assert found == {(p.rid, p.tokens): [len(p.ids)] * 3 for p in points}


def test_a_floor_of_another_collection_is_refused(test_part: Samples, tmp_path: Path) -> None:
    (tmp_path / resample.FILE).write_text('{"rid": "x#0", "tokens": 1, "remaining": [1, 2]}\n')
    with pytest.raises(ConfigError, match="not of these samples"):
        floor.of(test_part, resample.read(tmp_path))
    (tmp_path / resample.FILE).write_text('{"rid": 3}\n')
    with pytest.raises(ConfigError, match="line 1"):
        resample.read(tmp_path)


def test_resampling_needs_the_model_of_the_collection(folder: Path, tmp_path: Path) -> None:
    words = ["--resample", str(folder), "--out", str(tmp_path / "out"), "--model"]
    with pytest.raises(ConfigError, match="was collected from made"):
        collect.main([*words, "/elsewhere/other"])


# --------------------------------------------------------------------------- metrics


def one_sample_each(remaining: np.ndarray, limit: int) -> Samples:
    count = len(remaining)
    return Samples(
        rids=[f"{i:016x}#0" for i in range(count)],
        prompt_ids=[np.zeros(1)] * count,
        output_ids=[np.zeros(n + 1) for n in np.minimum(remaining, limit - 1)],
        max_new_tokens=np.full(count, limit),
        censored=remaining >= limit - 1,
        request=np.arange(count),
        tokens=np.ones(count, np.int64),
    )


def test_a_limit_does_not_spoil_calibration() -> None:
    generator = np.random.default_rng(0)
    scale = np.exp(generator.uniform(2.0, 7.0, 20_000))
    remaining = (generator.exponential(size=len(scale)) * scale).astype(np.int64)
    samples = one_sample_each(remaining, 300)
    assert 0.1 < samples.censored.mean() < 0.5
    # The quantiles of the distribution it was drawn from, rounded down as the draws are.
    exact = np.floor(-np.log1p(-np.array(QUANTILE_LEVELS)) * scale[:, None])
    found = metrics.score(exact, samples)
    assert found["coverage_open"] == pytest.approx(found["coverage_open_expected"], abs=0.02)
    assert 0.82 < found["coverage_open_expected"] < 0.90
    for row in found["calibration"]:
        assert row["within"] == pytest.approx(row["level"], abs=0.025)
    assert found["coverage"] > 0.82  # where the limit decides, every band holds it


def test_paired_intervals_are_narrower_than_separate_ones(test_part: Samples) -> None:
    generator = np.random.default_rng(0)
    hard = np.exp(generator.standard_normal(len(test_part.rids)))[test_part.request]
    ours = metrics.paired(10 * hard, 12 * hard, test_part.request)
    assert ours["ci"][0] < ours["difference"] < ours["ci"][1] < 0
    low, high = metrics.bootstrap(12 * hard, test_part.request)
    assert high - low > 2 * (ours["ci"][1] - ours["ci"][0])


def test_errors_are_split_by_source(test_part: Samples) -> None:
    names = ["a" if i % 3 else "b" for i in range(len(test_part.rids))]
    predicted = np.zeros(len(test_part.tokens))
    found = metrics.score(predicted, test_part, sources=names)["mae_by_source"]
    rows = np.array([name == "b" for name in names])[test_part.request]
    assert found["b"]["mae"] == pytest.approx(test_part.remaining[rows].mean())
    assert found["a"]["requests"] + found["b"]["requests"] == len(names)


# --------------------------------------------------------------------------- thinning


def test_a_thinned_collection_is_what_a_coarser_recorder_writes(test_part: Samples) -> None:
    thin = dataset.thinned(test_part, 40)
    assert set((thin.tokens - 1) % 40) == {0}
    identity, zero = np.eye(cases.HIDDEN, dtype=np.float32), np.zeros(cases.HIDDEN, np.float32)
    fine, coarse = (dataset.inputs(part, zero, identity) for part in (test_part, thin))
    rows = (test_part.tokens - 1) % 40 == 0
    assert np.array_equal(coarse.now, fine.now[rows])
    assert coarse.mean == pytest.approx(fine.mean[rows], abs=5e-3)


# --------------------------------------------------------------------------- the error curve


def test_the_error_curve_gives_the_simulator_what_was_measured(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    length = np.full(400, 101)
    tokens = np.tile(np.arange(1, 101, 5), 400)
    samples = Samples(
        rids=[f"{i:016x}#0" for i in range(400)],
        prompt_ids=[np.zeros(1)] * 400,
        output_ids=[np.zeros(n) for n in length],
        max_new_tokens=np.full(400, 10_000),
        censored=np.zeros(400, bool),
        request=np.repeat(np.arange(400), 20),
        tokens=tokens,
    )

    def predicted(spread: float) -> np.ndarray:
        noise = generator.standard_normal(len(tokens)) * spread
        return np.tile((samples.remaining * np.exp(noise))[:, None], (1, 5))

    found = errorcurve.measure(predicted(0.3), predicted(0.8), samples, "made")
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(found))
    curve = ErrorCurve.read(path)
    assert curve.measured
    # Noise that, combined with what age tells, leaves what the head was measured to leave.
    expected = (1 / 0.3**2 - 1 / 0.8**2) ** -0.5
    assert curve.log_error_std[:8] == pytest.approx(expected, rel=0.12)
    assert curve.turns == pytest.approx(4 / 3, abs=0.15)  # every error was drawn anew


# --------------------------------------------------------------------------- the commands


def test_a_whole_source_is_held_out_of_head_and_baselines(folder: Path, tmp_path: Path) -> None:
    whole, part, out = (tmp_path / name for name in ("whole", "part", "report.json"))
    few = ["--samples", str(folder), "--epochs", "2"]
    train([*few, "--out", str(whole)])
    train([*few, "--out", str(part), "--hold-out-source", "odd"])
    provenance = load(part).card.provenance
    assert provenance["held_out_sources"] == ["odd"]
    assert provenance["fit"]["requests"] < load(whole).card.provenance["fit"]["requests"] * 0.6
    words = ["--samples", str(folder), "--only", "median", "linear", "--hold-out-source", "odd"]
    with pytest.raises(ConfigError, match="trained on prompts from odd"):
        evaluate([*words, "--head", str(whole)])
    plot = tmp_path / "plot.png"
    evaluate([*words, "--head", str(part), "--json", str(out), "--plot", str(plot)])
    report = json.loads(out.read_text())
    assert set(report["results"]) == {"star", "by_age", "median", "linear"}
    assert set(report["results"]["star"]["mae_by_source"]) == {"odd"}
    assert report["requests"] == pytest.approx(200, abs=20)
    assert plot.stat().st_size > 10_000
    with pytest.raises(ConfigError, match="no prompt is from nowhere"):
        train([*few, "--out", str(part), "--hold-out-source", "nowhere"])


def test_the_mean_by_age_is_there_beside_the_median(test_part: Samples) -> None:
    mean, median = AgeMean(test_part).predict(test_part), ByAge(test_part, 0).predict(test_part)
    assert mean[0] == pytest.approx(test_part.remaining[test_part.tokens < 21].mean())
    assert mean[0] > median[0, 2]


def test_every_ablation_is_judged_against_the_whole_recipe(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, repeats=1)
    report = ablations.run(folder, recipe)
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == len(list(ablations.variants(recipe, cases.HIDDEN)))
    assert rows[ablations.FULL]["minus_full"]["difference"] == 0
    assert rows["1/4 of the requests"]["requests"] == -(-report["fit_requests"] // 4)
    assert "projection to 16" not in rows, "wider than the state"
    splits = [split_of(rid) for rid in load_samples(folder).rids]
    assert report["fit_requests"] == splits.count("train")
    assert report["validation_requests"] == splits.count("validation"), "the test split chooses"
    changed = [row for row in report["rows"] if row["minus_full"]["difference"] != 0]
    assert len(changed) >= len(rows) - 2
    ablations.plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


# --------------------------------------------------------------------------- the auxiliary model


def test_without_its_package_the_auxiliary_baseline_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoders, "PACKAGE", "no_such_package")
    with pytest.raises(SetupError, match=r"sglang-star\[bench\]"):
        encoders.Pretrained(10, str)


def test_the_auxiliary_baseline_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no tokenizer"):
        encoders.vocabulary(str(tmp_path))


@pytest.mark.parametrize("output", [40, 100, 500])
def test_every_sample_is_judged_once_by_what_came_before_it(
    test_part: Samples, output: int
) -> None:
    found = windows(test_part, View(4, output), (100, 101))
    judged = np.concatenate([one.samples for one in found])
    assert sorted(judged) == list(range(len(test_part.tokens)))
    for one in found:
        assert len(one.ids) <= View(4, output).longest
        request = test_part.request[one.samples[0]]
        prompt, ids = test_part.prompt_ids[request], test_part.output_ids[request]
        assert one.ids[:6].tolist() == [100, *prompt[:4], 101]
        for sample, place in zip(one.samples, one.places, strict=True):
            tokens = int(test_part.tokens[sample])
            read = one.ids[6 : place + 1]
            assert len(read) >= min(tokens, output // 2)
            assert read.tolist() == ids[tokens - len(read) : tokens].tolist()


def small() -> Any:
    return encoders.Small(12, 32)


def pretrained() -> Any:
    pytest.importorskip(encoders.PACKAGE)
    return encoders.Pretrained(12, lambda token: "abcdefghij"[token])


@pytest.mark.parametrize("make", [small, pretrained])
def test_an_encoder_sees_nothing_of_what_comes_later(make: Any) -> None:
    encoder = make().eval()
    ids = torch.tensor([[10, 1, 2, 11, 3, 4, 5, 6]])
    other = ids.clone()
    other[:, 6:] = 9
    with torch.no_grad():
        states, again = encoder(ids)[0], encoder(other)[0]
    assert states.shape == (8, encoder.width)
    assert torch.allclose(states[:6], again[:6], atol=1e-5)
    assert not torch.allclose(states[6:], again[6:], atol=1e-2)


def test_training_of_an_encoder_is_judged_by_validation_and_says_how_far_it_got(
    folder: Path, test_part: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "VIEWS": (View(8, 40), View(8, 80)), "RATES": {"small": (1e-3,)}, "TRIAL_TOKENS": 2000,
        "LOOK_TOKENS": 2000, "PATIENCE": 1, "JUDGED": 10,
    }.items():  # fmt: skip
        monkeypatch.setattr(auxiliary, name, value)
    fit, served = dataset.split(load_samples(folder)).fit, str(reasoning_model())
    found = auxiliary.Auxiliary(fit, 0, served, "small")
    assert found.notes["converged"]
    assert len(found.notes["tried"]) == 3  # two views, and a second loss with the better one
    curve = found.notes["curve"]
    assert min(look["mae"] for look in curve) < curve[0]["mae"]
    assert [look["tokens"] for look in curve] == sorted(look["tokens"] for look in curve)
    few = test_part.head(40)
    predicted = found.predict(few)
    assert np.isfinite(predicted).all()
    assert predicted == pytest.approx(found.predict(test_part)[: len(few.tokens)], rel=1e-3)
    stopped = auxiliary.Auxiliary(fit, 0, served, "small", minutes=0)
    assert not stopped.notes["converged"], "its figure is not the baseline's"


def test_the_routers_correction_of_a_head(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head, report = tmp_path / "head.safetensors", tmp_path / "report.json"
    cases.head().save(head)  # random weights: wrong about everything
    command = ["--samples", str(folder), "--head", str(head), "--running", "4"]
    command += ["--hold-out-source", "odd"]
    assert calibration.main([*command, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert f"{found['requests']} requests, 4 at a time" in capsys.readouterr().out
    given, corrected = found["estimates"]["given"], found["estimates"]["corrected"]
    assert corrected["held"] > given["held"] + 0.05
    assert corrected["held_over_time"][-1] > given["held_over_time"][-1]
