"""The command tree: dispatch, help without heavy imports, errors with a remedy, Ctrl-C."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import types
from collections.abc import Iterator

import pytest

from sglang_star import checks, cli
from sglang_star.errors import SetupError


@pytest.fixture(autouse=True)
def _keep_the_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def leaves(node: cli.Command | cli.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(node, cli.Command):
        yield words
        return
    for word, member in node.members.items():
        yield from leaves(member, (*words, word))


def test_every_documented_command_exists() -> None:
    bench = [
        "serving",
        "policy",
        "migration",
        "start",
        "overhead",
        "attention",
        "kv-copy",
        "predictor",
        "reasoning",
        "gemma",
        "calibration",
        "router",
        "chaos",
    ]
    predictor = ("collect", "train", "eval")
    assert set(leaves(cli.STAR)) == {
        *((word,) for word in ("demo", "cluster", "router", "simulate", "compat", "keys", "test")),
        *(("bench", word) for word in bench),
        *(("predictor", word) for word in predictor),
    }


def test_a_command_gets_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sglang_star_bench.kv_copy")
    seen: list[list[str]] = []
    module.main = lambda argv: seen.append([*argv, sys.argv[0]])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    assert cli.main(["bench", "kv-copy", "--json", "x"]) == 0
    assert seen == [["--json", "x", "star bench kv-copy"]]


@pytest.mark.parametrize("words", [["--help"], [], ["bench"], ["predictor", "-h"]])
def test_help_names_every_member(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    node = cli.STAR.members.get(words[0], cli.STAR) if words else cli.STAR
    assert isinstance(node, cli.Group)
    assert all(f"  {word} " in text for word in node.members)


def test_help_needs_only_the_standard_library() -> None:
    code = (
        "import sys; from sglang_star import cli; cli.main(['--help']);"
        "heavy = {'torch', 'sglang', 'numpy', 'transformers', 'aiohttp', 'msgspec'};"
        "sys.exit(str(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["migrate"], ["bench", "everything"]])
def test_unknown_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert repr(words[-1]) in capsys.readouterr().err


def _raising(error: BaseException) -> types.ModuleType:
    module = types.ModuleType("sglang_star_bench.router")

    def main(argv: list[str]) -> int:
        raise error

    module.main = main  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (SetupError("no room", hint="make some"), 2, "star: no room\n      make some\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_status(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "sglang_star_bench.router", _raising(error))
    assert cli.main(["bench", "router"]) == status
    assert capsys.readouterr().err == said


def test_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        cli.STAR.members, "simulate", cli.Command("", "a_package_nobody_has.simulate")
    )
    assert cli.main(["simulate"]) == 2
    assert "a_package_nobody_has" in capsys.readouterr().err


def test_checks_run_all_and_report_failure(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = ("timeit", "-n1", "-r1", "raise SystemExit(3)")
    monkeypatch.setattr(checks, "CHECKS", {"bad": bad, "all tests": ("pytest", "--markers")})
    assert checks.main([]) == 1
    out, err = capfd.readouterr()
    assert out.index("===== bad =====") < out.index("===== all tests =====")
    assert "@pytest.mark.e2e" in out
    assert err.endswith("star test: failed: bad\n")


def test_checks_pass_arguments_to_one_pytest(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    style = ("timeit", "-n1", "-r1", "pass")
    monkeypatch.setattr(checks, "CHECKS", {"style": style, "all tests": ("pytest", "--no-such")})
    assert checks.main(["--markers"]) == 0
    out, _ = capfd.readouterr()
    assert out.index("===== style =====") < out.index("===== pytest =====")
    assert "all tests" not in out
    assert "@pytest.mark.e2e" in out


def commands(node: cli.Group) -> Iterator[cli.Command]:
    for member in node.members.values():
        if isinstance(member, cli.Group):
            yield from commands(member)
        else:
            yield member


@pytest.mark.parametrize("command", list(commands(cli.STAR)), ids=lambda command: command.module)
def test_every_command_exists(command: cli.Command) -> None:
    assert importlib.util.find_spec(command.module) is not None
