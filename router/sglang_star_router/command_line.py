"""The command line of ``star router``, group by group; names follow ``sglang_router``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from sglang_star.errors import ConfigError
from sglang_star_router import faults
from sglang_star_router.config import RouterConfig
from sglang_star_router.control_key import ControlKey
from sglang_star_router.flags import METAVARS, flag
from sglang_star_router.members import read_members
from sglang_star_router.peer_flags import refuse_flags
from sglang_star_router.policy.registry import DISPATCH_NAMES, RESCHEDULER_NAMES

RESCHEDULER_CHOICES = ("off", *RESCHEDULER_NAMES)
LOG_LEVELS = ("debug", "info", "warning", "error")


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
            kwargs.setdefault("metavar", METAVARS.get(name) or METAVARS[kwargs["type"]])
        group.add_argument(
            flag(name), dest=name, default=default, help=f"{text} [{default}]", **kwargs
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
    door.add_argument(flag("insecure"), dest="insecure", action="store_true",
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
    members = read_members(
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
