"""The table of what we need of SGLang is complete: our own modules are read for what they use.

What is looked for: imports, names in strings, members of what was imported, flags of engines, and
attributes of variables that by our conventions hold an object of SGLang's. An object under another
name escapes; so does what only its type decides.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sglang_star.engine import hooked
from sglang_star.engine.contract import ROWS
from sglang_star.engine.contract.row import Class, Module, Row
from sglang_star.engine.source import PACKAGES
from sglang_star.hooks import HOOKS

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "python/sglang_star"
CHECKER = {
    f"engine.{name}"
    for name in ["check", "compat", "hooked", "installed", "names", "parsed", "signature", "source"]
}
"""Modules that speak of SGLang without touching it."""
PATHS = {row.path for row in ROWS} | {row.path for row in hooked.rows()}

# --------------------------------------------------------------------------- conventions

_MANAGERS = "sglang.srt.managers."
_REQ = _MANAGERS + "schedule_batch.Req"
_SCHEDULER = _MANAGERS + "scheduler.Scheduler"
_PARTS = _MANAGERS + "scheduler_components."
_BATCH = _MANAGERS + "schedule_batch.ScheduleBatch"
_ARGS = "sglang.srt.server_args.ServerArgs"
_ENGINE = "sglang.srt.entrypoints.engine.Engine"
_POOLS = "sglang.srt.mem_cache."
_GRAPHS = "sglang.srt.model_executor.cuda_graph_config."
_CONFIG = "sglang.srt.configs.model_config.ModelConfig"

EVERYWHERE = {
    "req": _REQ,
    "pause_req": _MANAGERS + "io_struct.PauseGenerationReqInput",
    "scheduler": _SCHEDULER,
    "_scheduler": _SCHEDULER,
    "batch": _BATCH,
    "running_batch": _BATCH,
    "kv": _MANAGERS + "schedule_batch.ReqKvInfo",
    "sampling_params": "sglang.srt.sampling.sampling_params.SamplingParams",
    "time_stats": "sglang.srt.observability.req_time_stats.SchedulerReqTimeStats",
    "grammar": "sglang.srt.constrained.base_grammar_backend.BaseGrammarObject",
    "server_args": _ARGS,
    "model_config": _CONFIG,
    "req_to_token_pool": _POOLS + "memory_pool.ReqToTokenPool",
    "output_streamer": _PARTS + "output_streamer.SchedulerOutputStreamer",
    "idle_sleeper": _PARTS + "idle_sleeper.IdleSleeper",
    "grammar_manager": "sglang.srt.constrained.grammar_manager.GrammarManager",
    "disagg_decode_prealloc_queue": "sglang.srt.disaggregation.decode.DecodePreallocQueue",
    "disagg_decode_transfer_queue": "sglang.srt.disaggregation.decode.DecodeTransferQueue",
    "disagg_prefill_bootstrap_queue": "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue",
    "orchestrator": "sglang.srt.sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator",
    "tp_worker": _MANAGERS + "tp_worker.TpModelWorker",
    "model_runner": "sglang.srt.model_executor.model_runner.ModelRunner",
    "forward_batch": "sglang.srt.model_executor.forward_batch_info.ForwardBatch",
    "forward_mode": "sglang.srt.model_executor.forward_batch_info.ForwardMode",
    "logits_output": "sglang.srt.layers.logits_processor.LogitsProcessorOutput",
    "tokenizer_manager": _MANAGERS + "tokenizer_manager.TokenizerManager",
    "recv_req": _MANAGERS + "io_struct.AbortReq",
    "abort_req": _MANAGERS + "io_struct.AbortReq",
}
"""What a variable, or an attribute, of that name holds in any of our modules."""

IN_MODULE = {
    ("engine.penalties", "params"): "sglang.srt.sampling.sampling_params.SamplingParams",
    ("engine.batch", "queue"): "sglang.srt.disaggregation.decode.DecodePreallocQueue",
    ("engine.batch", "running"): _BATCH,
    ("engine.codec", "params"): "sglang.srt.sampling.sampling_params.SamplingParams",
    ("engine.codec", "log"): _MANAGERS + "schedule_batch.ReqLogprob",
    ("engine.codec", "message"): _MANAGERS + "io_struct.TokenizedGenerateReqInput",
    ("engine.pages", "_rows_of"): _POOLS + "memory_pool.ReqToTokenPool",
    ("engine.pages", "_tree"): _POOLS + "base_prefix_cache.BasePrefixCache",
    ("engine.pages", "_allocator"): _POOLS + "allocator.base.BaseTokenToKVPoolAllocator",
    ("engine.real", "processor"): _PARTS + "batch_result_processor.SchedulerBatchResultProcessor",
    ("status", "prealloc"): "sglang.srt.disaggregation.decode.DecodePreallocQueue",
    ("status", "waiting"): "sglang.srt.disaggregation.decode.DecodeRequest",
    ("status", "last"): _BATCH,
    ("front", "args"): _ARGS,
    ("engine.kv_format", "pool"): _POOLS + "memory_pool.MHATokenToKVPool",
    ("engine.weights", "module"): "sglang.srt.layers.radix_attention.RadixAttention",
    ("rooms", "tokenized_obj"): _MANAGERS + "io_struct.TokenizedGenerateReqInput",
    ("platform.paced", "runner"): "sglang.srt.model_executor.model_runner.ModelRunner",
    ("platform.paced", "mode"): "sglang.srt.model_executor.forward_batch_info.ForwardMode",
    ("platform.device", "result"): _MANAGERS + "utils.GenerationBatchResult",
    ("predictor.runner", "graphs"): _GRAPHS + "CudaGraphConfig",
    ("predictor.runner", "decode"): _GRAPHS + "PhaseConfig",
    ("predictor.collect", "engine"): _ENGINE,
    ("predictor.resample", "engine"): _ENGINE,
}
"""... or in one of them."""

NOT_SGLANG = {
    # A class of ours wraps the engine.
    ("predictor.collect", "engine", "drive"),
    ("predictor.collect", "engine", "engine"),
    # Other pools have it under another name, or in a class of their own.
    ("engine.kv_format", "pool", "kv_buffer"),
    ("engine.kv_format", "pool", "use_dsa"),
    ("engine.kv_format", "pool", "layer_shard_enabled"),
    ("engine.kv_format", "pool", "dtype"),
    ("engine.kv_format", "pool", "store_dtype"),
    ("engine.kv_format", "pool", "page_size"),
    ("engine.kv_format", "pool", "start_layer"),
    ("engine.pages", "_allocator", "alloc_extend"),
}
"""Uses that mean something else, or that another class's row covers."""

