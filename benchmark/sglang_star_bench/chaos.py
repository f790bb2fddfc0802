"""``star bench chaos``: what a failing engine costs the clients of a router.

Four fake engines, a router, and 200 streams whose every token is checked. One engine fails, in one
way after the other, and recovers. The same is done with ``sglang_router`` where it is installed and
the fault can be put to it. The bar: only streams that the failed engine had begun may fail, and
requests sent later than twice the health interval after the fault notice nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

from sglang_star.errors import ConfigError, StarError
from sglang_star_bench.chaos_faults import FAULTS, Fault, Fleet, fleet_of
from sglang_star_bench.chaos_load import Load, Stream
from sglang_star_bench.router import has_sglang_router, process, wait_for
from sglang_star_bench.router_engine import free_port

ROUTERS = {
    "star": "sglang_star_router.launch_router",
    "sglang_router": "sglang_router.launch_router",
}
SLOW_FIRST_S = 1.0
"""A first token that takes so much longer than any before the fault counts as late."""


def router_command(
    name: str, python: str, fleet: Fleet, port: int, options: argparse.Namespace
) -> list[str]:
    """Return the command line of either router; flags are the same where both have them."""
    star = name == "star"
    command = [python, "-m", ROUTERS[name], "--host", "127.0.0.1", "--port", str(port)]
    if fleet.disaggregated:
        command.append("--pd-disaggregation")
        for spec in fleet.of_role("prefill"):
            # Ours asks the instance; the other one has to be told.
            command += ["--prefill", spec.url, *([] if star else [str(spec.bootstrap_port)])]
        for spec in fleet.of_role("decode"):
            command += ["--decode", spec.url]
    else:
        command += ["--worker-urls", *(spec.url for spec in fleet.specs)]
    seconds = str(options.health_interval)
    command += ["--health-check-interval-secs", seconds, "--health-check-timeout-secs", seconds]
    if star:
        return [*command, "--policy", options.policy, "--prefill-policy", options.policy]
    policy = {"least-requests": "power_of_two", "round-robin": "round_robin"}[options.policy]
    return [*command, "--policy", policy, "--prometheus-port", str(free_port())]


@contextlib.contextmanager
def router_running(
    name: str, python: str, fault: Fault, fleet: Fleet, options: argparse.Namespace
) -> Iterator[str]:
    """Run a router in front of the fleet; yield its URL."""
    port = free_port()
    command = router_command(name, python, fleet, port, options)
    if fault.descriptors:
        command = ["sh", "-c", f'ulimit -n {fault.descriptors}; exec "$@"', "sh", *command]
    with process(command) as child:
        body = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
        wait_for(child, port, json.dumps(body).encode(), name)
        yield f"http://127.0.0.1:{port}"


async def _play(url: str, fault: Fault, fleet: Fleet, options: argparse.Namespace) -> Any:
    """Load, fault, recovery; return the streams and the times of fault and recovery."""
    load = Load(url, options.streams, options.tokens, refusals_are_answers=bool(fault.descriptors))
    stop = asyncio.Event()
    task = asyncio.create_task(load.run(stop))
    await asyncio.sleep(options.before_s)
    at = time.monotonic()
    watch = asyncio.ensure_future(fault.watched(url, fleet)) if fault.watched else None
    await asyncio.to_thread(fault.begin, fleet)
    await asyncio.sleep(fault.lasts_s or options.fault_s)
    drawn = await asyncio.to_thread(fault.end, fleet)
    ended = time.monotonic()
    await asyncio.sleep(options.after_s)
    stop.set()
    await task
    noticed = None
    if watch is not None:
        noticed = await watch - at
    return load.streams, at, ended, drawn, noticed


def judge(streams: list[Stream], at: float, ended: float, failed_engine: str) -> dict[str, Any]:
    """Sum up one run: counts, and seconds from the fault.

    ``begun`` are failures of streams whose tokens had begun on the failed engine, ``others`` all
    other failures. ``recovery_s``: until the last request has had its first token late, or has
    failed, of those that were not begun by then; ``back_s``: from the end of the fault until the
    engine answered again.
    """
    before = [s.first_at - s.sent_at for s in streams if 0 < s.first_at < at]
    slow = SLOW_FIRST_S + max(before, default=0.0)
    bad = [s for s in streams if s.verdict in ("failed", "hung")]
    begun = [s for s in bad if s.tokens and s.engine == failed_engine]
    late = [
        s for s in streams
        if s.verdict != "refused"
        and ((s in bad and (not s.tokens or s.sent_at > at)) or s.first_at - s.sent_at > slow)
    ]  # fmt: skip
    back = [s.first_at for s in streams if s.engine == failed_engine and s.sent_at > ended]
    return {
        "streams": len(streams),
        "ok": sum(s.verdict == "ok" for s in streams),
        "wrong": sum(s.verdict == "wrong" for s in streams),
        "refused": sum(s.verdict == "refused" for s in streams),
        "begun": len(begun),
        "others": len(bad) - len(begun),
        "hung": sum(s.verdict == "hung" for s in streams),
        "slow_first": sum(s not in bad for s in late),
        "recovery_s": max(((s.first_at or s.ended_at) - at for s in late), default=0.0),
        "back_s": min(back) - ended if back else None,
        "late_from_s": slow,
        "slowest_first_s": max(
            (s.first_at - s.sent_at for s in streams if s.first_at), default=0.0
        ),
        "failures": sorted({s.detail for s in bad if s not in begun})[:5],
    }


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Put every chosen fault to every router and return the report."""
    pythons = {"star": sys.executable}
    if has_sglang_router(options.sglang_router_python):
        pythons["sglang_router"] = options.sglang_router_python
    rows: dict[str, dict[str, Any]] = {}
    for fault in FAULTS:
        if options.fault and fault.name not in options.fault:
            continue
        rows[fault.name] = {}
        for name, python in pythons.items():
            if name != "star" and fault.only_star:
                continue
            with contextlib.ExitStack() as stack:
                fleet = stack.enter_context(fleet_of(fault, options))
                url = stack.enter_context(router_running(name, python, fault, fleet, options))
                streams, at, ended, drawn, noticed = uvloop.run(_play(url, fault, fleet, options))
            row = judge(streams, at, ended, fleet.victim.name)
            row |= {"drawn": drawn, "noticed_s": noticed}
            row["within_bar"] = (
                not row["others"] and not row["wrong"]
                and row["recovery_s"] <= 2 * options.health_interval
            )  # fmt: skip
            rows[fault.name][name] = row
            say(line(fault.name, name, row))
            for failure in row["failures"]:
                say(f"    {failure}")
    keys = ("streams", "tokens", "itl_ms", "health_interval", "fault_s", "policy")
    return {"settings": {key: getattr(options, key) for key in keys}, "faults": rows}


