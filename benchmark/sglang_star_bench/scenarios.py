"""What could break a policy: lengths and arrivals unlike those it was tuned on.

Each scenario rewrites a trace. Those of lengths leave the arrivals alone; the load is set
afterwards, so that memory is as full as without them. Those of arrivals keep the lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from sglang_star.errors import ConfigError
from sglang_star_bench.traces import Trace, checked

SHORT: Final = 32
LONG: Final = 16_384
LONG_SHARE: Final = 1 / 8
CLIENT_SHARE: Final = 0.5
CLIENT_BURST_S: Final = 60.0
CROWD_FACTOR: Final = 4.0
CROWD_S: Final = 60.0
CROWD_EVERY_S: Final = 600.0

Rewrite = Callable[[Trace, np.random.Generator], Trace]


def all_short(trace: Trace, chance: np.random.Generator) -> Trace:
    """Every output is :data:`SHORT` tokens: nothing runs long enough to be worth a move."""
    return _with(trace, output=np.full(trace.arrival_s.size, SHORT))


def all_max(trace: Trace, chance: np.random.Generator) -> Trace:
    """Every output is :data:`LONG` tokens: whoever is placed stays."""
    return _with(trace, output=np.full(trace.arrival_s.size, LONG))


def adversarial(trace: Trace, chance: np.random.Generator) -> Trace:
    """One request in eight runs :data:`LONG` tokens, the others :data:`SHORT`, in strict turn.

    Nothing in a prompt tells them apart, the median says all is short, and with a multiple of two
    instances up to eight round-robin sends every long one to the same place.
    """
    turn = np.arange(trace.arrival_s.size) % round(1 / LONG_SHARE)
    return _with(trace, output=np.where(turn == 0, LONG, SHORT))


def dominant_client(trace: Trace, chance: np.random.Generator) -> Trace:
    """Half of all requests are one client's: identical long prompts and outputs, sent in bursts.

    The client's requests keep their number and gather at the start of every minute.
    """
    mine = chance.random(trace.arrival_s.size) < CLIENT_SHARE
    arrival = np.where(mine, trace.arrival_s // CLIENT_BURST_S * CLIENT_BURST_S, trace.arrival_s)
    order = np.argsort(arrival, kind="stable")
    prompt = np.where(mine, int(np.quantile(trace.input_len, 0.9)), trace.input_len)
    output = np.where(mine, int(np.quantile(trace.output_len, 0.9)), trace.output_len)
    return checked(trace.name, arrival[order], prompt[order], output[order])


def flash_crowd(trace: Trace, chance: np.random.Generator) -> Trace:
    """Every ten minutes, for one minute, :data:`CROWD_FACTOR` times as many arrivals as usual."""
    phase = trace.arrival_s % CROWD_EVERY_S
    crowd = np.flatnonzero((phase >= CROWD_EVERY_S / 2) & (phase < CROWD_EVERY_S / 2 + CROWD_S))
    copies = np.repeat(crowd, round(CROWD_FACTOR) - 1)
    begins = trace.arrival_s[copies] - phase[copies] + CROWD_EVERY_S / 2
    arrival = np.concatenate([trace.arrival_s, begins + chance.random(copies.size) * CROWD_S])
    like = chance.integers(0, trace.arrival_s.size, copies.size)
    rows = np.concatenate([np.arange(trace.arrival_s.size), like])
    order = np.argsort(arrival, kind="stable")
    rows = rows[order]
    return checked(trace.name, arrival[order], trace.input_len[rows], trace.output_len[rows])


SCENARIOS: Final[dict[str, Rewrite]] = {
    "all-short": all_short,
    "all-max": all_max,
    "adversarial": adversarial,
    "dominant-client": dominant_client,
    "flash-crowd": flash_crowd,
}


def apply(name: str, trace: Trace, seed: int = 0) -> Trace:
    """Rewrite ``trace``; its name gets the scenario's.

    Raises:
        ConfigError: no such scenario.
    """
    if name not in SCENARIOS:
        raise ConfigError(f"no scenario {name!r}", hint=f"choose from {', '.join(SCENARIOS)}")
    made = SCENARIOS[name](trace, np.random.default_rng(seed))
    return Trace(f"{trace.name}, {name}", made.arrival_s, made.input_len, made.output_len)


def _with(trace: Trace, output: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Trace:
    return checked(trace.name, trace.arrival_s, trace.input_len, output)
