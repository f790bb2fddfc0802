"""Problems whose worked solutions are long: seeded generators of (prompt, trace, answer).

Every trace is the run of an algorithm with small local steps: a line is the whole state, and the
next line follows from it and the prompt. How much is left therefore hangs on the state. Traces
have one token per character; the last line is ``=`` and the answer.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

LONGEST: Final = 3900
"""Characters of the longest trace."""

_HELD_BACK: Final = 0.2


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem; ``key`` names the instance whatever the wording of its prompt."""

    family: str
    key: str
    prompt: str
    trace: str
    answer: str

    @property
    def held_back(self) -> bool:
        """Whether the instance is kept out of the training of the model (a fifth are)."""
        digest = hashlib.sha256(f"{self.family} {self.key}".encode()).hexdigest()
        return int(digest[:8], 16) < _HELD_BACK * 2**32


Step = Callable[[random.Random], tuple[str, str, list[str], str]]
"""Draws (key, prompt, states, answer)."""


def gcd(rng: random.Random) -> tuple[str, str, list[str], str]:
    """Greatest common divisor by subtraction."""
    a = int(10 ** rng.uniform(1.3, 2.6))
    b = int(10 ** rng.uniform(0, 2.6))
    prompt = _say(
        rng,
        f"What is the greatest common divisor of {a} and {b}?",
        f"Find the largest number that divides both {a} and {b}.",
        f"Compute gcd({a},{b}) by subtraction.",
        f"Two ropes are {a} and {b} long. What is the longest ruler that measures both?",
    )
    key, states = f"{a} {b}", [f"{a} {b}"]
    while a != b:
        a, b = (a - b, b) if a > b else (a, b - a)
        states.append(f"{a} {b}")
    return key, prompt, states, str(a)


def sort(rng: random.Random) -> tuple[str, str, list[str], str]:
    """Gnome sort of distinct letters; ``|`` stands before the letter being compared."""
    size = min(4 + int(rng.expovariate(1 / 6)), 20)
    letters = sorted(rng.sample(string.ascii_uppercase, size))
    if rng.random() < 0.5:
        rng.shuffle(letters)
    else:
        for _ in range(rng.randint(1, size)):
            i, j = rng.randrange(size), rng.randrange(size)
            letters[i], letters[j] = letters[j], letters[i]
    given = "".join(letters)
    prompt = _say(
        rng,
        f"Sort the letters {given}.",
        f"Put {given} in alphabetical order.",
        f"Which word do you get by sorting {given}?",
        f"Reorder {given} from first to last.",
    )
    at, states = 1, [f"{given[:1]}|{given[1:]}"]
    while at < size:
        if at == 0 or letters[at - 1] < letters[at]:
            at += 1
        else:
            letters[at - 1], letters[at] = letters[at], letters[at - 1]
            at -= 1
        states.append("".join(letters[:at]) + "|" + "".join(letters[at:]))
    return given, prompt, states, "".join(letters)


def collatz(rng: random.Random) -> tuple[str, str, list[str], str]:
    """Halve if even, else three times plus one; ``value,highest`` until 1."""
    start = rng.choice(_COLLATZ_STARTS)
    prompt = _say(
        rng,
        f"How high does {start} climb on its way to 1?",
        f"Start at {start}, halve even numbers, triple odd ones and add 1. Find the peak.",
        f"Give the peak of the Collatz chain of {start}.",
        f"What is the highest number in the chain from {start} down to 1?",
    )
    states = [f"{value},{peak}" for value, peak in _chain(start)]
    return str(start), prompt, states, states[-1].partition(",")[2]


def tree(rng: random.Random) -> tuple[str, str, list[str], str]:
    """Depth-first search in a tree; a line is the path, ``-`` says that its end is exhausted."""
    names = rng.sample(string.ascii_lowercase, rng.randint(8, 26))
    target = rng.choice(string.ascii_lowercase if rng.random() < 0.3 else names)
    reach = rng.choice((1, 2, 2, 3, 4, 26))  # how far back a node may hang: small makes deep trees
    children: dict[str, list[str]] = {}
    for i, name in enumerate(names[1:], 1):
        children.setdefault(names[rng.randrange(max(0, i - reach), i)], []).append(name)
    heads = list(children)
    rng.shuffle(heads)
    edges = " ".join(f"{head.upper()}:{''.join(children[head])}" for head in heads)
    root = names[0]
    prompt = _say(
        rng,
        f"{edges}. Find the path from {root} to {target}.",
        f"Rooms lead on like this: {edges}. How do I get from {root} to {target}?",
        f"Search for {target} below {root}: {edges}.",
    )
    path, states, done = [root], [root], False
    while path and (done or path[-1] != target):
        below = children.get(path[-1], []) if not done else []
        if below:
            path.append(below[0])
        else:
            last = path.pop()
            siblings = children[path[-1]] if path else [last]
            place = siblings.index(last) + 1
            done = place == len(siblings)
            if not done:
                path.append(siblings[place])
        if path:
            states.append("".join(path) + "-" * done)
    return f"{edges} {root} {target}", prompt, states, "".join(path) or "none"


