from __future__ import annotations

import argparse

import pytest

from sglang_star.config import StarConfig, add_arguments, from_arguments
from sglang_star.errors import ConfigError


def parse(*argv: str) -> StarConfig | None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_arguments(parser.parse_args(argv))


def test_off_by_default() -> None:
    assert parse() is None


def test_every_flag_reaches_its_field() -> None:
    config = parse(
        "--star", "--star-predictor", "off", "--star-max-moves", "9", "--star-host", "::1"
    )
    assert config is not None
    assert (config.predictor, config.max_moves, config.host) == ("off", 9, "::1")


def test_a_star_flag_without_star_is_an_error() -> None:
    with pytest.raises(ConfigError, match="--star-max-moves needs --star"):
        parse("--star-max-moves", "3")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("--star-predictor", "/no/such/head"), "--star-predictor"),
        (("--star-status-interval-ms", "0"), "--star-status-interval-ms"),
        (("--star-max-guests", "0"), "--star-max-guests"),
        (("--star-migration-port", "70000"), "--star-migration-port"),
        (("--star-peer-timeout-s", "0.3"), "--star-peer-timeout-s"),
        (("--star-transport", "pigeon"), "--star-transport"),
        (("--star-paced", "warp-9"), "warp-9"),
    ],
)
def test_bad_values_name_their_flag(argv: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse("--star", *argv)
