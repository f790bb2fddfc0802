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


_CHAT_TOKENS: Final = 80

# Half of the answers end by themselves, half are cut.
_QUESTIONS: Final = {
    "lighthouse": "Write a story about a lighthouse keeper and a message in a bottle.",
    "noun": "Explain in one sentence what a noun is.",
    "garden": "How do I start a vegetable garden?",
    "colours": "Which two colours make green, and which two make orange?",
    "library": "Write a Python class for a small lending library.",
    "haiku": "Write a haiku about the first snow.",
    "bridges": "Compare arch, beam and suspension bridges.",
    "ice": "Why does ice float on water? Answer in one sentence.",
    "tides": "Why are there two high tides a day?",
    "slogan": "Write a slogan for a tea shop.",
    "bread": "Give me a recipe for sourdough bread.",
    "thanks": "Thank a colleague for her help, in two sentences.",
}

CHAT: Final[tuple[Prompt, ...]] = tuple(
    Prompt(name, text, max_tokens=_CHAT_TOKENS, at_s=0.1 * number)
    for number, (name, text) in enumerate(_QUESTIONS.items())
)
