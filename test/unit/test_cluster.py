"""Server processes end for certain, and a cluster says why it cannot start."""

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

from sglang_star import cluster, cluster_command, cluster_layout, machine
from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec, Place
from sglang_star.errors import ConfigError, SetupError
from sglang_star.process import ServerProcess, wait_healthy

HANGS_S = 180.0
"""What takes longer than this will never happen."""

# A server with a child of its own, like SGLang's scheduler; both ignore SIGTERM on request.
SERVER = textwrap.dedent("""
    import http.server, json, os, signal, subprocess, sys
    port, pids, stubborn = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "stubborn"
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers()
            self.wfile.write(b'{"instances": [{"healthy": true}]}')
    server = http.server.HTTPServer(("127.0.0.1", port), Handler)
    with open(pids + ".new", "w") as file:
        json.dump([os.getpid(), child.pid], file)
    os.rename(pids + ".new", pids)
    print("serving", flush=True)
    server.serve_forever()
""")

# Fails once the engines are up, whose pids a test wants to see gone.
BROKEN_ROUTER = textwrap.dedent("""
    import os, sys, time
    while not all(map(os.path.exists, sys.argv[1:])):
        time.sleep(0.01)
    raise SystemExit("no such rescheduler")
""")


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + HANGS_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def command(pids: Path, port: int, mode: str = "") -> list[str]:
    return [sys.executable, "-c", SERVER, str(port), str(pids), mode]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    port = machine.free_ports(1)[0]
    process = ServerProcess(
        "server",
        command(tmp_path / "pids", port),
        url=f"http://127.0.0.1:{port}",
        log=tmp_path / "server.log",
    )
    yield process
    process.stop()


def test_healthy_then_ended_with_its_children(server: ServerProcess, tmp_path: Path) -> None:
    assert wait_healthy([server], HANGS_S) == [server]
    server.check()
    pids = json.loads((tmp_path / "pids").read_text())
    assert all(map(running, pids))
    server.stop()
    assert not any(map(running, pids))
    server.check()  # being stopped is not a failure


def test_a_server_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_star.process.GRACE_S", 0.2)
    port = machine.free_ports(1)[0]
    process = ServerProcess(
        "stubborn",
        command(tmp_path / "pids", port, "stubborn"),
        url=f"http://127.0.0.1:{port}",
        log=tmp_path / "log",
    )
    wait_healthy([process], HANGS_S)
    pids = json.loads((tmp_path / "pids").read_text())
    process.stop()
    assert not any(map(running, pids))


def test_nothing_survives_a_killed_owner(tmp_path: Path) -> None:
    """The owner dies of SIGKILL, so that none of its code can clean up."""
    pids, port = tmp_path / "pids", machine.free_ports(1)[0]
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path\n"
            "from sglang_star.process import ServerProcess\n"
            "p = ServerProcess('s', sys.argv[2:], url='', log=Path(sys.argv[1]))\n"
            "time.sleep(600)",
            str(tmp_path / "log"),
            *command(pids, port),
        ]
    )
    eventually(pids.exists, "the server did not start")
    members = json.loads(pids.read_text())
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    eventually(lambda: not any(map(running, members)), "a process outlived its owner")


def test_when_the_command_ends_its_children_end(tmp_path: Path) -> None:
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid); sys.exit(7)"
    process = ServerProcess(
        "brief", [sys.executable, "-c", script], url="", log=tmp_path / "brief.log"
    )
    eventually(lambda: not process.alive, "it did not end")
    assert not running(int(process.log.read_text()))
    with pytest.raises(SetupError, match="brief ended with status 7"):
        process.check()


