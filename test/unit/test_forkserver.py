"""Engines as forks: here of a server that imports nothing; the engines' tests use the real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_star import forkserver
from sglang_star.errors import SetupError
from sglang_star.forkserver import MODULE, ForkServer, forkable
from sglang_star.process import ServerProcess

# Stands in for SGLang's launcher: a process with a child in its group.
ENGINE = textwrap.dedent("""
    import json, os, subprocess, sys, time
    path, mode = sys.argv[1], sys.argv[2]
    print("mode", mode, os.environ["COLOUR"], flush=True)
    if mode == "fail":
        raise SystemExit("STAR: no such head")
    if mode == "raise":
        raise ValueError("broken")
    child = subprocess.Popen(["sleep", "600"])
    with open(path + ".new", "w") as file:
        json.dump([os.getpid(), child.pid], file)
    os.rename(path + ".new", path)
    if mode == "brief":
        raise SystemExit(7)
    time.sleep(600)
""")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# The server as it is, but with nothing to import and a launcher of ours to run.
SERVER = textwrap.dedent("""
    import sys
    from sglang_star.platform import preloaded
    preloaded.IMPORTED = ("json",)
    preloaded._install_hooks = lambda star: print("hooks", star, flush=True)
    preloaded.MODULE = "stand_in"
    raise SystemExit(preloaded.main())
""")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    (tmp_path / "stand_in.py").write_text(ENGINE)
    (tmp_path / "server.py").write_text(SERVER)
    monkeypatch.setattr(forkserver, "SERVER", "server")
    monkeypatch.setattr(forkserver, "has_gpu", lambda: False)
    environment = {"PYTHONPATH": str(tmp_path), "COLOUR": "red"}
    with ForkServer(tmp_path / "imports.log", environment) as made:
        yield made


def engine(server: ForkServer, folder: Path, mode: str) -> ServerProcess:
    command = (sys.executable, "-m", MODULE, str(folder / "pids"), mode, "--star")
    assert server.suits(command)
    return ServerProcess("engine", command, url="", log=folder / "engine.log", forks=server)


def members(folder: Path) -> list[int]:
    eventually((folder / "pids").exists, "the engine did not start")
    found: list[int] = json.loads((folder / "pids").read_text())
    return found


def test_an_engine_lives_past_its_server_and_ends_with_its_children(
    server: ForkServer, tmp_path: Path
) -> None:
    process = engine(server, tmp_path, "serve")
    pids = members(tmp_path)
    assert server.imported_after() is not None
    assert server.imported_after() is None, "told once"
    server.stop()
    assert (tmp_path / "imports.log").read_text() == "hooks True\n"
    assert (tmp_path / "engine.log").read_text() == "mode serve red\n"
    assert all(map(running, pids))
    assert process.alive
    process.check()
    process.stop()
    assert not any(map(running, pids))
    process.check()  # being stopped is not a failure


@pytest.mark.parametrize(
    ("mode", "status", "said"),
    [("brief", 7, ""), ("fail", 1, "STAR: no such head"), ("raise", 1, "ValueError: broken")],
)
def test_the_end_of_an_engine_is_told_with_its_reason(
    server: ForkServer, tmp_path: Path, mode: str, status: int, said: str
) -> None:
    process = engine(server, tmp_path, mode)
    eventually(lambda: not process.alive, "it did not end")
    with pytest.raises(SetupError, match=f"ended with status {status};") as caught:
        process.check()
    assert said in caught.value.message
    if mode == "brief":
        assert not any(map(running, members(tmp_path))), "its child outlived it"


def test_a_killed_engine_is_reported_as_the_shell_does(server: ForkServer, tmp_path: Path) -> None:
    process = engine(server, tmp_path, "serve")
    os.kill(members(tmp_path)[0], signal.SIGKILL)
    eventually(lambda: not process.alive, "its death went unnoticed")
    with pytest.raises(SetupError, match="status 137"):
        process.check()


def test_a_server_that_cannot_import_fails_its_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forkserver, "SERVER", "no_such_module")
    with ForkServer(tmp_path / "imports.log", {}) as server:
        process = engine(server, tmp_path, "serve")
        eventually(lambda: not process.alive, "nobody noticed")
    assert "no_such_module" in (tmp_path / "imports.log").read_text()


# The owner dies of SIGKILL, so that none of its code can clean up.
OWNER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from sglang_star import forkserver
    from sglang_star.process import ServerProcess
    forkserver.SERVER, forkserver.has_gpu = "server", lambda: False
    folder = Path(sys.argv[1])
    server = forkserver.ForkServer(
        folder / "imports.log", {"PYTHONPATH": str(folder), "COLOUR": "red"}
    )
    command = (sys.executable, "-m", forkserver.MODULE, str(folder / "pids"), "serve", "--star")
    process = ServerProcess("e", command, url="", log=folder / "log", forks=server)
    time.sleep(600)
""")


def test_nothing_survives_a_killed_owner(tmp_path: Path) -> None:
    (tmp_path / "stand_in.py").write_text(ENGINE)
    (tmp_path / "server.py").write_text(SERVER)
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)])
    pids = members(tmp_path)
    children = Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()
    assert children, "the fork server is the owner's child"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    everyone = [*pids, *map(int, children)]
    eventually(lambda: not any(map(running, everyone)), "a process outlived its owner")


def test_only_engines_of_its_kind_and_never_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_star = (sys.executable, "-m", MODULE, "--star")
    monkeypatch.setattr(forkserver, "has_gpu", lambda: False)
    monkeypatch.setattr(forkserver, "SERVER", "no_such_module")
    assert forkable(with_star)
    assert not forkable((sys.executable, "-m", "sglang_star_router.launch_router"))
    assert not forkable((sys.executable, "-c", "pass"))
    with ForkServer(tmp_path / "log", {}, star=False) as server:
        assert not server.suits(with_star)
        assert server.suits(with_star[:-1])
    monkeypatch.setattr(forkserver, "has_gpu", lambda: True)
    assert not forkable(with_star)
