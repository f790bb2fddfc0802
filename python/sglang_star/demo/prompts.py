"""What the demo asks: three dozen prompts, short and long answers in turn.

The order is the point. Round-robin dispatch sends every other request to the same instance, so
with long and short answers alternating one instance collects all the long ones: the imbalance
that only the length of the answers, unknown on arrival, could have foretold.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question.

    Attributes:
        name: unique, readable in tables; its first part is the kind.
        max_tokens: the client's limit on output tokens.
        greedy: temperature 0; otherwise what the model card recommends, with a seed.
    """

    name: str
    text: str
    max_tokens: int
    greedy: bool = True


_LONG = {
    "story-lighthouse": "Write a story about a lighthouse keeper and a message in a bottle.",
    "essay-rivers": "Write a detailed essay on how rivers shaped the growth of early cities.",
    "guide-garden": "Give a complete guide to starting a vegetable garden, step by step.",
    "code-library": "Write a Python class for a small lending library, with comments and examples.",
    "plan-week": "Make a training plan for a first half marathon, week by week, with reasons.",
    "story-clockmaker": "Tell a long tale about a clockmaker whose clocks begin to run backwards.",
    "explain-internet": "Explain in depth what happens when I type an address into a browser.",
    "recipe-feast": "Write out a three-course dinner for six guests, with all recipes and timings.",
    "essay-bridges": "Compare arch, beam and suspension bridges at length, with their weaknesses.",
    "code-parser": "Write and explain a Python program that parses and evaluates arithmetic.",
    "story-desert": "Write a story of two friends who cross a desert following an old map.",
    "guide-chess": "Teach me chess from nothing: the pieces, the rules, ten opening principles.",
    "explain-weather": "Explain how weather forecasts are made, from measurement to television.",
    "essay-paper": "Write an essay about the history of paper and how it changed learning.",
    "story-station": "Tell a story about the last night train at a small mountain station.",
    "plan-shop": "Write a business plan for a second-hand bookshop in a university town.",
    "explain-heart": "Describe the human circulatory system in detail for a biology student.",
    "guide-photo": "Write a thorough introduction to photography for someone with a first camera.",
}

_SHORT = {
    "fact-capital": "What is the capital of Portugal? Answer in one sentence.",
    "sum-apples": "I have 17 apples and give away 9. How many are left? Answer briefly.",
    "word-opposite": "Give one word that means the opposite of generous.",
    "translate-hello": "How do you say good morning in Spanish? One line.",
    "fact-water": "At what temperature does water boil at sea level? One sentence.",
    "list-colours": "Name the three primary colours, separated by commas.",
    "yes-whale": "Is a whale a fish? Answer yes or no, with one reason.",
    "title-cat": "Suggest one title for a picture book about a cat that learns to swim.",
    "code-reverse": "Show one line of Python that reverses a string s.",
    "fact-planet": "Which planet is the largest in the solar system? One sentence.",
    "rhyme-moon": "Write one line of verse that ends with the word moon.",
    "unit-mile": "Roughly how many kilometres are in a mile? One sentence.",
    "mail-thanks": "Write a one-sentence thank-you note to a neighbour who fed my cat.",
    "define-entropy": "Define entropy in one short sentence.",
    "next-number": "What number comes next: 2, 4, 8, 16? Answer with the number only.",
    "fact-author": "Who wrote Romeo and Juliet? One sentence.",
    "slogan-tea": "Write a slogan of at most eight words for a tea shop.",
    "sort-words": "Put these words in alphabetical order: pear, fig, apple.",
}

# Every sixth long answer is sampled: moves must not depend on decoding being greedy.
PROMPTS: tuple[Prompt, ...] = tuple(
    chain.from_iterable(
        (
            Prompt(long, _LONG[long], max_tokens=240, greedy=number % 6 != 5),
            Prompt(short, _SHORT[short], max_tokens=48, greedy=number % 6 != 5),
        )
        for number, (long, short) in enumerate(zip(_LONG, _SHORT, strict=True))
    )
)
