"""What is learnt from estimates that turned out wrong, and from those that did not."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_star_router.policy import calibration as module
from sglang_star_router.policy.calibration import LEVELS, TURNOVERS, Calibration
from sglang_star_router.policy.snapshot import FloatArray

AGE = 16
FAR = 1_000_000
SHARES = np.array([0.3, 0.6, 1.0, 1.7, 3.0])
"""Quantiles of some estimate with median 1."""
MEDIANS = np.exp(np.random.default_rng(3).uniform(np.log(200), np.log(800), 600))


def quantiles(median: float, age: float) -> FloatArray:
    """Remaining length at an age, of outputs that are log-logistic of shape 2."""
    gone = 1 / (1 + (median / age) ** 2)
    level = gone + LEVELS * (1 - gone)
    remaining: FloatArray = median * np.sqrt(level / (1 - level)) - age
    return remaining


def serve(
    calibration: Calibration, medians: FloatArray, *, bias: float = 1.0, band: float = 1.0
) -> FloatArray:
    """Run requests one after another; every estimate as corrected and what remained, ``[n, 6]``.

    A head that knows the distribution of each output's length tells ``bias`` times its quantiles,
    with a band ``band`` times as wide.
    """
    rng = np.random.default_rng(7)
    rows = []
    for i, median in enumerate(medians):
        share = rng.uniform(0.001, 0.999)
        length = AGE + 1 + int(median * np.sqrt(share / (1 - share)))
        for age in range(AGE, length, 10):
            right = quantiles(median, age)
            said = bias * right[2] * (right / right[2]) ** band
            rows.append([*calibration.corrected(said[None])[0], length - age])
            calibration.note(f"r{i}", age, FAR, said)
        calibration.ended(f"r{i}", length)
    return np.array(rows)


def below(found: FloatArray) -> list[float]:
    """The share of what remained that lies below each quantile."""
    return [float((found[:, 5] <= found[:, i]).mean()) for i in range(5)]


@pytest.mark.parametrize(("bias", "band"), [(0.25, 1.0), (4.0, 1.0), (0.5, 0.2)])
def test_wrong_estimates_are_corrected(bias: float, band: float) -> None:
    given = serve(Calibration(enabled=False), MEDIANS, bias=bias, band=band)
    corrected = serve(Calibration(), MEDIANS, bias=bias, band=band)
    corrected = corrected[len(corrected) // 3 :]
    assert np.abs(np.subtract(below(given), LEVELS)).max() > 0.2
    assert below(corrected) == pytest.approx(list(LEVELS), abs=0.06)
    assert (np.diff(corrected[:, :5], axis=1) >= 0).all()


def test_right_estimates_stay_as_they_are() -> None:
    calibration = Calibration()
    assert below(serve(calibration, MEDIANS)) == pytest.approx(list(LEVELS), abs=0.05)
    assert np.abs(calibration.shift).max() < 0.3


def test_traffic_that_changes_is_followed_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECENT", 300)
    calibration = Calibration()
    serve(calibration, MEDIANS, bias=0.25)
    wrong = calibration.shift[2]
    serve(calibration, MEDIANS[:400], bias=4.0)
    assert wrong > 1.0
    assert calibration.shift[2] < -1.0


def test_nothing_is_learnt_while_only_short_requests_have_ended() -> None:
    calibration = Calibration()
    said = 1000 * SHARES
    for i in range(400):
        calibration.note(f"long{i}", AGE, FAR, said)
    for i in range(400 * TURNOVERS - 1):
        calibration.note(f"short{i}", AGE, FAR, said)
        calibration.ended(f"short{i}", AGE + 10)
    assert not calibration.shift.any()
    calibration.note("last", AGE, FAR, said)
    calibration.ended("last", AGE + 10)
    assert calibration.shift[2] < -1.0


def test_an_output_cut_by_its_limit_as_foreseen_is_no_error() -> None:
    calibration = Calibration()
    for i in range(500):
        calibration.note(f"r{i}", AGE, 64, 1000 * SHARES)
        calibration.ended(f"r{i}", AGE + 64)
    assert not calibration.shift.any()


def test_a_few_requests_prove_nothing() -> None:
    calibration = Calibration()
    serve(calibration, MEDIANS[:40], bias=1.2)
    assert not calibration.shift.any()


def test_what_cannot_be_scored_is_left_alone() -> None:
    calibration = Calibration()
    calibration.note("untold", AGE, FAR, np.full(5, np.nan))
    calibration.ended("untold", 100)
    calibration.ended("unknown", 100)
    calibration.note("restarted", AGE, FAR, SHARES)
    calibration.lost("restarted")
    calibration.ended("restarted", 100)
    assert not calibration._open
    assert not calibration._ended
    serve(calibration, MEDIANS, bias=0.25)
    nothing = np.full((1, 5), np.nan)
    assert np.isnan(calibration.corrected(nothing)).all()
    assert calibration.corrected(np.zeros((0, 5))).shape == (0, 5)
    point = calibration.corrected(np.full((1, 5), 100.0))
    assert np.isfinite(point).all()
