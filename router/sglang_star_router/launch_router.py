"""``python -m sglang_star_router.launch_router``: parse flags, serve, end cleanly."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence

import uvloop
from aiohttp import web

from sglang_star.errors import SetupError, StarError
from sglang_star_router.app import Router
from sglang_star_router.config import RouterConfig, configure_logging, parse_args
from sglang_star_router.descriptors import raise_soft_limit

logger = logging.getLogger(__name__)

BACKLOG = 4096


async def serve(router: Router, *, ready: asyncio.Event | None = None) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        ready: set once the socket listens.

    Raises:
        SetupError: the address cannot be bound.
    """
    config = router.config
    runner = web.AppRunner(
        router.application(),
        # A client that hangs up cancels its handler, which closes the instance's connection.
        handler_cancellation=True,
        access_log=None,
        handle_signals=False,
        shutdown_timeout=config.shutdown_grace,
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, config.host, config.port, backlog=BACKLOG).start()
        except OSError as error:
            hint = "another program may use the port: choose another with --port"
            if error.errno != errno.EADDRINUSE:
                hint = "--host must be an address of this machine; ports below 1024 are root's"
            # asyncio's own text repeats the address; the number alone says what is wrong.
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            raise SetupError(
                f"cannot listen on {config.host}:{config.port}: {why}", hint=hint
            ) from error
        stop = asyncio.Event()
        # Before it says that it listens: whoever reads that may end it at once.
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        logger.info("listening on http://%s:%d", config.host, config.port)
        if ready is not None:
            ready.set()
        await stop.wait()
        logger.info("stopping")
    finally:
        await runner.cleanup()


def launch(config: RouterConfig) -> None:
    """Run a router in this process until it is told to stop."""
    configure_logging(config.log_level)
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
