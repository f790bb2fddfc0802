"""Folders in shared places that show whether their owner lives.

Whoever makes such a folder holds a lock on it (flock) for as long as it uses it. The kernel
drops the lock with the process, however that ends, and the next start removes what nobody holds. A
process id in the name would say less: ids come again, and those of another container that shares
the folder mean nothing here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat

_TOKEN = re.compile(r"[0-9a-f]{16}")


def make_folder(folder: str, prefix: str) -> tuple[str, int]:
    """Make an empty folder that only this user may look into.

    Returns:
        Its path and a descriptor that holds the lock; so does every duplicate.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        path = f"{folder}/{prefix}{secrets.token_hex(8)}"
        os.mkdir(path, 0o700)
        with contextlib.suppress(FileNotFoundError):  # swept before it could be locked
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _hold(path, descriptor):
                return path, descriptor


def is_name(name: str, prefix: str) -> bool:
    """Whether this module makes such names for ``prefix``."""
    return name.startswith(prefix) and bool(_TOKEN.fullmatch(name.removeprefix(prefix)))


def sweep(folder: str, prefix: str) -> list[str]:
    """Remove what dead owners left, and return its paths.

    Left alone: what a living process holds, what another user owns, and what cannot be removed.
    """
    removed = []
    try:
        names = [name for name in os.listdir(folder) if is_name(name, prefix)]
    except OSError:
        return []
    for name in names:
        path = f"{folder}/{name}"
        with contextlib.suppress(OSError):  # gone meanwhile, held, or not ours to open
            if _is_ours(path) and _remove(path):
                removed.append(path)
    return removed


def _hold(path: str, descriptor: int) -> bool:
    """Lock what was just made; False if a sweep took it for left behind in between."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    if _is_at(path, descriptor):
        return True
    os.close(descriptor)
    return False


def _is_at(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_ours(path: str) -> bool:
    found = os.lstat(path)
    return found.st_uid == os.geteuid() and stat.S_ISDIR(found.st_mode)


def _remove(path: str) -> bool:
    """Remove it unless somebody holds it; the lock is kept until it is gone.

    Raises:
        OSError: somebody holds it, or it cannot be opened or removed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(path, descriptor):
            return False
        shutil.rmtree(path)
        return True
    finally:
        os.close(descriptor)
