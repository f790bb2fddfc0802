"""Fitting on data whose truth is known: accuracy, calibration, censoring, reproducibility."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_star.errors import ConfigError
from sglang_star.predictor import baselines, dataset, ensemble, metrics, trials
from sglang_star.predictor import fit as fitting
from sglang_star.predictor.baselines import AUXILIARY, BASELINES, ByAge, ConstantMedian
from sglang_star.predictor.fit import fit
from sglang_star.predictor.head import Head
from sglang_star.predictor.recipe import Recipe
from sglang_star.predictor.samples import RequestRecord, Samples, load_samples, write_shard
from sglang_star.predictor.train import main as train
from sglang_star.predictor.train import predict
from unit import predictor_cases as cases


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dataset.Split:
    folder = tmp_path_factory.mktemp("samples")
    write_shard(folder / "shard-000000.safetensors", cases.records(500))
    return dataset.split(load_samples(folder))


@pytest.fixture(scope="module")
def head(parts: dataset.Split) -> Head:
    weights, _ = fit(
        parts.fit, Recipe(width=8, inner=32, dropout=0.5, epochs=40, batch=256), quiet=True
    )
    return Head(cases.head().card, weights)


def test_the_head_uses_what_the_hidden_state_tells(parts: dataset.Split, head: Head) -> None:
    ours = metrics.score(predict(head, parts.test), parts.test)
    age = metrics.score(ByAge(parts.fit, 0).predict(parts.test), parts.test)
    assert ours["mae_ci"][1] < age["mae_ci"][0]
    assert ours["c_index"] > 0.8


def test_intervals_cover_what_they_say(parts: dataset.Split, head: Head) -> None:
    result = metrics.score(predict(head, parts.test), parts.test)
    assert 0.7 <= result["coverage"] <= 0.9


def test_some_outputs_were_cut_and_the_fit_reads_past_them(
    parts: dataset.Split, head: Head
) -> None:
    cut = parts.fit.censored
    assert 0.02 < cut.mean() < 0.3
    # Just before the limit the model must not believe that every output ends there.
    late = parts.fit.select(cut)
    rows = late.tokens > 300
    assert np.median(predict(head, late)[rows, -1]) > np.median(late.remaining[rows])


def spread(signal: bool) -> list[RequestRecord]:
    """Requests whose length is told, or not, by the 19th strongest direction of their state."""
    generator = np.random.default_rng(1)
    records = []
    for record in cases.records(200, seed=3):
        kind = np.log(len(record.output_ids)) - 4.0
        state = generator.standard_normal(48)
        state[18] = kind if signal else state[18]
        state *= np.geomspace(40.0, 1.0, 48)
        hidden = np.repeat(state[None], len(record.tokens), 0).astype(np.float16)
        records.append(dataclasses.replace(record, hidden=hidden, pooled=hidden))
    return records


@pytest.mark.parametrize(("signal", "chosen"), [(True, 48), (False, 24)])
def test_the_width_is_as_large_as_the_data_can_use(
    tmp_path: Path, signal: bool, chosen: int
) -> None:
    write_shard(tmp_path / "shard-000000.safetensors", spread(signal))
    samples = dataset.split(load_samples(tmp_path)).fit
    recipe, tried = trials.choose(samples, Recipe(batch=128, inner=32, dropout=0.5), quiet=True)
    assert recipe.width == chosen
    assert tried[f"width {chosen}, inner 32, dropout 0.5"] == min(tried.values())
    assert set(tried) <= {f"width {width}, inner 32, dropout 0.5" for width in trials.widths(48)}


@pytest.mark.parametrize(
    ("given", "name", "values"),
    [
        ({"width": 7, "inner": 9}, "dropout", trials.DROPOUTS),
        ({"width": 7, "dropout": 0.3}, "inner", [32 * k for k in trials.INNER]),
    ],
)
def test_what_is_open_is_tried_in_order_while_it_helps(
    parts: dataset.Split, given: dict[str, Any], name: str, values: Sequence[float]
) -> None:
    recipe, tried = trials.choose(parts.fit, Recipe(**given, epochs=2), quiet=True)
    losses = list(tried.values())
    chosen = values.index(getattr(recipe, name))
    assert len(losses) == min(chosen + 2, len(values))
    assert losses[chosen] == min(losses)
    assert all(later < earlier for earlier, later in pairwise(losses[: chosen + 1]))


def test_what_is_given_is_not_tried(parts: dataset.Split) -> None:
    recipe = Recipe(width=7, inner=9, dropout=0.3)
    assert trials.choose(parts.fit, recipe, quiet=True) == (recipe, {})
    for unset in (Recipe(width=7), Recipe(dropout=0.3, inner=9)):
        with pytest.raises(ValueError, match="chosen before"):
            fit(parts.fit, unset, quiet=True)


def test_a_trial_trains_no_more_folds_than_it_needs(
    parts: dataset.Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    train = ensemble.train
    monkeypatch.setattr(
        ensemble,
        "train",
        lambda x, trains, *rest: trained.append(len(trains)) or train(x, trains, *rest),
    )
    requests, recipe = len(parts.fit.rids), Recipe(width=7, inner=9, dropout=0.3, epochs=1)
    for judged in (1, requests // 2, 10 * requests):
        fitting.trial(parts.fit, recipe, judged, quiet=True)
    assert trained == [1, 3, 5]


@pytest.mark.parametrize(("enough", "share"), [(10**6, 1.0), (1, fitting.ASIDE)])
def test_many_requests_leave_some_that_only_calibrate(
    parts: dataset.Split, monkeypatch: pytest.MonkeyPatch, enough: int, share: float
) -> None:
    monkeypatch.setattr(fitting, "ASIDE_FROM", enough)
    inputs = fitting.Inputs.of(parts.fit, Recipe(width=7, inner=9, dropout=0.3))
    request = parts.fit.request
    asides = {int(r) for r in request[inputs.calibrates]}
    assert len(asides) == math.ceil(share * len(parts.fit.rids))
    learnt = inputs.trains.any(axis=0)
    assert learnt.all() if share == 1.0 else (learnt == ~inputs.calibrates).all()


def test_same_seed_same_head(parts: dataset.Split) -> None:
    first, _ = fit(parts.fit, Recipe(width=8, inner=32, dropout=0.5, epochs=2), quiet=True)
    again, _ = fit(parts.fit, Recipe(width=8, inner=32, dropout=0.5, epochs=2), quiet=True)
    assert np.array_equal(first.w1, again.w1)
    assert np.array_equal(first.levels, again.levels)


def test_a_feature_that_never_varied_does_not_act(parts: dataset.Split, head: Head) -> None:
    x = dataset.inputs(parts.test, head.weights.mean, head.weights.projection)
    states = (x.now, x.recent, x.mean)
    other = x.features.copy()
    other[:, 2] *= 8  # every request was collected with one max_new_tokens
    assert np.array_equal(head.logits(*states, x.features), head.logits(*states, other))


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"paper", *AUXILIARY}))
def test_baselines_predict_every_sample(parts: dataset.Split, name: str) -> None:
    predicted = BASELINES[name](parts.fit, 0).predict(parts.test)
    assert predicted.shape[0] == len(parts.test.tokens)
    assert np.isfinite(predicted).all()
    score = metrics.score(predicted, parts.test)
    constant = metrics.score(ConstantMedian(parts.fit, 0).predict(parts.test), parts.test)
    assert score["mae"] <= constant["mae"] * 1.2


def test_the_papers_head_is_trained_as_validation_says(
    parts: dataset.Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "SCHEDULES", ((1e-9, 0.0), (1e-3, 0.0)))
    monkeypatch.setattr(baselines, "TRIAL_EPOCHS", 2)
    monkeypatch.setattr(baselines, "EPOCHS", 6)
    found = baselines.PaperHead(parts.fit, 0)
    slow, fast = found.notes["tried"].values()
    assert fast < slow, "a rate that learns nothing must lose"
    ours = metrics.score(found.predict(parts.test), parts.test)["mae"]
    constant = metrics.score(ConstantMedian(parts.fit, 0).predict(parts.test), parts.test)["mae"]
    assert ours < constant


def test_no_prompt_is_in_two_splits(parts: dataset.Split) -> None:
    keys = [{rid.partition("#")[0] for rid in part.rids} for part in (parts.fit, parts.test)]
    assert not keys[0] & keys[1]


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Requests of which every four are wordings of one instance."""
    folder = tmp_path_factory.mktemp("worded")
    write_shard(folder / "shard-000000.safetensors", cases.records(600, wordings=4))
    return load_samples(folder)


