"""A process that reads large bodies for the router, so that no stream waits meanwhile.

It takes, on its standard input, a line ``PATH SIZE`` and so many bytes, and answers with one line
of JSON: the :class:`~sglang_star_router.calls.Facts`, or null. It ends with its input.
"""

from __future__ import annotations

import sys
from typing import BinaryIO

import msgspec

from sglang_star_router.calls import read_facts


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer until the input ends."""
    while line := source.readline():
        path, _, size = line.decode().rpartition(" ")
        body = source.read(int(size))
        sink.write(msgspec.json.encode(read_facts(path, body)) + b"\n")
        sink.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
