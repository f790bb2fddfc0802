"""Instances as named on the command line: where they listen, and what their role is."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from sglang_star.errors import ConfigError


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


def read_members(
    workers: list[str], pd: bool, prefill: list[list[str]], decode: list[list[str]]
) -> tuple[Member, ...]:
    """Turn the flags that name instances into members.

    Args:
        prefill: each a URL and, if given, a bootstrap port; decode: each a URL.

    Raises:
        ConfigError: flags that do not go together, or what is no URL or port.
    """
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
