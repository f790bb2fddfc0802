"""Defects put into the protocol, one at a time: the simulation must find every one of them.

A mutation is a piece of a module's text, found there exactly once, and what it is replaced by in a
copy of the package. One that no history finds means a missing fault or invariant.

    PYTHONPATH=test python -m simulation.mutations                    # all, a table
    PYTHONPATH=test python -m simulation.mutations --limit 5000 NAME  # these, so many histories
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "python" / "sglang_star"
HANGS_S = 60.0
"""A mutated protocol may turn in circles: it is found as well."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """``old`` in ``module`` becomes ``new``; ``why`` it matters.

    ``also`` are further (module, old, new): where two checks say the same, both must go.
    """

    name: str
    module: str
    old: str
    new: str
    why: str
    also: tuple[tuple[str, str, str], ...] = ()


_RELAY, _ARRIVAL, _GUESTS = "migration/relay.py", "migration/arrival.py", "migration/guests.py"
_SOURCE, _CARGO, _MOVER = "migration/source.py", "migration/cargo.py", "migration/mover.py"
_NEVER = "            if False:\n"
_OUTFLOW, _WATCH = "migration/outflow.py", "migration/watch.py"

MUTATIONS = (
    # ------------------------------------------------------------------ home
    Mutation(
        "former host may still speak",
        _RELAY,
        "if chunk.migration_id != shadow.migration_id and chunk.index >= shadow.base:",
        "if False:",
        "tokens of a host that gave a move up and went on are mixed with those of its target",
    ),
    Mutation(
        "older hand-over believed",
        _RELAY,
        "if message.moves > getattr(shadow.req, MOVES, 0):",
        "if True:",
        "home goes back to a host that has handed the stream on",
    ),
    Mutation(
        "no fencing",
        _RELAY,
        "            if have > base:\n",
        "            if False:\n",
        "a target inserts what its source has given up, and home mixes both",
    ),
    Mutation(
        "former host ends the stream of another home",
        _RELAY,
        'if message.stream_id.rsplit("/", 2)[0] != self._post.peer.instance_id:',
        "if False:",
        "a repeated hand-over at its source releases the new host",
    ),
    Mutation(
        "tokens appended twice",
        _RELAY,
        "if chunk.index < have and not (",
        "if False and not (",
        "a repeated chunk reaches the client again",
    ),
    Mutation(
        "gap never noticed",
        _RELAY,
        "if shadow.early and now - shadow.gap_since > self._timeout_s:",
        "if False:",
        "a lost chunk leaves the stream waiting for ever",
    ),
    Mutation(
        "lost host not reclaimed",
        _RELAY,
        "for shadow in [s for s in self.shadows.values() if s.host == peer]:",
        "for shadow in list(self.shadows.values())[:0]:",
        "a stream ends with its host",
    ),
    Mutation(
        "orphan shadow kept",
        _RELAY,
        "elif now - shadow.confirmed_at > self._timeout_s:",
        "elif False:",
        "a host that no longer holds the stream is waited for",
    ),
    Mutation(
        "arrival home kept after the end",
        _RELAY,
        'self._over(shadow.stream_id, "the stream has ended at home")',
        "pass",
        "an abort while the request comes home leaves the guest, and its commit ends the engine",
        also=(
            (_ARRIVAL, "            if message.stream_id not in self._relay.shadows:\n", _NEVER),
        ),
    ),
    Mutation(
        "arrival home kept after a reclaim",
        _RELAY,
        'self._over(shadow.stream_id, "home recomputes the stream")',
        "pass",
        "a reclaimed request still holds KV of its arrival",
    ),
    Mutation(
        "end not told once only",
        _RELAY,
        "            reason = None  # it saw the end itself, and why\n",
        '            reason = reason or {"message": "over"}\n',
        "a stop is told as an abort",
    ),
    # ------------------------------------------------------------------ target
    Mutation(
        "order of pages unchecked",
        _ARRIVAL,
        "if message.start != self._engine.held(guest.req) or message.end <= message.start:",
        "if False:",
        "a lost or repeated piece of KV is not missed",
    ),
    Mutation(
        "pages of another move",
        _ARRIVAL,
        "        if guest.reserve.migration_id != message.migration_id:\n"
        "            return  # of an earlier move of the same stream\n",
        "",
        "a slot of an earlier move's carrier is taken for one of this",
    ),
    Mutation(
        "commit of another move",
        _ARRIVAL,
        "        if guest is None or guest.reserve.migration_id != message.migration_id:\n"
        "            return\n        if not guest.arriving:",
        "        if guest is None:\n            return\n        if not guest.arriving:",
        "what an earlier source of the stream had is inserted",
    ),
    Mutation(
        "commit taken twice",
        _ARRIVAL,
        "        if not guest.arriving:\n            return  # a repeated one",
        "        if False:\n            return  # a repeated one",
        "a repeated commit ends the guest that it began",
    ),
    Mutation(
        "commit home unchecked",
        _ARRIVAL,
        "if list(req.output_ids) != list(message.output_ids):",
        "if False:",
        "KV of other tokens than the client has is taken in",
    ),
    Mutation(
        "stream taken in twice",
        _ARRIVAL,
        "if message.stream_id in self._guests.by_stream:",
        "if False:",
        "the second guest hides the first, whose memory is lost",
    ),
    Mutation(
        "memory promised twice",
        _ARRIVAL,
        "if free - promised < message.context_tokens + kept:",
        "if False:",
        "guests are taken in that do not fit; costs a move, no stream: may survive",
    ),
    Mutation(
        "carrier of an arrival stays open",
        _GUESTS,
        "        guest.carrier.close()\n",
        "",
        "shared memory of a move that failed stays mapped",
    ),
    Mutation(
        "name of a guest stays",
        _GUESTS,
        "        self.by_rid.pop(guest.rid, None)\n",
        "",
        "what comes under it later is taken for a guest",
    ),
    Mutation(
        "arrival not given back",
        _GUESTS,
        "                self._engine.release(guest.req, keep_prefix=False)\n",
        "                pass\n",
        "a cancelled arrival keeps row and pages",
    ),
    Mutation(
        "arrival deadline forgotten",
        _GUESTS,
        "for guest in [g for g in self.arriving() if now > g.deadline]:",
        "for guest in self.arriving()[:0]:",
        "a guest whose source fell silent stays",
    ),
    Mutation(
        "unwanted guest kept",
        _GUESTS,
        "elif now - guest.confirmed_at > self._config.peer_timeout_s:",
        "elif False:",
        "a guest whose home has ended the stream decodes on",
    ),
    Mutation(
        "guest outlives its home",
        _GUESTS,
        "if guest.reserve.home == peer or (guest.arriving and guest.reserve.source == peer):",
        "if guest.arriving and guest.reserve.source == peer:",
        "a guest decodes for nobody",
    ),
    Mutation(
        "guest slot kept after a hand-over",
        _SOURCE,
        "            self._handed_over(move.stream_id)\n",
        "            pass\n",
        "a host of a chain keeps its guest for ever",
    ),
    Mutation(
        "arrival home kept when over",
        _GUESTS,
        "if guest is not None and guest.comes_home:",
        "if False:",
        "the shadow ends, the arriving guest stays",
    ),
    # ------------------------------------------------------------------ source
    Mutation(
        "slot freed by any answer",
        _SOURCE,
        "move.filled.get(message.slot) == message.end:",
        "message.slot in move.filled:",
        "a repeated answer frees a slot that is in use",
    ),
    Mutation(
        "slot freed before it is read",
        _CARGO,
        "            move.filled[slot] = end\n",
        "            move.filled[slot] = end\n            move.free_slots.insert(0, slot)\n",
        "a slot is filled again while the target still has to read it",
    ),
    Mutation(
        "move deadline forgotten",
        _SOURCE,
        "elif self._engine.now() > move.deadline:",
        "elif False:",
        "a move whose target never answers holds its request",
    ),
    Mutation(
        "moves on though ending",
        _SOURCE,
        "elif not move.off_batch and self._engine.is_ending(move.req):",
        "elif False:",
        "the abort of a moving request stays behind",
    ),
    Mutation(
        "moves on though retracted",
        _SOURCE,
        "elif not move.off_batch and not self._engine.is_running(move.req):",
        "elif False:",
        "KV that was taken away is gathered",
    ),
    Mutation(
        "unparked unsettled",
        _SOURCE,
        "        if self._engine.is_settled(move.req):\n"
        "            move.machine.fire(HomeEvent.RESUME)",
        "        if True:\n            move.machine.fire(HomeEvent.RESUME)",
        "a request is put back while its last step is in flight",
    ),
    Mutation(
        "aborted while parked keeps its KV",
        _SOURCE,
        '            self._close(move, "cancelled", detail)\n'
        "        self._engine.release(move.req, keep_prefix=True)\n",
        '            self._close(move, "cancelled", detail)\n',
        "row and pages are lost",
    ),
    Mutation(
        "handed over before it was committed",
        _SOURCE,
        "if move is None or move.machine.state is not Home.COMMITTED:",
        "if move is None:",
        "a hand-over is believed of a move that is not at that point",
    ),
    Mutation(
        "KV freed at commit",
        _CARGO,
        "        move.machine.fire(HomeEvent.COMMIT)\n",
        "        move.machine.fire(HomeEvent.COMMIT)\n"
        "        self._engine.release(req, keep_prefix=True)\n",
        "a move that fails after its commit has nothing to go on with",
    ),
    Mutation(
        "commit before the last step",
        _CARGO,
        "if move.sent < length or not self._engine.is_settled(req):",
        "if move.sent < length:",
        "the step in flight when the request left the batch is lost",
    ),
    Mutation(
        "gathers what is not written",
        _CARGO,
        "        complete = self._engine.written(move.req)\n",
        "        complete = self._engine.held(move.req)\n",
        "the position that the step in flight writes is copied too early",
    ),
    Mutation(
        "carrier of a finished move stays open",
        _SOURCE,
        "        move.carrier.close()\n        if move.home",
        "        if move.home",
        "shared memory of every move stays",
    ),
    # ------------------------------------------------------------------ host
    Mutation(
        "tokens sent home twice",
        _OUTFLOW,
        "        guest.sent = have\n",
        "        guest.sent = have - 1\n",
        "every chunk begins with the last token of the one before",
    ),
    Mutation(
        "dropped guest still speaks",
        _OUTFLOW,
        "if guest.arriving or guest.muted or (",
        "if guest.arriving or (",
        "tokens of a guest that home has given up",
    ),
    Mutation(
        "finished guest told to a client",
        _OUTFLOW,
        "nowhere: its source is told.\n"
        "            return req.rid.startswith(self._guests.prefix)\n",
        "nowhere: its source is told.\n            return False\n",
        "the second result of a finished guest goes to the detokenizer",
    ),
    Mutation(
        "abort of a parked request lost",
        _MOVER,
        "if move.off_batch and wanted(move.req):",
        "if False:",
        "its client is gone, and it moves on",
    ),
    Mutation(
        "flush sees no KV off the batch",
        _MOVER,
        "return bool(self.guests.arriving()) or any(",
        "return False and any(",
        "a flush gives away the memory of a parked request or an arriving guest",
    ),
    Mutation(
        "late hand-over not proven",
        _MOVER,
        "            self.source.proven(item)\n",
        "            pass\n",
        "tokens of a host that is heard before the hand-over to it are lost",
    ),
    Mutation(
        "restart not noticed",
        _WATCH,
        "if known is None or known.peer.incarnation != sender.incarnation:",
        "if known is None:",
        "a new process under an old name is taken for the one that died",
    ),
)


class AnchorLost(Exception):
    """The text that a mutation replaces is not there exactly once."""


def mutate(mutation: Mutation, package: Path) -> None:
    """Put it into a copy of the package.

    Raises:
        AnchorLost: the module's text has changed; adapt the mutation.
    """
    for module, old, new in ((mutation.module, mutation.old, mutation.new), *mutation.also):
        path = package / module
        text = path.read_text() if path.exists() else ""
        if (count := text.count(old)) != 1:
            raise AnchorLost(f"{mutation.name}: its text stands {count} times in {module}")
        path.write_text(text.replace(old, new))


def hunt(mutation: Mutation, limit: int) -> str:
    """After how many histories it is found, and by what, for the table."""
    with tempfile.TemporaryDirectory(prefix="star-mutation-") as folder:
        package = Path(folder) / PACKAGE.name
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        mutate(mutation, package)
        path = os.pathsep.join((folder, str(Path(__file__).resolve().parents[1])))
        done = subprocess.run(
            [sys.executable, "-m", "simulation.hunt", folder, str(limit), str(HANGS_S)],
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    said = done.stdout.strip().splitlines()
    return said[-1] if said else f"? | {done.stderr.strip().splitlines()[-1:]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation.mutations", description=__doc__)
    parser.add_argument("--limit", type=int, default=10_000, metavar="N", help="histories each")
    parser.add_argument("--list", action="store_true", help="name them and why they matter")
    parser.add_argument("name", nargs="*", help="only those whose names contain this")
    arguments = parser.parse_args()
    chosen = [
        mutation
        for mutation in MUTATIONS
        if not arguments.name or any(name in mutation.name for name in arguments.name)
    ]
    if arguments.list:
        for mutation in chosen:
            print(f"{mutation.name}: {mutation.why}")
        return 0
    missed = 0
    print("| mutation | found after | by |\n|---|---|---|", flush=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [pool.submit(hunt, mutation, arguments.limit) for mutation in chosen]
        for mutation, job in zip(chosen, jobs, strict=True):
            missed += job.result().startswith("not")
            print(f"| {mutation.name} | {job.result()} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
