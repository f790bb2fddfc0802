"""Compiling: once for all processes, in the background; what is said where it cannot be done."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sgl_kernel_ext as kernels
from sgl_kernel_ext import KvBuffers, build, native
from sgl_kernel_ext.__main__ import main
from sgl_kernel_ext.build import BuildError, Target
from sgl_kernel_ext.native import Library

HANGS_S = 60.0
"""What takes longer than this will never happen."""

COMPILER = """#!/bin/sh
echo called >>"$CALLS"
while [ -e "$GATE" ]; do sleep 0.02; done
[ -z "$FAILS" ] || { echo "kv_copy.cuh:1: error: $FAILS"; exit 1; }
for file; do :; done
echo made >"$file"
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that notes its calls and waits while a gate is there; returns its folder."""
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    settings = {
        build.CACHE: tmp_path / "cache",
        "CXX": compiler,
        "CALLS": tmp_path / "calls",
        "GATE": tmp_path / "gate",
        "FAILS": "",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path


def calls(folder: Path) -> int:
    path = folder / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_is_built_once_and_found_again(fake: Path) -> None:
    first = build.build(build.host())
    assert first.read_text() == "made\n"
    assert build.build(build.host()) == first
    assert calls(fake) == 1


def test_other_sources_or_flags_are_another_file(fake: Path) -> None:
    source = fake / "x.cc"
    source.write_text("int x;")
    plain = build.path_of(Target("x", (source,), ()))
    assert build.path_of(Target("x", (source,), ("-g",))) != plain
    source.write_text("int y;")
    assert build.path_of(Target("x", (source,), ())) != plain


def test_processes_that_build_at_once_compile_once(fake: Path) -> None:
    (fake / "gate").touch()
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            os._exit(0 if build.build(build.host()).read_text() == "made\n" else 1)
        children.append(child)
    # The first one compiles until the gate is gone; whoever comes meanwhile has to wait for it.
    while not calls(fake):
        time.sleep(0.01)
    (fake / "gate").unlink()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert calls(fake) == 1
    assert [path.suffix for path in sorted((fake / "cache").iterdir())] == [".lock", ".so"]


def test_a_failure_leaves_nothing_and_shows_what_the_compiler_said(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "no such thing")
    with pytest.raises(BuildError, match="no such thing"):
        build.build(build.host())
    assert [path.suffix for path in (fake / "cache").iterdir()] == [".lock"]


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(build.CACHE, str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler 'no-such-compiler'; install g\+\+"):
        build.build(build.host())


def test_a_cache_that_cannot_be_written(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake / "file").touch()
    monkeypatch.setenv(build.CACHE, str(fake / "file" / "cache"))
    with pytest.raises(BuildError, match=f"name another with {build.CACHE}"):
        build.build(build.host())


def test_torch_copies_until_the_kernels_are_there(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake / "gate").touch()
    library = Library("host")
    monkeypatch.setattr(native, "library", lambda device: library)
    pool = KvBuffers([torch.arange(40, dtype=torch.uint8).view(10, 4)])
    out = torch.empty(8, dtype=torch.uint8)
    kernels.gather(pool, torch.tensor([2, 9]), out)  # starts the build, and does not wait for it
    assert out.tolist() == [8, 9, 10, 11, 36, 37, 38, 39]
    assert library.get() is None
    loaded: list[Path] = []
    monkeypatch.setattr("tvm_ffi.load_module", lambda path: loaded.append(path) or "module")
    (fake / "gate").unlink()
    assert library.wait(HANGS_S) == "module" == library.get()
    assert loaded == [build.path_of(build.host())]


def test_says_once_why_torch_copies(
    fake: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    library = Library("host")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert library.wait(HANGS_S) is None
    (record,) = caplog.records
    assert "copied by torch" in record.getMessage()
    assert "no-such-compiler" in record.getMessage()
    assert "python -m sgl_kernel_ext" in record.getMessage()


def test_a_forked_child_looks_for_itself(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvm_ffi.load_module", lambda path: "module")
    (fake / "gate").touch()
    library = Library("host")
    library.prepare()
    while not calls(fake):  # its builder now holds the lock
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        # The builder is not here: this process needs one of its own, or it never gets kernels.
        (fake / "gate").unlink()
        os._exit(0 if library.wait(HANGS_S) == "module" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert library.wait(HANGS_S) == "module"
    assert calls(fake) == 1


def test_the_command_line(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith(f"host: {fake / 'cache'}")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv(build.CACHE, str(fake / "other"))
    assert main(["--arch", "90"]) == 1
    assert capsys.readouterr().err.count("install g++") == 2


def test_an_import_loads_neither_compiler_nor_library() -> None:
    code = (
        "import torch, sys; import sgl_kernel_ext;"
        "print([name for name in ('tvm_ffi', 'triton', 'sglang') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_cuda_library_is_built_and_loads_without_a_gpu() -> None:
    try:
        path = build.build(build.cuda(["90"]))
    except BuildError as error:
        pytest.skip(str(error))
    from tvm_ffi import load_module

    module = load_module(path)
    assert all(module.get_function(name) for name in ("gather", "scatter", "transfer"))
