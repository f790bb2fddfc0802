"""The words a contract is written in: what we need of one path in SGLang, why, and where."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that has to be there.

    Attributes:
        path: dotted, from the package on.
        why: what it is to us.
        users: modules of ``sglang_star`` that rely on it, separated by spaces.
    """

    path: str
    why: str
    users: str


@dataclass(frozen=True, slots=True)
class Module(Row):
    """A module that is imported or run by its name."""


@dataclass(frozen=True, slots=True)
class Name(Row):
    """A name in a module whose value we use: an object, a constant, a lazy import.

    Attributes:
        value: the text it must be, where that matters.
    """

    value: str = ""


@dataclass(frozen=True, slots=True)
class Class(Row):
    """A class that we subclass, compare with or look into."""


@dataclass(frozen=True, slots=True)
class Function(Row):
    """A function, method or class that we call.

    Attributes:
        takes: what we pass, written as in a definition: names by position, ``*``, names by name.
        awaited: it is a coroutine.
    """

    takes: str = ""
    awaited: bool = False


@dataclass(frozen=True, slots=True)
class Attribute(Row):
    """What instances or a class have under that name: assigned, a property or a constant.

    Attributes:
        value: the text it must be, where that matters.
        read_in: the module that looks at it, if no class declares it and others assign it.
    """

    value: str = ""
    read_in: str = ""


@dataclass(frozen=True, slots=True)
class Field(Row):
    """A declared field of a struct or data class; others may be added beside it."""