FOREIGN = {
    "sglang.srt.entrypoints.http_server.app.add_api_route",
    "sglang.srt.entrypoints.http_server.app.add_middleware",
}
"""Members of what SGLang has from others: its app is FastAPI's."""


# --------------------------------------------------------------------------- reading our modules


@dataclass
class Uses:
    """What one of our modules uses of SGLang: dotted paths."""

    imported: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    members: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)


def uses(module: str, text: str) -> Uses:
    tree = ast.parse(text)
    found = Uses()
    bound: dict[str, str] = {}
    own: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                for alias in node.names:
                    if theirs(alias.name):
                        found.imported.add(alias.name)
                        bound[alias.name.partition(".")[0]] = alias.name.partition(".")[0]
            case ast.ImportFrom(module=str(origin)):
                for alias in node.names:
                    if theirs(origin):
                        path = f"{origin}.{alias.name}"
                        found.imported.add(path)
                        bound[alias.asname or alias.name] = path
                    else:
                        own.add(alias.asname or alias.name)
            case ast.Constant(value=str(words)) if theirs(words) and "." in words:
                if all(word.isidentifier() for word in words.split(".")):
                    found.named.add(words)
    for receiver, attribute in accesses(tree):
        if receiver in bound:
            found.members.add(f"{bound[receiver]}.{attribute}")
        elif receiver not in own and (module, receiver, attribute) not in NOT_SGLANG:
            kind = IN_MODULE.get((module, receiver)) or EVERYWHERE.get(receiver)
            if kind and not attribute.startswith(("_star", "__")):
                found.received.add(f"{kind}.{attribute}")
    return found


