"""Penalties after an interruption are those of a run without it: SGLang's penalizers, no engine.

A small timeline stands in for the event loop: which output tokens SGLang knows when it prepares a
step. The accumulating is SGLang's own, and what is compared is what it would apply to the logits.
"""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.engine

penalties = pytest.importorskip("sglang_star.engine.penalties")
from sglang_star.star_request import star_of  # noqa: E402

penaltylib = pytest.importorskip("sglang.srt.sampling.penaltylib")
schedule_batch = pytest.importorskip("sglang.srt.managers.schedule_batch")
forward = pytest.importorskip("sglang.srt.model_executor.forward_batch_info")

EXTEND, PREBUILT = forward.ForwardMode.EXTEND, forward.ForwardMode.PREBUILT
VOCABULARY, END = 12, 2
PROMPT = [7, 3, 9]
TEXT = random.Random(4).choices(range(VOCABULARY), k=120)
"""Few words, often repeated: what is missing or accumulated twice shows."""

PARAMETERS = {
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": 0.9},
    "repetition": {"repetition_penalty": 1.3},
    "minimum": {"min_new_tokens": 40},
    "all": {
        "frequency_penalty": 0.3,
        "presence_penalty": -0.4,
        "repetition_penalty": 1.1,
        "min_new_tokens": 25,
    },
}
NONE = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "stop_token_ids": None,
}


def request(**parameters: Any) -> Any:
    return SimpleNamespace(
        origin_input_ids=array("q", PROMPT),
        output_ids=array("q"),
        sampling_params=SimpleNamespace(**{**NONE, **parameters}),
        eos_token_ids={END},
        tokenizer=SimpleNamespace(additional_stop_token_ids=None, eos_token_id=END),
    )


class Batch:
    """What SGLang's penalizers need of a batch, built as SGLang builds one, with our hook."""

    def __init__(self, reqs: list[Any], mode: Any, *, overlap: bool) -> None:
        self.reqs, self.forward_mode, self.enable_overlap = reqs, mode, overlap
        self.device = "cpu"
        self.sampling_info = SimpleNamespace(
            penalizer_orchestrator=penaltylib.BatchedPenalizerOrchestrator(
                VOCABULARY,
                self,
                {
                    penaltylib.BatchedFrequencyPenalizer,
                    penaltylib.BatchedMinNewTokensPenalizer,
                    penaltylib.BatchedPresencePenalizer,
                    penaltylib.BatchedRepetitionPenalizer,
                },
            )
        )
        penalties.from_schedule_batch(self.sampling_info, type(self), self, VOCABULARY)

    def prepare_for_decode(self) -> None:
        original = schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens
        penalties.cumulate_penalty_output_tokens(original, self)

    def applied(self, row: int = 0) -> torch.Tensor:
        """What the sampler would add to the logits of a row, and divide them by."""
        orchestrator = self.sampling_info.penalizer_orchestrator
        added = torch.zeros(len(self.reqs), VOCABULARY)
        orchestrator.accumulate_additive_penalties(added)
        scaled = orchestrator.accumulate_scaling_penalties()
        if scaled is None:
            scaled = torch.ones_like(added)
        return torch.stack([added[row], scaled[row]])


class Timeline:
    """One request on one scheduler: what is applied when each token of ``TEXT`` is sampled.

    Under overlap the token of the step before is in flight while a step is prepared.
    """

    def __init__(self, req: Any, *, overlap: bool, disaggregated: bool) -> None:
        self.req, self.overlap = req, overlap
        self.applied: dict[int, torch.Tensor] = {}
        self.in_flight = 0
        if disaggregated:
            req.output_ids.append(TEXT[0])
            self.batch = Batch([req], PREBUILT, overlap=overlap)
        else:
            self.batch = Batch([req], EXTEND, overlap=overlap)
            self._sample()

    def _sample(self) -> None:
        """A forward of the batch as it stands is launched; the one before it ends."""
        index = len(self.req.output_ids) + self.in_flight
        self.applied[index] = self.batch.applied()
        self.settle()
        self.in_flight = 1
        if not self.overlap:
            self.settle()

    def settle(self) -> None:
        """The result of the step in flight is processed."""
        if self.in_flight:
            self.req.output_ids.append(TEXT[len(self.req.output_ids)])
        self.in_flight = 0

    def drop(self) -> None:
        """The result of the step in flight is not wanted any more."""
        self.in_flight = 0

    def decode_until(self, tokens: int) -> None:
        while len(self.req.output_ids) < tokens:
            self.batch.prepare_for_decode()
            self._sample()

    def prefill_again(self) -> None:
        self.batch = Batch([self.req], EXTEND, overlap=self.overlap)
        self._sample()

    def join(self) -> None:
        self.batch = Batch([self.req], PREBUILT, overlap=self.overlap)


