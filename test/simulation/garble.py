"""Messages that a defective or hostile member would send: real ones with something changed.

A copy that is changed travels beside the real one. Whatever it says, no engine ends by it, and the
streams it does not name go on as if it had never been.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec

from sglang_star.errors import ProtocolError
from sglang_star.protocol import decode, encode

ODD: tuple[Any, ...] = (
    0,
    1,
    -1,
    2**31,
    -(2**31),
    2**63 - 1,
    -(2**63),
    2**64 - 1,
    0.0,
    -1.0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x" * 5000,
    "\x00",
    b"",
    b"\xff" * 64,
    b"\x80",
    [],
    [[]],
    {},
    None,
    True,
    False,
)
"""Values at the edge of what a field may be, or beyond."""


def changed(message: Any, dice: random.Random) -> bytes:
    """The bytes of a message with one to three things changed."""
    data = encode(message)
    if dice.random() < 0.1:
        return _bent(data, dice)
    version, (kind, *fields) = msgspec.msgpack.decode(data)
    for _ in range(dice.choice((1, 1, 2, 3))):
        fields = _other(fields, dice)
    return msgspec.msgpack.encode(
        [version, [kind, *fields] if isinstance(fields, list) else fields]
    )


def understood(data: bytes) -> Any:
    """The message that the bytes are, or None if no receiver would take them for one."""
    try:
        return decode(data)
    except ProtocolError:
        return None


def streams_of(message: Any) -> set[str]:
    """The streams that a message names, in whatever place."""
    named: set[str] = set()
    _collect(msgspec.to_builtins(message), named)
    return named


def _bent(data: bytes, dice: random.Random) -> bytes:
    """Bytes lost, doubled or flipped, without an eye for what they mean."""
    where = dice.randrange(len(data))
    length = dice.randrange(1, 9)
    match dice.randrange(4):
        case 0:
            return data[:where]
        case 1:
            return data[:where] + data[where + length :]
        case 2:
            return data[:where] + data[where : where + length] + data[where:]
    flipped = bytearray(data)
    flipped[where] ^= 1 << dice.randrange(8)
    return bytes(flipped)


def _other(tree: Any, dice: random.Random) -> Any:
    """The same tree with one node changed, chosen from the root down."""
    if isinstance(tree, list) and tree and dice.random() < 0.85:
        where = dice.randrange(len(tree))
        return [*tree[:where], _other(tree[where], dice), *tree[where + 1 :]]
    if isinstance(tree, dict) and tree and dice.random() < 0.85:
        key = dice.choice(list(tree))
        return {**tree, key: _other(tree[key], dice)}
    match tree:
        case bool():
            return not tree
        case int() if dice.random() < 0.6:
            return max(-(2**63), min(tree + dice.choice((-1, 1, -17, 1000)), 2**64 - 1))
        case float() if dice.random() < 0.6:
            return tree * dice.choice((-1.0, 0.5, 1000.0))
        case list() if tree and dice.random() < 0.6:
            where = dice.randrange(len(tree))
            return dice.choice((tree[:where], tree[where:], tree + tree, tree[::-1]))
        case str() | bytes() if tree and dice.random() < 0.6:
            where = dice.randrange(len(tree))
            return dice.choice((tree[:where], tree[where:], tree + tree))
    return dice.choice(ODD)


def _collect(tree: Any, named: set[str]) -> None:
    match tree:
        case dict():
            for key, value in tree.items():
                _collect(key, named)
                _collect(value, named)
        case list() | tuple():
            for item in tree:
                _collect(item, named)
        case str():
            named.add(tree)
