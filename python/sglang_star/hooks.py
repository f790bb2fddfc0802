"""Every function of SGLang that STAR wraps or replaces: one table, applied and verified.

What it only calls or reads stands in :mod:`sglang_star.engine.contract`.

SGLang logs and swallows what goes wrong in plugins, so after applying a set of rows we look for
our function in each target and stop the process if one is missing: a STAR that is half installed
would corrupt streams rather than fail.

Rows are applied by scope: ``LAUNCHER`` in every process that parses arguments, ``SERVER`` in the
process that serves HTTP and only with ``--star``, ``SCHEDULER_ENTRY`` wherever SGLang has loaded
its scheduler, ``SCHEDULER`` from there and only with ``--star``, ``RANKS`` beside it where an
engine has several, ``CPU`` in the scheduler when the portable CPU platform is active, and
``FORKED`` in an engine that our fork server made.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_star import SGLANG_RELEASES, SGLANG_VERSION
from sglang_star.errors import HookError


class Scope(enum.Enum):
    """Where and when a row applies; see the module's text."""

    LAUNCHER = "launcher"
    SERVER = "server"
    SCHEDULER_ENTRY = "scheduler entry"
    SCHEDULER = "scheduler"
    RANKS = "scheduler of several ranks"
    CPU = "portable cpu platform"
    FORKED = "forked engine"


@dataclass(frozen=True, slots=True)
class Hook:
    """One row: ``function`` (``module:name``) is attached to ``target`` in the given ``kind``.

    Attributes:
        releases: of SGLang that have the target; all of ``SGLANG_RELEASES`` if empty.
    """

    scope: Scope
    target: str
    kind: str
    function: str
    why: str
    releases: tuple[str, ...] = ()

    def is_for(self, release: str) -> bool:
        """Whether the row applies to that release of SGLang."""
        return not self.releases or release in self.releases


_S = "sglang.srt.managers.scheduler.Scheduler."
_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver."
_WEIGHTS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
_LAUNCH = "sglang_star.launch:"
_SCHED = "sglang_star.scheduler:"
_PRED = "sglang_star.predictor.runner:"
_NIXL = "nixl._api.nixl_agent."
_HOST = "sglang_star.platform.nixl_host:"

