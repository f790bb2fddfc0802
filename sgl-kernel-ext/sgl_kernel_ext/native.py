"""The compiled kernels in this process: loaded if they are there, else built in the background.

Nothing here waits for a compiler. Until a library is ready, and for good where it cannot be made,
:func:`get` returns None and the torch reference does the work.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any, Final

from sgl_kernel_ext import build
from sgl_kernel_ext.build import BuildError, Target

if TYPE_CHECKING:
    from tvm_ffi import Module

log = logging.getLogger(__name__)


class Library:
    """One library of kernels, through its life in a process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: Module | None = None
        self._builder: threading.Thread | None = None
        self.forget()
        # A child of a fork has no thread that goes on building.
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Look for the library anew with the next call, unless it is loaded."""
        self._lock = threading.Lock()
        self._sought = self._module is not None

    def get(self) -> Module | None:
        """The library, or None; the first call looks for it and starts what it takes."""
        if not self._sought:
            self.prepare()
        return self._module

    def prepare(self) -> None:
        """Load the library, or start to build it; returns at once and never raises."""
        with self._lock:
            if self._sought:
                return
            self._sought = True
        try:
            target = self._target()
            if not self._load(target):
                self._builder = threading.Thread(
                    target=self._build, args=(target,), name=f"build-{self._name}", daemon=True
                )
                self._builder.start()
        except Exception as error:
            self._give_up(error)

    def wait(self, timeout: float | None = None) -> Module | None:
        """The library once a build that is under way has ended."""
        self.prepare()
        if self._builder is not None:
            self._builder.join(timeout)
        return self._module

    def _target(self) -> Target:
        return build.host() if self._name == "host" else build.of_devices()

    def _build(self, target: Target) -> None:
        try:
            build.build(target)
            self._load(target)
        except Exception as error:
            self._give_up(error)

    def _load(self, target: Target) -> bool:
        path = build.path_of(target)
        if not path.exists():
            return False
        from tvm_ffi import load_module

        self._module = load_module(path)
        return True

    def _give_up(self, error: Exception) -> None:
        log.warning(
            "STAR: KV is copied by torch, which is slower; the %s kernels are not to be had: %s. "
            "`python -m sgl_kernel_ext` tries again.",
            self._name,
            error if isinstance(error, BuildError) else repr(error),
        )


_HOST: Final = Library("host")
_CUDA: Final = Library("cuda")


def library(device: str) -> Library:
    """The library for pools on a type of device: ``cpu`` or ``cuda``."""
    return _CUDA if device == "cuda" else _HOST


def prepare(device: str) -> None:
    """Have the kernels for a type of device ready soon; returns at once and never raises."""
    library(device).prepare()


def function(device: str, name: str) -> Any:
    """A function of the library, or None while there is none."""
    module = library(device).get()
    return None if module is None else getattr(module, name)
