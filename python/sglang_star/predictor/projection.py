"""The device half of a head: which directions of the hidden state are kept."""

from __future__ import annotations

import numpy as np

from sglang_star.predictor import dataset
from sglang_star.predictor.hazard import Array
from sglang_star.predictor.samples import Samples


def project(samples: Samples, width: int) -> tuple[Array, Array]:
    """Mean and projection of hidden states for a head of ``width`` numbers per request.

    Half are the strongest principal directions of all states, half those of the requests' mean
    states: what differs between requests is what tells their lengths apart, and much of what
    differs between the tokens of one is not. Made orthogonal, unit variance each.

    Returns:
        ``[d]`` and ``[d, width]`` float32; fewer directions if the states have fewer.
    """
    begin = dataset.starts(samples)
    weight = dataset.steps(samples)[:, None]
    tokens = np.add.reduceat(weight, begin)
    means = np.add.reduceat(samples.pooled.astype(np.float32) * weight, begin) / tokens
    sets = (samples.hidden, means)
    shares = (width - width // 2, width // 2)
    found = [_directions(states, share) for states, share in zip(sets, shares, strict=True)]
    basis, triangle = np.linalg.qr(np.concatenate(found, axis=1))
    sound = np.abs(np.diag(triangle)) > 1e-6  # what an earlier direction did not hold already
    basis = basis[:, sound]
    mean, covariance = _moments(samples.hidden)
    scale = np.sqrt(np.einsum("dm,de,em->m", basis, covariance, basis))
    kept = scale > 1e-6 * scale.max()
    return mean.astype(np.float32), (basis[:, kept] / scale[kept]).astype(np.float32)


def _directions(states: Array, count: int) -> Array:
    """The strongest principal directions, ``[d, count]``."""
    _, covariance = _moments(states)
    _, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors[:, ::-1][:, :count])


def _moments(states: Array, rows: int = 65536) -> tuple[Array, Array]:
    """Mean ``[d]`` and covariance ``[d, d]``, without a copy of all states in double precision."""
    mean = states.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((len(mean), len(mean)))
    for i in range(0, len(states), rows):
        part = states[i : i + rows].astype(np.float64) - mean
        covariance += part.T @ part
    return mean, covariance / len(states)
