"""What one step of a head costs."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch

from sglang_star.predictor.estimator import Estimator
from sglang_star.predictor.head import Head

STEPS: Final = 200


def step_ms(head: Head, batch: int, steps: int = STEPS) -> tuple[float, float]:
    """CPU time of the two halves for one step of ``batch`` requests.

    CPU time of this thread, so that other work on the machine does not count: the median of the
    device half, which is the same in every step, and the mean of the host half, which is not.

    Returns:
        Milliseconds of the device half, run on this CPU, and of the host half.
    """
    weights = head.weights
    hidden = torch.randn(batch, len(weights.mean), dtype=torch.bfloat16)
    static = torch.zeros(batch, len(weights.mean))
    projection, bias = torch.tensor(weights.projection), torch.zeros(head.width)
    projected = torch.zeros(batch, head.width)
    estimator, reqs = Estimator(head), [_request(steps) for _ in range(batch)]
    times = np.zeros((steps, 2))
    for step in range(steps):
        started = time.thread_time()
        static.copy_(hidden)
        rows = torch.addmm(bias, static, projection, out=projected).clone()
        halfway = time.thread_time()
        estimator.step(rows.numpy(), reqs, [step + 1] * batch)
        times[step] = halfway - started, time.thread_time() - halfway
    return float(np.median(times[:, 0]) * 1e3), float(np.mean(times[:, 1]) * 1e3)


def _request(tokens: int) -> Any:
    """What the estimator reads of an SGLang request."""
    return SimpleNamespace(
        origin_input_ids=[0] * 100,
        output_ids=list(range(tokens)),
        sampling_params=SimpleNamespace(max_new_tokens=1024),
    )
