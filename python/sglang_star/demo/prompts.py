"""What the demo asks the chat model, and the form of a question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question.

    Attributes:
        name: unique, readable in tables.
        max_tokens: the client's limit on output tokens.
        at_s: when it is sent, seconds after the first.
        seed: None asks for temperature 0; otherwise the answer is sampled as the model's
            generation config says, from this seed.
    """

    name: str
    text: str
    max_tokens: int
    at_s: float = 0.0
    seed: int | None = None


_CHAT_TOKENS: Final = 96

_QUESTIONS: Final = {
    "lighthouse": "Write a story about a lighthouse keeper and a message in a bottle.",
    "rivers": "How did rivers shape the growth of early cities?",
    "garden": "How do I start a vegetable garden?",
    "library": "Write a Python class for a small lending library.",
    "half-marathon": "Make a training plan for a first half marathon.",
    "browser": "What happens when I type an address into a browser?",
    "bridges": "Compare arch, beam and suspension bridges.",
    "letter": "Write a letter to a friend about a walk in the mountains.",
    "primes": "Explain how the sieve of Eratosthenes finds prime numbers.",
    "tides": "Why are there two high tides a day?",
    "bread": "Give me a recipe for sourdough bread.",
    "chess": "Explain the rules of chess to a child.",
}

CHAT: Final[tuple[Prompt, ...]] = tuple(
    Prompt(name, text, max_tokens=_CHAT_TOKENS, at_s=0.1 * number)
    for number, (name, text) in enumerate(_QUESTIONS.items())
)