def instances(samples: Samples) -> set[str]:
    return {rid.partition("-")[0] for rid in samples.rids}


def test_no_instance_is_in_two_splits(worded: Samples) -> None:
    parts = dataset.split(worded)
    chosen = dataset.choice(parts.fit)
    assert not instances(parts.fit) & instances(parts.test)
    assert not instances(chosen.fit) & instances(chosen.test)
    # What chooses is a part of what is fitted on, and all of it takes part.
    assert instances(chosen.fit) | instances(chosen.test) == instances(parts.fit)
    assert max(worded.instance) + 1 == len(instances(worded)) == 150


def test_an_instance_of_a_held_out_source_teaches_in_no_other_wording(worded: Samples) -> None:
    held_out = np.arange(len(worded.rids)) % 8 == 0  # one wording of every other instance
    parts = dataset.split(worded, held_out)
    assert not instances(parts.fit) & instances(parts.test)


@pytest.mark.parametrize("aside_from", [4000, 100])
def test_no_member_leaves_out_an_instance_that_it_trains_on(
    worded: Samples, aside_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "ASIDE_FROM", aside_from)
    recipe = Recipe(width=4, inner=8, dropout=0.5, repeats=2)
    found = fitting.Inputs.of(worded, recipe)
    for trains in (*found.trains, found.calibrates):
        for row in range(len(trains)):
            same = worded.instance[worded.request] == worded.instance[worded.request[row]]
            assert (trains[same] == trains[row]).all()
    if aside_from == 100:
        assert 0.05 < found.calibrates.mean() < 0.15


