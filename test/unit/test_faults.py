"""A fault costs what it happened to, is counted each time and told once."""

from __future__ import annotations

import logging

import pytest

from sglang_star.faults import Faults


def test_what_is_raised_ends_the_one_thing(caplog: pytest.LogCaptureFixture) -> None:
    faults, ended = Faults(), []
    for number in range(3):
        with faults.contained("Commit", lambda number=number: ended.append(number)):
            raise KeyError("no such stream")
    assert ended == [0, 1, 2]
    assert faults.counts == {"Commit": 3}
    (told,) = caplog.records
    assert told.levelno == logging.ERROR
    assert "Commit" in told.getMessage()
    assert told.exc_info is not None
    assert "no such stream" in caplog.text


def test_an_ending_that_fails_is_contained_too() -> None:
    faults = Faults()

    def end() -> None:
        raise OSError("no way out either")

    with faults.contained("a move", end):
        raise AssertionError
    assert faults.counts == {"a move": 1, "ending a move": 1}


def test_another_kind_of_error_is_told_as_well(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()
    for error in (KeyError("a"), KeyError("b"), ValueError("c")):
        with faults.contained("Commit"):
            raise error
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [
        KeyError,
        ValueError,
    ]


def test_what_goes_well_costs_nothing() -> None:
    faults = Faults()
    with faults.contained("Commit", lambda: pytest.fail("nothing is to end")):
        pass
    assert not faults.counts


def test_leaving_is_not_a_fault() -> None:
    faults = Faults()
    with pytest.raises(SystemExit), faults.contained("Commit"):
        raise SystemExit
    assert not faults.counts
