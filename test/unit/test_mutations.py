"""The list of mutations does not rot: what each replaces stands in its module, and only once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from simulation.mutations import MUTATIONS, PACKAGE, AnchorLost, Mutation, mutate


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_still_finds_its_text(mutation: Mutation, tmp_path: Path) -> None:
    modules = {mutation.module, *(module for module, _, _ in mutation.also)}
    for module in modules:
        (tmp_path / module).parent.mkdir(exist_ok=True)
        (tmp_path / module).write_text((PACKAGE / module).read_text())
    mutate(mutation, tmp_path)
    for module in modules:
        ast.parse((tmp_path / module).read_text())


def test_a_text_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(AnchorLost, match="stands 0 times"):
        mutate(Mutation("lost", "nowhere.py", "x", "y", "it is gone"), tmp_path)


def test_names_are_unique() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
