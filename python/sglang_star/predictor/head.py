"""A trained head: its file, and its NumPy half.

The device half is one product, ``(h - mean) @ projection``, small enough to live in a captured
graph. The host half takes the projections of a request's history and what the engine knows for
free, and gives quantiles; it is an ensemble of small networks, evaluated for a whole batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from sglang_star.errors import HeadError
from sglang_star.predictor import hazard
from sglang_star.predictor.fingerprint import ModelFingerprint
from sglang_star.predictor.hazard import Array
from sglang_star.protocol import QUANTILE_LEVELS

FORMAT: Final = 2
CARD_KEY: Final = "star_head"
HEADS: Final = Path(__file__).parent / "heads"

BLOCKS: Final = 3
"""Projections of a request that the host half sees: now, recent mean, mean so far."""

FEATURES: Final = 4
"""log(1 + x) of tokens so far, prompt length, max_new_tokens and the share of repeated output."""


class HeadCard(msgspec.Struct, kw_only=True):
    """What a head file says about itself.

    Attributes:
        model: name of the model it was trained on, for people.
        fingerprint: of that model, for the engine.
        provenance: where the training data came from; metrics: on requests never trained on.
    """

    format: int = FORMAT
    model: str
    fingerprint: ModelFingerprint
    provenance: dict[str, Any]
    metrics: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors of a head: ``d`` hidden size, ``m`` projected size, ``e`` members, ``k`` bins.

    Attributes:
        mean, projection: ``[d]``, ``[d, m]``, device half.
        w1, b1, w2, b2: ``[e, BLOCKS * m + FEATURES, i]``, ``[e, 1, i]``, ``[e, i, k]``,
            ``[e, 1, k]``; inputs are the projections and the features.
        edges: ``[k + 1]`` bin edges, tokens.
        levels: ``[q]`` levels to read so that :data:`QUANTILE_LEVELS` are calibrated.
        age_edges, age_quantiles: ``[a]``, ``[a, q]``: quantiles of remaining length by tokens so
            far, for when the head has nothing to say.
    """

    mean: Array
    projection: Array
    w1: Array
    b1: Array
    w2: Array
    b2: Array
    edges: Array
    levels: Array
    age_edges: Array
    age_quantiles: Array

    def check(self) -> None:
        """Refuse tensors that do not fit together.

        Raises:
            ValueError: saying which.
        """
        d, m = self.projection.shape
        members, _inputs, inner = self.w1.shape
        bins, q = len(self.edges) - 1, len(QUANTILE_LEVELS)
        expected = {
            "mean": (d,),
            "w1": (members, BLOCKS * m + FEATURES, inner),
            "b1": (members, 1, inner),
            "w2": (members, inner, bins),
            "b2": (members, 1, bins),
            "levels": (q,),
            "age_quantiles": (len(self.age_edges), q),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} is {getattr(self, name).shape}, not {shape}")
        for field in fields(self):
            if not np.isfinite(getattr(self, field.name)).all():
                raise ValueError(f"{field.name} is not finite")
        if not (np.diff(self.edges) > 0).all() or not len(self.age_edges):
            raise ValueError("bin edges do not increase")


class Head:
    """A head ready to use."""

    def __init__(self, card: HeadCard, weights: Weights) -> None:
        self.card = card
        self.weights = weights
        members, inputs, inner = weights.w1.shape
        # All members side by side, and transposed: BLAS is twice as fast at few requests then.
        self._w1 = np.ascontiguousarray(weights.w1.transpose(0, 2, 1).reshape(-1, inputs))
        self._b1 = weights.b1.reshape(members * inner, 1)
        self._w2 = np.ascontiguousarray(weights.w2.reshape(members * inner, -1).T) / members
        self._b2 = weights.b2.mean(axis=0)

    @property
    def multiplications(self) -> int:
        """What the host half costs for one request."""
        return int(self._w1.size + self._w2.size)

    @property
    def width(self) -> int:
        """Numbers per request that the device half produces."""
        return int(self.weights.projection.shape[1])

    @property
    def parameters(self) -> int:
        """Trained numbers, both halves."""
        w = self.weights
        return sum(a.size for a in (w.mean, w.projection, w.w1, w.b1, w.w2, w.b2))

    def logits(self, now: Array, recent: Array, mean: Array, features: Array) -> Array:
        """Hazard logits, ``[n, bins]``, averaged over the ensemble.

        Args:
            now, recent, mean: ``[n, m]`` projections, as :class:`state.Fusion` keeps them.
            features: ``[n, FEATURES]`` raw: tokens so far, prompt, max_new_tokens, echo.
        """
        parts = [now, recent, mean, np.log1p(features)]
        inputs = np.concatenate(parts, axis=1, dtype=np.float32)
        inner = self._w1 @ inputs.T
        inner += self._b1
        np.maximum(inner, 0.0, out=inner)
        return np.asarray((self._w2 @ inner).T + self._b2)

    def quantiles(self, logits: Array) -> Array:
        """Calibrated remaining length at :data:`QUANTILE_LEVELS`, ``[n, q]`` tokens."""
        return hazard.quantiles(logits, self.weights.edges, self.weights.levels)

    def by_age(self, tokens: Array) -> Array:
        """What is known without looking: quantiles given only tokens so far, ``[n, q]``."""
        index = np.searchsorted(self.weights.age_edges, tokens, side="right") - 1
        return np.asarray(self.weights.age_quantiles[np.maximum(index, 0)])

    def save(self, path: Path) -> None:
        """Write the head as safetensors with its card in the header."""
        from safetensors.numpy import save_file

        tensors = {f.name: np.ascontiguousarray(getattr(self.weights, f.name)) for f in _FIELDS}
        card = msgspec.json.encode(self.card).decode()
        save_file(tensors, path, metadata={CARD_KEY: card})


_FIELDS: Final = fields(Weights)


def load(path: Path) -> Head:
    """Read a head.

    Raises:
        HeadError: the file is missing, damaged, of another format, or no head at all.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {})[CARD_KEY]
            weights = Weights(**{field.name: file.get_tensor(field.name) for field in _FIELDS})
        card = msgspec.json.decode(text, type=HeadCard)
        if card.format != FORMAT:
            raise HeadError(
                f"{path} has head format {card.format}, this release reads {FORMAT}",
                hint="train it again with `star predictor train`",
            )
        weights.check()
    except (OSError, SafetensorError, KeyError, ValueError, msgspec.MsgspecError) as error:
        raise HeadError(
            f"{path} is not a usable predictor head: {error}",
            hint="train it again with `star predictor train`, or launch with --star-predictor off",
        ) from error
    return Head(card, weights)


def packaged(fingerprint: ModelFingerprint) -> tuple[Path, Head] | None:
    """The head that comes with STAR for a model and its file, if there is one."""
    for path in sorted(HEADS.glob("*.safetensors")):
        head = load(path)
        if head.card.fingerprint == fingerprint:
            return path, head
    return None


def digest(path: Path) -> str:
    """Eight hexadecimal digits that tell a head's file from others."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]
