"""``star predictor collect``: prompts in, (hidden state, tokens so far, remaining) samples out.

An offline SGLang engine answers the prompts while STAR's own hook records. Everything on disk is
skipped by the next run. Ctrl-C or SIGTERM stops sending and lets running requests end, because
dropping them would keep only the short ones; a second one cuts them, and they are kept as
censored. What is left can be trained on or continued.

With ``--resample`` it continues prefixes of a collection many times instead, for the floor.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from sglang_star.config import PREDICTOR_OFF, StarConfig
from sglang_star.errors import ConfigError
from sglang_star.predictor import resample
from sglang_star.predictor.folder import claimed, write_manifest, write_sources
from sglang_star.predictor.prompts import Prompt, read_prompts
from sglang_star.predictor.samples import (
    FORMAT,
    collected_rids,
    describe,
)

REPORT_EVERY_S: Final = 10.0
PROMPT_TOKENS: Final = 1024
"""Prompt tokens per running request that the KV pool has room for; longer ones share."""

SAMPLING: Final = ("temperature", "top_p", "top_k")

Job = tuple[str, Prompt]
"""A rid (``<prompt key>#<sample>``) and its prompt."""

T = TypeVar("T")
Generate = Callable[[T], Awaitable[int]]
"""Answer one job; returns the number of output tokens."""

Cut = Callable[[], None]
"""Abort every running job."""


@dataclass(slots=True)
class Progress:
    """Counts of one run, printed every ten seconds."""

    total: int
    done: int = 0
    tokens: int = 0
    stopping: bool = False
    started: float = 0.0
    reported: float = 0.0

    def line(self) -> str:
        """What is done, how fast, and how long it will still take."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        left = f"{(self.total - self.done) * elapsed / self.done / 60:.0f}" if self.done else "?"
        return (
            f"{self.done}/{self.total} requests, {self.tokens} tokens, "
            f"{self.tokens / elapsed:.0f} tok/s, {left} min left"
        )

    def add(self, tokens: int) -> None:
        """Count one finished request."""
        self.done += 1
        self.tokens += tokens
        if time.monotonic() - self.reported >= REPORT_EVERY_S or self.done == self.total:
            self.reported = time.monotonic()
            print(self.line(), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when all is collected or the run was stopped by the user.

    Raises:
        ConfigError: the prompts, the folder or an option is wrong, or another run has the folder.
    """
    args = parser().parse_args(argv)
    return _resample(args) if args.resample else _collect(args)


def _collect(args: argparse.Namespace) -> int:
    prompts = read_prompts(args.prompts)[: args.limit]
    with claimed(args.out):
        write_manifest(args.out, settings(args, len(prompts)))
        write_sources(args.out, prompts)
        jobs = plan(prompts, args.samples or 1, args.out)
        if not jobs:
            print(f"{args.out} already holds every sample asked for")
            return 0
        with _Engine(args, collect=str(args.out)) as engine:
            engine.drive(jobs, generator(engine.engine, args))
    return 0


def _resample(args: argparse.Namespace) -> int:
    _, manifest = describe(args.resample)
    if Path(args.model).name != manifest["model"]:
        raise ConfigError(f"{args.resample} was collected from {manifest['model']}")
    args.max_new_tokens, args.no_chat_template = manifest["max_new_tokens"], False
    for name in SAMPLING:
        setattr(args, name, manifest["sampling"][name])
    sampling = {k: v for k, v in manifest["sampling"].items() if v is not None}
    repeats = args.samples or resample.REPEATS
    with claimed(args.out):
        write_manifest(args.out, settings(args, 0) | {"chat_template": manifest["chat_template"]})
        points = resample.plan(
            args.resample, args.limit or resample.POINTS, set(resample.read(args.out))
        )
        if not points:
            print(f"{args.out} already holds every point asked for")
            return 0
        with _Engine(args) as engine:
            engine.drive(
                points, resample.continuer(engine.engine, sampling, repeats, args.out), repeats
            )
    return 0


class _Engine:
    """SGLang for one run of this command."""

    def __init__(self, args: argparse.Namespace, collect: str = "") -> None:
        self._args = args
        self.engine = start_engine(args, collect)

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.shutdown()

    def drive(self, jobs: Sequence[T], generate: Generate[T], outputs: int = 1) -> None:
        """Answer all jobs, each of so many outputs."""
        cut = functools.partial(self.engine.tokenizer_manager.abort_request, abort_all=True)
        at_once = max(self._args.concurrency // outputs, 1)

        async def run() -> None:
            # SGLang takes SIGTERM for itself with the first request; after this, it has.
            self.engine.tokenizer_manager.auto_create_handle_loop()
            await drive(jobs, generate, cut, at_once, self._args.minutes)

        self.engine.loop.run_until_complete(run())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--model", required=True, help="model path, as for SGLang")
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, help="jsonl[.gz], json or text")
    source.add_argument(
        "--resample", type=Path, metavar="FOLDER", help="continue prefixes of this collection"
    )
    result.add_argument("--out", required=True, type=Path, help="folder; continued if it exists")
    result.add_argument("--limit", type=int, help="this many prompts [all] or points [100]")
    result.add_argument("--samples", type=int, help="outputs per prompt [1] or point [16]")
    result.add_argument("--max-new-tokens", type=int, default=1024, help="cap [1024]")
    result.add_argument("--temperature", type=float, help="[the model's own]")
    result.add_argument("--top-p", type=float, help="[the model's own]")
    result.add_argument("--top-k", type=int, help="[the model's own]; 64 is much faster on a CPU")
    result.add_argument("--no-chat-template", action="store_true", help="send prompts as they are")
    result.add_argument("--concurrency", type=int, default=32, help="requests at once [32]")
    result.add_argument("--minutes", type=float, help="stop sending after this long [never]")
    return result


def settings(args: argparse.Namespace, prompts: int) -> dict[str, Any]:
    """What the manifest records, and a continued collection must agree with."""
    return {
        "format": FORMAT,
        "model": str(args.model),
        "chat_template": not args.no_chat_template,
        "max_new_tokens": args.max_new_tokens,
        "sampling": {k: getattr(args, k) for k in SAMPLING},
        "prompts": prompts,
    }


def plan(prompts: Sequence[Prompt], samples: int, folder: Path) -> list[Job]:
    """Jobs not yet on disk; every prompt is sampled once before any is sampled twice."""
    done = set(collected_rids(folder))
    jobs = ((f"{prompt.key}#{i}", prompt) for i in range(samples) for prompt in prompts)
    return [job for job in jobs if job[0] not in done]


async def drive(
    jobs: Sequence[T],
    generate: Generate[T],
    cut: Cut,
    concurrency: int,
    minutes: float | None = None,
) -> Progress:
    """Answer ``jobs``, ``concurrency`` at a time, until done, out of time or interrupted."""
    progress = Progress(len(jobs), started=time.monotonic())
    deadline = time.monotonic() + minutes * 60 if minutes else float("inf")
    queue = iter(jobs)

    def stop() -> None:
        if progress.stopping:
            print("cutting the running requests", flush=True)
            cut()
            return
        print("stopping: waiting for running requests; once more to cut them", flush=True)
        progress.stopping = True

    async def work() -> None:
        for job in queue:
            if progress.stopping or time.monotonic() > deadline:
                return
            progress.add(await generate(job))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(jobs))):
                group.create_task(work())
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return progress


