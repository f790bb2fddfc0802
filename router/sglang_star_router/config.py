"""``RouterConfig``: every flag, frozen and validated once; names follow ``sglang_router``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sglang_star.errors import ConfigError
from sglang_star_router import faults
from sglang_star_router.faults import FaultLimits
from sglang_star_router.peer_flags import refuse_flags
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


@dataclass(frozen=True, slots=True)
class ControlKey:
    """A key for the control plane, as ``sglang_router`` writes it: ``ID:NAME:ROLE:KEY``.

    Attributes:
        name: what the audit log calls its bearer; admin: may give orders, not only look.
    """

    name: str
    admin: bool
    key: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> ControlKey:
        """Read one.

        Raises:
            ConfigError: another form; the key itself is not repeated.
        """
        parts = text.split(":", 3)
        if len(parts) != 4 or parts[2].lower() not in ("admin", "user") or not parts[3]:
            who = f"the one of {parts[0]}" if len(parts) == 4 else "one"
            raise ConfigError(
                f"--control-plane-api-keys: {who} is not ID:NAME:ROLE:KEY",
                hint="ROLE is admin or user",
            )
        return cls(f"{parts[0]} ({parts[1]})", parts[2].lower() == "admin", parts[3])


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
    fleet_key: str = ""
    insecure: bool = False
    admin_api_key: str | None = None
    control_plane_api_keys: tuple[ControlKey, ...] = ()
    control_plane_audit_enabled: bool = False
    cors_allowed_origins: tuple[str, ...] = ()
    tls_cert_path: str | None = None
    tls_key_path: str | None = None
    client_cert_path: str | None = None
    client_key_path: str | None = None
    ca_cert_paths: tuple[str, ...] = ()
    request_timeout: float = 1800.0
    head_timeout: float = 15.0
    body_timeout: float = 120.0
    sse_keepalive: float = 0.0
    health_check_endpoint: str = "/health"
    health_check_interval: float = 5.0
    health_check_timeout: float = 5.0
    health_failure_threshold: int = 3
    health_success_threshold: int = 1
    queue_size: int = 1024
    queue_timeout: float = 60.0
    max_payload_bytes: int = 64 * 1024 * 1024
    max_buffered_bytes: int = 2 * 1024 * 1024 * 1024
    max_concurrent_requests: int = -1
    rate_limit: float = 0.0
    shutdown_grace: float = 180.0
    prometheus_host: str = "127.0.0.1"
    prometheus_port: int = 0
    prometheus_duration_buckets: tuple[float, ...] = ()
    log_dir: str | None = None
    log_level: str = "info"
    faults: FaultLimits = field(default_factory=FaultLimits)

    @property
    def disaggregated(self) -> bool:
        """True when prefill and decode run on separate instances."""
        # Roles are not mixed with ``aggregated``: see __post_init__.
        return self.members[0].role != "aggregated"

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
                     "health_check_timeout", "queue_timeout", "head_timeout", "body_timeout",
                     "max_payload_bytes", "max_buffered_bytes"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"{_flag(name)} must be positive, not {getattr(self, name)}")
        for name in ("max_moves", "health_failure_threshold", "health_success_threshold"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("queue_size", "move_cooldown", "sse_keepalive",
                     "shutdown_grace", "rate_limit"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ConfigError(f"{_flag(name)} must not be negative")
        if self.max_concurrent_requests == 0 or self.max_concurrent_requests < -1:
            raise ConfigError("--max-concurrent-requests must be positive, or -1 for no limit")
        for pair in ("tls", "client"):
            cert, key = f"{pair}_cert_path", f"{pair}_key_path"
            if (getattr(self, cert) is None) != (getattr(self, key) is None):
                raise ConfigError(f"{_flag(cert)} and {_flag(key)} belong together")
        if not self.health_check_endpoint.startswith("/"):
            raise ConfigError("--health-check-endpoint must begin with a slash")


_SECONDS = {
    "request_timeout", "health_check_interval", "health_check_timeout", "queue_timeout",
    "status_stale", "head_timeout", "body_timeout", "sse_keepalive",
}  # fmt: skip


_METAVARS: dict[str | type, str] = {
    "host": "ADDRESS", "port": "PORT", "api_key": "KEY", "admin_api_key": "KEY",
    "fleet_key": "FILE",
    "max_payload_bytes": "BYTES", "max_buffered_bytes": "BYTES", "prometheus_host": "ADDRESS",
    "prometheus_port": "PORT", "health_check_endpoint": "PATH", "log_dir": "FOLDER",
    "tls_cert_path": "FILE", "tls_key_path": "FILE",
    "client_cert_path": "FILE", "client_key_path": "FILE",
    "policy": "NAME", "prefill_policy": "NAME", "max_moves_per_second": "N", int: "N", float: "S",
}  # fmt: skip


_NAMES = {
    "fleet_key": "--star-fleet-key",
    "insecure": "--star-insecure",
    "max_payload_bytes": "--max-payload-size",
    "max_buffered_bytes": "--max-buffered-size",
    "head_timeout": "--client-head-timeout-secs",
    "body_timeout": "--client-body-timeout-secs",
    "shutdown_grace": "--shutdown-grace-period-secs",
    "rate_limit": "--rate-limit-tokens-per-second",
}


def _flag(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
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
    option(server, "request_timeout", "Longest time one request may take.")
    option(server, "shutdown_grace", "Time that open requests get to end on SIGTERM.")
    option(server, "sse_keepalive", "Time between comments to a stream that is held; 0 sends none.")
    option(server, "prometheus_port", "Serve /metrics on this port too; 0 is off.")
    option(server, "prometheus_host", "Address of that port.")
    server.add_argument("--prometheus-duration-buckets", nargs="+", type=float, metavar="S",
                        default=[], help="Bounds of the histogram of first bytes.")  # fmt: skip
    option(server, "log_dir", "Write the log to a file in this folder too.", type=str)
    option(server, "log_level", "Verbosity.", type=_log_level, choices=LOG_LEVELS)

    clients = parser.add_argument_group("limits for clients")
    option(clients, "head_timeout", "Longest time a client may take over a request's head.")
    option(clients, "body_timeout", "Longest time a client may take over a request's body.")
    option(clients, "max_payload_bytes", "Largest request body, bytes.")
    option(clients, "max_buffered_bytes", "Request bodies kept at a time, all together, bytes.")
    option(clients, "max_concurrent_requests", "Requests served at a time; others queue. -1: all.")
    option(clients, "rate_limit", "Requests begun per second; others queue. 0: no limit.")

    door = parser.add_argument_group("keys and certificates")
    option(door, "fleet_key", "File that makes the router a member of the engines' fleet "
           "(see `star keys`).")  # fmt: skip
    door.add_argument(_flag("insecure"), dest="insecure", action="store_true",
                      help="Believe engines on other machines without a fleet key.")  # fmt: skip
    option(door, "api_key", "Key that clients must present and that instances are given.",
           type=str)  # fmt: skip
    option(door, "admin_api_key", "Key for /star/*, abort, flush, profile; here and there.",
           type=str)  # fmt: skip
    door.add_argument("--control-plane-api-keys", nargs="*", default=[],
                      metavar="ID:NAME:ROLE:KEY",
                      help="More keys for the same: a user may look, an admin give orders.",
                      )  # fmt: skip
    door.add_argument("--control-plane-audit-enabled", action="store_true",
                      help="Log who asked what of the control plane.")  # fmt: skip
    door.add_argument("--cors-allowed-origins", nargs="*", default=[], metavar="ORIGIN",
                      help="Origins whose pages may read answers; * is any.")  # fmt: skip
    option(door, "tls_cert_path", "Serve HTTPS with this certificate.", type=str)
    option(door, "tls_key_path", "Its key.", type=str)
    option(door, "client_cert_path", "Certificate shown to instances.", type=str)
    option(door, "client_key_path", "Its key.", type=str)
    door.add_argument("--ca-cert-paths", nargs="*", default=[], metavar="FILE",
                      help="CAs that instances' certificates must come from, "
                      "instead of the system's.")  # fmt: skip

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
    option(health, "health_check_endpoint", "What is asked of an instance.")
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
    refuse_flags(sys.argv[1:] if argv is None else argv)
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
    args["control_plane_api_keys"] = tuple(
        ControlKey.parse(text) for text in args["control_plane_api_keys"]
    )
    for name in ("cors_allowed_origins", "ca_cert_paths", "prometheus_duration_buckets"):
        args[name] = tuple(args[name])
    return RouterConfig(members=members, faults=faults.take(args), **args)


def _log_level(text: str) -> str:
    """Accept ``warn`` as sglang_router spells it."""
    return "warning" if text == "warn" else text


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


def configure_logging(level: str, log_dir: str | None = None) -> None:
    """Log to standard error, one line per event, and to a file if a folder is given.

    Raises:
        ConfigError: the folder cannot be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if log_dir is not None:
        try:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(Path(log_dir) / "star-router.log"))
        except OSError as error:
            raise ConfigError(f"--log-dir {log_dir} cannot be written: {error}") from None
    # ``star router`` comes through a command line that has set logging up for its own messages.
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=handlers, force=True,
    )  # fmt: skip
