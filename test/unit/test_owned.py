"""What a killed process leaves goes with the next start; what a living one uses stays."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_star import owned
from sglang_star.errors import ConfigError
from sglang_star.fleet_key import Unlocked
from sglang_star.migration.links import Links

MAKER = """
import sys
sys.path[:0] = sys.argv[1:2]
from sglang_star import owned
from sglang_star.fleet_key import Unlocked
from sglang_star.migration.links import Links

other, held = owned.make_folder(sys.argv[2], "star-other-")
links = Links("a", 1, host="127.0.0.1", advertise_host="127.0.0.1", access=Unlocked(),
              migration_port=0, status_port=0, heartbeat_s=1.0, timeout_s=10.0, stuck_s=60.0)
print(other, links.order_address.removeprefix("ipc://").removesuffix("/orders"), flush=True)
sys.stdin.read()
"""


def links() -> Links:
    return Links(
        "b", 1, host="127.0.0.1", advertise_host="127.0.0.1", access=Unlocked(), migration_port=0,
        status_port=0, heartbeat_s=1.0, timeout_s=10.0, stuck_s=60.0,
    )  # fmt: skip


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A temporary directory in which a socket's path is not too long for the kernel."""
    with tempfile.TemporaryDirectory(prefix="star-test-") as name:
        yield Path(name)


def test_the_next_start_removes_what_a_killed_instance_left(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short_path))
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))
    package = Path(owned.__file__).parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", MAKER, package, short_path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    other, folder = child.stdout.readline().split()
    try:
        # While it lives, others start beside it.
        assert owned.sweep(str(short_path), "star-other-") == []
        links().close()
        assert os.path.exists(other)
        assert os.path.exists(f"{folder}/orders")
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert os.path.exists(other), "it was killed before it could tidy up"
    assert os.path.exists(folder)
    assert owned.sweep(str(short_path), "star-other-") == [other]
    assert not os.path.exists(other)
    links().close()
    assert not os.path.exists(folder)
    assert list(short_path.iterdir()) == [], "what ends in good order leaves nothing"


def test_a_temporary_directory_with_too_long_a_name_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(ConfigError, match="TMPDIR"):
        links()
    assert list(long.iterdir()) == []


def test_a_sweep_touches_nothing_else(tmp_path: Path) -> None:
    names = ["star-kv-0123", "star-kv-" + "g" * 16, "x-star-kv-" + "0" * 16, "star-" + "0" * 16]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ("star-kv-" + "1" * 16)).symlink_to(tmp_path / names[0])
    os.mkfifo(tmp_path / ("star-kv-" + "2" * 16))
    (tmp_path / ("star-kv-" + "5" * 16)).write_text("a file")
    left = tmp_path / ("star-kv-" + "3" * 16)
    left.mkdir()
    (left / "file").write_text("left behind")
    held, descriptor = owned.make_folder(str(tmp_path), "star-kv-")
    before = set(tmp_path.iterdir())
    assert owned.sweep(str(tmp_path), "star-kv-") == [str(left)]
    assert set(tmp_path.iterdir()) == before - {left}
    os.close(descriptor)
    assert owned.sweep(str(tmp_path), "star-kv-") == [held]
    assert owned.sweep(str(tmp_path / "nowhere"), "star-kv-") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
def test_a_sweep_leaves_other_users_alone(tmp_path: Path) -> None:
    theirs = tmp_path / ("star-kv-" + "4" * 16)
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    assert owned.sweep(str(tmp_path), "star-kv-") == []


def test_what_is_swept_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep may find a name before its maker holds it: then the maker takes another one."""
    lock = fcntl.flock
    swept: list[str] = []

    def sweep_before_the_first(descriptor: int, how: int) -> None:
        if how == fcntl.LOCK_EX and not swept:
            swept.extend(owned.sweep(str(tmp_path), "star-"))
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", sweep_before_the_first)
    made, descriptor = owned.make_folder(str(tmp_path), "star-")
    assert len(swept) == 1
    assert [str(path) for path in tmp_path.iterdir()] == [made] != swept
    os.close(descriptor)
