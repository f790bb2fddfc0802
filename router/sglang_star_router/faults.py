"""``FaultLimits``: how the router bears with engines that fail; names as in ``sglang_router``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any

from sglang_star.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultLimits:
    """Retries, circuit breaker, time-outs and descriptors; times in seconds unless named.

    Attributes:
        retry_max_retries: attempts after the first; retry_budget: retries the whole fleet may make
            per request that arrives.
        cb_failure_threshold: failures among the last twice as many attempts at an instance that
            open its circuit; cb_window: older attempts do not count.
        cb_timeout: how long it stays open; cb_success_threshold: probes that then close it.
        first_byte_timeout: longest wait for the first event of an answer.
        token_timeout: longest silence within a stream.
        descriptor_reserve: file descriptors kept for the router's own use.
    """

    retry_max_retries: int = 5
    retry_initial_backoff_ms: float = 50.0
    retry_max_backoff_ms: float = 30_000.0
    retry_backoff_multiplier: float = 1.5
    retry_jitter_factor: float = 0.2
    retry_budget: float = 1.0
    cb_failure_threshold: int = 10
    cb_success_threshold: int = 3
    cb_timeout: float = 5.0
    cb_window: float = 120.0
    circuit_breaker: bool = True
    first_byte_timeout: float = 600.0
    token_timeout: float = 300.0
    descriptor_reserve: int = 64

    def __post_init__(self) -> None:
        """Refuse values of no use.

        Raises:
            ConfigError: naming the flag to change.
        """
        for name in ("cb_failure_threshold", "cb_success_threshold", "cb_timeout", "cb_window",
                     "first_byte_timeout", "token_timeout"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"{flag(name)} must be positive, not {getattr(self, name)}")
        for name in ("retry_max_retries", "retry_initial_backoff_ms", "retry_max_backoff_ms",
                     "retry_budget", "descriptor_reserve"):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{flag(name)} must not be negative")
        if not self.retry_backoff_multiplier >= 1:
            raise ConfigError(f"{flag('retry_backoff_multiplier')} must be at least 1")
        if not 0 <= self.retry_jitter_factor <= 1:
            raise ConfigError(f"{flag('retry_jitter_factor')} must lie between 0 and 1")


_HELP = {
    "retry_max_retries": "Attempts elsewhere when one fails before the answer's first event.",
    "retry_initial_backoff_ms": "Wait before the first of them, milliseconds.",
    "retry_max_backoff_ms": "Longest wait between two, milliseconds.",
    "retry_backoff_multiplier": "Each wait is so many times the one before.",
    "retry_jitter_factor": "Share by which a wait is varied at random.",
    "retry_budget": "Retries per arriving request that the fleet as a whole is given.",
    "cb_failure_threshold": "Failures among the last twice as many attempts that open a circuit.",
    "cb_success_threshold": "Probes that must succeed to close it again.",
    "cb_timeout": "Time an open circuit waits before probes.",
    "cb_window": "Attempts older than this do not count.",
    "first_byte_timeout": "Longest wait for the first event of an instance's answer.",
    "token_timeout": "Longest silence of an instance within a stream.",
    "descriptor_reserve": "File descriptors that clients cannot use up.",
}
_NAMES = {
    "cb_timeout": "--cb-timeout-duration-secs",
    "cb_window": "--cb-window-duration-secs",
    "first_byte_timeout": "--first-byte-timeout-secs",
    "token_timeout": "--token-timeout-secs",
}
_METAVARS = {int: "N", float: "X"}


def flag(name: str) -> str:
    """The flag of a field."""
    return _NAMES.get(name) or "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags in a group of their own."""
    group = parser.add_argument_group("faults of instances")
    for one in fields(FaultLimits):
        if one.name not in _HELP:
            continue
        kind: Any = type(one.default)
        metavar = "S" if "-secs" in flag(one.name) else _METAVARS[kind]
        group.add_argument(
            flag(one.name), dest=one.name, type=kind, default=one.default, metavar=metavar,
            help=f"{_HELP[one.name]} [{one.default:g}]",
        )  # fmt: skip
    group.add_argument("--disable-retries", action="store_true",
                       help="The same as --retry-max-retries 0.")  # fmt: skip
    group.add_argument("--disable-circuit-breaker", dest="circuit_breaker", action="store_false",
                       help="Send to an instance whatever became of earlier requests.")  # fmt: skip


def take(args: dict[str, Any]) -> FaultLimits:
    """Take these flags out of parsed arguments.

    Raises:
        ConfigError: a value of no use.
    """
    if args.pop("disable_retries"):
        args["retry_max_retries"] = 0
    return FaultLimits(**{one.name: args.pop(one.name) for one in fields(FaultLimits)})
