"""Ways by which KV bytes come from one engine to another."""

from __future__ import annotations

from typing import Final

NAMES: Final = ("cuda_ipc", "shm", "nixl")
"""All there are, the fastest first."""
AUTO: Final = "auto"
"""The fastest that both sides have."""
