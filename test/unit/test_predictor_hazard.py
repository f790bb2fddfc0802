"""Survival maths: closed forms, inverses, and the order of quantiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_star.predictor import dataset, ensemble, hazard
from sglang_star.protocol import QUANTILE_LEVELS

LEVELS = np.array(QUANTILE_LEVELS)


def constant_hazard(mean: float, edges: np.ndarray) -> np.ndarray:
    """Logits of an exponential distribution."""
    rate = np.diff(edges) / mean
    return (rate + np.log(-np.expm1(-rate)))[None]  # log(expm1(rate)), without overflow


@pytest.mark.parametrize("mean", [5.0, 50.0, 500.0])
def test_quantiles_of_an_exponential_are_its_closed_form(mean: float) -> None:
    edges = hazard.bin_edges(100_000, bins=64)
    found = hazard.quantiles(constant_hazard(mean, edges), edges, LEVELS)[0]
    assert found == pytest.approx(-mean * np.log1p(-LEVELS), rel=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_quantiles_ascend_and_invert_the_cdf(seed: int, rows: int) -> None:
    generator = np.random.default_rng(seed)
    edges = hazard.bin_edges(4096)
    logits = generator.normal(-1.0, 2.0, (rows, len(edges) - 1))
    found = hazard.quantiles(logits, edges, LEVELS)
    assert (np.diff(found, axis=1) >= 0).all()
    for column, level in enumerate(LEVELS):
        reached = hazard.cdf(logits, edges, found[:, column])
        inside = found[:, column] < edges[-1]
        assert reached[inside] == pytest.approx(np.full(inside.sum(), level), abs=1e-6)


def test_extreme_logits_stay_finite() -> None:
    edges = hazard.bin_edges(1024)
    for value in (-1e6, 1e6):
        logits = np.full((1, len(edges) - 1), value)
        found = hazard.quantiles(logits, edges, LEVELS)
        assert np.isfinite(found).all()
        assert (found >= 0).all()
        assert (found <= edges[-1]).all()


@pytest.mark.parametrize("longest", [1, 40, 1024, 32768])
def test_bins_are_at_least_a_token_wide_and_reach_the_longest(longest: int) -> None:
    edges = hazard.bin_edges(longest)
    assert (np.diff(edges) >= 1 - 1e-9).all()
    assert edges[0] == 0
    assert edges[-1] >= longest


def test_likelihood_gradient_vanishes_at_the_censored_maximum() -> None:
    # For a constant hazard the maximum is events / exposure, whatever was censored.
    generator = np.random.default_rng(0)
    lengths = generator.exponential(100.0, 5000)
    limit = generator.uniform(20.0, 200.0, 5000)
    seen, censored = np.minimum(lengths, limit), lengths > limit
    edges = np.array([0.0, 1e3])
    exposure = hazard.exposure(seen, edges)
    event = (~censored)[:, None].astype(float)
    rate = event.sum() / exposure.sum()
    logit = torch.full((5000, 1), float(np.log(np.expm1(rate))), dtype=torch.float64)
    logit.requires_grad_(True)
    ensemble.nll(logit, torch.tensor(exposure), torch.tensor(event)).sum().backward()
    assert logit.grad is not None
    assert abs(float(logit.grad.sum())) < 1e-6 * 5000
    assert 1e3 / rate == pytest.approx(100.0, rel=0.06)


def test_kaplan_meier_sees_past_censoring() -> None:
    generator = np.random.default_rng(1)
    lengths = generator.exponential(100.0, 20_000)
    limit = generator.uniform(10.0, 400.0, 20_000)
    found = dataset.survival_quantiles(
        np.minimum(lengths, limit), lengths > limit, np.array([0.1, 0.5, 0.9])
    )
    assert found == pytest.approx(-100.0 * np.log1p(-np.array([0.1, 0.5, 0.9])), rel=0.06)


def test_kaplan_meier_of_censored_values_alone_is_their_largest() -> None:
    found = dataset.survival_quantiles(
        np.array([3.0, 7.0, 5.0]), np.array([True, True, True]), np.array([0.5])
    )
    assert found == pytest.approx([7.0])
