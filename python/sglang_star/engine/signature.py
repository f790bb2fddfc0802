"""What a function takes, and whether a call or a hook of ours fits it."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter; ``required`` if a call must give it."""

    name: str
    required: bool


@dataclass(frozen=True, slots=True)
class Signature:
    """Parameters as a caller sees them.

    Attributes:
        positional: in order; keyword: those that can only be named.
        more, any_keyword: whether ``*args`` and ``**kwargs`` are there.
    """

    positional: tuple[Parameter, ...] = ()
    keyword: tuple[Parameter, ...] = ()
    more: bool = False
    any_keyword: bool = False

    def bound(self) -> Signature:
        """Without the first parameter: ``self`` or ``cls``."""
        return replace(self, positional=self.positional[1:])

    def __str__(self) -> str:
        def shown(parameter: Parameter) -> str:
            return parameter.name + ("" if parameter.required else "=")

        words = [shown(one) for one in self.positional]
        words += ["*args"] if self.more else ["*"] if self.keyword else []
        words += [shown(one) for one in self.keyword]
        return f"({', '.join(words + ['**kwargs'] * self.any_keyword)})"


def of(function: Function) -> Signature:
    """The signature of a definition, ``self`` included."""
    given = function.args
    ordered = [*given.posonlyargs, *given.args]
    required = len(ordered) - len(given.defaults)
    return Signature(
        tuple(Parameter(arg.arg, i < required) for i, arg in enumerate(ordered)),
        tuple(
            Parameter(arg.arg, default is None)
            for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
        ),
        given.vararg is not None,
        given.kwarg is not None,
    )


def refuses(takes: str, target: Signature) -> str:
    """Why a call of ours does not fit; empty if it does.

    Args:
        takes: names of what we pass, as in a definition: by position, then ``*``, then by name.
        target: what is called, without ``self``.
    """
    before, _, after = takes.partition("*")
    passed = [word.strip() for word in before.split(",") if word.strip()]
    named = {word.strip() for word in after.split(",") if word.strip()}
    known = {one.name for one in (*target.positional, *target.keyword)}
    for i, name in enumerate(passed):
        found = target.positional[i].name if i < len(target.positional) else ""
        if found != name and not (not found and target.more):
            return f"argument {i + 1} is {found or 'too many'}, not {name}"
    for name in sorted(named):
        if name not in known and not target.any_keyword:
            return f"there is no parameter {name}"
    for one in (*target.positional[len(passed) :], *target.keyword):
        if one.required and one.name not in named:
            return f"{one.name} must be given"
    return ""


def misfits(ours: Signature, target: Signature) -> str:
    """Why a hook that stands in for ``target`` does not take all its calls; empty if it does.

    Both are compared from their first parameter on, which is ``self`` in a method and may have
    any name. An underscore in front of a name of ours says that we do not look at it.
    """
    for i, mine in enumerate(ours.positional):
        if i >= len(target.positional):
            return f"there is no parameter {mine.name}"
        theirs = target.positional[i]
        if i and mine.name.lstrip("_") != theirs.name.lstrip("_"):
            return f"parameter {i} is {theirs.name}, not {mine.name.lstrip('_')}"
        if mine.required and not theirs.required:
            return f"{theirs.name} may be left out"
    names = {one.name for one in ours.keyword}
    for one in () if ours.more else target.positional[len(ours.positional) :]:
        # What may be left out is given by name, if at all.
        if one.required or not (ours.any_keyword or one.name in names):
            return f"it also takes {one.name}"
    known = {one.name for one in (*target.positional, *target.keyword)}
    for one in ours.keyword:
        if one.name not in known and not target.any_keyword:
            return f"there is no parameter {one.name}"
    for one in target.keyword:
        if one.name not in names and not ours.any_keyword:
            return f"it also takes {one.name}"
    return ""
