"""A request on one engine."""

from __future__ import annotations

from typing import Any

from simulation.tokens import VOCABULARY, Spec, extend


class Request:
    """What SGLang's ``Req`` is to the protocol.

    Attributes:
        chain: per token so far the hash of the prefix that ends with it.
        row: whether it holds a slot of its own; slots: KV slots of positions ``[0, allocated)``.
        committed: positions whose KV is written, or is being written by the step in flight.
        told: output tokens its client, or nobody, has been sent.
    """

    def __init__(self, rid: str, spec: Spec) -> None:
        self.rid = rid
        self.spec = spec
        self.output_ids: list[int] = []
        self.max_new_tokens = spec.max_new_tokens
        self.chain: list[int] = []
        state = 0
        for token in spec.prompt:
            state = extend(state, token)
            self.chain.append(state)
        self.row = False
        self.slots: list[int] = []
        self.committed = 0
        self.to_finish: dict[str, Any] | None = None
        self.finished_reason: dict[str, Any] | None = None
        self.is_retracted = False
        self.told = 0
        self.told_end = False

    def finished(self) -> bool:
        return self.finished_reason is not None

    def push(self, token: int) -> None:
        """One more output token, and whether the output ends with it."""
        assert 0 <= token < VOCABULARY, "no model has such a token"
        output = self.output_ids
        output.append(token)
        chain = self.chain
        chain.append(extend(chain[-1], token))
        if self.finished_reason is None:
            self.finished_reason = self.to_finish or self.spec.ends(token, len(output))

    def __repr__(self) -> str:
        return f"{self.rid}@{len(self.output_ids)}"
