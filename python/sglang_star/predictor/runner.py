"""The predictor inside SGLang: head built once, run on every forward, delivered with its results.

``_get_pruned_states`` sees the last-token hidden states on the device, inside the captured graph
where there is one, so what it does there is a copy and a product into static buffers. ``sample``
runs outside the graph and hands a clone of the rows to SGLang's auxiliary output, whose copy to
the host is gated by the batch's own event: no step waits for the predictor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.managers.auxiliary_output import append_auxiliary_output
from sglang.srt.runtime_context import get_parallel

from sglang_star.config import PREDICTOR_OFF, StarConfig
from sglang_star.errors import ConfigError
from sglang_star.launch import ATTRIBUTE
from sglang_star.predictor.choice import choose
from sglang_star.predictor.estimator import Estimator
from sglang_star.predictor.fingerprint import ModelFingerprint, fingerprint
from sglang_star.predictor.head import Head
from sglang_star.predictor.recorder import Recorder
from sglang_star.predictor.samples import MODEL

log = logging.getLogger(__name__)

MIN_ROWS: Final = 256
"""Rows of the static buffers; a larger eager batch gets buffers of its own for that step."""

fallbacks: int = 0
"""Estimates so far that came from the by-age table because the head's were not finite."""

failures: int = 0
"""Steps whose estimates were skipped because of a defect; serving went on without them."""

serving: str = PREDICTOR_OFF
"""What estimates here: a head's name, ``by-age`` where there is none for the model, or ``off``."""

Take = Callable[[Any, Sequence[Any], Sequence[int | None]], None]
"""(host rows, requests, visible output tokens of each request or None)."""


