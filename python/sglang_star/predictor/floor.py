"""The floor: how far off the best possible predictor is, and how near to it each one comes.

At a prefix the best predictor of absolute error knows the median of what may follow. Outputs drawn
again from that prefix estimate it: each is compared with the median of the *others*, since the
median of all would have seen it. What remains of that estimate's own noise (a few percent with 17
draws) raises the floor, never lowers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sglang_star.errors import ConfigError
from sglang_star.predictor import metrics
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.samples import Samples

QUARTERS: Final = 4


@dataclass(frozen=True, slots=True)
class Floor:
    """Prefixes of the test split that were continued many times.

    Attributes:
        rows: ``[p]`` which samples they are.
        draws: for each, its remaining lengths: those drawn again and the one in the collection.
    """

    rows: Array
    draws: list[Array]

    def report(self, samples: Samples, results: dict[str, Array], seed: int) -> dict[str, Any]:
        """The floor, and each predictor's error and share of the reducible error there.

        All are means over the same prefixes and all their draws. Prefixes are a uniform draw of
        the test samples, so that these means estimate the ones over the whole test split.

        Args:
            samples: the test split.
            results: predictions by name, as :func:`metrics.score` takes them; ``by_age`` among
                them.
            seed: of the bootstrap over instances.

        Returns:
            ``points, requests, draws, mae, mae_ci, mae_seen`` (with the median of all draws,
            a lower estimate), ``mae_by_quarter`` of progress, and ``predictors``: by name the
            ``mae`` at these points, ``removed`` and ``removed_ci``.
        """
        floors = np.array([_left_out(draws) for draws in self.draws])
        seen = np.array([np.abs(draws - np.median(draws)).mean() for draws in self.draws])
        request, unit = samples.request[self.rows], metrics.drawn_as(samples)[self.rows]
        quarter = self._quarter(samples)
        report: dict[str, Any] = {
            "points": len(self.rows),
            "requests": len(np.unique(request)),
            "draws": int(sum(len(draws) for draws in self.draws)),
            "mae": float(floors.mean()),
            "mae_ci": list(metrics.bootstrap(floors, unit, seed)),
            "mae_seen": float(seen.mean()),
            "mae_by_quarter": [
                float(floors[quarter == i].mean()) if (quarter == i).any() else None
                for i in range(QUARTERS)
            ],
            "predictors": {},
        }
        risks = {name: self._risk(predicted, samples) for name, predicted in results.items()}
        for name, risk in risks.items():
            report["predictors"][name] = {"mae": float(risk.mean())} | _removed(
                risk, risks["by_age"], floors, unit, seed
            )
        return report

    def _risk(self, predicted: Array, samples: Samples) -> Array:
        clipped = metrics.clip(predicted, samples)[self.rows]
        point = clipped if clipped.ndim == 1 else clipped[:, metrics.MEDIAN]
        pairs = zip(self.draws, point, strict=True)
        return np.array([np.abs(draws - value).mean() for draws, value in pairs])

    def _quarter(self, samples: Samples) -> Array:
        total = samples.output_tokens[samples.request[self.rows]]
        return np.minimum(samples.tokens[self.rows] * QUARTERS // total, QUARTERS - 1)


def of(samples: Samples, resamples: dict[tuple[str, int], list[int]]) -> Floor:
    """Match continued prefixes with the samples of a test split.

    Raises:
        ConfigError: none matches.
    """
    rows, draws = [], []
    for row, (request, tokens) in enumerate(zip(samples.request, samples.tokens, strict=True)):
        again = resamples.get((samples.rids[request], int(tokens)))
        if again is not None:
            rows.append(row)
            draws.append(np.array([*again, samples.remaining[row]], np.float64))
    if not rows:
        raise ConfigError(
            "the floor's prefixes are not of these samples",
            hint="make it with `star predictor collect --resample` of the same collection",
        )
    return Floor(np.array(rows), draws)


def _left_out(draws: Array) -> float:
    """Mean distance of each draw from the median of the others."""
    others = [np.median(np.delete(draws, i)) for i in range(len(draws))]
    return float(np.abs(draws - others).mean())


def _removed(risk: Array, by_age: Array, floors: Array, unit: Array, seed: int) -> dict[str, Any]:
    """Share of the way from the by-age median down to the floor, with its 95 % interval."""
    _, unit = np.unique(unit, return_inverse=True)
    gained = np.bincount(unit, by_age - risk)
    reducible = np.bincount(unit, by_age - floors)
    if reducible.sum() <= 0:
        return {"removed": None, "removed_ci": None}
    drawn = metrics.draws(len(gained), seed)
    bottom = drawn @ reducible
    shares = ((drawn @ gained) / np.where(bottom > 0, bottom, np.nan))[bottom > 0]
    low, high = np.percentile(shares, [2.5, 97.5])
    return {
        "removed": float(gained.sum() / reducible.sum()),
        "removed_ci": [float(low), float(high)],
    }
