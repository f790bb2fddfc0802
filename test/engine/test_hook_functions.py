"""What hooks do with what SGLang hands them, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_star.star_request import star_of

pytestmark = pytest.mark.engine

scheduler = pytest.importorskip("sglang_star.scheduler")


def test_requests_that_cannot_resume_are_marked() -> None:
    resumes, ends = SimpleNamespace(), SimpleNamespace()
    result = ([resumes], 0.5, [ends])
    assert scheduler.retract_decode(result, None) is result
    assert star_of(ends).unbacked
    assert not star_of(resumes).unbacked


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["write_weights", "write_some_weights"])
def test_weights_are_looked_at_again_after_every_update(
    monkeypatch: pytest.MonkeyPatch, name: str, fails: bool
) -> None:
    changed: list[bool] = []
    star = SimpleNamespace(weights_changed=lambda over: changed.append(over))
    around = getattr(scheduler, name)
    monkeypatch.setattr(scheduler, "_scheduler", SimpleNamespace(_star=star))

    def update(_manager: Any, message: str) -> str:
        assert not changed
        if fails:
            raise ValueError(message)
        return message + "d"

    if fails:
        with pytest.raises(ValueError, match="update"):
            around(update, None, "update")
    else:
        assert around(update, None, "update") == "updated"
    assert changed == [name == "write_weights"]
