"""The predictor inside SGLang: head built once, run on every forward, delivered with its results."""

from __future__ import annotations

from typing import Any


def init_tp_model_worker(result: None, scheduler: Any) -> None:
    """AFTER ``Scheduler.init_tp_model_worker``: build what the next two hooks use."""


def get_pruned_states(result: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``LogitsProcessor._get_pruned_states``: run the head on last-token hidden states."""


def sample(result: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``ModelRunner.sample``: attach the estimate to the step's results."""
