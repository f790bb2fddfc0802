"""How the fields of the configuration are called on the command line."""

from __future__ import annotations

from typing import Final

SECONDS: Final = {
    "request_timeout", "health_check_interval", "health_check_timeout", "queue_timeout",
    "status_stale", "head_timeout", "body_timeout", "sse_keepalive",
}  # fmt: skip


METAVARS: Final[dict[str | type, str]] = {
    "host": "ADDRESS", "port": "PORT", "api_key": "KEY", "admin_api_key": "KEY",
    "fleet_key": "FILE",
    "max_payload_bytes": "BYTES", "max_buffered_bytes": "BYTES", "prometheus_host": "ADDRESS",
    "prometheus_port": "PORT", "health_check_endpoint": "PATH", "log_dir": "FOLDER",
    "tls_cert_path": "FILE", "tls_key_path": "FILE",
    "client_cert_path": "FILE", "client_key_path": "FILE",
    "policy": "NAME", "prefill_policy": "NAME", "max_moves_per_second": "N", int: "N", float: "S",
}  # fmt: skip


NAMES: Final = {
    "fleet_key": "--star-fleet-key",
    "insecure": "--star-insecure",
    "max_payload_bytes": "--max-payload-size",
    "max_buffered_bytes": "--max-buffered-size",
    "head_timeout": "--client-head-timeout-secs",
    "body_timeout": "--client-body-timeout-secs",
    "shutdown_grace": "--shutdown-grace-period-secs",
    "rate_limit": "--rate-limit-tokens-per-second",
}


def flag(name: str) -> str:
    """The flag that sets a field of the configuration."""
    if name in NAMES:
        return NAMES[name]
    return "--" + name.replace("_", "-") + ("-secs" if name in SECONDS else "")
