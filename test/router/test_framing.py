"""Chunked bodies, cut wherever a network may cut them."""

from __future__ import annotations

import pytest

from sglang_star_router.first_event import end_of_event
from sglang_star_router.framing import ChunkScanner, FramingError, unframed

CONTENT = (b"data: 1\n\n", b"a\r\n\r\nb", b"\r\n", b"x" * 40)
BODY = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in CONTENT) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", range(1, len(BODY) + 1))
def test_a_body_is_the_same_however_it_was_cut(size):
    scanner, content, used = ChunkScanner(), [], 0
    for start in range(0, len(BODY), size):
        used += scanner.feed(BODY[start : start + size], content)
    assert b"".join(content) == b"".join(CONTENT)
    assert scanner.done
    assert used == len(BODY)


def test_what_is_there_of_a_body_is_unframed():
    whole = b"".join(CONTENT)
    for end in range(len(BODY) + 1):
        # The framing's own CRLF after a chunk may be there or not.
        assert whole.startswith(unframed(BODY[:end]).removesuffix(b"\r")), end
    assert unframed(BODY) == whole
    assert unframed(b"9;name=value\r\ndata: 1\n\n\r\n") == b"data: 1\n\n"


@pytest.mark.parametrize("line", [b"-5\r\n", b"0x5\r\n", b"1_0\r\n", b"\r\n", b"z\r\n"])
def test_what_is_no_size_is_refused_each_time(line):
    for _ in range(2):
        with pytest.raises(FramingError):
            ChunkScanner().feed(line + b"12345")
        with pytest.raises(FramingError):
            unframed(line + b"12345")


def test_a_first_event_ends_at_the_first_of_its_marks():
    assert end_of_event(b"data: 1\n") is None
    assert end_of_event(b"data: 1\n\nrest\r\n\r\n") == 9
    assert end_of_event(b"data: 1\r\n\r\nrest\n\n") == 11
    assert end_of_event(b"0\r\n\r\n\n") == 5
