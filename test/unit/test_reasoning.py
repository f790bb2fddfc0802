"""The reasoning model's problems, tokenizer, training step and export."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sglang_star.errors import ConfigError
from sglang_star.predictor.prompts import read_prompts, split_of
from sglang_star_bench.reasoning import check, command, model, tasks
from sglang_star_bench.reasoning.recipe import MIXES, Recipe
from sglang_star_bench.reasoning.tasks import FAMILIES, Problem

pytest.importorskip("torch")


def some(family: str, count: int = 300, seed: int = 7) -> list[Problem]:
    return list(itertools.islice(tasks.problems(seed, [family]), count))


def numbers(text: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", text)]


def right_answer(problem: Problem) -> str:
    """The answer worked out from the instance by other means than the trace's algorithm."""
    key = problem.key
    if problem.family == "gcd":
        return str(math.gcd(*numbers(key)))
    if problem.family == "sort":
        return "".join(sorted(key))
    if problem.family == "collatz":
        return str(highest(int(key)))
    if problem.family == "tree":
        return path_upwards(key)
    if problem.family == "product":
        rounds, ticks, start = numbers(key)
        return str(start + rounds * ticks)
    if problem.family == "clock":
        start, stride, goal = numbers(key)
        turns = [k for k in range(100) if (start + k * stride) % 100 == goal]
        return str(turns[0]) if turns else "none"
    if problem.family == "subset":
        return first_subset(key)
    return in_base(*numbers(key))


