"""Where bodies are read: small ones at once, large ones by a process of their own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from typing import Final

import msgspec

from sglang_star_router import calls
from sglang_star_router.calls import Call, Facts

logger = logging.getLogger(__name__)

LARGE: Final = 512 * 1024
"""Bytes from which a body is read elsewhere: parsing so many takes about a millisecond."""

_facts = msgspec.json.Decoder(Facts | None)


class BodyReader:
    """Reads bodies; the process for large ones is started by the first of them."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._asking: set[asyncio.Task[Facts | None]] = set()

    @property
    def pid(self) -> int:
        """The process for large bodies; 0 while there is none."""
        return self._process.pid if self._process is not None else 0

    async def call(self, path: str, body: tuple[bytes, ...]) -> Call | None:
        """Read a body; None if it is not a JSON object."""
        if sum(map(len, body)) < LARGE:
            whole = b"".join(body)
            facts = calls.read_facts(path, whole)
            body = (whole,)
        else:
            asking = asyncio.create_task(self._elsewhere(path, body))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
            # A client that leaves must not leave half a body in the process' input.
            facts = await asyncio.shield(asking)
        return None if facts is None else Call.of(path, body, facts)

    async def close(self) -> None:
        """End the process."""
        for task in self._asking:
            task.cancel()
        self._end()

    # ------------------------------------------------------------------ inside

    async def _elsewhere(self, path: str, body: tuple[bytes, ...]) -> Facts | None:
        async with self._turn:
            for _ in range(2):
                try:
                    return await self._ask(path, body)
                except (OSError, EOFError, ValueError, RuntimeError, msgspec.MsgspecError) as error:
                    # RuntimeError is how uvloop says that the pipe is closed.
                    logger.warning("the process that reads large bodies failed: %r", error)
                    self._end()
                except asyncio.CancelledError:
                    self._end()
                    raise
        # Better slow than not at all: other streams wait while this one is parsed.
        return await asyncio.to_thread(calls.read_facts, path, b"".join(body))

    async def _ask(self, path: str, body: tuple[bytes, ...]) -> Facts | None:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "sglang_star_router.scan",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                # It finds our modules where this process found them.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                # Ctrl-C in a terminal is for the router, which ends it by closing its input.
                start_new_session=True,
            )  # fmt: skip
        source, sink = self._process.stdin, self._process.stdout
        assert source is not None
        assert sink is not None
        source.write(f"{path} {sum(map(len, body))}\n".encode())
        for piece in body:
            source.write(piece)
            await source.drain()
        await source.drain()
        line = await sink.readline()
        if not line.endswith(b"\n"):
            raise EOFError("it has ended")
        facts: Facts | None = _facts.decode(line)
        return facts

    def _end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process = None
