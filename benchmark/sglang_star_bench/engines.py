"""Engines under measurement: started without a router, asked and streamed from directly."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil  # type: ignore[import-untyped]

from sglang_star.cluster_layout import CPU_ENVIRONMENT, ClusterSpec, Engine, engines
from sglang_star.errors import PeerError
from sglang_star.forkserver import ForkServer, forkable
from sglang_star.machine import require_memory
from sglang_star.process import ServerProcess, wait_healthy

WARM_UP_TOKENS = 4


@contextlib.contextmanager
def running(
    specs: Sequence[ClusterSpec],
    logs: Path,
    report: Callable[[str], None] = print,
    *,
    fork: bool = False,
) -> Iterator[list[Engine]]:
    """Start the engines of all ``specs`` and yield them, in order, once they serve.

    With ``fork`` they share what they import, where that is possible: less memory, sooner there.

    Raises:
        SetupError: too little memory, or an engine that did not come up.
    """
    logs.mkdir(parents=True, exist_ok=True)
    members = [engine for spec in specs for engine in engines(spec)]
    require_memory(len(members), specs[0].model)
    with contextlib.ExitStack() as stack:
        processes = []
        forks = None
        if fork and all(forkable(engine.command) for engine in members):
            forks = stack.enter_context(ForkServer(logs / "imports.log", CPU_ENVIRONMENT))
        for number, engine in enumerate(members):
            log = logs / f"{number}-{engine.name}.log"
            process = ServerProcess(
                engine.name,
                engine.command,
                url=engine.url,
                log=log,
                environment=CPU_ENVIRONMENT,
                forks=forks,
                place=engine.place,
            )
            stack.callback(process.stop)
            processes.append(process)
        report(f"starting {len(members)} engines with {specs[0].model}")
        deadline = time.monotonic() + specs[0].start_timeout_s
        while processes:
            for process in wait_healthy(processes, deadline - time.monotonic()):
                processes.remove(process)
        yield members


def family(engine: Engine) -> list[psutil.Process]:
    """The processes of an engine: HTTP server, scheduler, detokenizer, and who watches them."""
    port = engine.url.rsplit(":", 1)[1]
    roots = [child for child in psutil.Process().children() if port in child.cmdline()]
    return roots + [child for root in roots for child in root.children(recursive=True)]


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    """Processor time used so far by ``processes`` together, seconds."""
    times = [process.cpu_times() for process in processes]
    return sum(one.user + one.system for one in times)


def greedy(tokens: int) -> dict[str, Any]:
    """Sampling parameters of exactly ``tokens`` greedy output tokens."""
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}


def ending(length: int, limit: int, stop: int) -> dict[str, Any]:
    """Sampling parameters of exactly ``length`` greedy tokens, the last one ``stop``.

    The limit is what a client would set that does not know the length, and the only number of
    these that router, schedulers and predictor go by. That ``stop`` cannot come sooner and then
    must is the sampler's business alone.

    Args:
        length: output tokens, at least 2: the first one is prefill's.
        limit: ``max_new_tokens``.
        stop: a token id.
    """
    return {
        "temperature": 0,
        "max_new_tokens": limit,
        "min_new_tokens": length - 1,
        "stop_token_ids": [stop],
        "logit_bias": {str(stop): 1e4},
    }


async def post(session: aiohttp.ClientSession, url: str, body: Any = None) -> Any:
    """POST and return the decoded answer.

    Raises:
        PeerError: the engine answered with an error.
    """
    async with session.post(url, json=body) as answer:
        if answer.status >= 400:
            raise PeerError(
                f"{url} answered {answer.status}: {(await answer.text())[:300]}",
                hint="the engine's log says more",
            )
        return await answer.json(content_type=None)


async def warm_up(session: aiohttp.ClientSession, url: str, batch: int) -> None:
    """Let an engine decode once at this batch size, so that nothing is first when measured."""
    prompts = [[100 + number] * 8 for number in range(batch)]
    body = {"input_ids": prompts, "sampling_params": greedy(WARM_UP_TOKENS)}
    await post(session, url + "/generate", body)


@dataclass(slots=True)
class Stream:
    """One streamed request as its client sees it.

    Attributes:
        arrivals: (wall-clock seconds, output tokens so far) of every chunk that brought tokens.
        token_ids: output so far.
    """

    arrivals: list[tuple[float, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Output tokens received."""
        return len(self.token_ids)

    async def read(self, session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
        """Send ``body`` to the engine at ``url`` and follow its stream to the end.

        Raises:
            PeerError: the engine refused, or broke the stream off with an error.
        """
        async with session.post(url + "/generate", json={**body, "stream": True}) as answer:
            if answer.status >= 400:
                raise PeerError(f"{url} answered {answer.status}: {await answer.text()}")
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                now, chunk = time.time(), json.loads(line[6:])
                if "error" in chunk:
                    raise PeerError(f"{url} broke a stream off: {chunk['error']}")
                new = chunk["meta_info"]["completion_tokens"] - self.tokens
                if new > 0:
                    # All of the output, or, with --incremental-streaming-output, what is new.
                    self.token_ids += chunk["output_ids"][-new:]
                    self.arrivals.append((now, self.tokens))
