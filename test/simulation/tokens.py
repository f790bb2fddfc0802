"""What the model of the simulation says: the next token is a hash of everything before it."""

from __future__ import annotations

from dataclasses import dataclass

MASK = (1 << 61) - 1
END = 0
VOCABULARY = 500


def extend(state: int, token: int) -> int:
    """The hash of a prefix with one more token; a KV position holds it."""
    return (state * 0x5851F42D4C957F2D + token * 0x14057B7EF767814F + 1) & MASK


@dataclass(frozen=True, slots=True)
class Spec:
    """What a client asks for.

    Attributes:
        end_every: one token in so many ends the output by itself.
        stop_token: one that ends it, too.
        sampled: every engine would go on in its own way.
        grammar_s: how long its grammar compiles on another engine; below 0 it never does.
    """

    rid: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    end_every: int
    stop_token: int
    grammar_s: float
    sampled: bool = False

    def next_token(self, state: int, engine: int) -> int:
        if self.sampled:
            state = extend(state, engine)
        mixed = (state ^ state >> 31) * 0x9E3779B97F4A7C15 >> 20 & MASK
        return END if mixed % self.end_every == 0 else 1 + mixed % (VOCABULARY - 1)

    def ends(self, token: int, output_tokens: int) -> dict[str, object] | None:
        """Why the output is over with this token, if it is."""
        if token in (END, self.stop_token):
            return {"type": "stop", "matched": token}
        if output_tokens >= self.max_new_tokens:
            return {"type": "length", "length": output_tokens}
        return None
