"""What the documents say against the code: flags, metrics, modules, commands, links."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sglang_star import __version__, config
from sglang_star_router.app import Router
from sglang_star_router.command_line import build_parser, parse_args
from sglang_star_router.policy.params import ReactiveParams, StarParams, StarPointParams

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmark/README.md"]
FLAGS = (ROOT / "docs/flags.md").read_text()


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --------------------------------------------------------------------------- flags


def section(text: str, title: str) -> str:
    """The text under ``## title``."""
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def table(text: str, header: str) -> dict[str, str]:
    """First and second cell of each row of the table whose first heading contains ``header``."""
    rows: dict[str, str] = {}
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif inside and not set(line) <= set("|- "):
            name = cells[0].strip("`").split()[0]
            assert name not in rows, f"{name} stands there twice"
            rows[name] = cells[1]
        elif header in cells[0]:
            inside = True
    assert rows, header
    return rows


def shown(value: Any) -> str:
    """A default as the tables write it."""
    if value is None or value in ("", []):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Every flag of a parser with its default."""
    return {
        action.option_strings[-1]: "off" if action.nargs == 0 else shown(action.default)
        for action in parser._actions
        if action.option_strings and action.dest != "help"
    }


def engine_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    return parser


def test_every_engine_flag_has_its_line() -> None:
    assert table(section(FLAGS, "Engine"), "flag") == flags(engine_parser())


def test_every_router_flag_has_its_line() -> None:
    assert table(section(FLAGS, "Router"), "flag") == flags(build_parser())


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ("parameter of `star`,", StarParams),
        ("parameter of `star-point`", StarPointParams),
        ("parameter of `reactive`", ReactiveParams),
    ],
)
def test_every_parameter_has_its_line(header: str, kind: type[Any]) -> None:
    fields = {field.name: shown(field.default) for field in dataclasses.fields(kind)}
    assert table(FLAGS, header) == fields


def test_every_policy_is_explained() -> None:
    actions = {action.dest: action for action in build_parser()._actions}
    text = section(FLAGS, "Policies")
    for name in actions["rescheduler"].choices or ():
        assert f"| `{name}` |" in text
    for name in re.findall(r"[a-z]+(?:-[a-z]+)+|star", str(actions["policy"].help)):
        assert f"`{name}`" in text


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_no_page_speaks_of_a_star_flag_that_is_gone(page: Path) -> None:
    named = set(re.findall(r"--star-[a-z][a-z-]*[a-z]", page.read_text()))
    assert named <= set(flags(engine_parser()))


# --------------------------------------------------------------------------- commands


def commands(page: Path) -> Iterator[list[str]]:
    """Every command line in the page's fenced blocks, as words."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                yield shlex.split(line, comments=True)
            except ValueError:  # printed text, not a command
                continue


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_router_and_engine_commands_parse(page: Path) -> None:
    for words in commands(page):
        if words[:2] == ["star", "router"]:
            parse_args(words[2:])
        if words[:3] == ["python", "-m", "sglang.launch_server"]:
            _, rest = engine_parser().parse_known_args(words[3:])
            assert not [word for word in rest if word.startswith("--star")]


def test_router_commands_were_seen() -> None:
    seen = [words for page in PAGES for words in commands(page) if words[:2] == ["star", "router"]]
    assert len(seen) >= 3


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_the_wheel_is_called_what_it_is_called(page: Path) -> None:
    named = set(re.findall(r"sglang_star-(\d[\w.]*)-py3", page.read_text()))
    assert named <= {__version__}


# --------------------------------------------------------------------------- metrics, modules


def test_every_metric_has_its_line() -> None:
    router = Router(parse_args(["--worker-urls", "http://127.0.0.1:1", "--rescheduler", "star"]))
    families = list(text_string_to_metric_families(router.metrics.text().decode()))
    real = {
        family.name.removeprefix("star_router_") + ("_total" if family.type == "counter" else "")
        for family in families
        if not family.name.endswith("_created")
    }
    text = section((ROOT / "docs/metrics.md").read_text(), "In the router's `/metrics`")
    lines = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    documented = [name for cell in lines for name in re.findall(r"`(\w+)(?:\{[\w,]+\})?`", cell)]
    assert sorted(documented) == sorted(real)


def test_metrics_named_elsewhere_exist() -> None:
    metrics = (ROOT / "docs/metrics.md").read_text()
    watched = section((ROOT / "docs/operating.md").read_text(), "What to watch")
    cells = [line.split("|")[1] for line in watched.splitlines() if line.startswith("| `")]
    for name in re.findall(r"`(\w+)(?:\{\w+\})?`", " ".join(cells)):
        assert re.search(rf"`{name}\b", metrics), name


def test_every_module_of_the_engine_extension_has_its_line() -> None:
    package = ROOT / "python/sglang_star"
    real = {path.stem for path in package.iterdir() if path.suffix == ".py"} - {"__init__"}
    real |= {path.name for path in package.iterdir() if path.is_dir()} - {"__pycache__"}
    text = (ROOT / "docs/structures.md").read_text()
    within = text.partition("| `python/sglang_star/`")[2].partition("| `router/")[0]
    rows = [line.split("|")[1] for line in within.splitlines()[1:]]
    named = {name.strip(" /`") for row in rows for name in row.split(",")}
    assert named == real


# --------------------------------------------------------------------------- links

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: dict[str, int] = {}
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    made = set()
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        made.add(f"{slug}-{count}" if count else slug)
    return made


def test_anchors_are_made_as_github_makes_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `code`, 1,047 & it's\n```\n# not one\n```\n## Two words\n## Two words\n")
    assert anchors(page) == {"a-code-1047--its", "two-words", "two-words-1"}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_link_leads_somewhere(page: Path) -> None:
    dead = []
    for target in LINK.findall(page.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            dead.append(target)
    assert not dead


# --------------------------------------------------------------------------- names in the code


def names_of(path: Path) -> set[str]:
    """Functions, classes and methods of a module, dotted."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found.add(node.name)
            found |= {
                f"{node.name}.{part.name}"
                for part in node.body
                if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


def test_the_way_of_a_request_leads_through_code_that_is_there() -> None:
    text = (ROOT / "docs/a-request.md").read_text()
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert len(named) > 40
    for file, name in named:
        places = [ROOT / "router/sglang_star_router" / file, ROOT / "python/sglang_star" / file]
        known = [names_of(path) for path in places if path.exists()]
        assert any(name in names for names in known), f"{file}:{name}"
