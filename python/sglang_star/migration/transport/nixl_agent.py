"""NIXL's agent, as much of it as is needed."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import torch

from sglang_star.errors import PeerError

PROGRESS_US: Final = 1000
"""Pause of NIXL's own thread between two looks; its default, 0, keeps a core busy for ever."""


class Agent:
    """For one thread.

    Raises:
        Exception: NIXL's own errors, which have no base in common, from every call.
    """

    def __init__(self, name: str) -> None:
        import nixl._api

        self._nixl: Any = nixl._api.nixlBind
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.pthrDelay = PROGRESS_US
        self._agent = self._nixl.nixlAgent(name, config)
        self._backend = self._agent.createBackend("UCX", {})

    def register(self, tensor: torch.Tensor) -> None:
        """Memory that is read, or read into."""
        listed = self._nixl.nixlRegDList(self._nixl.DRAM_SEG)
        listed.addDesc((tensor.data_ptr(), tensor.numel(), 0, b""))
        self._agent.registerMem(listed, [self._backend])

    def metadata(self) -> bytes:
        """What others meet this agent by."""
        return bytes(self._agent.getLocalMD())

    def meet(self, metadata: bytes) -> str:
        """Take up a peer's agent; its name."""
        name = self._agent.loadRemoteMD(metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def forget(self, name: str) -> None:
        """Drop a peer's agent, and the connection to it."""
        self._agent.invalidateRemoteMD(name)

    def read(self, name: str, here: int, there: int, size: int) -> Any:
        """Begin to read; the handle of the transfer."""
        handle = self._agent.createXferReq(
            self._nixl.NIXL_READ,
            self._piece(here, size),
            self._piece(there, size),
            name,
            b"",
            [self._backend],
        )
        self._agent.postXferReq(handle, b"")
        return handle

    def is_done(self, handle: Any) -> bool:
        """Whether it is.

        Raises:
            PeerError: it has failed.
        """
        status = self._agent.getXferStatus(handle)
        if status == self._nixl.NIXL_SUCCESS:
            return True
        if status == self._nixl.NIXL_IN_PROG:
            return False
        raise PeerError(f"a transfer failed: {status}")

    def release(self, handle: Any) -> None:
        """Forget a transfer that is over, or can end no more."""
        with contextlib.suppress(Exception):  # what cannot be released is NIXL's to keep
            self._agent.releaseXferReq(handle)

    def _piece(self, address: int, size: int) -> Any:
        listed = self._nixl.nixlXferDList(self._nixl.DRAM_SEG)
        listed.addDesc((address, size, 0))
        return listed
