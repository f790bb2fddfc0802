"""Where the text of SGLang's modules comes from: folders, or a wheel that is not installed."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from pathlib import Path
from typing import Protocol

from sglang_star.errors import ConfigError

PACKAGES = ("sglang", "nixl", "nixl_cu13", "nixl_cu12")
"""Packages that the contract speaks of; NIXL's own is a front of one of the two after it."""


class Source(Protocol):
    """Module texts by dotted name.

    Attributes:
        label: what a report calls it.
        packages: the top-level packages it holds.
    """

    label: str
    packages: frozenset[str]

    def text(self, module: str) -> tuple[str, bool] | None:
        """Text of a module and whether it is a package; None if it has no such module."""


def release_of(source: Source) -> str:
    """The release of SGLang that a source holds, as it says itself; empty if it does not."""
    text = source.text("sglang._version")
    said = re.search(
        r"^__version__ = .*?['\"]([\w.+]+)['\"]", text[0] if text else "", re.MULTILINE
    )
    return said[1] if said else ""


class Folders:
    """Packages that lie unpacked, such as installed ones.

    Attributes:
        read: the files whose text was asked for.
    """

    def __init__(self, label: str, packages: dict[str, Path]) -> None:
        self.label = label
        self.packages = frozenset(packages)
        self.read: set[Path] = set()
        self._packages = packages

    def text(self, module: str) -> tuple[str, bool] | None:
        """Text of a module and whether it is a package; None if there is no such module."""
        path = self._path(module)
        if path is None:
            return None
        self.read.add(path)
        return path.read_text(encoding="utf-8"), path.name == "__init__.py"

    def _path(self, module: str) -> Path | None:
        package, *rest = module.split(".")
        if package not in self._packages:
            return None
        base = self._packages[package].joinpath(*rest)
        found = [base / "__init__.py", *([base.with_name(base.name + ".py")] if rest else [])]
        return next((path for path in found if path.is_file()), None)


class Wheel:
    """A wheel's file, read without unpacking it."""

    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{path} is no wheel: {error}") from error
        self._names = frozenset(self._zip.namelist())
        self.label = "-".join(path.name.split("-")[:2])
        self.packages = frozenset(p for p in PACKAGES if f"{p}/__init__.py" in self._names)

    def text(self, module: str) -> tuple[str, bool] | None:
        """Text of a module and whether it is a package; None if there is no such module."""
        base = module.replace(".", "/")
        for name, package in ((base + "/__init__.py", True), (base + ".py", False)):
            if name in self._names:
                return self._zip.read(name).decode("utf-8"), package
        return None


def installed() -> Folders:
    """What this Python would import, found without importing it."""
    packages: dict[str, Path] = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            packages[name] = Path(spec.origin).parent
    return Folders("installed", packages)


def opened(path: Path) -> Source:
    """A wheel, a folder with packages in it, or a checkout of SGLang.

    Raises:
        ConfigError: it is none of them.
    """
    if path.is_file():
        source: Source = Wheel(path)
    else:
        bases = (path, path / "python")
        found = {p: b / p for b in bases for p in PACKAGES if (b / p / "__init__.py").is_file()}
        source = Folders(str(path), found)
    if "sglang" not in source.packages:
        raise ConfigError(
            f"{path} holds no package sglang",
            hint="give a wheel, a folder that holds sglang/, or a checkout of SGLang",
        )
    return source