def test_early_death_shows_the_log_and_our_own_reason_first(tmp_path: Path) -> None:
    lines = (
        "print('STAR: no such head')\nfor i in range(40): print('noise', i)\nraise SystemExit(3)"
    )
    process = ServerProcess(
        "engine", [sys.executable, "-c", lines], url="http://127.0.0.1:9", log=tmp_path / "log"
    )
    with pytest.raises(SetupError) as caught:
        wait_healthy([process], HANGS_S)
    text = caught.value.message
    assert text.index("status 3") < text.index("STAR: no such head") < text.index("noise 39")
    assert "noise 5\n" not in text
    assert str(tmp_path / "log") in caught.value.hint


def test_not_ready_in_time(server: ServerProcess) -> None:
    with pytest.raises(SetupError, match="not ready after 0 s"):
        wait_healthy([server], 0)


def test_free_ports_are_free_and_distinct() -> None:
    ports = machine.free_ports(20)
    assert len(set(ports)) == 20
    assert all(map(machine.port_is_free, ports))
    # Outgoing connections take their ports from this range; ours must lie below it.
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < max(first, 32000)


# --------------------------------------------------------------------------- the specification


@pytest.mark.parametrize(
    "counts",
    [{}, {"prefill": 1}, {"decode": 2}, {"prefill": 1, "decode": 1, "aggregated": 1}],
)
def test_counts_that_cannot_serve_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="aggregated"):
        ClusterSpec(model="m", **counts)  # type: ignore[arg-type]


