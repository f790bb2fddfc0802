"""Certificates: the router's own for clients, and those of both sides towards instances."""

from __future__ import annotations

import ssl

from sglang_star.errors import ConfigError
from sglang_star_router.config import RouterConfig


def server_context(config: RouterConfig) -> ssl.SSLContext | None:
    """What clients are served with; None serves plain HTTP.

    Raises:
        ConfigError: a file cannot be read or used.
    """
    if config.tls_cert_path is None or config.tls_key_path is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load(context, config.tls_cert_path, config.tls_key_path)
    return context


def worker_context(config: RouterConfig) -> ssl.SSLContext | None:
    """What instances with ``https`` URLs are reached with; None takes the system's CAs.

    Raises:
        ConfigError: a file cannot be read or used.
    """
    if not config.ca_cert_paths and config.client_cert_path is None:
        return None
    context = ssl.create_default_context() if not config.ca_cert_paths else _of_cas(config)
    if config.client_cert_path is not None and config.client_key_path is not None:
        _load(context, config.client_cert_path, config.client_key_path)
    return context


def _of_cas(config: RouterConfig) -> ssl.SSLContext:
    """A context that believes these CAs and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in config.ca_cert_paths:
        try:
            context.load_verify_locations(path)
        except OSError as error:
            raise ConfigError(f"{path}: no CA certificate can be read: {error}") from None
    return context


def _load(context: ssl.SSLContext, cert: str, key: str) -> None:
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:
        raise ConfigError(
            f"{cert} and {key} cannot be used: {error}",
            hint="give a PEM certificate, with its chain, and its key without a passphrase",
        ) from None
