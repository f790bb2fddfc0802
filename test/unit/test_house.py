"""The one-way dependencies between our packages, and what may not stand in any file.

Imports are read from the source, lazy ones included; only those for type checkers are left out.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "sglang_star": ROOT / "python",
    "sglang_star_router": ROOT / "router",
    "sgl_kernel_ext": ROOT / "sgl-kernel-ext",
    "sglang_star_bench": ROOT / "benchmark",
}
HEAVY = {"torch", "sglang", "transformers"}

# All that touches SGLang; the rest of the engine extension can be read and tested without it.
SGLANG_BORDER = {
    "sglang_star.endpoints",
    "sglang_star.engine",
    "sglang_star.hooks",
    "sglang_star.launch",
    "sglang_star.platform",
    "sglang_star.plugin",
    "sglang_star.predictor.collect",
    "sglang_star.predictor.runner",
    "sglang_star.scheduler",
    "sglang_star.status",
}


class _Imports(ast.NodeVisitor):
    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.names |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports are absolute here"
        assert node.module
        # `from package import module` imports the module, `from module import name` does not.
        self.names |= {node.module} | {
            f"{node.module}.{alias.name}" for alias in node.names if is_ours(node.module, alias)
        }


def is_ours(module: str, alias: ast.alias) -> bool:
    folder = FOLDERS.get(module.partition(".")[0])
    path = folder and folder.joinpath(*module.split("."), alias.name)
    return bool(path and (path.is_dir() or path.with_suffix(".py").is_file()))


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in (folder / package).rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports_of(path: Path) -> set[str]:
    visitor = _Imports()
    visitor.visit(ast.parse(path.read_text()))
    return visitor.names


IMPORTS = {name: imports_of(path) for name, path in modules()}


def within(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def of(*prefixes: str) -> list[tuple[str, str]]:
    """All (importer, imported) whose importer lies under one of ``prefixes``."""
    found = [
        (name, imported)
        for name, all_imported in IMPORTS.items()
        if within(name, *prefixes)
        for imported in all_imported
    ]
    assert found, prefixes
    return found


def ours(name: str) -> bool:
    return name.partition(".")[0] in FOLDERS


def test_the_reader_of_imports_sees_them(tmp_path: Path) -> None:
    source = tmp_path / "m.py"
    source.write_text(
        "import torch.nn\nfrom sglang_star import errors\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sglang\n"
        "def f():\n    import numpy\n"
    )
    assert imports_of(source) == {
        "torch.nn",
        "sglang_star",
        "sglang_star.errors",
        "typing",
        "numpy",
    }


def test_errors_and_protocol_stand_at_the_bottom() -> None:
    assert not [pair for pair in of("sglang_star.errors") if ours(pair[1])]
    assert {one for _, one in of("sglang_star.protocol") if ours(one)} == {"sglang_star.errors"}


def test_the_router_knows_the_wire_and_nothing_else_of_the_engine() -> None:
    for name, imported in of("sglang_star_router"):
        assert imported.partition(".")[0] not in HEAVY, f"{name} imports {imported}"
        if ours(imported) and imported != "sglang_star":
            allowed = (
                "sglang_star.protocol",
                "sglang_star.errors",
                "sglang_star.fleet_key",
                "sglang_star_router",
            )
            assert within(imported, *allowed), f"{name} imports {imported}"


def test_policies_are_numpy_and_nothing_else() -> None:
    for name, imported in of("sglang_star_router.policy"):
        outside = imported.partition(".")[0] not in sys.stdlib_module_names
        allowed = ("numpy", "sglang_star_router.policy", "sglang_star.errors")
        assert not outside or within(imported, *allowed), f"{name} imports {imported}"


def test_the_simulator_runs_the_routers_policies_and_no_engine() -> None:
    for name, imported in of("sglang_star_bench.simulator"):
        assert imported.partition(".")[0] not in HEAVY, f"{name} imports {imported}"
        if ours(imported):
            allowed = (
                "sglang_star_bench",
                "sglang_star_router.policy",
                "sglang_star.errors",
                "sglang_star.platform.profile",
            )
            assert within(imported, *allowed), f"{name} imports {imported}"


def test_the_engine_extension_depends_on_neither_router_nor_benchmarks() -> None:
    for name, imported in of("sglang_star", "sgl_kernel_ext"):
        assert not within(imported, "sglang_star_router", "sglang_star_bench"), name


def test_the_kernel_package_stands_alone() -> None:
    for name, imported in of("sgl_kernel_ext"):
        assert not within(imported, "sglang", "sglang_star"), f"{name} imports {imported}"


def test_only_the_border_touches_sglang() -> None:
    for name, imported in of("sglang_star"):
        if within(imported, "sglang"):
            assert within(name, *SGLANG_BORDER), f"{name} imports {imported}"


@pytest.mark.parametrize("part", sorted(SGLANG_BORDER))
def test_every_entry_of_the_border_is_real(part: str) -> None:
    assert any(within(name, part) for name in IMPORTS)


def test_the_protocol_of_moves_knows_engines_by_their_verbs() -> None:
    pure = ("sglang_star.migration", "sglang_star.orders", "sglang_star.engine.verbs")
    for name, imported in of(*pure):
        if within(name, "sglang_star.migration.transport"):
            continue  # carriers hold tensors
        assert imported.partition(".")[0] not in HEAVY, f"{name} imports {imported}"
        engine = within(imported, "sglang_star.engine")
        assert not engine or within(imported, "sglang_star.engine.verbs"), (name, imported)


def test_the_front_door_is_light() -> None:
    light = ("cli", "checks", "errors", "cluster", "process", "machine", "demo", "protocol")
    for name, imported in of(*(f"sglang_star.{part}" for part in light)):
        assert imported.partition(".")[0] not in HEAVY, f"{name} imports {imported}"
    for part in ("cli", "supervise", "process", "machine", "checks"):
        for name, imported in of(f"sglang_star.{part}"):
            known = imported.partition(".")[0] in sys.stdlib_module_names
            assert known or within(imported, "sglang_star"), f"{name} imports {imported}"


def test_nothing_is_installed_under_sglang() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    packages = [Path(path).name for path in build["targets"]["wheel"]["packages"]]
    assert sorted(packages) == sorted(FOLDERS)
    assert not [path for path in tracked() if "sglang" in path.parts[:-1]]


# --------------------------------------------------------------------------- every file

ABSOLUTE = re.compile(r"(?<![\w.$}])/(?:work|root|home|Users|opt)/\w")
HOST = re.compile(r"https?://([\w-]+(?:\.[\w-]+)+)")
ADDRESS = re.compile(r"(?<![\d.])\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?![\d.])")
KNOWN_HOSTS = {"www.w3.org", "www.apache.org", "127.0.0.1", "arxiv.org", "github.com"}
KNOWN_ADDRESSES = {"127.0.0.1", "0.0.0.0"}


def tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in listing.stdout.split("\0") if name]


def text_files() -> Iterator[tuple[Path, str]]:
    for path in tracked():
        try:
            yield path, (ROOT / path).read_text()
        except (UnicodeDecodeError, FileNotFoundError):
            continue


def test_no_file_names_a_machine() -> None:
    found = []
    for path, text in text_files():
        for number, line in enumerate(text.splitlines(), 1):
            hosts = {
                host
                for host in HOST.findall(line)
                if host not in KNOWN_HOSTS and not host.endswith((".invalid", ".example"))
            }
            addresses = set(ADDRESS.findall(line)) - KNOWN_ADDRESSES
            # Versions of NVIDIA's packages look like addresses.
            if path.name == "constraints.txt":
                addresses = set()
            if hosts or addresses or ABSOLUTE.search(line):
                found.append(f"{path}:{number}: {line.strip()[:90]}")
    assert not found, "\n".join(found)