def value_of(words: tuple[str, ...], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_disaggregated_layout() -> None:
    spec = ClusterSpec(model="m", prefill=1, decode=2, paced="24gb-7b", predictor="off")
    prefill, first, second = cluster_layout.engines(spec)
    assert [e.name for e in (prefill, first, second)] == ["prefill-0", "decode-0", "decode-1"]
    assert len({e.url for e in (prefill, first, second)}) == 3
    for engine in (prefill, first, second):
        assert value_of(engine.command, "--disaggregation-mode") == engine.role
        assert value_of(engine.command, "--star-instance-id") == engine.name
        assert value_of(engine.command, "--star-paced") == "24gb-7b"
        assert value_of(engine.command, "--host") == "127.0.0.1"
        assert ("--disaggregation-decode-retraction-backup" in engine.command) == (
            engine.role == "decode"
        )
    router = cluster_layout.router_command(spec, (prefill, first, second), 9000)
    at = router.index("--prefill")
    assert router[at + 1 : at + 3] == (prefill.url, str(prefill.bootstrap_port))
    assert router.count("--decode") == 2
    assert "--pd-disaggregation" in router


def test_engines_and_router_on_machines_of_their_own() -> None:
    places = tuple(Place(f"10.0.0.{n}") for n in range(1, 5))
    spec = ClusterSpec(model="m", prefill=1, decode=2, places=places)
    engines = tuple(cluster_layout.engines(spec))
    for place, engine in zip(places, engines, strict=False):
        assert engine.place is place
        assert engine.url.startswith(f"http://{place.address}:")
        assert value_of(engine.command, "--host") == place.address
        assert value_of(engine.command, "--star-host") == place.address
    router = cluster_layout.router_command(spec, engines, 9000)
    assert value_of(router, "--host") == places[3].address
    with pytest.raises(ConfigError, match="3 places"):
        ClusterSpec(model="m", prefill=1, decode=2, places=places[:3])


def test_a_place_is_entered_by_its_namespaces() -> None:
    files = ("/proc/7/ns/net", "/proc/7/ns/pid_for_children", "/proc/7/ns/mnt")
    there = Place("a", files, (("UCX_TLS", "tcp"),))
    namespaces = (f"--net={files[0]}", f"--pid={files[1]}", f"--mount={files[2]}")
    assert there.enter == ("nsenter", *namespaces, "--", "env", "UCX_TLS=tcp")
    assert Place().enter == ()


def test_plain_sglang_gets_no_star_flag() -> None:
    spec = ClusterSpec(model="m", aggregated=2, star=False)
    engines = tuple(cluster_layout.engines(spec))
    assert not any(word.startswith("--star") for engine in engines for word in engine.command)
    router = cluster_layout.router_command(spec, engines, 9000)
    at = router.index("--worker-urls")
    assert router[at + 1 :] == tuple(engine.url for engine in engines)


def test_command_line_defaults_and_extra_arguments() -> None:
    words = ["--model", "m", "--engine-args=--dtype float32", "--router-args=--policy round-robin"]
    spec = cluster_command.spec_from(cluster_command.parser().parse_args(words))
    assert spec.roles == ("prefill", "decode", "decode")
    assert next(cluster_layout.engines(spec)).command[-2:] == ("--dtype", "float32")
    assert cluster_layout.router_command(spec, (), 1)[-2:] == ("--policy", "round-robin")


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(machine, "available_memory", lambda: 8 * machine.GIB)
    machine.require_memory(2, str(tmp_path))
    with pytest.raises(SetupError, match="3 engines need about"):
        machine.require_memory(3, str(tmp_path))


def test_available_memory_is_plausible() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < machine.available_memory() <= total


# --------------------------------------------------------------------------- the whole, with fakes


@pytest.fixture
def fake_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Engines and router become the small server above."""

    def engine_command(
        spec: ClusterSpec, name: str, role: str, port: int, bootstrap_port: int, host: str
    ) -> tuple[str, ...]:
        return tuple(command(tmp_path / f"{name}.pids", port))

    def router_command(spec: ClusterSpec, members: object, port: int) -> tuple[str, ...]:
        if spec.rescheduler == "broken":
            engines = [str(tmp_path / f"aggregated-{number}.pids") for number in (0, 1)]
            return (sys.executable, "-c", BROKEN_ROUTER, *engines)
        return tuple(command(tmp_path / "router.pids", port))

    monkeypatch.setattr(cluster_layout, "engine_command", engine_command)
    monkeypatch.setattr(cluster, "router_command", router_command)
    monkeypatch.setattr(cluster, "require_memory", lambda count, model: None)
    return tmp_path


def died(running_cluster: Cluster) -> bool:
    try:
        running_cluster.check()
    except SetupError as error:
        return "ended with status 137" in error.message
    return False


def all_pids(folder: Path) -> list[int]:
    return [pid for file in folder.glob("*.pids") for pid in json.loads(file.read_text())]


def test_cluster_starts_serves_and_leaves_nothing(fake_commands: Path) -> None:
    said: list[str] = []
    spec = ClusterSpec(model="m", prefill=1, decode=2)
    with Cluster(spec, logs=fake_commands / "logs", report=said.append) as running_cluster:
        running_cluster.check()
        pids = all_pids(fake_commands)
        assert len(pids) == 8
        assert all(map(running, pids))
        os.kill(pids[0], signal.SIGKILL)
        eventually(lambda: died(running_cluster), "the cluster did not notice a death")
    assert not any(map(running, pids))
    ready = {line.split()[0] for line in said[1:]}
    assert ready == {"prefill-0", "decode-0", "decode-1", "router"}
    assert (fake_commands / "logs" / "decode-1.log").read_text().startswith("serving\n")


def test_a_failed_start_leaves_nothing(fake_commands: Path) -> None:
    spec = ClusterSpec(model="m", aggregated=2, rescheduler="broken")
    with pytest.raises(SetupError, match="no such rescheduler"):
        Cluster(spec, logs=fake_commands / "logs").__enter__()
    assert len(all_pids(fake_commands)) == 4
    assert not any(map(running, all_pids(fake_commands)))


def test_a_taken_port_is_named(fake_commands: Path) -> None:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        spec = ClusterSpec(model="m", aggregated=1, port=port)
        with pytest.raises(SetupError, match=f"port {port} on 127.0.0.1 is taken"):
            Cluster(spec, logs=fake_commands / "logs").__enter__()
    assert all_pids(fake_commands) == []
