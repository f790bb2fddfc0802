"""One module's text as a tree: the names it binds, and the members of its classes."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Import:
    """A name that comes from elsewhere; ``name`` is empty for a module."""

    module: str
    name: str


Node = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.stmt
Binding = Node | Import


@dataclass(slots=True)
class Module:
    """One parsed module; ``names`` maps each top-level name to where it may come from."""

    tree: ast.Module
    names: dict[str, list[Binding]] = field(default_factory=dict)


def parsed(text: str, package: str) -> Module:
    """Read a module of ``package``, which relative imports start from.

    Raises:
        SyntaxError: this Python does not understand the text.
    """
    enabled = gc.isenabled()
    gc.disable()  # a tree is a hundred thousand new objects, none of them garbage
    try:
        tree = ast.parse(text)
    finally:
        if enabled:
            gc.enable()
    module = Module(tree)
    for statement in statements(tree.body):
        for bound, binding in _bindings(statement, package):
            module.names.setdefault(bound, []).append(binding)
    return module


FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements of a body, those inside branches, loops and handlers too."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.ClassDef | FUNCTIONS):
            continue
        for part in ("body", "orelse", "finalbody"):
            yield from statements(getattr(statement, part, []))
        for branch in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            yield from statements(branch.body)


def _bindings(statement: ast.stmt, package: str) -> Iterator[tuple[str, Binding]]:
    match statement:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            yield statement.name, statement
        case ast.Import():
            for alias in statement.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                yield alias.asname or whole, Import(whole, "")
        case ast.ImportFrom():
            parts = package.split(".")
            parts = parts[: len(parts) - statement.level + 1] if statement.level else []
            module = ".".join([*parts, *([statement.module] if statement.module else [])])
            for alias in statement.names:
                yield alias.asname or alias.name, Import(module, alias.name)
        case _:
            for target in _targets(statement):
                if isinstance(target, ast.Name):
                    yield target.id, statement


def _targets(statement: ast.stmt) -> Iterator[ast.expr]:
    match statement:
        case ast.Assign():
            pending = list(statement.targets)
        case ast.AnnAssign() | ast.AugAssign() | ast.For() | ast.AsyncFor():
            pending = [statement.target]
        case ast.With() | ast.AsyncWith():
            pending = [item.optional_vars for item in statement.items if item.optional_vars]
        case _:
            return
    while pending:
        target = pending.pop()
        if isinstance(target, ast.Tuple | ast.List):
            pending += target.elts
        else:
            yield target.value if isinstance(target, ast.Starred) else target


def members(node: ast.ClassDef) -> Iterator[tuple[str, tuple[Node, bool]]]:
    """Own members, definitions and fields after what methods assign, so that they win."""
    for method in statements(node.body):
        if not isinstance(method, FUNCTIONS) or not method.args.args:
            continue
        first = method.args.args[0].arg
        for statement in statements(method.body):
            for target in _targets(statement):
                if (
                    isinstance(target, ast.Attribute)
                    and isinstance(target.value, ast.Name)
                    and target.value.id == first
                ):
                    yield target.attr, (statement, True)
    for statement in statements(node.body):
        if isinstance(statement, ast.ClassDef | FUNCTIONS):
            yield statement.name, (statement, False)
        else:
            for target in _targets(statement):
                if isinstance(target, ast.Name):
                    yield target.id, (statement, False)