def line(fault: str, router: str, row: dict[str, Any]) -> str:
    """One row of the table."""
    back = "-" if row["back_s"] is None else f"{row['back_s']:.1f}"
    return (
        f"{fault:22} {router:14} {row['streams']:8d} {row['begun']:6d} {row['others']:7d} "
        f"{row['wrong']:6d} {row['refused']:8d} {row['drawn']:6d} {row['recovery_s']:9.1f} "
        f"{back:>6} {'yes' if row['within_bar'] else 'NO':>4}"
    )


TITLE = (
    f"{'fault':22} {'router':14} {'streams':>8} {'begun':>6} {'others':>7} {'wrong':>6} "
    f"{'refused':>8} {'drawn':>6} {'recovery':>9} {'back':>6} {'bar':>4}"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 if our router misses the bar."""
    parser = argparse.ArgumentParser(prog="star bench chaos", description=__doc__)
    parser.add_argument("--streams", type=int, default=200, help="Open at a time.")
    parser.add_argument("--tokens", type=int, default=20, help="Per stream.")
    parser.add_argument("--ttft-ms", type=float, default=20.0, help="The engines' own.")
    parser.add_argument("--itl-ms", type=float, default=100.0, help="The engines' own.")
    parser.add_argument("--health-interval", type=int, default=5, metavar="S")
    parser.add_argument("--before-s", type=float, default=4.0, help="Load before the fault.")
    parser.add_argument("--fault-s", type=float, default=10.0, help="How long it lasts.")
    parser.add_argument("--after-s", type=float, default=12.0, help="Load after it.")
    parser.add_argument("--policy", choices=("least-requests", "round-robin"),
                        default="least-requests")  # fmt: skip
    parser.add_argument("--fault", action="append", choices=[one.name for one in FAULTS],
                        help="Only this one; repeatable.")  # fmt: skip
    parser.add_argument("--sglang-router-python", default=sys.executable, metavar="PYTHON",
                        help="Interpreter that has sglang_router installed.")  # fmt: skip
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)
    try:
        for name in ("streams", "tokens", "health_interval"):
            if getattr(options, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
        print(TITLE, flush=True)
        result = run(options, lambda text: print(text, flush=True))
    except StarError as error:
        print(f"star bench chaos: {error}", file=sys.stderr)
        return 2
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["star"]["within_bar"] for row in result["faults"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