def accesses(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(last name of the receiver, attribute), also where ``getattr`` has a constant."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=attribute):
                yield last_name(value), attribute
            case ast.Call(func=ast.Name("getattr"), args=[value, ast.Constant(str(attribute)), *_]):
                yield last_name(value), attribute


def last_name(value: ast.expr) -> str:
    match value:
        case ast.Name(name) | ast.Attribute(attr=name):
            return name
    return ""


def theirs(path: str) -> bool:
    return path.partition(".")[0] in PACKAGES


def modules() -> dict[str, str]:
    """Our modules that are not the contract itself, with their text."""
    return {
        name: path.read_text()
        for path in sorted(OURS.rglob("*.py"))
        if (name := dotted(path)) not in CHECKER and not name.startswith("engine.contract")
    }


def dotted(path: Path) -> str:
    parts = path.relative_to(OURS).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = modules()
USES = {name: uses(name, text) for name, text in MODULES.items()}


def covered(path: str) -> bool:
    """Whether a row is on the path, or on something in it."""
    return any(one == path or one.startswith(path + ".") for one in PATHS)


# --------------------------------------------------------------------------- complete


def test_every_import_has_a_row() -> None:
    missing = {(m, path) for m, use in USES.items() for path in use.imported if not covered(path)}
    assert not missing


def test_every_module_named_in_a_string_has_a_row() -> None:
    # Prefixes that the hook table composes its targets of are covered as such.
    missing = {(m, path) for m, use in USES.items() for path in use.named if not covered(path)}
    assert not missing


def test_every_member_of_an_import_has_a_row() -> None:
    missing = {
        (module, path)
        for module, use in USES.items()
        for path in use.members
        if path not in FOREIGN and not covered(path.replace(".envs.", ".Envs."))
    }
    assert not missing


def test_every_attribute_of_a_known_receiver_has_a_row() -> None:
    missing = {(m, path) for m, use in USES.items() for path in use.received if path not in PATHS}
    assert not missing, "add rows to sglang_star/engine/contract, or a convention here"


def test_the_conventions_are_in_use() -> None:
    names = {
        (module, receiver)
        for module, text in MODULES.items()
        for receiver, _ in accesses(ast.parse(text))
    }
    assert set(IN_MODULE) <= names
    assert set(EVERYWHERE) <= {receiver for _, receiver in names}


def test_every_flag_of_an_engine_has_a_row() -> None:
    text = MODULES["cluster_layout"].partition("def router_command")[0]
    flags = {
        node.value.removeprefix("--").replace("-", "_")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("--")
        and node.value.removeprefix("--").replace("-", "").isalnum()
        and not node.value.startswith("--star")
    }
    assert len(flags) >= 8
    assert not {flag for flag in flags if f"{_ARGS}.{flag}" not in PATHS}


def test_every_hook_is_a_row() -> None:
    assert [row.path for row in hooked.rows()] == [hook.target for hook in HOOKS]


def test_a_use_without_a_row_is_seen() -> None:
    text = (
        "from sglang.srt.new import thing\n"
        "from sglang_star.migration import batch\n"
        "NAME = 'sglang.srt.another'\n"
        "def f(req, scheduler):\n"
        "    thing.part\n"
        "    batch.park(scheduler, req)\n"
        "    getattr(scheduler, 'gone', None)\n"
        "    scheduler.running_batch.unheard_of(req._star_moves)\n"
    )
    found = uses("new", text)
    assert found.imported == {"sglang.srt.new.thing"}
    assert found.named == {"sglang.srt.another"}
    assert found.members == {"sglang.srt.new.thing.part"}
    assert found.received == {
        f"{_SCHEDULER}.gone",
        f"{_SCHEDULER}.running_batch",
        f"{_BATCH}.unheard_of",
    }
    assert not any(map(covered, found.imported | found.named | found.members))
    assert found.received - PATHS == {f"{_SCHEDULER}.gone", f"{_BATCH}.unheard_of"}


# --------------------------------------------------------------------------- sound


def words_of(module: str) -> set[str]:
    """Every name and constant in a module; a flag as the field it sets."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module])):
        match node:
            case ast.Attribute(attr=name) | ast.Name(name) | ast.keyword(arg=str(name)):
                found.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(name=name):
                found.add(name)
            case ast.Constant(value=str(text)):
                found.add(text.removeprefix("--").replace("-", "_"))
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.path)
def test_every_row_says_why_and_who(row: Row) -> None:
    assert row.why
    assert row.users
    assert theirs(row.path)
    for user in row.users.split():
        assert user in MODULES
        name = getattr(row, "value", "") or row.path.rpartition(".")[2]
        in_project = name in (ROOT / "pyproject.toml").read_text() and hasattr(row, "value")
        whole = isinstance(row, Class | Module)
        assert whole or in_project or name in words_of(user), f"{user} does not mention {name}"


def test_no_row_stands_twice() -> None:
    keys = [(type(row), row.path, getattr(row, "takes", "")) for row in ROWS]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("module", sorted(CHECKER))
def test_the_checker_needs_no_sglang(module: str) -> None:
    assert not uses(module, (OURS / f"{module.replace('.', '/')}.py").read_text()).imported