HOOKS: tuple[Hook, ...] = (
    Hook(
        Scope.LAUNCHER,
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        "after",
        _LAUNCH + "add_cli_args",
        "the STAR group of flags",
    ),
    Hook(
        Scope.LAUNCHER,
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        "after",
        _LAUNCH + "from_cli_args",
        "attach StarConfig; underscore attributes survive pickling to the scheduler",
    ),
    Hook(
        Scope.SERVER,
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        "before",
        "sglang_star.endpoints:install",
        "the /star/* routes, before SGLang adds its API-key check",
    ),
    Hook(
        Scope.SERVER,
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info",
        "before",
        "sglang_star.endpoints:keep_latest_estimate",
        "meta_info shows the latest estimate, not one for every token",
    ),
    Hook(
        Scope.SERVER,
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._send_one_request",
        "before",
        "sglang_star.rooms:send_one_request",
        "n > 1 in disaggregated serving: every sample needs a bootstrap room of its own",
    ),
    Hook(
        Scope.SCHEDULER_ENTRY,
        _S + "__init__",
        "around",
        _SCHED + "init",
        "install the scheduler rows if --star, then build STAR's part of the scheduler",
    ),
    Hook(
        Scope.SCHEDULER,
        _S + "get_init_info",
        "after",
        _SCHED + "get_init_info",
        "advertise STAR's addresses in /server_info",
    ),
    Hook(
        Scope.SCHEDULER,
        _S + "get_output_streamer_class",
        "after",
        _SCHED + "get_output_streamer_class",
        "the estimate in meta_info; a guest's tokens go home instead of to the detokenizer",
    ),
    Hook(
        Scope.SCHEDULER,
        _S + "ingest_requests",
        "after",
        _SCHED + "ingest_requests",
        "the step-boundary tick, in every event loop",
    ),
    Hook(
        Scope.SCHEDULER,
        _S + "_create_generation_req",
        "after",
        _SCHED + "create_generation_req",
        "keep the original request message: a target rebuilds the request from it",
        releases=("0.5.23",),
    ),
    Hook(
        Scope.SCHEDULER,
        _S + "_handle_generate_request",
        "around",
        _SCHED + "handle_generate_request",
        "the original request message, for the request that is made of it",
        releases=("0.5.22",),
    ),
    Hook(
        Scope.SCHEDULER,
        "sglang.srt.managers.schedule_batch.Req.__init__",
        "after",
        _SCHED + "make_request",
        "keep the original request message: a target rebuilds the request from it",
        releases=("0.5.22",),
    ),
    Hook(
        Scope.SCHEDULER,
        _S + "_add_request_to_queue",
        "around",
        _SCHED + "add_request_to_queue",
        "a rebuilt guest waits for its KV instead of for prefill",
    ),
    Hook(
        Scope.SCHEDULER,
        _S + "abort_request",
        "before",
        _SCHED + "abort_request",
        "an abort follows the request to its target",
    ),
    Hook(
        Scope.SCHEDULER,
        _S + "pause_generation",
        "around",
        _SCHED + "pause_generation",
        "a pause that computes all KV again takes that of moves, which SGLang does not know of",
    ),
    Hook(
        Scope.SCHEDULER,
        "sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode",
        "after",
        _SCHED + "retract_decode",
        "a guest that is aborted because host memory cannot hold its KV goes on at home",
    ),
    *(
        Hook(
            Scope.SCHEDULER,
            _WEIGHTS + update,
            "around",
            _SCHED + "write_weights",
            "KV of other weights is of no use, whether or not the update names a version",
        )
        for update in ("update_weights_from_disk", "update_weights_from_ipc", "end_weight_update")
    ),
    *(
        Hook(
            Scope.SCHEDULER,
            _WEIGHTS + update,
            "around",
            _SCHED + "write_some_weights",
            "as above; more will be written before the update is over",
        )
        for update in (
            "update_weights_from_distributed",
            "update_weights_from_tensor",
            "resume_memory_occupation",
        )
    ),
    Hook(
        Scope.SCHEDULER,
        _S + "send_abort_output",
        "around",
        _SCHED + "send_abort_output",
        "a guest that its target aborts outside the output stream is reported to its home",
        releases=("0.5.23",),
    ),
    Hook(
        Scope.SCHEDULER,
        "sglang.srt.managers.scheduler_components.output_sender.SenderWrapper.send_output",
        "around",
        _SCHED + "send_output",
        "as above: every place that aborts sends the message itself",
        releases=("0.5.22",),
    ),
    Hook(
        Scope.SCHEDULER,
        _S + "_poll_timeout_aborts",
        "after",
        _SCHED + "poll_timeout_aborts",
        "SGLang's running timeout also covers requests that run elsewhere",
    ),
    Hook(
        Scope.SCHEDULER,
        _S + "is_fully_idle",
        "after",
        _SCHED + "is_fully_idle",
        "KV held outside the batch is not a leak, and its owner is not idle",
    ),
    Hook(
        Scope.SCHEDULER,
        _S + "on_idle",
        "around",
        _SCHED + "on_idle",
        "wait for the next message instead of spinning while a move is under way",
    ),
    Hook(
        Scope.SCHEDULER,
        _S + "process_batch_result",
        "around",
        _SCHED + "process_batch_result",
        "step time, and the status published after each step",
    ),
    Hook(
        Scope.SCHEDULER,
        "sglang.srt.managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens",
        "around",
        "sglang_star.engine.penalties:cumulate_penalty_output_tokens",
        "log what each penalised request has accumulated",
    ),
    Hook(
        Scope.SCHEDULER,
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch",
        "after",
        "sglang_star.engine.penalties:from_schedule_batch",
        "give it back in every new batch: SGLang's retraction forgets it, and so would a move",
    ),
    Hook(
        Scope.SCHEDULER,
        _S + "init_tp_model_worker",
        "after",
        _PRED + "init_tp_model_worker",
        "build the predictor before memory pools are sized and graphs captured",
    ),
    Hook(
        Scope.SCHEDULER,
        "sglang.srt.layers.logits_processor.LogitsProcessor._get_pruned_states",
        "after",
        _PRED + "get_pruned_states",
        "last-token hidden states, at prefill and decode",
    ),
    Hook(
        Scope.SCHEDULER,
        "sglang.srt.model_executor.model_runner.ModelRunner.sample",
        "after",
        _PRED + "sample",
        "attach the estimate to the step's results: no extra synchronisation",
    ),
    Hook(
        Scope.SCHEDULER,
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        "around",
        "sglang_star.platform.paced:forward",
        "paced execution: pad a forward to the modelled step time",
    ),
    Hook(
        Scope.RANKS,
        _RECEIVER + "_pull_raw_reqs",
        "after",
        _SCHED + "pull_raw_reqs",
        "what rank 0 received rides SGLang's broadcast, so that all ranks act in the same step",
    ),
    Hook(
        Scope.RANKS,
        _RECEIVER + "recv_requests",
        "after",
        _SCHED + "recv_requests",
        "it leaves the broadcast before SGLang looks at what came",
    ),
    Hook(
        Scope.CPU,
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode",
        "around",
        "sglang_star.platform.cpu:skip_batch_invariant_kernels",
        "--enable-deterministic-inference, for its sampling seeds: the kernels are for GPUs only",
    ),
    Hook(
        Scope.CPU,
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
        "._run_sdpa_forward_decode",
        "around",
        "sglang_star.platform.attention:decode",
        "decode attention in the layout torch is fast at",
    ),
    Hook(
        Scope.CPU,
        "sglang.kernels.ops.sampling.murmur_hash.murmur_hash32",
        "around",
        "sglang_star.platform.seeds:murmur_hash32",
        "seeded sampling: the compiled hash is not in the wheel",
    ),
    Hook(
        Scope.CPU,
        _NIXL + "register_memory",
        "before",
        _HOST + "register_memory",
        "there is no device memory: register KV as host memory",
    ),
    Hook(Scope.CPU, _NIXL + "get_xfer_descs", "before", _HOST + "get_descs", "as above"),
    Hook(Scope.CPU, _NIXL + "get_reg_descs", "before", _HOST + "get_descs", "as above"),
    Hook(Scope.CPU, _NIXL + "prep_xfer_dlist", "before", _HOST + "prep_xfer_dlist", "as above"),
    Hook(
        Scope.CPU,
        "nixl._api.nixlBind.nixlAgentConfig",
        "replace",
        _HOST + "AgentConfig",
        "NIXL's progress thread pauses between two looks instead of spinning on a core",
    ),
    Hook(
        Scope.CPU,
        _S + "maybe_send_cached_prefix_chunk",
        "around",
        _HOST + "maybe_send_cached_prefix_chunk",
        "an optional early send that records a CUDA event",
    ),
    Hook(
        Scope.FORKED,
        "sglang.srt.entrypoints.engine._set_envs_and_config",
        "after",
        "sglang_star.platform.preloaded:fork_processes",
        "scheduler and detokenizer are forks of an engine that has everything imported",
    ),
)


