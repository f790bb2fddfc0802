"""Compiling the kernels: once per source, flags and machine, into a cache that processes share.

``STAR_KERNEL_CACHE`` names the cache; by default it lies in the user's own.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CSRC: Final = Path(__file__).parent / "csrc"
CACHE: Final = "STAR_KERNEL_CACHE"
COMMON: Final = ("-std=c++17", "-O3")
SHARED: Final = ("-shared", "-fPIC", "-fvisibility=hidden", "-pthread")
TIMEOUT_S: Final = 600.0


class BuildError(RuntimeError):
    """A library of kernels cannot be made here; the message says what to do about it."""


@dataclass(frozen=True, slots=True)
class Target:
    """One file to make.

    Attributes:
        name: what its file name begins with.
        sources: the files to compile; all of ``csrc`` counts as included.
        flags: of the compiler, without places.
        cuda: it takes nvcc.
        suffix: of the file.
    """

    name: str
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    cuda: bool = False
    suffix: str = ".so"


def host() -> Target:
    """The library for host pools."""
    # A piece that the compiler knows to be short it would copy byte by byte.
    flags = (*COMMON, *SHARED, "-fno-builtin-memcpy", *_vectors())
    return Target("host", (CSRC / "binding_host.cc",), flags)


def cuda(capabilities: Iterable[str]) -> Target:
    """The library for CUDA pools on GPUs of these compute capabilities, such as ``90``."""
    flags = (*COMMON, "-shared", f"-Xcompiler={','.join(SHARED[1:])}", *gencode(capabilities))
    return Target("cuda", (CSRC / "kv_copy.cu", CSRC / "binding_cuda.cc"), flags, cuda=True)


def gencode(capabilities: Iterable[str]) -> tuple[str, ...]:
    """nvcc's flags for machine code of all of them."""
    return tuple(f"-gencode=arch=compute_{c},code=sm_{c}" for c in sorted(set(capabilities)))


def of_this_machine() -> list[Target]:
    """What there is a use for here: always ``host``, and ``cuda`` where torch sees a device."""
    import torch

    return [host(), of_devices()] if torch.cuda.is_available() else [host()]


def of_devices() -> Target:
    """The library for the GPUs that torch sees."""
    import torch

    seen = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return cuda(f"{major}{minor}" for major, minor in seen)


def path_of(target: Target) -> Path:
    """Where a target lies once it is built: another file for every source and flag."""
    from tvm_ffi import __version__

    digest = hashlib.sha256()
    for word in (__version__, platform.machine(), *target.flags):
        digest.update(word.encode() + b"\0")
    for source in (*target.sources, *sorted(CSRC.iterdir())):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return folder() / f"{target.name}-{digest.hexdigest()[:16]}{target.suffix}"


def folder() -> Path:
    """The cache."""
    if named := os.environ.get(CACHE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sglang-star" / "kernels"


def build(target: Target) -> Path:
    """Compile a target unless it is there; return its path.

    Safe from any number of processes: one compiles, the others wait for it, and the file appears
    whole or not at all.

    Raises:
        BuildError: there is no compiler, it failed, or the cache cannot be written.
    """
    path = path_of(target)
    if path.exists():
        return path
    command = [*compiler(target), *target.flags, *places(target)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.with_suffix(".lock").open("w") as lock:
            # Of this process alone: a child forked meanwhile must not hold it on.
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(command, target, path)
    except OSError as error:
        raise BuildError(
            f"cannot write the kernel cache {path.parent}: {error}; name another with {CACHE}"
        ) from error
    return path


def compiler(target: Target) -> list[str]:
    """The command that compiles.

    Raises:
        BuildError: there is none.
    """
    cxx = os.environ.get("CXX", "g++")
    if shutil.which(cxx) is None:
        raise BuildError(f"there is no C++ compiler {cxx!r}; install g++, or name one with CXX")
    return [str(nvcc()), "-ccbin", cxx] if target.cuda else [cxx]


def nvcc() -> Path:
    """CUDA's compiler: of CUDA_HOME, else of the Python packages, else of PATH.

    Raises:
        BuildError: there is none.
    """
    if home := os.environ.get("CUDA_HOME"):
        return Path(home, "bin", "nvcc")
    # The packages come in torch's own CUDA version; what PATH has may be any.
    spec = importlib.util.find_spec("nvidia")
    for root in (spec and spec.submodule_search_locations) or ():
        if found := sorted(Path(root).glob("cu*/bin/nvcc")):
            return found[-1]
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    raise BuildError("there is no nvcc; install nvidia-cuda-nvcc, or set CUDA_HOME")


def places(target: Target) -> list[str]:
    """Sources, include folders and libraries, as arguments."""
    from tvm_ffi import libinfo

    includes = (CSRC, libinfo.find_include_path(), libinfo.find_dlpack_include_path())
    words = [*map(str, target.sources), *(f"-I{include}" for include in includes)]
    if target.suffix == ".so":
        words += [f"-L{Path(libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi"]
    return words


def _vectors() -> tuple[str, ...]:
    # Part of the file's name, so that machines which share a cache get what they can run.
    cpuinfo = Path("/proc/cpuinfo")
    has = cpuinfo.exists() and " avx2 " in cpuinfo.read_text()
    return ("-mavx2",) if has else ()


def _compile(command: list[str], target: Target, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch, path.name)
        try:
            done = subprocess.run(
                [*command, "-o", str(made)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"compiling {target.name} took over {TIMEOUT_S:.0f} s") from error
        if done.returncode:
            end = "\n".join(done.stdout.splitlines()[-20:])
            raise BuildError(f"compiling {target.name} failed: {' '.join(command)}\n{end}")
        os.replace(made, path)
