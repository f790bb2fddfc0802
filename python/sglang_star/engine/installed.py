"""The contract against the SGLang that is installed, before an engine starts."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from sglang_star import SGLANG_RELEASES, SGLANG_VERSION
from sglang_star.engine import check, hooked
from sglang_star.engine.check import Finding
from sglang_star.engine.contract import ROWS
from sglang_star.engine.contract.row import Row
from sglang_star.engine.source import Folders, Source, installed, release_of
from sglang_star.errors import ContractError
from sglang_star.hooks import HOOKS
from sglang_star.model import cache_root


def everything(source: Source) -> tuple[Row, ...]:
    """The contract's rows and the hooks for the release that a source holds.

    One that is not supported is held against the rows of the newest that is.
    """
    found = release_of(source)
    known = found if found in SGLANG_RELEASES else SGLANG_VERSION
    return (*ROWS, *hooked.rows(tuple(hook for hook in HOOKS if hook.is_for(known))))


def verify() -> None:
    """Refuse an SGLang that does not have all that STAR relies on.

    Raises:
        ContractError: naming the first thing that is missing or changed.
    """
    findings = known_findings()
    if not findings:
        return
    first, others = findings[0], len(findings) - 1
    raise ContractError(
        f"{first}{f', and {others} more' if others else ''}; STAR needs it: {first.row.why}",
        hint="`star compat` lists everything that STAR misses in this SGLang; reinstall the "
        "release it is built for, unmodified, or launch without --star",
    )


@functools.cache
def known_findings() -> tuple[Finding, ...]:
    """What is wrong with the installed SGLang; looked up once, forks know it from their parent."""
    source = installed()
    return checked(source, everything(source), cache_root() / "contract.json")


def checked(source: Folders, rows: Iterable[Row], memory: Path) -> tuple[Finding, ...]:
    """Findings of a check, which is spared if ``memory`` says the same files passed before."""
    rows = tuple(rows)
    table = hashlib.sha256("\n".join(map(repr, rows)).encode()).hexdigest()
    if _passed(memory, table, source):
        return ()
    report = check.check(rows, source)
    if not report.findings:
        _remember(memory, table, source)
    return report.findings


def _passed(memory: Path, table: str, source: Folders) -> bool:
    try:
        told = json.loads(memory.read_bytes())
        return (
            told["table"] == table
            and told["packages"] == sorted(source.packages)
            and all(_stamp(Path(path)) == stamp for path, stamp in told["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _remember(memory: Path, table: str, source: Folders) -> None:
    files = {str(path): _stamp(path) for path in source.read}
    told = {"table": table, "packages": sorted(source.packages), "files": files}
    # Without a place to keep it, every start checks again.
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_name(f"{memory.name}.{os.getpid()}")
        partial.write_text(json.dumps(told))
        partial.replace(memory)


def _stamp(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ino]
