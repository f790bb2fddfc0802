"""``star cluster``: a local cluster until Ctrl-C."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec, shown
from sglang_star.model import default_model


def main(argv: Sequence[str]) -> int:
    """Start the cluster, print where it is and stay until interrupted or a process ends.

    Raises:
        ConfigError: the flags ask for something that cannot serve.
        SetupError: the machine cannot run it, or a process ended.
    """
    arguments = parser().parse_args(argv)
    with Cluster(spec_from(arguments), logs=arguments.logs) as cluster:
        print(f"\nrouter   {cluster.url}   (OpenAI API under /v1, moves under /star/migrations)")
        for engine in cluster.engines:
            print(f"{engine.name:12} {engine.url}\n    {shown(engine.command)}")
        print(f"logs in {arguments.logs}; Ctrl-C ends everything", flush=True)
        while True:
            cluster.check()
            time.sleep(0.5)


def spec_from(arguments: argparse.Namespace) -> ClusterSpec:
    """Turn parsed flags into a specification; without counts, one prefill and two decode."""
    prefill, decode, aggregated = arguments.prefill, arguments.decode, arguments.aggregated
    if not (prefill or decode or aggregated):
        prefill, decode = 1, 2
    return ClusterSpec(
        model=arguments.model or str(default_model()),
        prefill=prefill,
        decode=decode,
        aggregated=aggregated,
        host=arguments.host,
        port=arguments.port,
        rescheduler=arguments.rescheduler,
        predictor=arguments.predictor,
        paced=arguments.paced,
        max_total_tokens=arguments.max_total_tokens,
        engine_arguments=tuple(arguments.engine_args.split()),
        router_arguments=tuple(arguments.router_args.split()),
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``star cluster``."""
    made = argparse.ArgumentParser(description="Run engines and a router on this machine.")
    add = made.add_argument
    add("--prefill", type=int, default=0, metavar="N", help="prefill engines [1]")
    add("--decode", type=int, default=0, metavar="M", help="decode engines [2]")
    add("--aggregated", type=int, default=0, metavar="M", help="engines that do both, instead")
    add("--model", default="", help="directory or hub name [the packaged SmolLM2-135M-Instruct]")
    add("--host", default="127.0.0.1", help="address of the router [%(default)s]")
    add("--port", type=int, default=30000, help="port of the router, 0: any [%(default)s]")
    add("--rescheduler", default="star", help="off, reactive, star, ... [%(default)s]")
    add("--predictor", default="auto", help="auto, builtin, off or a head's path [%(default)s]")
    add("--paced", default="", metavar="PROFILE", help="pad steps to those of a modelled GPU")
    add("--max-total-tokens", type=int, default=16384, help="KV pool per engine [%(default)s]")
    add("--engine-args", default="", metavar="'...'", help="more flags for every engine")
    add("--router-args", default="", metavar="'...'", help="more flags for the router")
    add("--logs", type=Path, default=Path("star-cluster"), help="folder of logs [%(default)s]")
    return made
