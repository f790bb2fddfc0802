"""What a local cluster consists of: its specification, and the command line of each process."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sglang_star.errors import ConfigError
from sglang_star.machine import free_ports, has_gpu

# Several engines share the cores: one thread each, or they thrash. Schedulers that are idle sleep.
# A health check that decodes a token would wake them, and SGLang answers it without.
CPU_ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
    # A few of SGLang's functions are compiled by torch at first use: that takes a C++ compiler,
    # which a fresh machine lacks, and seconds of every engine's first step.
    "TORCHDYNAMO_DISABLE": "1",
    # Without cached bytecode every process compiles half a million lines before it serves.
    "PYTHONDONTWRITEBYTECODE": "",
}
CPU_FLAGS: Final = ("--device", "cpu", "--sleep-on-idle")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs.

    Attributes:
        address: what it listens on.
        namespaces: the kernel's files of namespaces that it is to be in, as in /proc/PID/ns.
        environment: variables that it gets there.
    """

    address: str = "127.0.0.1"
    namespaces: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def enter(self) -> tuple[str, ...]:
        """What precedes a command line that is to run there."""
        if not self.namespaces:
            return ()
        files = (f"--{SPACES[file.rsplit('/', 1)[1]]}={file}" for file in self.namespaces)
        return ("nsenter", *files, "--", "env", *(f"{k}={v}" for k, v in self.environment))


HERE: Final = Place()
SPACES: Final = {"net": "net", "mnt": "mount", "ipc": "ipc", "pid_for_children": "pid"}
"""Options of ``nsenter`` by the kernel's names."""


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """What to start. Either ``aggregated`` engines, or ``prefill`` and ``decode`` ones.

    Attributes:
        model: directory or hub name of the model.
        host, port: where the router listens; port 0 picks a free one.
        rescheduler, predictor, paced: see ``star router --help`` and ``--star-*``.
        max_total_tokens: KV pool of each engine, tokens.
        engine_arguments, decode_arguments, router_arguments: added to the command lines of all
            engines, of decode engines, and of the router; the last word wins.
        places: of the engines, in starting order, and of the router; empty: all on this machine.
        start_timeout_s: longest time until everything answers ``/health``.
        star: False starts plain SGLang engines, for comparison.
    """

    model: str
    prefill: int = 0
    decode: int = 0
    aggregated: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    rescheduler: str = "star"
    predictor: str = "auto"
    paced: str = ""
    max_total_tokens: int = 16384
    engine_arguments: tuple[str, ...] = ()
    decode_arguments: tuple[str, ...] = ()
    router_arguments: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()
    start_timeout_s: float = 600.0
    star: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot serve.

        Raises:
            ConfigError: no engine, both kinds of them, or one half of a disaggregated pair.
        """
        if self.aggregated and (self.prefill or self.decode):
            raise ConfigError(
                "--aggregated excludes --prefill and --decode",
                hint="an instance either does both phases or one of them",
            )
        if not self.aggregated and not (self.prefill and self.decode):
            raise ConfigError(
                "a cluster needs --aggregated M, or both --prefill N and --decode M",
                hint="for example: star cluster --prefill 1 --decode 2",
            )
        if self.places and len(self.places) != len(self.roles) + 1:
            raise ConfigError(
                f"{len(self.places)} places for {len(self.roles)} engines and a router",
                hint="give one for each, or none",
            )

    @property
    def router_host(self) -> str:
        """Where the router listens."""
        return self.places[-1].address if self.places else self.host

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each engine, in starting order."""
        return (
            ("prefill",) * self.prefill
            + ("decode",) * self.decode
            + ("aggregated",) * self.aggregated
        )


@dataclass(frozen=True)
class Engine:
    """Where one engine is.

    Attributes:
        name: its instance id: the role and a number.
        command: its command line, at its place.
        bootstrap_port: where decode engines meet it; 0 unless it does prefill.
    """

    name: str
    role: str
    url: str
    bootstrap_port: int
    command: tuple[str, ...]
    place: Place = HERE


def engines(spec: ClusterSpec) -> Iterator[Engine]:
    """Lay out the engines on free ports of this machine, which are free on another as well."""
    ports = iter(free_ports(2 * len(spec.roles)))
    numbers: dict[str, int] = {}
    for at, role in enumerate(spec.roles):
        place = spec.places[at] if spec.places else HERE
        number = numbers[role] = numbers.get(role, -1) + 1
        name, port, bootstrap_port = f"{role}-{number}", next(ports), next(ports)
        yield Engine(
            name=name,
            role=role,
            url=f"http://{place.address}:{port}",
            bootstrap_port=bootstrap_port if role == "prefill" else 0,
            command=engine_command(spec, name, role, port, bootstrap_port, place.address),
            place=place,
        )


def engine_command(
    spec: ClusterSpec, name: str, role: str, port: int, bootstrap_port: int, host: str
) -> tuple[str, ...]:
    """Return the command line of one engine, on a machine that others reach as ``host``."""
    command = [sys.executable, "-m", "sglang.launch_server"]
    command += ["--model-path", spec.model, "--host", host, "--port", str(port)]
    command += ["--max-total-tokens", str(spec.max_total_tokens), "--random-seed", "1"]
    if not has_gpu():
        command += CPU_FLAGS
    if role != "aggregated":
        command += ["--disaggregation-mode", role, "--disaggregation-transfer-backend", "nixl"]
        command += ["--disaggregation-bootstrap-port", str(bootstrap_port)]
    if role == "decode":
        command += ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
    if spec.star:
        command += ["--star", "--star-instance-id", name, "--star-predictor", spec.predictor]
        if host != HERE.address:
            command += ["--star-host", host]
        if spec.paced:
            command += ["--star-paced", spec.paced]
    return (*command, *spec.engine_arguments, *(spec.decode_arguments if role == "decode" else ()))


def router_command(spec: ClusterSpec, members: tuple[Engine, ...], port: int) -> tuple[str, ...]:
    """Return the command line of the router in front of ``members``."""
    command = [sys.executable, "-m", "sglang_star_router.launch_router"]
    command += ["--host", spec.router_host, "--port", str(port), "--rescheduler", spec.rescheduler]
    if spec.aggregated:
        command += ["--worker-urls", *(engine.url for engine in members)]
    else:
        command.append("--pd-disaggregation")
        for engine in members:
            command += [f"--{engine.role}", engine.url]
            if engine.role == "prefill":
                command.append(str(engine.bootstrap_port))
    return (*command, *spec.router_arguments)


def shown(command: tuple[str, ...]) -> str:
    """Return ``command`` as one would type it."""
    return shlex.join(("python", *command[1:]))
