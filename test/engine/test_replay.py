"""A guest's grammar follows its KV, with SGLang's own grammar objects and no engine."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_star.engine.bounds import Bounds
from sglang_star.errors import OrderRefused

pytestmark = pytest.mark.engine

real = pytest.importorskip("sglang_star.engine.real")
backend = pytest.importorskip("sglang.srt.constrained.xgrammar_backend")
xgrammar = pytest.importorskip("xgrammar")

VOCABULARY = ["<end>", *"abc ", "ab", "b ", "d"]
PROMPT = [1, 2, 3]
PAGES = 16
"""Positions that arrive with one step."""


class Counted(backend.XGrammarGrammar):  # type: ignore[misc]
    """SGLang's grammar; says how many tokens it was given."""

    given = 0

    def accept_token(self, token: int) -> None:
        self.given += 1
        super().accept_token(token)


def grammar() -> Any:
    info = xgrammar.TokenizerInfo(VOCABULARY, stop_token_ids=[0])
    compiled = xgrammar.GrammarCompiler(info).compile_regex("([a-c]{2} )*")
    matcher = xgrammar.GrammarMatcher(compiled)
    return Counted(matcher, len(VOCABULARY), compiled, None)


def text(words: int) -> list[int]:
    """Token ids of words that the grammar accepts, cut in various ways."""
    made = random.Random(words)
    return [token for _ in range(words) for token in made.choice(([1, 2, 4], [5, 4], [3, 6]))]


def guest(known: list[int], *, constrained: bool = True) -> tuple[Any, Any]:
    """An engine whose memory is never full, and a request that has just been seated there."""
    engine = object.__new__(real.SglangEngine)
    engine.pages = SimpleNamespace(
        reserve_row=lambda req: True, bind_to_root=lambda req: None, extend=lambda req, end: True
    )
    req = SimpleNamespace(
        rid="guest",
        origin_input_ids=array("q", PROMPT),
        output_ids=array("q"),
        sampling_params=SimpleNamespace(max_new_tokens=0),
        grammar=grammar() if constrained else None,
    )
    engine._bounds = Bounds(vocabulary=len(VOCABULARY), context=10_000)
    engine._outputs = {"guest": array("q", known)}
    assert engine.seat(req, 1000)
    assert not engine._outputs
    return engine, req


def mask(grammar: Any) -> list[int]:
    allowed = torch.zeros(1, 1, dtype=torch.int32)
    grammar.fill_vocab_mask(allowed, 0)
    return list(allowed[0].tolist())


def test_the_grammar_takes_in_no_more_per_step_than_arrives() -> None:
    output = text(200)
    known, meanwhile = output[:-7], output[-7:]
    engine, req = guest(known)
    written = len(PROMPT) + len(output) - 1
    for end in (*range(PAGES, written, PAGES), written):
        before = req.grammar.given
        assert engine.extend(req, end)
        assert req.grammar.given - before <= PAGES
    before = req.grammar.given
    engine.adopt(req, output)
    assert req.grammar.given - before <= len(meanwhile)
    assert req.grammar.given == len(output), "each token once"
    assert list(req.output_ids) == output
    at_once = grammar()
    for token in output:
        at_once.accept_token(token)
    assert mask(req.grammar) == mask(at_once)


def test_a_grammar_that_did_not_follow_takes_in_everything_at_the_end() -> None:
    output = text(5)
    engine, req = guest([])
    assert engine.extend(req, len(PROMPT) + len(output) - 1)
    engine.adopt(req, output)
    assert req.grammar.accepted_tokens == output


def test_what_the_grammar_does_not_accept_ends_the_move() -> None:
    engine, req = guest([*text(3), 7])
    with pytest.raises(OrderRefused, match="does not accept"):
        engine.extend(req, 100)
    engine, req = guest([])
    with pytest.raises(OrderRefused, match="does not accept"):
        engine.adopt(req, [7])


def test_another_output_than_the_move_began_with_ends_it() -> None:
    output = [1, 2, 4, 1, 2, 4]
    engine, req = guest(output)
    assert engine.extend(req, len(PROMPT) + 3)
    with pytest.raises(OrderRefused, match="not the one"):
        engine.adopt(req, [5, 4, 1, 2, 4])


def test_without_a_grammar_nothing_is_kept() -> None:
    engine, req = guest(text(2), constrained=False)
    assert engine.extend(req, 100)
    engine.adopt(req, [1, 2])
    assert list(req.output_ids) == [1, 2]
