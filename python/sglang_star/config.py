"""``StarConfig``: every ``--star-*`` flag, frozen and validated once, in the launcher."""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from sglang_star.errors import ConfigError
from sglang_star.fleet_key import FleetKey, is_loopback
from sglang_star.migration.transport import AUTO, NAMES
from sglang_star.platform.profile import find

AUTO_HEAD = "auto"
BUILTIN_HEAD = "builtin"
PREDICTOR_OFF = "off"


def _flag(default: Any, text: str, metavar: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "metavar": metavar})


@dataclass(frozen=True, slots=True)
class StarConfig:
    """Configuration of STAR in one SGLang instance; field ``x_y`` is flag ``--star-x-y``."""

    instance_id: str = _flag(
        "", "Stable name of this instance in the fleet. Default: role@host:port.", "NAME"
    )
    predictor: str = _flag(
        AUTO_HEAD,
        "Remaining-length predictor: 'auto' (the packaged head for this model, else the newest one "
        "trained for it here, else none), 'builtin' (the packaged one, or no start), 'off', or the "
        "path of a .safetensors head made by `star predictor train`.",
        "HEAD",
    )
    host: str = _flag(
        "127.0.0.1",
        "Address that STAR's status and migration sockets bind to; another than this machine's own "
        "needs --star-fleet-key.",
        "HOST",
    )
    fleet_key: str = _flag(
        "",
        "File that makes this instance a member of its fleet (see `star keys`): its sockets speak "
        "to members only, encrypted. The same file for every engine and the router.",
        "FILE",
    )
    insecure: bool = _flag(
        False, "Let STAR's sockets be reached from other machines without a fleet key."
    )
    advertise_host: str = _flag("", "Address peers use to reach --star-host. Default: the same.")
    status_port: int = _flag(0, "Port of the status publisher; 0 picks a free one.", "PORT")
    migration_port: int = _flag(0, "Port of the migration socket; 0 picks a free one.", "PORT")
    status_interval_ms: float = _flag(100.0, "Time between two published statuses.", "MS")
    transport: str = _flag(
        AUTO,
        f"What carries KV between instances: {', '.join(NAMES)}, or '{AUTO}', the fastest of them "
        "that both instances have.",
        "NAME",
    )
    staging_mb: float = _flag(
        128.0, "Memory that KV to be sent lies in, and again as much for what 'nixl' reads.", "MB"
    )
    checksum: bool = _flag(False, "Check every piece of KV on its way (in host memory only).")
    max_moves: int = _flag(4, "Moves this instance sends at the same time.", "N")
    max_guests: int = _flag(64, "Requests of other instances it hosts at the same time.", "N")
    copy_mb_per_step: float = _flag(
        16.0,
        "KV that is gathered, and that is scattered, per scheduler step, over all moves.",
        "MB",
    )
    copy_mb_per_s: float = _flag(
        0.0, "KV that this instance sends per second at most, over all moves; 0: no limit.", "MB"
    )
    move_deadline_s: float = _flag(
        30.0, "A move that is not committed within this time is cancelled.", "S"
    )
    heartbeat_s: float = _flag(0.25, "Time between heartbeats to a peer with live moves.", "S")
    peer_timeout_s: float = _flag(
        10.0,
        "A peer silent for this long is given up: its guests are dropped, requests that decode "
        "there are recomputed here. One whose process is gone is noticed within about a second.",
        "S",
    )
    stuck_timeout_s: float = _flag(
        60.0,
        "An instance whose scheduler has not come to a step boundary for this long sends no more "
        "heartbeats, so that its peers give it up; longer than any prefill step takes.",
        "S",
    )
    paced: str = _flag(
        "",
        "Pad every forward by sleeping to the modelled step time of this profile "
        "(see `star simulate`); for experiments on a CPU.",
        "PROFILE",
    )
    paced_kv_bytes: int = _flag(
        0,
        "Hold and move this many bytes of KV per token, as the modelled card's model has them "
        "(57344 for a 7B profile), instead of this model's own; 0: its own.",
        "N",
    )
    collect: str = _flag(
        "", "Write predictor training samples to this folder (see `star predictor collect`).", "DIR"
    )

    def __post_init__(self) -> None:
        """Refuse values no instance can run with.

        Raises:
            ConfigError: naming the flag.
        """
        for name in (
            "status_interval_ms",
            "move_deadline_s",
            "heartbeat_s",
            "peer_timeout_s",
            "stuck_timeout_s",
            "staging_mb",
            "copy_mb_per_step",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{_option(name)} must be positive, not {getattr(self, name)}")
        if self.copy_mb_per_s < 0:
            raise ConfigError("--star-copy-mb-per-s must be 0 or more")
        for name in ("max_moves", "max_guests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_option(name)} must be at least 1")
        for name in ("status_port", "migration_port"):
            if not 0 <= getattr(self, name) < 65536:
                raise ConfigError(f"{_option(name)} must be a port number or 0")
        if self.peer_timeout_s < 3 * self.heartbeat_s:
            raise ConfigError(
                "--star-peer-timeout-s must be at least three heartbeats",
                hint="raise it, or lower --star-heartbeat-s",
            )
        if self.transport not in (AUTO, *NAMES):
            raise ConfigError(
                f"--star-transport {self.transport!r} is unknown",
                hint=f"one of {', '.join((AUTO, *NAMES))}",
            )
        if self.fleet_key:
            FleetKey(self.fleet_key)
        elif not self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"--star-host {self.host} can be reached from other machines, and whoever does "
                "could read and write streams",
                hint="give every engine and the router --star-fleet-key FILE (star keys new FILE), "
                "or --star-insecure where the network itself is locked",
            )
        if self.paced:
            find(self.paced)
        if self.paced_kv_bytes < 0 or (self.paced_kv_bytes and not self.paced):
            raise ConfigError(
                "--star-paced-kv-bytes must be positive and needs --star-paced",
                hint="for example --star-paced 24gb-7b --star-paced-kv-bytes 57344",
            )
        if self.predictor not in (AUTO_HEAD, BUILTIN_HEAD, PREDICTOR_OFF) and not os.path.isfile(
            self.predictor
        ):
            raise ConfigError(
                f"--star-predictor {self.predictor!r} does not exist",
                hint="give the path of a trained head, 'auto', 'builtin' or 'off'",
            )

    @property
    def copy_bytes_per_step(self) -> int:
        """See ``copy_mb_per_step``."""
        return max(1, int(self.copy_mb_per_step * 1e6))

    @property
    def copy_bytes_per_s(self) -> int:
        """See ``copy_mb_per_s``."""
        return int(self.copy_mb_per_s * 1e6)


