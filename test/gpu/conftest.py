"""Tests on a GPU; benchmark/runs/gpu.sh runs them. They need torch and nvcc, and no SGLang.

``STAR_TEST_DEVICE=cpu`` runs what does not depend on streams on the host: a rehearsal of the tests.
"""

from __future__ import annotations

import os

import pytest
import torch

from sgl_kernel_ext import native


@pytest.fixture(scope="session")
def device() -> str:
    name = os.environ.get("STAR_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    assert native.library(name).wait() is not None, "the kernels were not built"
    return name


@pytest.fixture
def cuda(device: str) -> str:
    if device != "cuda":
        pytest.skip("of streams and devices")
    return device


@pytest.fixture
def _no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that falls back to torch is a failure here."""
    from sgl_kernel_ext import copies

    class Refused:
        def __getattr__(self, name: str) -> object:
            raise AssertionError("torch copied, and not the kernel")

    monkeypatch.setattr(copies, "reference", Refused())
