"""Flags of sglang_router 0.3.2: each is understood, or refused by name with a hint.

``STAR_PEER_PYTHON``, the Python of an environment with that release, compares the list with the
real ``--help``.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from sglang_star.errors import ConfigError
from sglang_star_router.command_line import build_parser, parse_args
from sglang_star_router.peer_flags import REFUSED

PEER_FLAGS = frozenset(
    re.findall(
        r"--\S+",
        """
--api-key --assignment-mode --backend --balance-abs-threshold --balance-rel-threshold
--bucket-adjust-interval-secs --ca-cert-paths --cache-threshold --cb-failure-threshold
--cb-success-threshold --cb-timeout-duration-secs --cb-window-duration-secs
--chat-template --client-cert-path --client-key-path --control-plane-api-keys
--control-plane-audit-enabled --cors-allowed-origins --decode --decode-policy
--decode-selector --disable-circuit-breaker --disable-health-check --disable-retries
--dp-aware --enable-igw --enable-trace --eviction-interval-secs --health-check-endpoint
--health-check-interval-secs --health-check-timeout-secs --health-failure-threshold
--health-success-threshold --history-backend --host --jwt-audience --jwt-issuer
--jwt-jwks-uri --jwt-role-mapping --log-dir --log-level --max-concurrent-requests
--max-idle-secs --max-payload-size --max-tree-size --mcp-config-path --mini-lb
--model-path --oracle-connect-descriptor --oracle-password --oracle-pool-max
--oracle-pool-min --oracle-pool-timeout-secs --oracle-tns-alias --oracle-username
--oracle-wallet-path --otlp-traces-endpoint --pd-disaggregation --policy --port
--postgres-db-url --postgres-pool-max --prefill --prefill-policy --prefill-selector
--prometheus-duration-buckets --prometheus-host --prometheus-port --queue-size
--queue-timeout-secs --rate-limit-tokens-per-second --reasoning-parser --redis-pool-max
--redis-retention-days --redis-url --request-id-headers --request-timeout-secs
--retry-backoff-multiplier --retry-initial-backoff-ms --retry-jitter-factor
--retry-max-backoff-ms --retry-max-retries --selector --service-discovery
--service-discovery-namespace --service-discovery-port --shutdown-grace-period-secs
--tls-cert-path --tls-key-path --tokenizer-cache-enable-l0 --tokenizer-cache-enable-l1
--tokenizer-cache-l0-max-entries --tokenizer-cache-l1-max-memory --tokenizer-path
--tool-call-parser --worker-startup-check-interval --worker-startup-timeout-secs
--worker-urls
        """,
    )
)

WORKER = ["--worker-urls", "http://127.0.0.1:1"]


def understood() -> set[str]:
    return {name for action in build_parser()._actions for name in action.option_strings}


def test_every_flag_of_the_peer_is_understood_or_refused():
    assert not understood() & set(REFUSED)
    assert PEER_FLAGS - understood() == set(REFUSED)


@pytest.mark.parametrize("flag", sorted(REFUSED))
def test_a_refused_flag_is_named_with_what_to_do_instead(flag):
    for words in ([flag, "1"], [f"{flag}=1"], [flag]):
        with pytest.raises(ConfigError) as refused:
            parse_args([*WORKER, *words])
        assert flag in refused.value.message
        assert refused.value.hint


def test_what_is_understood_is_taken_as_the_peer_writes_it(tmp_path):
    config = parse_args(
        [
            *WORKER, "--policy", "round_robin", "--log-level", "warn", "--log-dir", str(tmp_path),
            "--max-payload-size", "1000", "--shutdown-grace-period-secs", "5",
            "--prometheus-port", "29000", "--prometheus-host", "0.0.0.0",
            "--prometheus-duration-buckets", "0.1", "1",
            "--cors-allowed-origins", "http://page.invalid",
            "--max-concurrent-requests", "64", "--rate-limit-tokens-per-second", "10",
            "--health-check-endpoint", "/health_generate", "--ca-cert-paths", "a.pem", "b.pem",
            "--tls-cert-path", "c", "--tls-key-path", "k", "--client-cert-path", "c",
            "--client-key-path", "k", "--control-plane-audit-enabled",
            "--control-plane-api-keys", "1:ann:admin:s:e:c", "2:bob:user:t",
        ]
    )  # fmt: skip
    assert config.log_level == "warning"
    assert config.max_payload_bytes == 1000
    assert config.shutdown_grace == 5
    assert config.prometheus_duration_buckets == (0.1, 1.0)
    assert config.ca_cert_paths == ("a.pem", "b.pem")
    keys = [(one.name, one.admin, one.key) for one in config.control_plane_api_keys]
    assert keys == [("1 (ann)", True, "s:e:c"), ("2 (bob)", False, "t")]
    assert "s:e:c" not in repr(config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--control-plane-api-keys", "1:ann:chief:secret"], "ROLE"),
        (["--control-plane-api-keys", "secret"], "ID:NAME:ROLE:KEY"),
        (["--tls-cert-path", "c"], "--tls-key-path"),
        (["--client-key-path", "k"], "--client-cert-path"),
        (["--max-concurrent-requests", "0"], "--max-concurrent-requests"),
        (["--client-head-timeout-secs", "0"], "--client-head-timeout-secs"),
        (["--max-payload-size", "0"], "--max-payload-size"),
        (["--health-check-endpoint", "health"], "--health-check-endpoint"),
    ],
)
def test_what_is_of_no_use_is_refused_and_no_secret_repeated(words, said):
    with pytest.raises(ConfigError) as refused:
        parse_args([*WORKER, *words])
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.skipif("STAR_PEER_PYTHON" not in os.environ, reason="sglang_router is not here")
def test_the_list_is_the_peers_own():
    shown = subprocess.run(
        [os.environ["STAR_PEER_PYTHON"], "-m", "sglang_router.launch_router", "--help"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert set(re.findall(r"^  (--[a-z0-9-]+)", shown, re.MULTILINE)) == PEER_FLAGS
