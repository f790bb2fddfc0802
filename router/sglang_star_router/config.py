"""``RouterConfig``: every flag, frozen and validated once; names follow ``sglang_router``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from sglang_star.errors import ConfigError
from sglang_star_router import faults
from sglang_star_router.faults import FaultLimits
from sglang_star_router.policy.registry import DISPATCH_NAMES, RESCHEDULER_NAMES

RESCHEDULER_CHOICES = ("off", *RESCHEDULER_NAMES)
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an instance's HTTP server listens.

    Attributes:
        url: normalised, without a trailing slash; the instance's identity for the router.
    """

    url: str
    host: str
    port: int
    tls: bool

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Read ``http://host:port`` or ``https://host:port``.

        Raises:
            ConfigError: anything else.
        """
        hint = "write instances as http://HOST:PORT"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r} is not a URL: {error}", hint=hint) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not an instance URL", hint=hint)
        if parts.path.strip("/") or parts.query or parts.username:
            raise ConfigError(f"{url!r} has more than scheme, host and port", hint=hint)
        tls = parts.scheme == "https"
        port = port or (443 if tls else 80)
        host = parts.hostname
        shown = f"[{host}]" if ":" in host else host
        return cls(f"{parts.scheme}://{shown}:{port}", host, port, tls)


@dataclass(frozen=True, slots=True)
class Member:
    """One instance as named on the command line.

    Attributes:
        role: ``aggregated``, ``prefill`` or ``decode``.
        bootstrap_port: of a prefill instance; None asks the instance itself.
    """

    endpoint: Endpoint
    role: str
    bootstrap_port: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Everything the router can be told. Times are seconds unless the name says otherwise."""

    members: tuple[Member, ...]
    host: str = "127.0.0.1"
    port: int = 30000
    policy: str = "least-tokens"
    calibrate: bool = True
    prefill_policy: str = "least-requests"
    rescheduler: str = "off"
    rescheduler_interval: float = 0.5
    rescheduler_params: dict[str, float | int | bool] = field(default_factory=dict)
    dispatch_params: dict[str, float | int | bool] = field(default_factory=dict)
    max_moves: int = 16
    max_moves_per_second: float = 20.0
    move_cooldown: float = 5.0
    move_report_timeout: float = 60.0
    status_stale: float = 3.0
    api_key: str | None = None
    request_timeout: float = 1800.0
    health_check_endpoint: str = "/health"
    health_check_interval: float = 5.0
    health_check_timeout: float = 5.0
    health_failure_threshold: int = 3
    health_success_threshold: int = 1
    queue_size: int = 1024
    queue_timeout: float = 60.0
    max_payload_bytes: int = 512 * 1024 * 1024
    shutdown_grace: float = 10.0
    log_level: str = "info"
    faults: FaultLimits = field(default_factory=FaultLimits)

    @property
    def disaggregated(self) -> bool:
        """True when prefill and decode run on separate instances."""
        return any(member.role == "decode" for member in self.members)

    def __post_init__(self) -> None:
        """Refuse combinations that cannot serve.

        Raises:
            ConfigError: naming the flag to change.
        """
        roles = {member.role for member in self.members}
        if not self.members:
            raise ConfigError(
                "no instance given",
                hint="use --worker-urls URL ..., or --pd-disaggregation --prefill URL --decode URL",
            )
        if "aggregated" in roles and len(roles) > 1:
            raise ConfigError(
                "--worker-urls cannot be combined with --prefill and --decode",
                hint="run one router per kind of fleet",
            )
        for missing in {"prefill", "decode"} - roles:
            if "aggregated" not in roles:
                raise ConfigError(f"--pd-disaggregation needs at least one --{missing}")
        urls = [member.endpoint.url for member in self.members]
        for url in urls:
            if urls.count(url) > 1:
                raise ConfigError(f"{url} is given twice", hint="list every instance once")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port {self.port} is not a port number")
        for name in ("rescheduler_interval", "max_moves_per_second", "move_report_timeout",
                     "status_stale", "request_timeout", "health_check_interval",
                     "health_check_timeout", "queue_timeout"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"{_flag(name)} must be positive, not {getattr(self, name)}")
        for name in ("max_moves", "health_failure_threshold", "health_success_threshold"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("queue_size", "move_cooldown"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{_flag(name)} must not be negative")


_SECONDS = {
    "request_timeout", "health_check_interval", "health_check_timeout", "queue_timeout",
    "status_stale", "shutdown_grace",
}  # fmt: skip


_METAVARS: dict[str | type, str] = {
    "host": "ADDRESS", "port": "PORT", "api_key": "KEY", "max_payload_bytes": "BYTES",
    "policy": "NAME", "prefill_policy": "NAME", "max_moves_per_second": "N", int: "N", float: "S",
}  # fmt: skip


def _flag(name: str) -> str:
    if name == "max_payload_bytes":
        return "--max-payload-size"
    return "--" + name.replace("_", "-") + ("-secs" if name in _SECONDS else "")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of ``star router``."""
    parser = argparse.ArgumentParser(
        prog="star router",
        description="Route requests to SGLang instances and move running ones between them.",
        allow_abbrev=False,
    )

    def option(group: Any, name: str, text: str, **kwargs: Any) -> None:
        default = RouterConfig.__dataclass_fields__[name].default
        kwargs.setdefault("type", type(default))
        if "choices" not in kwargs:
            kwargs.setdefault("metavar", _METAVARS.get(name) or _METAVARS[kwargs["type"]])
        group.add_argument(
            _flag(name), dest=name, default=default, help=f"{text} [{default}]", **kwargs
        )

    fleet = parser.add_argument_group("fleet")
    fleet.add_argument("--worker-urls", nargs="+", metavar="URL", default=[],
                       help="Aggregated instances.")  # fmt: skip
    fleet.add_argument("--pd-disaggregation", action="store_true",
                       help="Prefill and decode on separate instances.")  # fmt: skip
    fleet.add_argument("--prefill", nargs="+", action="append", default=[],
                       metavar=("URL", "BOOTSTRAP_PORT"),
                       help="A prefill instance; the port defaults to what it reports itself. "
                       "Repeatable.")  # fmt: skip
    fleet.add_argument("--decode", nargs=1, action="append", default=[], metavar="URL",
                       help="A decode instance. Repeatable.")  # fmt: skip

    server = parser.add_argument_group("server")
    option(server, "host", "Address to listen on.")
    option(server, "port", "Port to listen on.")
    option(server, "api_key", "Key that clients must present and that instances are given.",
           type=str)  # fmt: skip
    option(server, "request_timeout", "Longest time one request may take.")
    option(server, "max_payload_bytes", "Largest request body, bytes.")
    option(server, "shutdown_grace", "Time open streams get to end on SIGTERM.")
    option(server, "log_level", "Verbosity.", choices=LOG_LEVELS)

    dispatch = parser.add_argument_group("dispatch")
    option(dispatch, "policy", "Chooses the decode or aggregated instance: "
           f"{', '.join(DISPATCH_NAMES)}.", type=_policy_name)  # fmt: skip
    dispatch.add_argument("--decode-policy", type=_policy_name, default=None, metavar="NAME",
                          help="The same; wins over --policy.")  # fmt: skip
    option(dispatch, "prefill_policy", "Chooses the prefill instance; the same names.",
           type=_policy_name)  # fmt: skip
    dispatch.add_argument("--no-calibrate", dest="calibrate", action="store_false",
                          help="Take estimates as given, whatever became of others.")  # fmt: skip
    dispatch.add_argument("--policy-param", action="append", default=[], metavar="NAME=VALUE",
                          help="A parameter of the dispatch policy. Repeatable.")  # fmt: skip
    option(dispatch, "queue_size", "Requests held at the router while no instance admits them.")
    option(dispatch, "queue_timeout", "Longest time a request is held.")

    moves = parser.add_argument_group("rescheduling")
    option(moves, "rescheduler", "Moves running requests between instances.",
           choices=RESCHEDULER_CHOICES)  # fmt: skip
    option(moves, "rescheduler_interval", "Seconds between two decisions.")
    moves.add_argument("--rescheduler-param", action="append", default=[], metavar="NAME=VALUE",
                       help="A parameter of the rescheduler. Repeatable.")  # fmt: skip
    option(moves, "max_moves", "Moves under way at the same time, whole fleet.")
    option(moves, "max_moves_per_second", "Orders sent per second, whole fleet.")
    option(moves, "move_cooldown", "Seconds a request stays put after an order for it ended.")
    option(moves, "move_report_timeout", "Seconds after which a move without a report is lost.")
    option(moves, "status_stale", "Age at which an instance's status is no longer acted upon.")

    health = parser.add_argument_group("health")
    option(health, "health_check_interval", "Time between two checks of an instance.")
    option(health, "health_check_timeout", "Longest time a check may take.")
    option(health, "health_failure_threshold", "Failed checks before an instance is excluded.")
    option(health, "health_success_threshold", "Passed checks before it is admitted again.")
    faults.add_arguments(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> RouterConfig:
    """Turn a command line into a configuration.

    Raises:
        ConfigError: flags that contradict each other, or a value of no use.
        SystemExit: argparse's own errors and ``--help``.
    """
    args = vars(build_parser().parse_args(argv))
    members = _members(
        args.pop("worker_urls"), args.pop("pd_disaggregation"),
        args.pop("prefill"), args.pop("decode"),
    )  # fmt: skip
    args["policy"] = args.pop("decode_policy") or args["policy"]
    args["dispatch_params"] = _params("--policy-param", args.pop("policy_param"))
    args["rescheduler_params"] = _params("--rescheduler-param", args.pop("rescheduler_param"))
    if args["rescheduler_params"] and args["rescheduler"] == "off":
        raise ConfigError("--rescheduler-param has no effect with --rescheduler off")
    if args["rescheduler_params"].get("recompute_tokens_per_s"):
        raise ConfigError(
            "engines move KV by copying it; recomputing it at the target is for star simulate",
            hint="leave recompute_tokens_per_s out",
        )
    return RouterConfig(members=members, faults=faults.take(args), **args)


def _policy_name(text: str) -> str:
    """Accept ``round_robin`` as sglang_router spells it; the registry's own spelling is kept."""
    name = text.replace("_", "-")
    if name not in DISPATCH_NAMES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of this router's policies: {', '.join(DISPATCH_NAMES)}"
        )
    return name


def _members(
    workers: list[str], pd: bool, prefill: list[list[str]], decode: list[list[str]]
) -> tuple[Member, ...]:
    if (prefill or decode) and not pd:
        raise ConfigError("--prefill and --decode need --pd-disaggregation")
    if pd and workers:
        raise ConfigError(
            "--worker-urls cannot be combined with --pd-disaggregation",
            hint="name the instances with --prefill and --decode",
        )
    members = [Member(Endpoint.parse(url), "aggregated") for url in workers]
    for url, *rest in prefill:
        if len(rest) > 1:
            raise ConfigError(f"--prefill takes a URL and one port, not {' '.join([url, *rest])}")
        members.append(Member(Endpoint.parse(url), "prefill", _bootstrap_port(rest)))
    members.extend(Member(Endpoint.parse(url), "decode") for (url,) in decode)
    return tuple(members)


def _bootstrap_port(rest: list[str]) -> int | None:
    if not rest or rest[0].lower() == "none":
        return None
    if not rest[0].isdecimal() or not 0 < int(rest[0]) < 65536:
        raise ConfigError(
            f"bootstrap port {rest[0]!r} is not a port number",
            hint="use the prefill instance's --disaggregation-bootstrap-port",
        )
    return int(rest[0])


def _params(flag: str, given: list[str]) -> dict[str, float | int | bool]:
    parsed: dict[str, float | int | bool] = {}
    for item in given:
        name, equals, text = item.partition("=")
        name = name.strip().replace("-", "_")
        try:
            if text.lower() in ("true", "false"):
                parsed[name] = text.lower() == "true"
            else:
                parsed[name] = float(text) if any(c in text for c in ".eE") else int(text)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ConfigError(f"{flag} {item!r} is not NAME=NUMBER")
    return parsed


def configure_logging(level: str) -> None:
    """Log to standard error, one line per event."""
    # ``star router`` comes through a command line that has set logging up for its own messages.
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
