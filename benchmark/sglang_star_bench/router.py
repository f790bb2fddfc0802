"""``star bench router``: what a router adds to every first token and every gap, side by side.

A fake engine streams server-sent events at a fixed pace from a process of its own. The same load is
sent straight to it, through our router and, where it is installed, through ``sglang_router``; the
three take turns in every round, so that a disturbance of the machine meets all of them alike.
Latency is measured at that pace; capacity with an engine that never waits.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from sglang_star.errors import ConfigError, SetupError, StarError
from sglang_star_bench.router_engine import free_port

START_S = 90.0


@dataclass
class Samples:
    """Measurements of one target; seconds.

    Attributes:
        ttft: request sent to first event; itl: gaps between reads that brought events.
        rps: completed requests per second of the capacity runs, one per round.
        round_ttft, round_itl: medians of each round, for the paired comparison.
        cpu: processor time the router used in the capacity runs; it hardly depends on what else
            the machine is doing. served: requests of those runs.
    """

    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    rps: list[float] = field(default_factory=list)
    round_ttft: list[float] = field(default_factory=list)
    round_itl: list[float] = field(default_factory=list)
    cpu: float = 0.0
    served: int = 0
    failed: int = 0


class _Stream(asyncio.Protocol):
    """One client connection; sends one streaming request at a time and times what comes back."""

    def __init__(self, request: bytes, end: bytes) -> None:
        self._request = request
        self._end = end
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def ask(self) -> asyncio.Future[tuple[float, list[float]]]:
        """Send; resolves to the time to first event and the gaps after it."""
        self._answer: asyncio.Future[tuple[float, list[float]]]
        self._answer = asyncio.get_running_loop().create_future()
        self._gaps: list[float] = []
        self._tail = b""
        self._first = 0.0
        self._sent = self._last = time.perf_counter()
        self.transport.write(self._request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if b"data: " in data:
            if self._first:
                self._gaps.append(now - self._last)
            else:
                self._first = now - self._sent
            self._last = now
        self._tail = (self._tail + data)[-len(self._end) :]
        if self._tail == self._end and not self._answer.done():
            self._answer.set_result((self._first, self._gaps))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(ConnectionError("the stream was cut"))


async def _load(port: int, path: str, body: bytes, concurrency: int, requests: int) -> Samples:
    """Keep ``concurrency`` streams open until ``requests`` have completed."""
    block = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    samples, left = Samples(), requests
    loop = asyncio.get_running_loop()

    async def client() -> None:
        nonlocal left
        _, stream = await loop.create_connection(
            lambda: _Stream(block, b"\r\n0\r\n\r\n"), "127.0.0.1", port
        )
        while left > 0:
            left -= 1
            try:
                ttft, gaps = await asyncio.wait_for(stream.ask(), 120)
            except (ConnectionError, TimeoutError):
                samples.failed += 1
                break
            samples.ttft.append(ttft)
            samples.itl.extend(gaps)
        stream.transport.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    samples.rps.append(len(samples.ttft) / (time.perf_counter() - started))
    return samples


def load(port: int, path: str, body: bytes, concurrency: int, requests: int) -> Samples:
    """Run one load in a fresh event loop."""
    return uvloop.run(_load(port, path, body, concurrency, requests))


# --------------------------------------------------------------------------- processes


@contextlib.contextmanager
def process(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command until the block ends."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def cpu_s(pid: int) -> float:
    """Return the processor time a process has used so far, all threads; 0 where unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(child: subprocess.Popen[bytes], port: int, body: bytes, name: str) -> None:
    """Wait until a generation request succeeds.

    Raises:
        SetupError: the process ended or did not get ready in time.
    """
    deadline = time.monotonic() + START_S
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise SetupError(f"{name} ended with status {child.returncode} instead of serving")
        with contextlib.suppress(OSError, urllib.error.URLError):
            request = urllib.request.Request(url, body, headers)
            with urllib.request.urlopen(request, timeout=5) as answer:
                answer.read()
            return
        time.sleep(0.2)
    raise SetupError(f"{name} was not ready within {START_S:g} s")


