"""STAR in the launcher: flags, the programmatic way in, and the checks before anything starts."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from sglang_star import config, hooks
from sglang_star.config import StarConfig
from sglang_star.engine import installed
from sglang_star.errors import ConfigError, StarError
from sglang_star.platform import is_portable_cpu

ATTRIBUTE = "_star_config"
"""Where StarConfig rides on SGLang's ServerArgs; the underscore keeps it through pickling."""


def add_cli_args(_result: None, parser: argparse.ArgumentParser) -> None:
    """AFTER ``ServerArgs.add_cli_args``."""
    config.add_arguments(parser)


def from_cli_args(server_args: Any, _cls: type, args: argparse.Namespace) -> Any:
    """AFTER ``ServerArgs.from_cli_args``: attach the configuration, or stop with its error."""
    _choose_cpu(server_args)
    try:
        star = config.from_arguments(args)
        if star is not None:
            enable(server_args, star)
    except StarError as error:
        _stop(error)
    return server_args


def enable(server_args: Any, star: StarConfig | None = None) -> Any:
    """Turn STAR on for an engine or server started from Python.

    Example::

        args = ServerArgs(model_path=...)
        sglang_star.launch.enable(args, StarConfig(predictor="off"))
        engine = sglang.Engine(server_args=args)

    Args:
        server_args: SGLang's ``ServerArgs``, not yet used to start anything.
        star: configuration; defaults to ``StarConfig()``.

    Returns:
        ``server_args``.

    Raises:
        ConfigError: an SGLang option excludes STAR.
        HookError: SGLang is another version, a hook did not take effect, or something that STAR
            relies on is not as it should be.
    """
    hooks.verify_version()
    installed.verify()
    _choose_cpu(server_args)
    _refuse_unsupported(server_args)
    _refuse_pinned_memory(server_args)
    hooks.install(hooks.Scope.SERVER)
    setattr(server_args, ATTRIBUTE, star or StarConfig())
    return server_args


def _choose_cpu(server_args: Any) -> None:
    """Fill in what SGLang cannot guess on the portable CPU platform.

    Its own guesses there are a device object where a name is wanted, and kernels that the wheel
    lacks. Its attention over plain torch treats each request by itself, so it may serve
    ``--enable-deterministic-inference``, which is what makes SGLang honour sampling seeds.
    """
    from sglang.srt.arg_groups import choices
    from sglang.srt.platforms import current_platform

    if not is_portable_cpu(current_platform):
        return
    # For the scheduler's process, which reads it when it imports torch: see cluster_layout.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # More ranks than NUMA nodes: SGLang wants to be told which cores each is to have. It binds none
    # here, where its own kernels are missing.
    if (ranks := getattr(server_args, "tp_size", 1)) > 1:
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(map(str, range(ranks))))
    if server_args.device is None:
        server_args.device = "cpu"
    if server_args.attention_backend is None:
        server_args.attention_backend = "torch_native"
    decodes = server_args.disaggregation_mode == "decode"
    if decodes and server_args.disaggregation_decode_retraction_backup is None:
        # What SGLang would choose keeps copies of KV in memory that only CUDA can pin.
        server_args.disaggregation_decode_retraction_backup = "cpu_tensor"
    for known, add in (
        (
            choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
            choices.add_deterministic_attention_backend_choices,
        ),
        (
            choices.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
            choices.add_radix_supported_deterministic_attention_backend_choices,
        ),
    ):
        if "torch_native" not in known:
            add(["torch_native"])


def _refuse_unsupported(server_args: Any) -> None:
    """Name the first SGLang option that STAR cannot work with.

    Raises:
        ConfigError: naming it.
    """
    limits = (
        ("--pp-size", getattr(server_args, "pp_size", 1), 1),
        ("--dp-size", getattr(server_args, "dp_size", 1), 1),
        ("--tokenizer-worker-num", getattr(server_args, "tokenizer_worker_num", 1), 1),
        ("--nnodes", getattr(server_args, "nnodes", 1), 1),
    )
    for option, value, most in limits:
        if value is not None and value > most:
            raise ConfigError(
                f"--star does not support {option} {value} yet",
                hint=f"use {option} {most}, or launch without --star",
            )
    if getattr(server_args, "speculative_algorithm", None):
        raise ConfigError(
            "--star does not support speculative decoding yet",
            hint="drop --speculative-algorithm, or launch without --star",
        )


def _refuse_pinned_memory(server_args: Any) -> None:
    """Say at once what would end the scheduler in the middle of its start.

    Raises:
        ConfigError: retracted KV is to be copied into pinned memory, and there is no CUDA.
    """
    from sglang.srt.platforms import current_platform

    backup = server_args.disaggregation_decode_retraction_backup
    if backup == "host_pool" and is_portable_cpu(current_platform):
        raise ConfigError(
            "--disaggregation-decode-retraction-backup host_pool needs memory that CUDA pins",
            hint="use cpu_tensor on a CPU",
        )


def _stop(error: StarError) -> NoReturn:
    print(f"STAR: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"      {error.hint}", file=sys.stderr)
    raise SystemExit(2)