def start_engine(args: argparse.Namespace, collect: str = "") -> Any:
    """Boot SGLang with STAR recording to the folder ``collect``, or not recording."""
    import sglang
    from sglang.srt.server_args import ServerArgs

    from sglang_star.launch import enable

    server_args = ServerArgs(
        model_path=str(args.model),
        log_level="error",
        max_running_requests=args.concurrency,
        # Room for every request at its longest; the default would take most of the host's memory.
        max_total_tokens=args.concurrency * (args.max_new_tokens + PROMPT_TOKENS),
        sleep_on_idle=True,
    )
    enable(server_args, StarConfig(collect=collect, predictor=PREDICTOR_OFF))
    return sglang.Engine(server_args=server_args)


def generator(engine: Any, args: argparse.Namespace) -> Generate[Job]:
    """Bind the engine, its tokenizer and the sampling options into one coroutine."""
    tokenizer = engine.tokenizer_manager.tokenizer
    sampling = {k: getattr(args, k) for k in SAMPLING if getattr(args, k) is not None}
    sampling["max_new_tokens"] = args.max_new_tokens
    longest = engine.tokenizer_manager.context_len - args.max_new_tokens - 1

    async def generate(job: Job) -> int:
        rid, prompt = job
        if args.no_chat_template:
            ids = tokenizer.encode(prompt.text)
        else:
            turns = [{"role": "user", "content": prompt.text}]
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        if len(ids) > longest:
            print(f"skipped {rid}: {len(ids)} prompt tokens are too many", flush=True)
            return 0
        try:
            result = await engine.async_generate(input_ids=ids, sampling_params=sampling, rid=rid)
        except ValueError as error:  # how SGLang's engine reports a request it will not run
            print(f"skipped {rid}: {error}", flush=True)
            return 0
        return int(result["meta_info"]["completion_tokens"])

    return generate
