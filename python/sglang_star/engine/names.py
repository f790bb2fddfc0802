"""What a dotted path means in a source, found by reading: modules, classes, members, re-exports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sglang_star.engine.parsed import FUNCTIONS, Import, Module, Node, members, parsed
from sglang_star.engine.source import Source
from sglang_star.errors import ConfigError

REACH: Final = 12
"""Re-exports and base classes are followed this far."""
ALIASES: Final = {"nixl._api": ("nixl_cu13._api", "nixl_cu12._api")}
"""Modules that are put under another name while they are imported."""
ASSEMBLED: Final = {("sglang.srt.server_args", "ServerArgs"): "_INPUT_NAMESPACES"}
"""Classes that get the fields of other classes while they are imported; those stand in a list."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a path leads to: a statement of ``module``, and the class it was found in, if any.

    Attributes:
        node: the definition; None for a module as a whole, or where the source cannot be read.
        readable: False where a package outside the source, or compiled, has it.
        on_instance: it is assigned to instances by a method.
    """

    module: str
    node: Node | None = None
    owner: str = ""
    readable: bool = True
    on_instance: bool = False


class Names:
    """Looks paths up in one source; every module is parsed once, when it is first needed."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._modules: dict[str, Module | None] = {}
        self._members: dict[int, dict[str, tuple[Node, bool]]] = {}

    def module(self, name: str) -> Module | None:
        """A module of the source; None if it has none of that name."""
        if name not in self._modules:
            self._modules[name] = self._parsed(name)
        return self._modules[name]

    def find(self, path: str) -> Found | None:
        """What a path leads to; None if it leads nowhere."""
        words = path.split(".")
        for end in range(len(words), 0, -1):
            for name in self._called(".".join(words[:end])):
                if self.module(name) is not None:
                    return self._within(Found(name), words[end:])
        return None

    def member(self, found: Found, name: str) -> Found | None:
        """A member of a class, its own or inherited; a declared one before an assigned one."""
        assigned: Found | None = None
        for one in self._with_bases(found, REACH):
            assert isinstance(one.node, ast.ClassDef)
            own = self._own(one.node).get(name)
            if own is not None:
                node, on_instance = own
                member = Found(one.module, node, one.node.name, on_instance=on_instance)
                if not on_instance:
                    return member
                assigned = assigned or member
        return assigned

    def bases(self, found: Found) -> Iterator[Found]:
        """Base classes that the source has."""
        assert isinstance(found.node, ast.ClassDef)
        for base in (*found.node.bases, *self._assembled_from(found)):
            words = ast.unparse(base).partition("[")[0].split(".")
            resolved = self._within(Found(found.module), words)
            if resolved is not None and isinstance(resolved.node, ast.ClassDef):
                yield resolved

    def _with_bases(self, found: Found, reach: int) -> Iterator[Found]:
        yield found
        for base in self.bases(found) if reach else ():
            yield from self._with_bases(base, reach - 1)

    def _assembled_from(self, found: Found) -> list[ast.expr]:
        assert isinstance(found.node, ast.ClassDef)
        listing = ASSEMBLED.get((found.module, found.node.name), "")
        parsed = self.module(found.module) if listing else None
        for binding in parsed.names.get(listing, ()) if parsed else ():
            if isinstance(binding, ast.Assign) and isinstance(binding.value, ast.List):
                return binding.value.elts
        return []

    def mentions(self, module: str, attribute: str) -> bool:
        """Whether a module looks at an attribute of that name, of whatever object."""
        parsed = self.module(module)
        return parsed is not None and any(
            (isinstance(node, ast.Attribute) and node.attr == attribute)
            or (isinstance(node, ast.Constant) and node.value == attribute)
            for node in ast.walk(parsed.tree)
        )

    # ------------------------------------------------------------------ one step of a path

    def _within(self, start: Found, words: list[str]) -> Found | None:
        found: Found | None = start
        for word in words:
            if found is None or not found.readable:
                return found
            if found.node is None:
                found = self._global(found.module, word)
            elif isinstance(found.node, ast.ClassDef):
                found = self.member(found, word)
            else:
                return None
        return found

    def _global(self, module: str, name: str, reach: int = REACH) -> Found | None:
        parsed = self.module(module)
        bindings = parsed.names.get(name, []) if parsed else []
        definite = [b for b in bindings if isinstance(b, ast.ClassDef | FUNCTIONS)]
        if definite:
            return Found(module, definite[0])
        for binding in bindings:
            if isinstance(binding, Import):
                found = self._imported(binding, reach - 1) if reach else None
                if found is not None:
                    return found
        values = [b for b in bindings if not isinstance(b, Import)]
        if values:
            return Found(module, values[0])
        return Found(f"{module}.{name}") if self.module(f"{module}.{name}") else None

    def _imported(self, binding: Import, reach: int) -> Found | None:
        if binding.module.partition(".")[0] not in self._source.packages:
            return Found(binding.module, readable=False)
        if not binding.name:
            return Found(binding.module) if self.module(binding.module) else None
        whole = f"{binding.module}.{binding.name}"
        if self.module(binding.module) is None:
            return Found(binding.module, readable=False)
        found = self._global(binding.module, binding.name, reach)
        # A submodule without text is compiled.
        return found or (Found(whole, readable=False) if binding.name.startswith("_") else None)

    def _called(self, name: str) -> Iterator[str]:
        for alias, others in ALIASES.items():
            if name == alias or name.startswith(alias + "."):
                yield from (other + name[len(alias) :] for other in others)
        yield name

    # ------------------------------------------------------------------ reading

    def _parsed(self, name: str) -> Module | None:
        text = self._source.text(name)
        if text is None:
            return None
        try:
            return parsed(text[0], name if text[1] else name.rpartition(".")[0])
        except SyntaxError as error:
            raise ConfigError(
                f"this Python cannot read {name} of {self._source.label}: {error}",
                hint="use the Python that this SGLang is for",
            ) from error

    def _own(self, node: ast.ClassDef) -> dict[str, tuple[Node, bool]]:
        if id(node) not in self._members:
            self._members[id(node)] = dict(members(node))
        return self._members[id(node)]
