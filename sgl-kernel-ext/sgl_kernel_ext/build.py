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
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CSRC: Final = Path(__file__).parent / "csrc"
CACHE: Final = "STAR_KERNEL_CACHE"
COMMON: Final = ("-std=c++17", "-O3", "-shared")
TIMEOUT_S: Final = 600.0


class BuildError(RuntimeError):
    """A library of kernels cannot be made here; the message says what to do about it."""


@dataclass(frozen=True, slots=True)
class Target:
    """One library.

    Attributes:
        name: ``host`` or ``cuda``.
        architectures: compute capabilities such as ``90`` or ``100a``; of ``cuda`` only.
    """

    name: str
    architectures: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """File names in ``csrc``; what they include counts as well, so all of it is hashed."""
        if self.name == "host":
            return ("binding_host.cc",)
        return ("kv_copy.cu", "binding_cuda.cc")

    @property
    def flags(self) -> tuple[str, ...]:
        """The compiler's flags, without places."""
        if self.name == "host":
            return (*COMMON, "-fPIC", "-fvisibility=hidden", "-pthread")
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures]
        return (*COMMON, "-Xcompiler=-fPIC,-fvisibility=hidden", *codes)


HOST: Final = Target("host")


def path_of(target: Target) -> Path:
    """Where the library lies once it is built: another file for every source and flag."""
    from tvm_ffi import __version__

    digest = hashlib.sha256()
    for word in (__version__, platform.machine(), *target.sources, *target.flags):
        digest.update(word.encode() + b"\0")
    for source in sorted(CSRC.iterdir()):
        digest.update(source.read_bytes())
    return cache() / f"{target.name}-{digest.hexdigest()[:16]}.so"


def cache() -> Path:
    """The folder of compiled libraries."""
    if named := os.environ.get(CACHE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sglang-star" / "kernels"


def build(target: Target) -> Path:
    """Compile a library unless it is there; return its path.

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
            fcntl.flock(lock, fcntl.LOCK_EX)
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
    host = os.environ.get("CXX", "g++").split()
    if shutil.which(host[0]) is None:
        raise BuildError(f"no C++ compiler {host[0]!r}; install g++, or name one with CXX")
    if target.name == "host":
        return host
    return [str(nvcc()), "-ccbin", host[0]]


def nvcc() -> Path:
    """CUDA's compiler: of CUDA_HOME, else of the Python packages, else of PATH.

    Raises:
        BuildError: there is none.
    """
    if home := os.environ.get("CUDA_HOME"):
        return Path(home, "bin", "nvcc")
    # The packages come in torch's own CUDA version; what PATH has may be any.
    if (spec := importlib.util.find_spec("nvidia")) and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            if found := sorted(Path(folder).glob("cu*/bin/nvcc")):
                return found[-1]
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    raise BuildError("no nvcc; install the package nvidia-cuda-nvcc, or set CUDA_HOME")


def places(target: Target) -> list[str]:
    """Sources, include folders and libraries, as arguments."""
    from tvm_ffi import libinfo

    library = Path(libinfo.find_libtvm_ffi())
    return [
        *(str(CSRC / source) for source in target.sources),
        f"-I{libinfo.find_include_path()}",
        f"-I{libinfo.find_dlpack_include_path()}",
        f"-L{library.parent}",
        "-ltvm_ffi",
    ]


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


def local() -> list[Target]:
    """What this machine has a use for: always ``host``, and ``cuda`` where torch sees a device."""
    import torch

    if not torch.cuda.is_available():
        return [HOST]
    return [HOST, of_devices()]


def of_devices() -> Target:
    """``cuda`` for the devices that torch sees."""
    import torch

    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return Target("cuda", tuple(sorted(f"{major}{minor}" for major, minor in capabilities)))
