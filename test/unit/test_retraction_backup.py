"""Where a decode instance on a CPU keeps copies of retracted KV: not in memory that CUDA pins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_star.errors import ConfigError

launch = pytest.importorskip("sglang_star.launch")


def arguments(mode: str, backup: str | None) -> Any:
    return SimpleNamespace(
        device="cpu",
        attention_backend="torch_native",
        disaggregation_mode=mode,
        disaggregation_decode_retraction_backup=backup,
    )


@pytest.mark.parametrize(
    ("mode", "given", "taken"),
    [
        ("decode", None, "cpu_tensor"),
        ("decode", "cpu_tensor", "cpu_tensor"),
        ("decode", "none", "none"),
        ("prefill", None, None),
        ("null", None, None),
    ],
)
def test_a_cpu_takes_what_works_there(
    monkeypatch: pytest.MonkeyPatch, mode: str, given: str | None, taken: str | None
) -> None:
    monkeypatch.setattr(launch, "is_portable_cpu", lambda platform: True)
    args = arguments(mode, given)
    launch._choose_cpu(args)
    launch._refuse_pinned_memory(args)
    assert args.disaggregation_decode_retraction_backup == taken


def test_what_does_not_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_portable_cpu", lambda platform: True)
    with pytest.raises(ConfigError) as refused:
        launch._refuse_pinned_memory(arguments("decode", "host_pool"))
    assert "cpu_tensor" in refused.value.hint


def test_a_device_keeps_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_portable_cpu", lambda platform: False)
    for given in (None, "host_pool"):
        args = arguments("decode", given)
        launch._choose_cpu(args)
        launch._refuse_pinned_memory(args)
        assert args.disaggregation_decode_retraction_backup == given
