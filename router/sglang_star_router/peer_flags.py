"""Flags of ``sglang_router`` that mean nothing here, each with what to do instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sglang_star.errors import ConfigError

_POLICY: Final = "it belongs to a policy this router does not have; see --policy and --policy-param"
_DISCOVERY: Final = "name the instances with --worker-urls, or with --prefill and --decode"
_TOKENIZER: Final = "engines tokenize and parse: give it to them"
_STORE: Final = "engines store responses themselves: start them with --enable-response-store"
_JWT: Final = "use --admin-api-key or --control-plane-api-keys"
_TRACE: Final = "trace at the engines: the router passes trace headers on to them"

REFUSED: Final[dict[str, str]] = {
    "--cache-threshold": _POLICY,
    "--balance-abs-threshold": _POLICY,
    "--balance-rel-threshold": _POLICY,
    "--bucket-adjust-interval-secs": _POLICY,
    "--eviction-interval-secs": _POLICY,
    "--max-tree-size": _POLICY,
    "--max-idle-secs": _POLICY,
    "--assignment-mode": _POLICY,
    "--dp-aware": "give each data-parallel rank a port of its own and name it as an instance",
    "--enable-igw": "run one router for each model",
    "--mini-lb": "leave it out: --pd-disaggregation is all that prefill and decode need",
    "--worker-startup-timeout-secs": "the router serves at once, with the instances that are up",
    "--worker-startup-check-interval": "an instance that is down is looked at every second",
    "--service-discovery": _DISCOVERY,
    "--selector": _DISCOVERY,
    "--service-discovery-port": _DISCOVERY,
    "--service-discovery-namespace": _DISCOVERY,
    "--prefill-selector": _DISCOVERY,
    "--decode-selector": _DISCOVERY,
    "--request-id-headers": "every header reaches the engines; a request's own name is rid",
    "--disable-health-check": "moves rely on it; --health-check-interval-secs makes it rare",
    "--model-path": _TOKENIZER,
    "--tokenizer-path": _TOKENIZER,
    "--chat-template": _TOKENIZER,
    "--tokenizer-cache-enable-l0": _TOKENIZER,
    "--tokenizer-cache-l0-max-entries": _TOKENIZER,
    "--tokenizer-cache-enable-l1": _TOKENIZER,
    "--tokenizer-cache-l1-max-memory": _TOKENIZER,
    "--reasoning-parser": _TOKENIZER,
    "--tool-call-parser": _TOKENIZER,
    "--mcp-config-path": "give engines --tool-server",
    "--backend": "instances are SGLang engines; leave it out",
    "--history-backend": _STORE,
    "--oracle-wallet-path": _STORE,
    "--oracle-tns-alias": _STORE,
    "--oracle-connect-descriptor": _STORE,
    "--oracle-username": _STORE,
    "--oracle-password": _STORE,
    "--oracle-pool-min": _STORE,
    "--oracle-pool-max": _STORE,
    "--oracle-pool-timeout-secs": _STORE,
    "--postgres-db-url": _STORE,
    "--postgres-pool-max": _STORE,
    "--redis-url": _STORE,
    "--redis-pool-max": _STORE,
    "--redis-retention-days": _STORE,
    "--enable-trace": _TRACE,
    "--otlp-traces-endpoint": _TRACE,
    "--jwt-issuer": _JWT,
    "--jwt-audience": _JWT,
    "--jwt-jwks-uri": _JWT,
    "--jwt-role-mapping": _JWT,
}  # fmt: skip


def refuse_flags(argv: Sequence[str]) -> None:
    """Refuse what another router would understand and this one would have to ignore.

    Raises:
        ConfigError: naming the first such flag and what to do instead.
    """
    for word in argv:
        hint = REFUSED.get(word.partition("=")[0])
        if hint is not None:
            raise ConfigError(f"{word.partition('=')[0]} has no meaning in this router", hint=hint)
