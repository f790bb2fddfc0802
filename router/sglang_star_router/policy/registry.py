"""Policies by the names users give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_star.errors import ConfigError
from sglang_star_router.policy.base import DispatchPolicy, ReschedulePolicy
from sglang_star_router.policy.holding import Queued
from sglang_star_router.policy.params import (
    ReactiveParams,
    StarParams,
    StarPointParams,
    StaticParams,
    build,
)
from sglang_star_router.policy.reactive import Reactive
from sglang_star_router.policy.star_dispatch import StarDispatch
from sglang_star_router.policy.star_moves import StarMoves
from sglang_star_router.policy.star_point import StarPoint
from sglang_star_router.policy.static import LeastRequests, LeastTokens, RoundRobin

RESCHEDULER_NAMES = ("reactive", "star-point", "star", "oracle")

_STATIC: dict[str, Callable[[], DispatchPolicy]] = {
    "round-robin": RoundRobin,
    "least-requests": LeastRequests,
    "least-tokens": LeastTokens,
}
_QUEUED = "queued-"
DISPATCH_NAMES = (*_STATIC, *(_QUEUED + name for name in _STATIC), "star")


def make_dispatch(name: str, **params: Any) -> DispatchPolicy:
    """Build the dispatch policy called ``name``.

    Args:
        params: fields of :class:`StarParams` for ``star`` and ``queued-*``; the static policies
            have none.

    Raises:
        ConfigError: unknown name or parameter.
    """
    if name == "star":
        return StarDispatch(build(StarParams, params))
    if name.startswith(_QUEUED) and name.removeprefix(_QUEUED) in _STATIC:
        return Queued(_STATIC[name.removeprefix(_QUEUED)](), build(StarParams, params))
    if name not in _STATIC:
        raise ConfigError(
            f"no dispatch policy {name!r}", hint=f"choose from {', '.join(DISPATCH_NAMES)}"
        )
    build(StaticParams, params)
    return _STATIC[name]()


def make_rescheduler(name: str, **params: Any) -> ReschedulePolicy:
    """Build the rescheduler called ``name``; "off" is the absence of one.

    Raises:
        ConfigError: unknown name or parameter.
    """
    if name == "reactive":
        return Reactive(build(ReactiveParams, params))
    if name == "star-point":
        return StarPoint(build(StarPointParams, params))
    if name in ("star", "oracle"):
        return StarMoves(build(StarParams, params), true_lengths=name == "oracle")
    raise ConfigError(
        f"no rescheduler {name!r}", hint=f"choose from off, {', '.join(RESCHEDULER_NAMES)}"
    )
