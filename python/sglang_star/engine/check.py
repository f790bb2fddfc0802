"""Rows and hooks against a source: what is missing, and what is there but not as we know it."""

from __future__ import annotations

import ast
import enum
from collections.abc import Iterable
from dataclasses import dataclass

from sglang_star.engine import signature
from sglang_star.engine.contract.row import Attribute, Class, Field, Function, Module, Name, Row
from sglang_star.engine.hooked import Hooked
from sglang_star.engine.names import Found, Names
from sglang_star.engine.parsed import FUNCTIONS
from sglang_star.engine.signature import Parameter, Signature
from sglang_star.engine.source import Source


class Kind(enum.Enum):
    """What a finding says."""

    MISSING = "missing"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Finding:
    """A row that a source does not keep.

    Attributes:
        found: what it has instead; empty if there is nothing to say.
    """

    row: Row
    kind: Kind
    found: str

    def __str__(self) -> str:
        return f"{self.row.path} is {self.kind.value}{f': {self.found}' if self.found else ''}"


@dataclass(frozen=True, slots=True)
class Report:
    """What a check of one source found.

    Attributes:
        checked: rows looked at; skipped: rows on packages that the source does not hold.
    """

    findings: tuple[Finding, ...]
    checked: int
    skipped: int


def check(rows: Iterable[Row], source: Source) -> Report:
    """Hold every row against the source."""
    names = Names(source)
    findings: list[Finding] = []
    checked = skipped = 0
    for row in rows:
        if row.path.partition(".")[0] not in source.packages:
            skipped += 1
            continue
        checked += 1
        found = names.find(row.path)
        if isinstance(row, Attribute) and row.read_in and found is None:
            if not names.mentions(row.read_in, row.path.rpartition(".")[2]):
                findings.append(Finding(row, Kind.MISSING, f"{row.read_in} does not look at it"))
        elif found is None:
            findings.append(Finding(row, Kind.MISSING, _how_far(names, row.path)))
        elif found.readable and (said := _changed(names, row, found)):
            findings.append(Finding(row, Kind.CHANGED, said))
    return Report(tuple(findings), checked, skipped)


def _how_far(names: Names, path: str) -> str:
    """What else a path lacks than its last word."""
    words = path.split(".")
    for end in range(len(words) - 1, 1, -1):
        if names.find(".".join(words[:end])) is not None:
            return "" if end == len(words) - 1 else f"there is no {'.'.join(words[: end + 1])}"
    capital = next((i for i, word in enumerate(words) if word[:1].isupper()), len(words) - 1)
    return f"there is no module {'.'.join(words[: max(capital, 1)])}"


def _changed(names: Names, row: Row, found: Found) -> str:
    """How what was found differs from what the row says; empty if it does not."""
    node = found.node
    match row:
        case Module():
            return "" if node is None else f"it is {_kind(found)}"
        case Class():
            return "" if isinstance(node, ast.ClassDef) else f"it is {_kind(found)}"
        case Field():
            declared = isinstance(node, ast.AnnAssign) and not found.on_instance
            return "" if declared else f"it is {_kind(found)}"
        case Attribute():
            callable_ = isinstance(node, ast.ClassDef | FUNCTIONS) and not _is_property(node)
            if callable_ or node is None:
                return f"it is {_kind(found)}"
            return _another_value(node, row.value)
        case Name():
            return "it is a module" if node is None else _another_value(node, row.value)
        case Function() if isinstance(node, ast.ClassDef):
            return signature.refuses(row.takes, _constructor(names, found))
        case Function() | Hooked():
            if isinstance(row, Hooked) and row.replaces:
                return "" if isinstance(node, ast.ClassDef) else f"it is {_kind(found)}"
            if not isinstance(node, FUNCTIONS) or _is_property(node):
                return f"it is {_kind(found)}"
            takes = signature.of(node)
            if isinstance(row, Hooked):
                return signature.misfits(row.signature, takes)
            if isinstance(node, ast.AsyncFunctionDef) != row.awaited:
                return "it has to be awaited" if not row.awaited else "it is no coroutine"
            is_bound = bool(found.owner) and not _decorated(node, "staticmethod")
            takes = takes.bound() if is_bound else takes
            said = signature.refuses(row.takes, takes)
            return f"{said}; it takes {takes}" if said else ""
    raise AssertionError(row)


def _another_value(node: ast.AST, value: str) -> str:
    """What a definition says instead of ``value``; empty if that does not matter."""
    given = getattr(node, "value", None)
    if not value or (isinstance(given, ast.Constant) and given.value == value):
        return ""
    return f"its value is {ast.unparse(given) if given else 'not given'}, not {value!r}"


def _constructor(names: Names, found: Found) -> Signature:
    """What a class takes: its ``__init__``, or the fields of a struct or data class."""
    init = names.member(found, "__init__")
    if init is not None and isinstance(init.node, FUNCTIONS):
        return signature.of(init.node).bound()
    fields: dict[str, Parameter] = {}
    _add_fields(names, found, fields)
    return Signature((), tuple(fields.values()))


def _add_fields(names: Names, found: Found, fields: dict[str, Parameter]) -> None:
    for base in reversed(list(names.bases(found))):
        _add_fields(names, base, fields)
    assert isinstance(found.node, ast.ClassDef)
    for statement in found.node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            fields[name] = Parameter(name, statement.value is None)


def _kind(found: Found) -> str:
    """What a definition is, for a person."""
    match found.node:
        case None:
            return "a module"
        case ast.ClassDef():
            return "a class"
        case ast.FunctionDef() | ast.AsyncFunctionDef() as node:
            return "a property" if _is_property(node) else f"a function {signature.of(node)}"
        case ast.AnnAssign() if not found.on_instance and found.owner:
            return "a field"
    return "an attribute of instances" if found.on_instance else "a value"


def _is_property(node: ast.AST | None) -> bool:
    return isinstance(node, FUNCTIONS) and _decorated(node, "property", "setter", "cached_property")


def _decorated(node: ast.FunctionDef | ast.AsyncFunctionDef, *names: str) -> bool:
    words = {ast.unparse(one).rpartition(".")[2] for one in node.decorator_list}
    return not words.isdisjoint(names)