_registered: set[Hook] = set()
"""Rows this process has, or had when it was forked."""


def install(*scopes: Scope) -> None:
    """Register, apply and verify this SGLang's rows of the given scopes in this process, once.

    Raises:
        HookError: naming the row that did not take effect.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    installed: list[tuple[Hook, Callable[..., Any]]] = []
    for hook in HOOKS:
        if hook.scope not in scopes or hook in _registered or not hook.is_for(release()):
            continue
        module, _, name = hook.function.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise HookError(f"STAR cannot load its hook {hook.function}: {error}") from error
        HookRegistry.register(hook.target, function, HookType(hook.kind))
        _registered.add(hook)
        installed.append((hook, function))
    HookRegistry.apply_hooks()
    for hook, function in installed:
        if not _is_attached(hook.target, function):
            raise HookError(
                f"STAR's hook on {hook.target} ({hook.why}) did not take effect",
                hint=f"STAR needs sglang=={release()} unmodified, and no other plugin that "
                "hooks the same function first",
            )


def release() -> str:
    """Return the release of the SGLang that is installed."""
    import sglang

    return str(sglang.__version__)


def verify_version() -> None:
    """Refuse any SGLang but the supported releases.

    Raises:
        HookError: naming these and the one that is there.
    """
    if release() not in SGLANG_RELEASES:
        raise HookError(
            f"this STAR runs in SGLang {' and '.join(SGLANG_RELEASES)}, "
            f"but {release()} is installed",
            hint=f"pip install sglang=={SGLANG_VERSION}, or launch without --star",
        )


def _is_attached(target: str, function: Callable[..., Any]) -> bool:
    """Whether ``function`` is somewhere in the target's chain of wrappers."""
    try:
        owner, _, name = target.rpartition(".")
        current: Any = inspect.getattr_static(pkgutil.resolve_name(owner), name)
    except (ImportError, AttributeError):
        return False
    current = getattr(current, "__func__", current)
    while current is not None:
        if current is function:  # a class in place of another
            return True
        for cell in getattr(current, "__closure__", None) or ():
            if cell.cell_contents is function:
                return True
        current = getattr(current, "__wrapped__", None)
    return False
