"""Machines that are namespaces: what they share, what passes between them, and what they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_star.errors import SetupError
from sglang_star_bench.machines import Machine, Network, unavailable

HANGS_S = 60.0

LISTEN = """
import socket, sys
server = socket.create_server((sys.argv[1], 5000))
print("listening", flush=True)
while True:
    connection, _ = server.accept()
    while connection.recv(1 << 16):
        pass
    connection.close()
"""
SEND = """
import socket, sys, time
began = time.monotonic()
with socket.create_connection((sys.argv[1], 5000), 2) as connection:
    connection.sendall(bytes(int(sys.argv[2])))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
print(time.monotonic() - began)
"""
DIES = """
import time
from sglang_star_bench.machines import Network
Network(1).__enter__()
print("made", flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if reason := unavailable():
        pytest.skip(reason)
    with Network(3) as made:
        servers = [
            subprocess.Popen(
                [*machine.place.enter, sys.executable, "-c", LISTEN, machine.address],
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            for machine in made.machines
        ]
        for server in servers:
            assert server.stdout is not None
            assert server.stdout.readline()
        yield made
        for server in servers:
            os.killpg(server.pid, signal.SIGKILL)  # what enters a machine forks
            server.communicate()


def send(source: Machine, target: Machine, size: int = 1) -> float:
    """Seconds it took; infinity if nobody answered."""
    command = (*source.place.enter, sys.executable, "-c", SEND, target.address, str(size))
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S)
    return float(done.stdout) if done.returncode == 0 else float("inf")


def shell(machine: Machine, line: str) -> str:
    command = (*machine.place.enter, "sh", "-c", line)
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S).stdout


def test_they_share_no_memory_and_no_temporary_files(network: Network, tmp_path: Path) -> None:
    first, second, _ = network.machines
    for folder in ("/dev/shm", "/tmp"):
        name = f"{folder}/{tmp_path.name}-of-one"
        assert shell(first, f"echo mine > {name}; cat {name}") == "mine\n"
        assert shell(second, f"cat {name}") == ""
        assert not Path(name).exists()


def test_they_do_not_see_each_others_processes(network: Network) -> None:
    first, second, _ = network.machines
    listed = "ls /proc | grep -c '^[0-9]'"
    # Its shell, that which it waits for, and what listens; and these.
    assert 3 <= int(shell(first, listed)) < 10
    # A shell's child that outlives it is collected by the machine's first process.
    shell(second, "(sleep 0.1; true) & (true) &")
    deadline = time.monotonic() + HANGS_S
    while shell(second, "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_bytes_pass_and_are_counted(network: Network) -> None:
    first, second, third = network.machines
    before = [network.carried(machine) for machine in network.machines]
    assert send(first, second, 1_000_000) < float("inf")
    after = [network.carried(machine) for machine in network.machines]
    sent, received = zip(*after, strict=True)
    sent_before, received_before = zip(*before, strict=True)
    assert sent[0] - sent_before[0] > 1_000_000
    assert received[1] - received_before[1] > 1_000_000
    assert sent[2] - sent_before[2] < 100_000
    assert third.address not in (first.address, second.address)


def test_a_held_link_is_no_faster(network: Network) -> None:
    network.hold("8mbit")
    try:
        # A megabyte at a megabyte a second, less what the queue lets through at once.
        assert send(*network.machines[:2], 1_000_000) > 0.5
    finally:
        network.hold("")


def test_two_machines_lose_each_other_and_nobody_else(network: Network) -> None:
    first, second, third = network.machines
    network.part(first, second)
    try:
        assert send(first, second) == send(second, first) == float("inf")
        assert max(send(first, third), send(third, second)) < float("inf")
    finally:
        network.rejoin(first, second)
    assert send(first, second) < float("inf")


def test_a_pulled_cable_and_one_plugged_in_again(network: Network) -> None:
    first, second, third = network.machines
    network.cut(first)
    try:
        assert send(first, second) == send(third, first) == float("inf")
        assert send(second, third) < float("inf")
    finally:
        network.mend(first)
    deadline = time.monotonic() + HANGS_S
    while send(first, second) == float("inf"):  # it still takes its neighbours for gone
        assert time.monotonic() < deadline


def test_a_rate_that_is_none_is_refused(network: Network) -> None:
    with pytest.raises(SetupError, match="fast"):
        network.hold("fast")
    network.hold("")


def test_nothing_stays_of_one_who_was_killed() -> None:
    if reason := unavailable():
        pytest.skip(reason)
    owner = subprocess.Popen([sys.executable, "-c", DIES], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"made\n"
    ours = Path(f"/sys/class/net/star{owner.pid}")
    assert ours.exists()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + HANGS_S
    while ours.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
