"""The kernels compiled for every GPU that SGLang is used on, and what came out."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from sgl_kernel_ext.build import COMMON, CSRC, BuildError, Target, build, gencode, nvcc

CAPABILITIES = ("80", "89", "90a", "100a", "120")
KERNELS = 6
"""Gather, scatter and transfer, for two types of slots."""
DEPTH = 8
"""Vectors in flight per lane: kDepth of kv_copy.cuh."""


def cuobjdump() -> str:
    """NVIDIA's disassembler, of a toolkit or of the triton package."""
    spec = importlib.util.find_spec("triton")
    for root in (spec and spec.submodule_search_locations) or ():
        if (tool := Path(root, "backends", "nvidia", "bin", "cuobjdump")).exists():
            return str(tool)
    return shutil.which("cuobjdump") or pytest.skip("there is no cuobjdump")


@pytest.fixture(scope="module")
def fatbin() -> Path:
    """All of them in one file, compiled once per source."""
    try:
        nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    flags = (*COMMON, "-fatbin", "--threads=2", *gencode(CAPABILITIES))
    return build(Target("machine-code", (CSRC / "kv_copy.cu",), flags, cuda=True, suffix=".fatbin"))


@functools.cache
def dump(fatbin: Path, capability: str, what: str) -> str:
    command = [cuobjdump(), what, "--gpu-architecture", f"sm_{capability}", str(fatbin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_is_spilled(fatbin: Path, capability: str) -> None:
    usage = dump(fatbin, capability, "--dump-resource-usage")
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(found) == KERNELS
    for registers, stack, local in found:
        assert (int(stack), int(local)) == (0, 0)
        # 512 threads have to find room in the 65,536 registers of a multiprocessor.
        assert int(registers) <= 128
    assert not re.search(r"\b(LDL|STL)\b", dump(fatbin, capability, "--dump-sass"))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_vectors_of_16_bytes_are_loaded_together(fatbin: Path, capability: str) -> None:
    sass = dump(fatbin, capability, "--dump-sass")
    kernels = re.split(r"Function : ", sass)[1:]
    assert len(kernels) == KERNELS
    for kernel in kernels:
        accesses = re.findall(r"\b(LDG|STG)\.E\.EF(?:\.(128|64|U8))?\b", kernel)
        counts = Counter(accesses)
        for width in ("128", "64", "", "U8"):  # of 16, 8, 4 and 1 bytes
            assert counts["LDG", width] == counts["STG", width] == DEPTH, (width, counts)
        # All loads are issued before the first one is waited for.
        wide = [op for op, width in accesses if width == "128"]
        assert wide == ["LDG"] * DEPTH + ["STG"] * DEPTH
