from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sgl_kernel_ext import native
from sgl_kernel_ext.build import COMMON, SHARED, Target, build


@pytest.fixture(scope="session")
def grid() -> Any:
    """The device's code, walked over a grid on the host."""
    from tvm_ffi import load_module

    source = Path(__file__).parent / "grid.cc"
    return load_module(build(Target("grid", (source,), (*COMMON, *SHARED))))


@pytest.fixture(scope="session")
def host() -> Any:
    """The library for host pools."""
    module = native.library("cpu").wait()
    assert module is not None, "the kernels were not built"
    return module