def subset(rng: random.Random) -> tuple[str, str, list[str], str]:
    """Subset sum with backtracking; a line is the stack: item, what is still missing or ``x``."""
    size = rng.choice((4, 5, 5, 6, 6, 7, 7, 8, 9))
    even = rng.random() < 0.5  # an odd target is then out of reach, and all must be searched
    values = [rng.randint(1, 4) * 2 if even else rng.randint(1, 9) for _ in range(size)]
    goal = rng.randint(max(values), max(sum(values), max(values)))
    items = string.ascii_lowercase[:size]
    listed = " ".join(f"{item}{value}" for item, value in zip(items, values, strict=True))
    prompt = _say(
        rng,
        f"Which of {listed} add up to {goal}?",
        f"Choose weights from {listed} that balance {goal}.",
        f"Pick coins worth {goal} in all: {listed}.",
    )
    stack: list[tuple[int, int]] = [(0, goal - values[0])]
    states = [_frames(stack)]
    while stack and stack[-1][1]:
        at, missing = stack[-1]
        if missing < 0 or at + 1 == size:
            at, missing = stack.pop()
            if at + 1 == size:
                if not stack:
                    break
                at, _ = stack.pop()
        following = at + 1
        left = stack[-1][1] if stack else goal
        stack.append((following, left - values[following]))
        states.append(_frames(stack))
    return f"{listed} {goal}", prompt, states, "".join(items[at] for at, _ in stack) or "none"


def product(rng: random.Random) -> tuple[str, str, list[str], str]:
    """A counter machine: ``rounds,ticks,total`` adds one per tick."""
    rounds = min(2 + int(rng.expovariate(1 / 9)), 30)
    ticks = min(2 + int(rng.expovariate(1 / 9)), 30)
    total = rng.randint(0, 99)
    prompt = _say(
        rng,
        f"What is {total} plus {rounds} times {ticks}?",
        f"Start with {total} and add {ticks} for {rounds} rounds.",
        f"A jar holds {total} beans. {rounds} times {ticks} are put in. How many are there?",
        f"Count {total}+{rounds}*{ticks} one by one.",
    )
    key, states = f"{rounds} {ticks} {total}", []
    for left in range(rounds, 0, -1):
        for tick in range(ticks, 0, -1):
            states.append(f"{left},{tick},{total}")
            total += 1
    return key, prompt, [*states, f"0,0,{total}"], str(total)


def clock(rng: random.Random) -> tuple[str, str, list[str], str]:
    """Steps around a dial of a hundred: ``count:place`` until the place or the start again."""
    start, stride, goal = (rng.randrange(100) for _ in range(3))
    stride = max(stride, 1)
    prompt = _say(
        rng,
        f"A dial with 100 marks stands at {start:02}. It turns by {stride:02}. When is it at "
        f"{goal:02}?",
        f"Keep the last two digits. From {start:02} add {stride:02} until {goal:02}.",
        f"How many steps of {stride:02} lead from {start:02} to {goal:02} around 100?",
    )
    states, place, count = [f"0:{start:02}"], start, 0
    while place != goal and (place != start or not count):
        place, count = (place + stride) % 100, count + 1
        states.append(f"{count}:{place:02}")
    return f"{start} {stride} {goal}", prompt, states, str(count) if place == goal else "none"


def base(rng: random.Random) -> tuple[str, str, list[str], str]:
    """Conversion to another base: ``quotient:digits so far``."""
    number, radix = rng.randint(2, 999), rng.randint(2, 9)
    prompt = _say(
        rng,
        f"Write {number} in base {radix}.",
        f"Convert {number} to base {radix}.",
        f"How does one who counts with {radix} fingers write {number}?",
    )
    key, states, digits = f"{number} {radix}", [f"{number}:"], ""
    while number:
        number, digit = divmod(number, radix)
        digits = f"{digit}{digits}"
        states.append(f"{number}:{digits}")
    return key, prompt, states, digits


FAMILIES: Final[dict[str, tuple[Step, float]]] = {
    "gcd": (gcd, 0.7),
    "sort": (sort, 2.0),
    "collatz": (collatz, 1.5),
    "tree": (tree, 0.5),
    "subset": (subset, 1.2),
    "product": (product, 2.0),
    "clock": (clock, 0.8),
    "base": (base, 0.3),
}
"""Generator of each family, and how often it comes among the prompts."""


def problems(
    seed: int,
    families: Sequence[str] = tuple(FAMILIES),
    weights: Mapping[str, float] | None = None,
) -> Iterator[Problem]:
    """Endless problems, families drawn by ``weights``; the same seed gives the same ones."""
    rng = random.Random(f"reasoning {seed}")
    usual = {name: weight for name, (_, weight) in FAMILIES.items()}
    shares = [(weights or usual)[name] for name in families]
    while True:
        [family] = rng.choices(families, shares)
        key, prompt, states, answer = FAMILIES[family][0](rng)
        trace = "\n".join([*states, f"={answer}"])
        if len(trace) <= LONGEST:
            yield Problem(family, key, prompt, trace, answer)


def _say(rng: random.Random, *ways: str) -> str:
    return rng.choice(ways)


def _frames(stack: Sequence[tuple[int, int]]) -> str:
    return "".join(
        f"{string.ascii_lowercase[at]}{missing if missing >= 0 else 'x'}" for at, missing in stack
    )


def _chain(value: int) -> Iterator[tuple[int, int]]:
    peak = value
    yield value, peak
    while value != 1:
        value = 3 * value + 1 if value % 2 else value // 2
        peak = max(peak, value)
        yield value, peak


_COLLATZ_STARTS: Final = [n for n in range(2, 2500) if max(v for v, _ in _chain(n)) < 10000]
