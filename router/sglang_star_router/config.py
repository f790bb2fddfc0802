"""``RouterConfig``: everything the router can be told, frozen and validated once."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_star.errors import ConfigError
from sglang_star_router.control_key import ControlKey
from sglang_star_router.faults import FaultLimits
from sglang_star_router.flags import flag
from sglang_star_router.members import Member


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
                raise ConfigError(f"{flag(name)} must be positive, not {getattr(self, name)}")
        for name in ("max_moves", "health_failure_threshold", "health_success_threshold"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("queue_size", "move_cooldown", "sse_keepalive",
                     "shutdown_grace", "rate_limit"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ConfigError(f"{flag(name)} must not be negative")
        if self.max_concurrent_requests == 0 or self.max_concurrent_requests < -1:
            raise ConfigError("--max-concurrent-requests must be positive, or -1 for no limit")
        for pair in ("tls", "client"):
            cert, key = f"{pair}_cert_path", f"{pair}_key_path"
            if (getattr(self, cert) is None) != (getattr(self, key) is None):
                raise ConfigError(f"{flag(cert)} and {flag(key)} belong together")
        if not self.health_check_endpoint.startswith("/"):
            raise ConfigError("--health-check-endpoint must begin with a slash")