def retracted(line: Timeline) -> None:
    """SGLang's own, for want of memory: the step in flight is lost."""
    line.drop()
    line.prefill_again()


def retracted_when_drained(line: Timeline) -> None:
    """SGLang's own, by its pause endpoint: the step in flight is awaited first."""
    line.settle()
    line.prefill_again()


def resumed_from_backup(line: Timeline) -> None:
    """SGLang's own on a decode instance: KV comes back from host memory."""
    line.drop()
    line.join()


def moved(line: Timeline) -> None:
    """Parked, settled, inserted elsewhere with the log in its commit."""
    line.settle()
    log = star_of(line.req).penalty_log
    assert len(log) == len(line.req.output_ids) - 1
    line.join()


def decoded_elsewhere(line: Timeline) -> None:
    """Nine tokens come from a host whose log is lost with it."""
    line.settle()
    for _ in range(9):
        line.req.output_ids.append(TEXT[len(line.req.output_ids)])


def reclaimed(line: Timeline) -> None:
    decoded_elsewhere(line)
    line.prefill_again()


def reclaimed_by_a_decode_instance(line: Timeline) -> None:
    decoded_elsewhere(line)
    line.join()


AGGREGATED = (retracted, retracted_when_drained, moved, reclaimed)
DISAGGREGATED = (resumed_from_backup, moved, reclaimed_by_a_decode_instance)


@pytest.mark.parametrize("overlap", [False, True], ids=["sync", "overlap"])
@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("disaggregated", [False, True], ids=["aggregated", "disaggregated"])
def test_every_interruption_leaves_what_an_undisturbed_run_has(
    disaggregated: bool, kind: str, overlap: bool
) -> None:
    def timeline() -> Timeline:
        return Timeline(request(**PARAMETERS[kind]), overlap=overlap, disaggregated=disaggregated)

    undisturbed = timeline()
    undisturbed.decode_until(100)
    for interrupt in DISAGGREGATED if disaggregated else AGGREGATED:
        line = timeline()
        for tokens in (2, 5, 20, 21, 23):
            line.decode_until(tokens)
            interrupt(line)
        line.decode_until(90)
        for index, applied in line.applied.items():
            assert torch.equal(applied, undisturbed.applied[index]), (interrupt, index)


@pytest.mark.parametrize("overlap", [False, True], ids=["sync", "overlap"])
def test_a_minimum_is_counted_from_the_first_token(overlap: bool) -> None:
    line = Timeline(request(min_new_tokens=30), overlap=overlap, disaggregated=False)
    for tokens in (4, 11, 12):
        line.decode_until(tokens)
        retracted(line)
    line.decode_until(40)
    barred = [index for index, applied in line.applied.items() if applied[0, END] == -torch.inf]
    assert barred == list(range(30))


def test_what_is_written_at_once_equals_token_by_token() -> None:
    reqs = [
        request(),
        request(frequency_penalty=0.1, min_new_tokens=50),
        request(presence_penalty=1.5),
        request(repetition_penalty=1.7),
        request(**PARAMETERS["all"]),
    ]
    logs = {row: array("q", TEXT[row : 40 + row]) for row in range(1, len(reqs))}
    at_once, by_token = (Batch(reqs, EXTEND, overlap=False) for _ in range(2))
    penalties.write(at_once.sampling_info.penalizer_orchestrator, logs)
    for step in range(40):
        tokens = torch.tensor([0, *(log[step] for log in logs.values())])
        by_token.sampling_info.penalizer_orchestrator.cumulate_output_tokens(tokens)
    for row in range(1, len(reqs)):
        assert torch.equal(at_once.applied(row), by_token.applied(row)), row


def test_a_request_without_penalties_keeps_no_log() -> None:
    plain, penalised = request(), request(frequency_penalty=1.0)
    for req in (plain, penalised):
        req.output_ids.extend(TEXT[:5])
    batch = Batch([plain, penalised], EXTEND, overlap=False)
    batch.prepare_for_decode()
    assert star_of(plain).penalty_log is None
    assert list(star_of(penalised).penalty_log) == [*TEXT[:5], TEXT[4]]
    assert torch.equal(batch.applied(0)[0], torch.zeros(VOCABULARY))


def test_a_request_whose_output_is_gone_starts_anew() -> None:
    req = request(frequency_penalty=1.0)
    star_of(req).penalty_log = array("q", TEXT[:9])
    batch = Batch([req], EXTEND, overlap=False)
    assert not star_of(req).penalty_log
    assert torch.equal(batch.applied()[0], torch.zeros(VOCABULARY))