class HiddenTap:
    """Static device buffer with the last-token hidden states of the latest forward.

    A replayed graph runs none of this: it only writes the buffers that it was captured with. So
    nothing that an eager forward leaves behind may decide which buffer is read; the number of rows
    alone does, and the buffer holds the first rows of every forward, however many there are.
    """

    def __init__(self, rows: int, hidden_size: int, device: str) -> None:
        self._hidden = torch.zeros(rows, hidden_size, dtype=torch.float32, device=device)
        self._oversize: torch.Tensor | None = None

    def observe(self, hidden: torch.Tensor) -> None:
        """Take ``[n, d]`` states; allocation-free up to the buffer's rows."""
        rows = self._hidden.shape[0]
        if hidden.shape[0] > rows:
            self._oversize = self._of(hidden.float())
        count = min(hidden.shape[0], rows)
        self._hidden[:count].copy_(hidden[:count])
        self._update(count)

    def latest(self, count: int) -> torch.Tensor:
        """Return a copy of the first ``count`` rows: graph replays overwrite the buffer."""
        if count <= self._hidden.shape[0] or self._oversize is None:
            return self._static()[:count].clone()
        oversize, self._oversize = self._oversize, None
        return oversize[:count].clone()

    def _of(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def _update(self, count: int) -> None:
        """Derive the output rows from the hidden ones; here they are the same."""

    def _static(self) -> torch.Tensor:
        return self._hidden


class ProjectionTap(HiddenTap):
    """The device half of a head: hidden states in, ``(h - mean) @ projection`` out."""

    def __init__(self, rows: int, head: Head, device: str) -> None:
        weights = head.weights
        super().__init__(rows, len(weights.mean), device)
        self._projection = torch.tensor(weights.projection, dtype=torch.float32, device=device)
        self._bias = torch.tensor(
            -weights.mean.astype("f8") @ weights.projection, dtype=torch.float32, device=device
        )
        self._projected = torch.zeros(rows, head.width, dtype=torch.float32, device=device)

    def _of(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self._bias, hidden, self._projection)

    def _update(self, count: int) -> None:
        out = self._projected[:count]
        torch.addmm(self._bias, self._hidden[:count], self._projection, out=out)

    def _static(self) -> torch.Tensor:
        return self._projected


@dataclass(frozen=True, slots=True)
class Attachment:
    """A tap and who takes its rows on the host."""

    tap: HiddenTap
    take: Take


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """Rows on the device, aligned with the batch; SGLang's ``DeviceAuxiliaryOutput``."""

    rows: torch.Tensor
    take: Take

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> HostRows:
        """Start the copy."""
        return HostRows(copy_tensor(self.rows), self.take)


@dataclass(frozen=True, slots=True)
class HostRows:
    """Rows on the host; SGLang's ``HostAuxiliaryOutput``."""

    rows: torch.Tensor
    take: Take

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Called once per step, after its tokens were added to the requests."""
        visible = [c and c.output_index + len(c.token_ids) for c in commits]
        try:
            self.take(self.rows.numpy(), batch.reqs, visible)
        except Exception:
            # SGLang would end the whole scheduler here; an estimate is not worth a stream.
            global failures
            failures += 1
            if failures == 1:
                log.exception("STAR: the predictor failed; serving goes on, further cases counted")


_attached: tuple[Attachment, ...] = ()


def init_tp_model_worker(result: None, scheduler: Any) -> None:
    """AFTER ``Scheduler.init_tp_model_worker``: build what the next two hooks use.

    Raises:
        HeadError: there is no head for this model, or the one named is not for it.
        ConfigError: samples cannot be written where they should go.
    """
    global _attached
    star: StarConfig | None = getattr(scheduler.server_args, ATTRIBUTE, None)
    if star is None or (star.predictor == PREDICTOR_OFF and not star.collect):
        return
    # All ranks see the same states, and only what rank 0 thinks of them goes anywhere.
    if get_parallel().tp_rank == 0:
        _attached = _build(star, scheduler.server_args, scheduler.tp_worker.model_runner)


def _build(star: StarConfig, server_args: Any, model_runner: Any) -> tuple[Attachment, ...]:
    if server_args.startup_weight_load_mode == "overlap":
        raise ConfigError(
            "the predictor must see the model's weights before graphs are captured",
            hint="drop --startup-weight-load-mode overlap, or use --star-predictor off",
        )
    device, rows = model_runner.device, _rows(server_args)
    model = fingerprint(model_runner.model, model_runner.model_config)
    global serving
    attached: list[Attachment] = []
    if star.predictor != PREDICTOR_OFF:
        choice = choose(star.predictor, model)
        serving = choice.name
        if head := choice.head:
            tap = ProjectionTap(rows, head, device)
            attached.append(Attachment(tap, _Counted(Estimator(head))))
            log.info("STAR: predictor head %s, %d parameters", choice.name, head.parameters)
    if star.collect:
        folder = Path(star.collect)
        _claim(folder, model)
        hidden = HiddenTap(rows, model.hidden_size, device)
        attached.append(Attachment(hidden, Recorder(folder).step))
    return tuple(attached)


def _claim(folder: Path, model: ModelFingerprint) -> None:
    """Note in the collection which model it is of, or check that it is the same.

    Raises:
        ConfigError: the folder cannot be written, or holds samples of another model.
    """
    path = folder / MODEL
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(msgspec.json.encode(model))
        recorded = msgspec.json.decode(path.read_bytes(), type=ModelFingerprint)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"cannot collect into {folder}: {error}") from error
    if recorded != model:
        raise ConfigError(
            f"{folder} holds samples of another model", hint="collect into another folder"
        )


class _Counted:
    """An estimator's step that keeps this module's counter up to date."""

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator

    def __call__(self, rows: Any, reqs: Sequence[Any], visible: Sequence[int | None]) -> None:
        global fallbacks
        self._estimator.step(rows, reqs, visible)
        fallbacks = self._estimator.fallbacks


def _rows(server_args: Any) -> int:
    # A captured step runs no Python: its batch has to fit the buffers from the start.
    limits = [server_args.max_running_requests]
    if graphs := resolution_result(server_args, "cuda_graph_config"):
        decode, prefill = graphs.decode, graphs.prefill
        limits += [decode.max_bs, *(decode.bs or ()), prefill.full_prefill_max_req]
    return max(MIN_ROWS, *(limit or 0 for limit in limits))


def get_pruned_states(result: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``LogitsProcessor._get_pruned_states``: take the last-token hidden states."""
    if not _attached:
        return
    states, _before_norm, _aux, sample_indices = result[:4]
    last = states if sample_indices is None else states[sample_indices]
    for attachment in _attached:
        attachment.tap.observe(last)


def sample(result: Any, model_runner: Any, logits_output: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``ModelRunner.sample``: attach the rows to the step's results."""
    if not _attached:
        return
    count = logits_output.next_token_logits.shape[0]
    for attachment in _attached:
        logits_output.auxiliary_device_output = append_auxiliary_output(
            logits_output.auxiliary_device_output,
            DeviceRows(attachment.tap.latest(count), attachment.take),
        )
