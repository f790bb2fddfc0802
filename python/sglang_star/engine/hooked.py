"""The hook table as rows: each of our hook functions has to take what its target takes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sglang_star
from sglang_star.engine import signature
from sglang_star.engine.contract.row import Row
from sglang_star.engine.signature import Signature
from sglang_star.engine.source import Folders
from sglang_star.hooks import HOOKS, Hook

NOTHING = Signature()


@dataclass(frozen=True, slots=True)
class Hooked(Row):
    """A row of ``hooks.HOOKS``.

    Attributes:
        signature: of our function, as if it were called in place of the target.
        replaces: a class of ours takes the target's place.
    """

    signature: Signature = NOTHING
    replaces: bool = False


def rows(hooks: tuple[Hook, ...] = HOOKS) -> Iterator[Hooked]:
    """Every hook; our functions are read, not imported, since some import SGLang."""
    package = "sglang_star"
    source = Folders(package, {package: Path(sglang_star.__file__).parent})
    for hook in hooks:
        module, _, name = hook.function.partition(":")
        text = source.text(module)
        assert text is not None, module
        node = next(
            one
            for one in ast.parse(text[0]).body
            if isinstance(one, ast.ClassDef | ast.FunctionDef) and one.name == name
        )
        user = module.removeprefix(package + ".")
        if isinstance(node, ast.ClassDef):
            yield Hooked(hook.target, hook.why, user, replaces=True)
            continue
        takes = signature.of(node)
        if hook.kind != "before":  # the result, or the function it goes around, comes first
            takes = takes.bound()
        yield Hooked(hook.target, hook.why, user, signature=takes)
