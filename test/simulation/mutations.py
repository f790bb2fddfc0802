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


_HOME, _TARGET, _HOST = "migration/home.py", "migration/target.py", "migration/host.py"
_SENDER, _CARGO, _MOVER = "migration/sender.py", "migration/cargo.py", "migration/mover.py"
_ADMISSION, _WATCH = "migration/admission.py", "migration/watch.py"

MUTATIONS = (
    # ------------------------------------------------------------------ home
    Mutation(
        "former host may still speak",
        _HOME,
        "if chunk.migration_id != shadow.migration_id and (",
        "if False and (",
        "tokens of a host that gave a move up and went on are mixed with those of its target",
    ),
    Mutation(
        "older hand-over believed",
        _HOME,
        "if message.moves > star_of(shadow.req).moves:",
        "if True:",
        "home goes back to a host that has handed the stream on",
    ),
    Mutation(
        "no fencing",
        _HOME,
        "            if have > base:\n",
        "            if False:\n",
        "a target inserts what its source has given up, and home mixes both",
    ),
    Mutation(
        "former host ends the stream of another home",
        _HOME,
        "if message.home != self._post.peer:",
        "if False:",
        "a repeated hand-over at its source releases the new host",
    ),
    Mutation(
        "tokens appended twice",
        _HOME,
        "if chunk.index < have and not (",
        "if False and not (",
        "a repeated chunk reaches the client again",
    ),
    Mutation(
        "gap never noticed",
        _HOME,
        "if shadow.early and now - shadow.gap_since > self._timeout_s:",
        "if False:",
        "a lost chunk leaves the stream waiting for ever",
    ),
    Mutation(
        "lost host not reclaimed",
        _HOME,
        '        """A host is gone: its streams go on here."""\n'
        "        for shadow in [s for s in self.shadows.values() if s.host == peer]:",
        "        for shadow in list(self.shadows.values())[:0]:",
        "a stream ends with its host",
    ),
    Mutation(
        "orphan shadow kept",
        _HOME,
        "elif now - shadow.confirmed_at > self._timeout_s:",
        "elif False:",
        "a host that no longer holds the stream is waited for",
    ),
    Mutation(
        "arrival home kept after the end",
        _HOME,
        'self._over(shadow.stream_id, "the stream has ended at home")',
        "pass",
        "an abort while the request comes home leaves the move, and its commit ends the engine",
    ),
    Mutation(
        "arrival home kept after a reclaim",
        _HOME,
        'self._over(shadow.stream_id, "home recomputes the stream")',
        "pass",
        "a reclaimed request still holds KV of its move",
    ),
    Mutation(
        "end not told once only",
        _HOME,
        "            reason = None  # it saw the end itself, and why\n",
        '            reason = reason or {"message": "over"}\n',
        "a stop is told as an abort",
    ),
    # ------------------------------------------------------------------ target
    Mutation(
        "order of pages unchecked",
        _TARGET,
        "if message.start != self._engine.held(req) or message.end <= message.start:",
        "if False:",
        "a lost or repeated piece of KV is not missed",
    ),
    Mutation(
        "messages of another move",
        _TARGET,
        "return move if move is not None and move.migration_id == route.migration_id else None",
        "return move",
        "what an earlier source of the stream sent is taken for this one's",
    ),
    Mutation(
        "commit taken twice",
        _TARGET,
        "if move is None or move.commit is not None:",
        "if move is None:",
        "a repeated commit ends the move that waits for tokens",
    ),
    Mutation(
        "commit home unchecked",
        _TARGET,
        "case Homecoming() if list(req.output_ids) != list(commit.output_ids):",
        "case Homecoming() if False:",
        "KV of other tokens than the client has is taken in",
    ),
    Mutation(
        "commit home not awaited",
        _TARGET,
        "case Homecoming() if len(req.output_ids) < len(commit.output_ids):",
        "case Homecoming() if False:",
        "a request comes home before an earlier host's last tokens; costs a move, no stream",
    ),
    Mutation(
        "stream taken in twice",
        _TARGET,
        "if message.stream_id in self.moves or message.stream_id in self._host.by_stream:",
        "if False:",
        "the second move hides the first, whose memory is lost",
    ),
    Mutation(
        "memory promised twice",
        _ADMISSION,
        "if free - promised < message.context_tokens + kept:",
        "if False:",
        "guests are taken in that do not fit; costs a move, no stream: may survive",
    ),
    Mutation(
        "KV of other weights",
        _ADMISSION,
        "    if theirs != ours:\n",
        "    if False:\n",
        "an engine with new weights decodes with KV of the old ones",
    ),
    Mutation(
        "peer's memory stays in use",
        _TARGET,
        "        self._transports.leave(move.way)\n",
        "",
        "memory of every peer stays open for ever",
    ),
    Mutation(
        "name of an incoming move stays",
        _TARGET,
        "        del self._by_rid[move.rid]\n",
        "",
        "what comes under it later is taken for a guest",
    ),
    Mutation(
        "arrival not given back",
        _TARGET,
        "        if move.req is not None:\n"
        "            self._engine.release(move.req, keep_prefix=False, after=move.tickets)\n"
        "        elif",
        "        if",
        "a cancelled arrival keeps row and pages",
    ),
    Mutation(
        "grammar of a cancelled move compiles on",
        _TARGET,
        "            self._engine.abort(move.rid)\n",
        "            pass\n",
        "what is rebuilt for nobody is waited for",
    ),
    Mutation(
        "arrival deadline forgotten",
        _TARGET,
        "if now > move.deadline and move.stream_id in self.moves:",
        "if False:",
        "a move whose source fell silent stays",
    ),
    Mutation(
        "arrival outlives its source",
        _TARGET,
        "            if move.reserve.source == peer:\n",
        "            if False:\n",
        "memory is kept for a move that never goes on until its deadline; costs no stream",
    ),
    Mutation(
        "arrivals kept through a pause that recomputes",
        _TARGET,
        "        for move in list(self.moves.values()):\n"
        '            self.refuse(move, OrderRefused("this instance is paused',
        "        for move in []:\n"
        '            self.refuse(move, OrderRefused("this instance is paused',
        "KV of old weights lies where a flush gives the memory away",
    ),
    # ------------------------------------------------------------------ sender
    Mutation(
        "slot freed by any answer",
        _SENDER,
        "(piece := move.filled.pop(message.stamp, None)) is not None:",
        "(piece := move.filled and move.filled.popitem()[1]):",
        "a repeated answer frees a slot that is in use",
    ),
    Mutation(
        "slot freed before it is read",
        _CARGO,
        "            move.filled[piece.grant.stamp] = piece\n",
        "            piece.region.give(piece.grant)\n",
        "a slot is filled again while the target still has to read it",
    ),
    Mutation(
        "move deadline forgotten",
        _SENDER,
        "elif self._engine.now() > move.deadline:",
        "elif False:",
        "a move whose target never answers holds its request",
    ),
    Mutation(
        "moves on though ending",
        _SENDER,
        "elif not move.off_batch and self._engine.is_ending(move.req):",
        "elif False:",
        "the abort of a moving request stays behind",
    ),
    Mutation(
        "moves on though retracted",
        _SENDER,
        "elif not move.off_batch and not self._engine.is_running(move.req):",
        "elif False:",
        "KV that was taken away is gathered",
    ),
    Mutation(
        "unparked unsettled",
        _SENDER,
        "        if self._engine.is_settled(move.req):\n"
        "            move.machine.fire(SendingEvent.RESUME)",
        "        if True:\n            move.machine.fire(SendingEvent.RESUME)",
        "a request is put back while its last step is in flight",
    ),
    Mutation(
        "aborted while parked keeps its KV",
        _SENDER,
        "        self._end(move, SendingEvent.ABORT, detail)\n"
        "        self._engine.release(move.req, keep_prefix=True)\n",
        "        self._end(move, SendingEvent.ABORT, detail)\n",
        "row and pages are lost",
    ),
    Mutation(
        "handed over before it was committed",
        _SENDER,
        "if move is None or move.machine.state is not Sending.COMMITTED:",
        "if move is None:",
        "a hand-over is believed of a move that is not at that point",
    ),
    Mutation(
        "parked through a pause that recomputes",
        _SENDER,
        "if move.machine.state is Sending.RESUMING and not move.req.finished():",
        "if False:",
        "a request goes on with KV of the weights before",
    ),
    Mutation(
        "moves on through a pause that recomputes",
        _SENDER,
        '                self.cancel(move, "cancelled", "the engine is paused',
        '                continue; self.cancel(move, "cancelled", "the engine is paused',
        "KV of old weights is committed",
    ),
    Mutation(
        "KV freed at commit",
        _CARGO,
        "        move.machine.fire(SendingEvent.COMMIT)\n",
        "        move.machine.fire(SendingEvent.COMMIT)\n"
        "        self._engine.release(req, keep_prefix=True)\n",
        "a move that fails after its commit has nothing to go on with",
    ),
    Mutation(
        "commit before the last step",
        _CARGO,
        "if move.sent < length or move.loading or not self._engine.is_settled(req):",
        "if move.sent < length or move.loading:",
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
        "slots of a finished move kept",
        _SENDER,
        "        self._cargo.unload(move)\n        move.machine.fire(SendingEvent.INSERTED)",
        "        move.machine.fire(SendingEvent.INSERTED)",
        "what the target has not given back by then is never granted again",
    ),
    Mutation(
        "guest slot kept after a hand-over",
        _SENDER,
        "            self._moved_on(move.stream_id)\n",
        "            pass\n",
        "a host of a chain keeps its guest for ever",
    ),
    # ------------------------------------------------------------------ copies under way
    Mutation(
        "KV released before its copy is over",
        _TARGET,
        "keep_prefix=False, after=move.tickets)",
        "keep_prefix=False)",
        "a copy into pages of a cancelled arrival writes over KV of another request",
    ),
    Mutation(
        "pages told before they are gathered",
        _CARGO,
        "while move.loading and self._engine.copied(move.loading[0].ticket):",
        "while move.loading:",
        "the target reads a slot that is still being filled",
    ),
    Mutation(
        "slot given back before it is emptied",
        _TARGET,
        "\n    def _unload",
        "        source = move.reserve.source\n"
        "        self._post.send(source, PagesTaken(\n"
        "            route=move.route(source), stamp=message.stamp))\n"
        "\n    def _unload",
        "the source fills a slot that the target still reads",
    ),
    Mutation(
        "joined before its KV is there",
        _TARGET,
        "        if move.announced or move.unloading:\n",
        "        if move.announced:\n",
        "a step reads pages that a copy still writes",
    ),
    Mutation(
        "copies seen to be over within a step boundary",
        "engine/tickets.py",
        "        return ticket not in self._under_way\n",
        "        return ticket != self.begun or ticket not in self._under_way\n",
        "of several copies only the latest is waited for",
    ),
    Mutation(
        "failed copy taken for a good one",
        _TARGET,
        "            if why := self._engine.failure(piece.ticket):\n",
        "            if why := None:\n",
        "KV that never came is decoded with",
    ),
    Mutation(
        "pieces beyond the budget lost",
        _TARGET,
        "                self._receive(move)\n                if move.commit",
        "                self._unload(move)\n                if move.commit",
        "what had to wait for the next step's budget is never copied; costs a move: may survive",
    ),
    # ------------------------------------------------------------------ host
    Mutation(
        "tokens sent home twice",
        _HOST,
        "            guest.sent = have\n",
        "            guest.sent = have - 1\n",
        "every chunk begins with the last token of the one before",
    ),
    Mutation(
        "dropped guest still speaks",
        _HOST,
        "if guest.wanted and (have > guest.sent or req.finished()):",
        "if have > guest.sent or req.finished():",
        "tokens of a guest that home has given up; home knows them by their epoch: may survive",
    ),
    Mutation(
        "name of a guest stays",
        _HOST,
        "        del self.by_rid[guest.rid]\n",
        "",
        "a guest that is gone is kept for ever",
    ),
    Mutation(
        "unwanted guest kept",
        _HOST,
        "elif now - guest.confirmed_at > self._timeout_s:",
        "elif False:",
        "a guest whose home has ended the stream decodes on",
    ),
    Mutation(
        "guest outlives its home",
        _HOST,
        '        """A home is gone."""\n'
        "        for guest in [g for g in self.by_stream.values() if g.home == peer]:\n",
        "        for guest in []:\n",
        "a guest decodes for nobody",
    ),
    Mutation(
        "release of an earlier visit believed",
        _HOST,
        "if guest is not None and guest.migration_id == message.migration_id:",
        "if guest is not None:",
        "a late release of a stream's earlier visit ends this one",
    ),
    # ------------------------------------------------------------------ all of it
    Mutation(
        "finished guest told to a client",
        _MOVER,
        "            if star.guest:\n",
        "            if star.guest and req.rid in self.host.by_rid:\n",
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
        "            bool(self.target.moves)\n"
        "            or self._engine.draining()\n"
        "            or any(",
        "            False and any(",
        "a flush gives away the memory of a parked request or an arriving guest",
    ),
    Mutation(
        "late hand-over not proven",
        _MOVER,
        "            self.sender.proven(item)\n",
        "            pass\n",
        "tokens of a host that is heard before the hand-over to it are lost",
    ),
    Mutation(
        "message to a former process believed",
        _MOVER,
        "if isinstance(item, PeerMessage) and item.receiver != self._post.peer.incarnation:",
        "if False:",
        "what was meant for the process that died reaches the one that is there now",
    ),
    Mutation(
        "restart not noticed",
        _WATCH,
        "if known is None or known.peer != sender:",
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
