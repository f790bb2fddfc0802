"""``python -m sglang_star_router.launch_router``: parse flags, serve, end cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence

import uvloop
from aiohttp import web

from sglang_star.errors import SetupError, StarError
from sglang_star_router.app import Router
from sglang_star_router.command_line import parse_args
from sglang_star_router.config import RouterConfig
from sglang_star_router.descriptors import raise_soft_limit
from sglang_star_router.listener import Listener
from sglang_star_router.logs import configure_logging

logger = logging.getLogger(__name__)


async def serve(router: Router, *, ready: asyncio.Event | None = None) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        ready: set once the socket listens.

    Raises:
        SetupError: the address cannot be bound.
    """
    config = router.config
    listener = Listener(router, config.host, config.port)
    metrics = web.Application()
    metrics.router.add_get("/metrics", router.show_metrics)
    apart = web.AppRunner(metrics, access_log=None, handle_signals=False)
    stop, hurry = asyncio.Event(), asyncio.Event()
    try:
        with _binding(config.host, config.port, "--host", "--port"):
            await listener.start()
        if config.prometheus_port:
            await apart.setup()
            with _binding(
                config.prometheus_host, config.prometheus_port, "--prometheus-host",
                "--prometheus-port",
            ):  # fmt: skip
                await web.TCPSite(apart, config.prometheus_host, config.prometheus_port).start()

        def told() -> None:
            (hurry if stop.is_set() else stop).set()

        # Before it says that it listens: whoever reads that may end it at once.
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, told)
        # What exists now stays: the collector need not go through it time and again.
        gc.collect()
        gc.freeze()
        logger.info("listening on %s", listener.url)
        if ready is not None:
            ready.set()
        await stop.wait()
        logger.info("stopping, %d requests open", router.closing.open)
    finally:
        await listener.close(config.shutdown_grace, hurry)
        await apart.cleanup()


@contextlib.contextmanager
def _binding(host: str, port: int, host_flag: str, port_flag: str) -> Iterator[None]:
    """Say which flag is at fault when an address cannot be bound."""
    try:
        yield
    except OSError as error:
        hint = f"another program may use the port: choose another with {port_flag}"
        if error.errno != errno.EADDRINUSE:
            hint = f"{host_flag} must be an address of this machine; ports below 1024 are root's"
        # asyncio's own text repeats the address; the number alone says what is wrong.
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise SetupError(f"cannot listen on {host}:{port}: {why}", hint=hint) from error


def launch(config: RouterConfig) -> None:
    """Run a router in this process until it is told to stop."""
    configure_logging(config.log_level, config.log_dir)
    raise_soft_limit()
    uvloop.run(serve(Router(config)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    try:
        launch(parse_args(argv))
    except StarError as error:
        print(f"star router: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