def test_intervals_draw_instances_again(worded: Samples) -> None:
    error = metrics.drawn_as(worded) % 7.0  # wordings of one instance err alike
    low, high = metrics.bootstrap(error, metrics.drawn_as(worded))
    less, more = metrics.bootstrap(error, worded.request)
    assert high - low > 1.5 * (more - less)


def test_requests_cut_by_the_end_of_collection_are_not_judged(tmp_path: Path) -> None:
    made = cases.records(400)
    for record in made[::2]:
        record.censored, record.max_new_tokens = True, 10_000
    write_shard(tmp_path / "shard-000000.safetensors", made)
    parts = dataset.split(load_samples(tmp_path))
    assert not parts.test.cut.any()
    assert parts.fit.cut.any()


def test_all_censored_is_refused(tmp_path: Path) -> None:
    made = cases.records(400)
    for record in made:
        record.censored = True
    write_shard(tmp_path / "shard-000000.safetensors", made)
    with pytest.raises(ConfigError, match="no length was ever seen"):
        dataset.split(load_samples(tmp_path))


def test_too_few_requests_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard-000000.safetensors", cases.records(30))
    with pytest.raises(ConfigError, match="at least 20 needed"):
        dataset.split(load_samples(tmp_path))


def test_training_needs_a_collection(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a collection"):
        train(["--samples", str(tmp_path), "--out", str(tmp_path / "h.safetensors")])


def test_a_perfect_prediction_scores_perfectly(parts: dataset.Split) -> None:
    result = metrics.score(parts.test.remaining.astype(float), parts.test)
    assert result["mae"] == 0
    assert result["spearman"] == pytest.approx(1.0)
    assert result["c_index"] == pytest.approx(1.0)


def test_running_means_repeat_the_engine(parts: dataset.Split) -> None:
    from unit.reference_estimator import fuse

    some = parts.test.select(np.arange(len(parts.test.rids)) < 5)
    mean = np.zeros(cases.HIDDEN, np.float32)
    identity = np.eye(cases.HIDDEN, dtype=np.float32)
    found = dataset.inputs(some, mean, identity)
    for number in range(5):
        rows = np.flatnonzero(some.request == number)
        req = cases.request()
        for row in rows:
            # Twenty equal steps have the mean that the recorder writes.
            tokens = int(some.tokens[row])
            for step in range(0 if row == rows[0] else cases.INTERVAL):
                fusion = fuse(req, some.pooled[row].astype(np.float32), tokens + 1 - step)
            if row == rows[0]:
                assert fuse(req, some.pooled[row].astype(np.float32), tokens).steps == 0
                assert found.mean[row] == pytest.approx(found.recent[row])
                continue
            assert fusion.mean == pytest.approx(found.mean[row], abs=1e-3)
            assert fusion.recent == pytest.approx(found.recent[row], abs=1e-3)