def _option(name: str) -> str:
    return "--star-" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the STAR group to SGLang's own parser."""
    group = parser.add_argument_group(
        "STAR", "decode-phase rescheduling; nothing below has any effect without --star"
    )
    group.add_argument("--star", action="store_true", default=False, help="Enable STAR.")
    for field in dataclasses.fields(StarConfig):
        help_text = f"{field.metadata['help']} [{field.default}]".replace("%", "%%")
        kind: dict[str, Any] = {"type": type(field.default), "metavar": field.metadata["metavar"]}
        if isinstance(field.default, bool):
            kind = {"action": "store_true"}
        group.add_argument(
            _option(field.name),
            dest="star_" + field.name,
            default=field.default,
            help=help_text,
            **kind,
        )


def from_arguments(args: argparse.Namespace) -> StarConfig | None:
    """Return the configuration, or None without ``--star``.

    Raises:
        ConfigError: a value is wrong, or a ``--star-*`` flag was given without ``--star``.
    """
    values: dict[str, Any] = {
        field.name: getattr(args, "star_" + field.name, field.default)
        for field in dataclasses.fields(StarConfig)
    }
    if getattr(args, "star", False):
        return StarConfig(**values)
    for field in dataclasses.fields(StarConfig):
        if values[field.name] != field.default:
            raise ConfigError(f"{_option(field.name)} needs --star", hint="add --star")
    return None