def highest(value: int) -> int:
    return value if value == 1 else max(value, highest(3 * value + 1 if value % 2 else value // 2))


def path_upwards(key: str) -> str:
    *edges, root, target = key.split()
    parent = {child: edge[0].lower() for edge in edges for child in edge[2:]}
    path = target
    while path[0] != root:
        if path[0] not in parent:
            return "none"
        path = parent[path[0]] + path
    return path


def first_subset(key: str) -> str:
    *items, goal = key.split()
    found = [
        "".join(item[0] for item in chosen)
        for size in range(1, len(items) + 1)
        for chosen in itertools.combinations(items, size)
        if sum(int(item[1:]) for item in chosen) == int(goal)
    ]
    return min(found, default="none")


def in_base(number: int, radix: int) -> str:
    power = radix ** int(math.log(number, radix) + 1e-9)
    digits = ""
    while power:
        digits += str(number // power % radix)
        power //= radix
    return digits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trace_ends_in_the_right_answer(family: str) -> None:
    for problem in some(family):
        assert problem.trace.rpartition("\n")[2] == f"={problem.answer}"
        assert problem.answer == right_answer(problem), problem


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_states_the_instance(family: str) -> None:
    for problem in some(family, 100):
        for part in problem.key.split():
            assert part in problem.prompt
        assert problem.trace.isascii()
        assert problem.prompt.isascii()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_follows_from_the_prompt_and_the_state_before(family: str) -> None:
    following: dict[tuple[str, str], str] = {}
    for problem in some(family, 500):
        lines = problem.trace.split("\n")
        assert len(set(lines)) == len(lines), "a state that comes again would never end"
        for line, after in itertools.pairwise(lines):
            assert following.setdefault((problem.key, line), after) == after


def test_the_same_seed_gives_the_same_problems() -> None:
    first, again, other = (list(itertools.islice(tasks.problems(s), 200)) for s in (3, 3, 4))
    assert first == again
    assert first != other


def test_lengths_have_a_heavy_tail_and_prompts_are_many() -> None:
    drawn = list(itertools.islice(tasks.problems(5), 20_000))
    lengths = np.array([len(problem.trace) + 1 for problem in drawn])
    assert 180 <= np.percentile(lengths, 50) <= 300
    assert 1000 <= np.percentile(lengths, 90) <= 1500
    assert 2500 <= np.percentile(lengths, 99) <= 3500
    assert lengths.max() <= tasks.LONGEST + 1
    assert len({problem.prompt for problem in drawn}) > 18_000
    assert {problem.family for problem in drawn} == set(FAMILIES)


def test_the_length_of_a_prompt_says_little_about_the_output() -> None:
    from scipy.stats import spearmanr

    drawn = list(itertools.islice(tasks.problems(5), 5000))
    prompt, output = zip(*((len(p.prompt), len(p.trace)) for p in drawn), strict=True)
    assert abs(spearmanr(prompt, output).statistic) < 0.4


def test_held_back_instances_are_a_fifth_whatever_their_wording() -> None:
    drawn = list(itertools.islice(tasks.problems(6), 5000))
    assert 0.17 < np.mean([problem.held_back for problem in drawn]) < 0.23
    by_key: dict[tuple[str, str], set[bool]] = {}
    for problem in drawn:
        by_key.setdefault((problem.family, problem.key), set()).add(problem.held_back)
    assert all(len(kinds) == 1 for kinds in by_key.values())
    assert any(len({p.prompt for p in drawn if p.key == key}) > 1 for _, key in by_key)


def test_prompts_are_held_back_distinct_and_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        words = ["prompts", "--count", "300", "--seed", "1", "--out", str(tmp_path / name)]
        assert command.main(words) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    rows = [
        json.loads(line) for line in gzip.decompress((tmp_path / "a").read_bytes()).splitlines()
    ]
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 300
    assert {row["source"] for row in rows} == set(FAMILIES)
    trained = (p for p in tasks.problems(1) if not p.held_back)
    assert not {p.prompt for p in itertools.islice(trained, 3000)} & {r["prompt"] for r in rows}


def test_asking_for_no_prompts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--count 0"):
        command.main(["prompts", "--count", "0", "--out", str(tmp_path / "x")])


# --------------------------------------------------------------------------- tokenizer and model


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return model.train_tokenizer(p.prompt for p in itertools.islice(tasks.problems(0), 2000))


def test_text_survives_the_tokenizer(tokenizer: object) -> None:
    for problem in itertools.islice(tasks.problems(8), 300):
        ids = model.encode(tokenizer, problem.prompt, problem.trace)  # type: ignore[arg-type]
        decoded = tokenizer.decode(ids)  # type: ignore[attr-defined]
        assert decoded == problem.prompt + problem.trace
        prompt = model.encode(tokenizer, problem.prompt)  # type: ignore[arg-type]
        assert ids[: len(prompt)] == prompt
        assert len(ids) - len(prompt) == len(problem.trace) + 1, "a token per character, and end"
    odd = "What (is) ~this~ Zebra_42?\n\tOK"
    assert tokenizer.decode(tokenizer.encode(odd).ids).replace("\t", "") == odd.replace("\t", "")  # type: ignore[attr-defined]


def test_a_few_steps_train_export_and_resume(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sglang_star_bench.reasoning import train

    recipe = Recipe(width=32, layers=1, tokens=3000, warmup=0.0)
    run = train.Trainer(recipe, tmp_path)
    sequences = train.pool(run.tokenizer, 1, 4000, 256, "plain")
    [*groups] = train.batches(sequences, 512, random.Random(0))
    before = float(train.loss_of(run.model, *groups[0]).detach())
    for _ in range(40):
        run.tokens = 0
        run._step(*groups[0])
    assert float(train.loss_of(run.model, *groups[0]).detach()) < before * 0.9
    run.tokens = 3000
    run._save()
    again = train.Trainer(recipe, tmp_path)
    assert again.steps == run.steps
    assert all(
        torch.equal(a, b)
        for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True)
    )
    again.run()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([model.encode(run.tokenizer, "Sort the letters CAB.")])
    ours, theirs = again.model(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=0.05)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "Sort the letters CAB."}]
    rendered = hf.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert rendered == ids[0].tolist()
    with pytest.raises(ConfigError, match="another recipe"):
        train.Trainer(Recipe(width=64), tmp_path)


def test_the_learning_rate_warms_up_and_falls_and_lengths_grow() -> None:
    recipe = Recipe()
    rates = [recipe.rate_at(done) for done in (0.0, recipe.warmup, 0.5, 1.0)]
    assert rates[0] < rates[3] < rates[2] < rates[1] == pytest.approx(recipe.rate)
    assert recipe.rate_at(1.02) == pytest.approx(rates[3]), "a pool may run past the end"
    stages = [recipe.stage(done) for done in (0.0, 0.4, 0.7, 0.9, 1.0)]
    lengths = [stage.longest for stage in stages]
    assert lengths == sorted(lengths)
    assert lengths[-1] > tasks.LONGEST
    for stage in stages:
        assert MIXES[stage.mix].keys() == FAMILIES.keys()


def test_batches_hold_every_learnt_token_once() -> None:
    from sglang_star_bench.reasoning.train import IGNORED, Sequence, batches

    given = [Sequence(list(range(1, n + 1)), n // 2) for n in range(4, 60)]
    learnt = 0
    for ids, labels in batches(given, 128, random.Random(0)):
        assert ids.shape == labels.shape
        assert ids.numel() <= 128
        kept = labels != IGNORED
        assert (ids[kept] == labels[kept]).all()
        learnt += int(kept.sum())
    assert learnt == sum(n - n // 2 for n in range(4, 60))


def test_attempts_are_judged_by_answer_steps_and_end() -> None:
    problem = next(tasks.problems(2, ["gcd"]))
    good = check.Attempt(problem, problem.trace, len(problem.trace) + 1, True)
    lucky = check.Attempt(problem, f"1 1\n={problem.answer}", 9, True)
    cut = check.Attempt(problem, problem.trace[:-1] + "x", 4096, False)
    assert (good.correct, good.exact) == (True, True)
    assert (lucky.correct, lucky.exact) == (True, False)
    assert not cut.correct
    row = check.summary([good, lucky, cut])["gcd"]
    assert row["count"] == 3
    assert row["correct"] == row["ended"] == pytest.approx(2 / 3)
    assert row["tokens"]["max"] == 4096


@pytest.mark.skipif(not model.WEIGHTS.exists(), reason="the trained model is not packaged")
def test_the_packaged_model_is_small_and_knows_its_steps() -> None:
    assert sum(path.stat().st_size for path in model.WEIGHTS.iterdir()) <= 6 * 2**20
    provenance = json.loads((model.WEIGHTS / "provenance.json").read_text())
    assert provenance["tokens"] > 1_000_000
    assert check.forced_loss(model.WEIGHTS, 8, 3)["all"] < 0.1


def test_no_instance_is_both_fitted_and_judged_on(tmp_path: Path) -> None:
    # Collatz has few starts, so nearly every one comes in several wordings: the same length.
    command.write_prompts(tmp_path / "prompts.jsonl", 3000, 1, ["collatz", "product", "gcd"])
    instances = {problem.prompt: problem.key for problem in given(3000)}
    parts: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for prompt in read_prompts(tmp_path / "prompts.jsonl"):
        parts[split_of(f"{prompt.key}#0")].add(instances[prompt.text])
    leaked = {key for name in ("train", "validation") for key in parts["test"] & parts[name]}
    assert not leaked, f"{len(leaked)} of {len(parts['test'])} instances judged on were fitted on"
    assert not parts["validation"] & parts["train"]
    assert min(map(len, parts.values())) > 100


def given(count: int) -> Iterator[Problem]:
    return itertools.islice(check.held_back(1, ["collatz", "product", "gcd"]), count)