def router_command(python: str, module: str, mode: str, ports: list[int], port: int) -> list[str]:
    """Return the command line of either router: their flags are the same."""
    urls = [f"http://127.0.0.1:{one}" for one in ports]
    command = [python, "-m", module, "--host", "127.0.0.1", "--port", str(port)]
    if mode == "pd":
        fleet = ["--pd-disaggregation", "--prefill", urls[0], "8998", "--decode", urls[1]]
    else:
        fleet = ["--worker-urls", *urls]
    if module.startswith("sglang_router"):
        return [*command, *fleet, "--policy", "round_robin", "--prometheus-port", str(free_port())]
    return [*command, *fleet, "--policy", "round-robin", "--prefill-policy", "round-robin"]


def has_sglang_router(python: str) -> bool:
    """Whether ``python`` can import sglang_router."""
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('sglang_router') is None)"
    return subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0


# --------------------------------------------------------------------------- measurement


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds and return the report."""
    body = json.dumps(
        {
            "model": "fake",
            "messages": [{"role": "user", "content": "x" * options.prompt_bytes}],
            "stream": True,
            "max_tokens": options.tokens,
        }
    ).encode()
    path = "/v1/chat/completions"
    with contextlib.ExitStack() as stack:
        targets: dict[str, tuple[int, int, int]] = {}
        routers = {"star": (sys.executable, "sglang_star_router.launch_router")}
        if has_sglang_router(options.sglang_router_python):
            routers["sglang_router"] = (
                options.sglang_router_python,
                "sglang_router.launch_router",
            )
        engines = {
            pace: [free_port(), free_port()] for pace in (True, False)
        }  # paced and unpaced engines, each two instances
        for paced, ports in engines.items():
            first = f"{ports[0]}:prefill" if options.mode == "pd" else str(ports[0])
            delays = [str(options.ttft_ms), str(options.itl_ms)] if paced else ["0", "0"]
            command = [sys.executable, "-m", "sglang_star_bench.router_engine", *delays,
                       str(options.tokens), first, str(ports[1])]  # fmt: skip
            child = stack.enter_context(process(command))
            wait_for(child, ports[-1], body, "the fake engine")
        targets["direct"] = (engines[True][-1], engines[False][-1], 0)
        for name, (python, module) in routers.items():
            chosen = []
            for ports in engines.values():
                port = free_port()
                command = router_command(python, module, options.mode, ports, port)
                child = stack.enter_context(process(command))
                wait_for(child, port, body, name)
                chosen.append(port)
            targets[name] = (chosen[0], chosen[1], child.pid)
        results = {name: Samples() for name in targets}
        order = list(targets)
        for number in range(options.rounds):
            for name in order[number % len(order) :] + order[: number % len(order)]:
                paced_port, free_running, pid = targets[name]
                one = load(paced_port, path, body, options.concurrency, options.requests)
                kept, used = results[name], cpu_s(pid)
                fast = load(free_running, path, body, options.concurrency, options.requests)
                kept.cpu += cpu_s(pid) - used
                kept.served += len(fast.ttft)
                kept.failed += one.failed + fast.failed
                kept.ttft += one.ttft
                kept.itl += one.itl
                kept.round_ttft.append(statistics.median(one.ttft))
                kept.round_itl.append(statistics.median(one.itl))
                kept.rps += fast.rps
                print(
                    f"round {number + 1}/{options.rounds} {name:14} "
                    f"TTFT {1e3 * kept.round_ttft[-1]:7.3f} ms  "
                    f"ITL {1e3 * kept.round_itl[-1]:7.3f} ms  {kept.rps[-1]:8.1f} requests/s",
                    file=sys.stderr,
                )
    return report(results, options)


def report(results: dict[str, Samples], options: argparse.Namespace) -> dict[str, Any]:
    """Summarise: milliseconds, and differences from ``direct`` paired by round."""
    direct = results["direct"]
    rows = {}
    for name, one in results.items():
        added_ttft = [1e3 * (a - b) for a, b in zip(one.round_ttft, direct.round_ttft, strict=True)]
        added_itl = [1e3 * (a - b) for a, b in zip(one.round_itl, direct.round_itl, strict=True)]
        rows[name] = {
            "ttft_ms": _quantiles(one.ttft),
            "itl_ms": _quantiles(one.itl),
            "added_ttft_ms": statistics.median(added_ttft),
            "added_itl_ms": statistics.median(added_itl),
            "rps": statistics.median(one.rps),
            "cpu_ms_per_request": 1e3 * one.cpu / max(1, one.served),
            "failed": one.failed,
        }
    keys = ("mode", "concurrency", "requests", "tokens", "ttft_ms", "itl_ms", "rounds",
            "prompt_bytes")  # fmt: skip
    return {"settings": {key: getattr(options, key) for key in keys}, "targets": rows}


def _quantiles(values: list[float]) -> dict[str, float]:
    p50, p90, p99 = (1e3 * float(q) for q in np.quantile(values, [0.5, 0.9, 0.99]))
    return {"p50": p50, "p90": p90, "p99": p99}


def table(result: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = [
        f"{'':14} {'TTFT p50':>9} {'p99':>9} {'added':>8} {'ITL p50':>9} {'p99':>9} "
        f"{'added':>8} {'requests/s':>11} {'CPU ms/req':>11} {'failed':>7}"
    ]
    for name, row in result["targets"].items():
        ttft, itl = row["ttft_ms"], row["itl_ms"]
        lines.append(
            f"{name:14} {ttft['p50']:9.3f} {ttft['p99']:9.3f} {row['added_ttft_ms']:8.3f} "
            f"{itl['p50']:9.3f} {itl['p99']:9.3f} {row['added_itl_ms']:8.3f} "
            f"{row['rps']:11.1f} {row['cpu_ms_per_request']:11.3f} {row['failed']:7d}"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: str) -> None:
    """Draw latency added at the median and at P99, and capacity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(result["targets"])
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.5), constrained_layout=True)
    for axis, key, title in zip(axes, ("ttft_ms", "itl_ms"), ("TTFT", "ITL"), strict=False):
        for offset, level in ((-0.2, "p50"), (0.2, "p99")):
            heights = [result["targets"][name][key][level] for name in names]
            axis.bar(np.arange(len(names)) + offset, heights, 0.38, label=level)
        axis.set(title=f"{title}, ms", xticks=range(len(names)), xticklabels=names)
        axis.legend()
    axes[2].bar(names, [result["targets"][name]["rps"] for name in names])
    axes[2].set_title("capacity, requests/s")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="star bench router", description=__doc__)
    parser.add_argument("--mode", choices=("aggregated", "pd"), default="aggregated")
    parser.add_argument("--concurrency", type=int, default=32, help="Open streams.")
    parser.add_argument("--requests", type=int, default=256, help="Per target and round.")
    parser.add_argument("--tokens", type=int, default=64, help="Events per stream.")
    parser.add_argument("--prompt-bytes", type=int, default=2000)
    parser.add_argument("--ttft-ms", type=float, default=20.0, help="The engine's own.")
    parser.add_argument("--itl-ms", type=float, default=10.0, help="The engine's own.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sglang-router-python", default=sys.executable, metavar="PYTHON",
                        help="Interpreter that has sglang_router installed.")  # fmt: skip
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args(argv)
    try:
        for name in ("concurrency", "requests", "tokens", "rounds"):
            if getattr(options, name) < 1:
                raise ConfigError(f"--{name} must be at least 1")
        result = measure(options)
    except StarError as error:
        print(f"star bench router: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(result, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
