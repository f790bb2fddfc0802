"""The page of what moves and what stays: each line is held by a test, each reason has a line."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_star.errors import ConfigError
from sglang_star.migration.kind import Kind

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/what-moves.md").read_text()
OURS = ROOT / "python/sglang_star"


@dataclass(frozen=True)
class Line:
    what: str
    outcome: str
    because: str
    test: str


def lines() -> list[Line]:
    """The page's tables, without their heads."""
    found = []
    for text in PAGE.splitlines():
        if text.startswith("|") and not text.startswith(("|---", "| a request with | |")):
            cells = [cell.strip() for cell in text.strip("|").split("|")]
            if cells[1]:
                assert len(cells) == 4, text
                found.append(Line(*cells))
    return found


def test_the_page_was_read() -> None:
    assert len(lines()) > 40
    assert {line.outcome for line in lines()} == {"moves", "stays", "no start", "not tried"}


@pytest.mark.parametrize("line", lines(), ids=lambda line: line.what)
def test_every_line_is_held_by_a_test(line: Line) -> None:
    if line.outcome == "not tried":
        assert not line.test
        return
    assert line.because or line.outcome == "moves"
    path, _, name = line.test.strip("`").partition("::")
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def strings(path: str, function: str) -> set[str]:
    """Text in a function of ours, but for its documentation."""
    tree = ast.parse((OURS / path).read_text())
    [node] = [one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == function]
    found = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
    return {str(text) for text in found if isinstance(text, str)} - {ast.get_docstring(node)}


def stays(text: str) -> bool:
    """Whether some line says of this that it stays."""
    words = set(re.findall(r"\w+", text.lower())) - {"adapter"}
    return any(
        words <= set(re.findall(r"\w+", line.what.lower()))
        for line in lines()
        if line.outcome == "stays"
    )


def test_every_reason_of_a_request_has_its_line() -> None:
    reasons = strings("engine/codec.py", "pinned")
    assert "LoRA adapter" in reasons
    assert not [reason for reason in reasons if reason and not stays(reason)]


@pytest.mark.parametrize("field", Kind.__struct_fields__)
def test_every_field_of_a_kind_has_its_line(field: str) -> None:
    assert any(f"`{field}`" in line.what for line in lines() if line.outcome == "stays")


OPTIONS = sorted(
    text for text in strings("launch.py", "_refuse_unsupported") if re.fullmatch(r"--[a-z-]+", text)
)


@pytest.mark.parametrize("option", [*OPTIONS, "--speculative-algorithm"])
def test_options_that_exclude_moves_stop_the_launch(option: str) -> None:
    launch = pytest.importorskip("sglang_star.launch")
    name = option.strip("-").replace("-", "_")
    value: int | str = "EAGLE" if name == "speculative_algorithm" else 2
    with pytest.raises(ConfigError) as refused:
        launch._refuse_unsupported(SimpleNamespace(**{name: value}))
    assert refused.value.hint
    launch._refuse_unsupported(SimpleNamespace(**{name: None}))
    assert any(f"`{option}`" in line.what for line in lines() if line.outcome == "no start")


def test_no_option_stops_the_launch_that_no_longer_does() -> None:
    told = {
        option
        for line in lines()
        if line.outcome == "no start"
        for option in re.findall(r"`(--[a-z-]+)`", line.what)
    }
    assert told == {*OPTIONS, "--speculative-algorithm"}
