"""How long a prompt is, read off its JSON: text in bytes, ids by number, media apart.

Nothing is rebuilt: what is long (text, numbers, base64) is skipped as raw bytes, so that the time
depends on how many parts a prompt has and hardly on how large they are.
"""

from __future__ import annotations

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


NESTED: Final = 2
"""So many fields of a part, the first ones, may hold more parts; all others hold media."""
_NO_MEDIA: Final = (ABSENT,) * (len(_Part.__struct_fields__) - NESTED)
_LIST: Final = ord("[")
_OPENING: Final = (_LIST, ord("{"))

_part = msgspec.json.Decoder(_Part)
_items = msgspec.json.Decoder(list[msgspec.Raw])


class Prompt(msgspec.Struct, frozen=True):
    """What a prompt amounts to.

    Attributes:
        text: bytes of JSON that are text or structure; ids: token ids or embeddings.
        media: images, sounds and films; batch: number of prompts.
    """

    text: int = 0
    ids: int = 0
    media: int = 0
    batch: int = 1


def parts(raw: msgspec.Raw) -> Prompt:
    """Measure messages, items, instances or anything made of them.

    Raises:
        msgspec.MsgspecError: not JSON.
    """
    text, media = _measured(raw, 0)
    return Prompt(text=text, media=media)


def _measured(raw: msgspec.Raw, depth: int) -> tuple[int, int]:
    """Bytes of text or structure, and the number of media, in one value and all within it."""
    data = memoryview(raw)
    text, media = len(data), 0
    first = data[0] if data else 0
    if depth > _DEEPEST or first not in _OPENING:
        return text, media
    if first == _LIST:
        for item in _items.decode(raw):
            inner, found = _measured(item, depth + 1)
            text += inner - len(memoryview(item))
            media += found
        return text, media
    values = msgspec.structs.astuple(_part.decode(raw))
    for inside in values[:NESTED]:
        if inside is not ABSENT:
            inner, found = _measured(inside, depth + 1)
            text += inner - len(memoryview(inside))
            media += found
    # Most parts hold none, which one comparison tells.
    if values[NESTED:] != _NO_MEDIA:
        for inside in values[NESTED:]:
            if found := number_of_media(inside):
                text -= len(memoryview(inside))
                media += found
    return text, media


def number_of_media(raw: msgspec.Raw) -> int:
    """How many images, sounds or films a field holds: one, or a list of them."""
    if raw is ABSENT:
        return 0
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
