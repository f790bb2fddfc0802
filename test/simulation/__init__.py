"""The real protocol of moves over engines whose KV knows its prefix; one seed, one history.

``clock`` moves time, ``plan`` draws what happens, ``history`` lets it happen to ``node`` s
(``engine``, ``network``, ``transport``), ``invariants`` look at the end, ``shrink`` makes what
fails small. What is real: ``Mover`` and all it owns, ``Tickets``, ``Transports``, ``Orders``,
``Faults``, ``Watch``. A history that failed once is kept in ``kept/`` and runs for ever;
``test_scripted`` has those written by hand.

    PYTHONPATH=test python -m simulation --histories 100000
    PYTHONPATH=test python -m simulation --seed 17            # replay, shrunk, with its trace
    PYTHONPATH=test python -m simulation --without killed,cut # leave kinds of faults out
    PYTHONPATH=test python -m simulation.mutations            # can it fail? defects put back
    PYTHONPATH=test python -m simulation.ranks                # engines of two ranks each
    benchmark/runs/histories.sh OUT                           # a million, in parts

Copies take their time, and read and write what they were told to when they are over; a slot is
filled again as soon as the protocol has it back, whoever still reads it. A step reads and writes
KV late: when its result is asked for, or the device is waited for. In a history whose faults lose
nothing and last for less than any time-out, no stream may be reclaimed.

Left out so far: prefill instances and their way of recomputing, a process that is killed in the
middle of a step boundary, a scheduler that never goes on while its heartbeats do (nobody reclaims
from it).
"""
