"""Several ranks of one engine: all do the same, and one of them talks to the world.

SGLang runs one scheduler per rank of tensor parallelism; each makes every decision by itself, from
requests that rank 0 receives and broadcasts. STAR does alike. What rank 0's tick would see, its
messages, its clocks, its dice, rides that broadcast as a
:class:`~sglang_star.ranks.step.StepInput`, and every rank's
:class:`~sglang_star.ranks.replica.Replica` does the same with it in the same step. Messages leave
from rank 0 only, once all ranks have copied what these tell of.
"""
