"""``star demo``: the effect of moving running requests, and proof that it changes no token."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import CPU_ENVIRONMENT, ClusterSpec
from sglang_star.demo import comparison, conversation, page, picture, report, setting
from sglang_star.demo.conversation import Conversation
from sglang_star.demo.phases import Phases, cores, expected_s
from sglang_star.demo.report import Findings
from sglang_star.demo.side import summary
from sglang_star.demo.workload import Workload
from sglang_star.forkserver import ForkServer
from sglang_star.machine import has_gpu

PLAYING_S: Final = 130.0
QUICK_PLAYING_S: Final = 45.0
"""Measured; what is played takes as long on every machine that keeps up."""


def main(argv: Sequence[str]) -> int:
    """Run the demo; return 0 only if nothing went wrong, see :func:`report.verdict`."""
    arguments = parser().parse_args(argv)
    out: Path = arguments.out
    workload = comparison.QUICK if arguments.quick else comparison.FULL
    began = time.monotonic()
    steps = _announce(arguments.quick)
    talk = Conversation()
    with contextlib.ExitStack() as imported, contextlib.ExitStack() as running:
        forks = _fork_server(out / "logs", imported)

        def start(spec: ClusterSpec, what: str) -> Cluster:
            with steps.phase(f"starting {what}"):
                logs = out / "logs" / what.replace(" ", "-")
                return running.enter_context(Cluster(spec, logs, report=_detail, forks=forks))

        cluster = start(comparison.spec(arguments.predictor), "1 prefill and 2 decode engines")
        comparison.warm_up(cluster, workload)
        with steps.phase(f"{workload.requests} bursty requests, rescheduling off"):
            without = comparison.run(cluster, "without", workload)
        comparison.reschedule(cluster)
        with steps.phase("the same requests, rescheduling on"):
            rescheduled = comparison.run(cluster, "with", workload)
        if not arguments.quick:
            running.close()
            cluster = start(conversation.spec(arguments.predictor), "2 chat engines")
            imported.close()
            with steps.phase("chat answers, moved live, then again without moving"):
                talk = conversation.run(cluster)
        found = Findings(without, rescheduled, talk, steps.took, time.monotonic() - began)
        wrong = publish(found, workload, out)
        if arguments.keep:
            stay(cluster)
    return 1 if wrong else 0


def _fork_server(logs: Path, stack: contextlib.ExitStack) -> ForkServer | None:
    """Import SGLang once for both clusters, where engines can be forks."""
    if has_gpu():
        return None
    logs.mkdir(parents=True, exist_ok=True)
    return stack.enter_context(ForkServer(logs / "imports.log", CPU_ENVIRONMENT))


def publish(found: Findings, workload: Workload, out: Path) -> list[str]:
    """Write the report's files, print the summary and return what went wrong."""
    result = report.build(found)
    sides = [(side, summary(side)) for side in (found.without, found.rescheduled)]
    drawn = picture.render(sides, setting.caption(workload))
    files = {
        "report.json": json.dumps(result, indent=2) + "\n",
        "effect.svg": drawn,
        "report.html": page.render(found, result, drawn, setting.paragraphs(workload)),
    }
    print(report.as_text(result, found.twins))
    wrong = report.verdict(found)
    print("".join(f"\nFAILED: {line}" for line in wrong))
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
        print(out / name)
    return wrong


def stay(cluster: Cluster) -> None:
    """Leave the cluster up, rescheduling on, until Ctrl-C.

    Raises:
        SetupError: one of its processes ended.
    """
    cluster.replace_router(rescheduler="star")
    print(f"\nthe cluster stays up until Ctrl-C; watch it at {cluster.url}/dashboard and ask it:")
    print(
        f"  curl -N {cluster.url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        """    -d '{"model": "star", "stream": true, "max_tokens": 400, \\\n"""
        """         "messages": [{"role": "user", "content": "Tell me about the tides."}]}'""",
        flush=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            cluster.check()
            time.sleep(0.5)


def _announce(quick: bool) -> Phases:
    """Say what will happen and how long it will take on this machine."""
    starts, playing_s = (1, QUICK_PLAYING_S) if quick else (2, PLAYING_S)
    count = cores()
    about = expected_s(starts, playing_s, count)
    print(
        f"STAR demo: about {about / 60:.1f} minutes on this machine's {count} "
        f"core{'s' * (count > 1)}, if nothing else runs"
    )
    return Phases(total=2 * starts + 1)


def _detail(line: str) -> None:
    print(f"      {line}", flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``star demo``."""
    made = argparse.ArgumentParser(
        description="Play the same bursty requests twice on 1 prefill + 2 decode engines, "
        "rescheduling off and on, and show what it changes; then move chat answers live and "
        "compare each with its unmoved twin."
    )
    add = made.add_argument
    add("--out", type=Path, default=Path("star-demo"), help="folder of the report [%(default)s]")
    add("--quick", action="store_true", help="one burst and no chat, in a third of the time")
    add("--keep", action="store_true", help="leave the cluster and its dashboard up until Ctrl-C")
    add("--predictor", choices=("builtin", "off"), default="builtin",
        help="off: the rescheduler goes by age alone [%(default)s]")  # fmt: skip
    return made
