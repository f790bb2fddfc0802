"""How long a prompt is, read off its JSON: text in bytes, ids by number, media apart.

Nothing is rebuilt: what is long (text, numbers, base64) is skipped as raw bytes, so that the time
depends on how many parts a prompt has and hardly on how large they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

ABSENT: Final = msgspec.Raw(b"")
_DEEPEST: Final = 32
"""Levels of content within content that are looked into; no API nests more than three."""


class _Part(msgspec.Struct):
    """A message, a content part or an item: what may hold media, and what may hold more parts."""

    content: msgspec.Raw = ABSENT
    output: msgspec.Raw = ABSENT
    image_url: msgspec.Raw = ABSENT
    input_audio: msgspec.Raw = ABSENT
    audio_url: msgspec.Raw = ABSENT
    video_url: msgspec.Raw = ABSENT
    source: msgspec.Raw = ABSENT
    file: msgspec.Raw = ABSENT
    file_data: msgspec.Raw = ABSENT
    images: msgspec.Raw = ABSENT
    image_data: msgspec.Raw = ABSENT
    audio_data: msgspec.Raw = ABSENT
    video_data: msgspec.Raw = ABSENT


NESTED: Final = ("content", "output")
MEDIA: Final = tuple(name for name in _Part.__struct_fields__ if name not in NESTED)

_part = msgspec.json.Decoder(_Part)
_items = msgspec.json.Decoder(list[msgspec.Raw])


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a prompt amounts to.

    Attributes:
        text: bytes of JSON that are text or structure; ids: token ids or embeddings.
        media: images, sounds and films; batch: number of prompts.
    """

    text: int = 0
    ids: int = 0
    media: int = 0
    batch: int = 1


def parts(raw: msgspec.Raw, depth: int = 0) -> Prompt:
    """Measure messages, items, instances or anything made of them.

    Raises:
        msgspec.MsgspecError: not JSON.
    """
    data = bytes(raw)
    if depth > _DEEPEST or data[:1] not in (b"[", b"{"):
        return Prompt(text=len(data))
    text = len(data)
    media = 0
    if data[:1] == b"[":
        for item in _items.decode(raw):
            inner = parts(item, depth + 1)
            text += inner.text - len(bytes(item))
            media += inner.media
        return Prompt(text=text, media=media)
    part = _part.decode(raw)
    for name in NESTED:
        inside: msgspec.Raw = getattr(part, name)
        if inside != ABSENT:
            inner = parts(inside, depth + 1)
            text += inner.text - len(bytes(inside))
            media += inner.media
    for name in MEDIA:
        found = number_of_media(getattr(part, name))
        if found:
            text -= len(bytes(getattr(part, name)))
            media += found
    return Prompt(text=text, media=media)


def number_of_media(raw: msgspec.Raw) -> int:
    """How many images, sounds or films a field holds: one, or a list of them."""
    data = bytes(raw)
    if data in (b"", b"null", b"[]"):
        return 0
    return len(_items.decode(raw)) if data[:1] == b"[" else 1


def prompts(raw: msgspec.Raw, unit: int) -> Prompt:
    """Measure one prompt or a list of them.

    Args:
        unit: depth of lists of one prompt: 0 for text, 1 for token ids, 2 for embeddings.

    Raises:
        msgspec.MsgspecError: not JSON.
    """
    data = bytes(raw)
    if not data.startswith(b"["):
        return Prompt(text=len(data))
    depth, first = _shape(data)
    if first == b'"' or depth > unit:
        items = _items.decode(raw)
        ids = 0 if first == b'"' else sum(_length(item, depth - 1) for item in items)
        return Prompt(text=0 if ids else len(data), ids=ids, batch=max(1, len(items)))
    ids = _length(raw, depth)
    return Prompt(text=0 if ids else len(data), ids=ids)


def _shape(data: bytes) -> tuple[int, bytes]:
    """How many lists deep the first value lies, and what it begins with; ``[]`` is no value."""
    depth = 0
    for position in range(len(data)):
        byte = data[position : position + 1]
        if byte == b"[":
            depth += 1
        elif not byte.isspace():
            return (depth - 1, b"") if byte == b"]" else (depth, byte)
    return depth, b""


def _length(raw: msgspec.Raw, depth: int) -> int:
    """Items of a list; of numbers alone they are counted by their commas. What is no list has 0."""
    data = bytes(raw)
    if not data.startswith(b"["):
        return 0
    if depth > 1:
        return len(_items.decode(raw))
    inside = data.strip()[1:-1]
    return inside.count(b",") + 1 if inside.strip() else 0
