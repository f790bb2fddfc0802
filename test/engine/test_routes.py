"""Every route of SGLang's HTTP server is one that the router has an answer for."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from sglang_star_router.door import FLEET_PATHS
from sglang_star_router.engine_api import ANY_INSTANCE
from sglang_star_router.paths import PATHS
from sglang_star_router.probes import READINESS

pytestmark = pytest.mark.engine

ROUTER = {"/server_info", "/get_server_info", "/ping", "/v1/realtime", "/", *READINESS}
"""Answered by the router itself, or refused by it clearly."""
ONE_INSTANCE = {
    # They change, show or serve one instance, and are asked of that instance.
    "/set_internal_state", "/add_external_corpus", "/remove_external_corpus",
    "/list_external_corpora", "/hicache/storage-backend/clear", "/hicache/storage-backend",
    "/get_hicache_l3_cache_layout", "/set_trace_level", "/freeze_gc",
    "/start_expert_distribution_record", "/stop_expert_distribution_record",
    "/dump_expert_distribution_record", "/update_weights_from_disk",
    "/init_weights_send_group_for_remote_instance", "/send_weights_to_remote_instance",
    "/get_remote_instance_transfer_engine_info", "/remote_instance_transfer_engine_info",
    "/init_weights_update_group", "/destroy_weights_update_group", "/update_weights_from_tensor",
    "/begin_weight_update", "/end_weight_update", "/update_weights_from_distributed",
    "/update_weights_from_ipc", "/update_weight_version", "/get_weights_by_name",
    "/release_memory_occupation", "/resume_memory_occupation", "/weights_checker", "/slow_down",
    "/pd_role_switch", "/load_lora_adapter", "/load_lora_adapter_from_tensors",
    "/unload_lora_adapter", "/open_session", "/close_session", "/configure_logging",
    "/pause_generation", "/continue_generation", "/dumper/{method}",
}  # fmt: skip


def routes() -> dict[str, set[str]]:
    """Paths of SGLang's server and their methods, as its source writes them."""
    package = importlib.util.find_spec("sglang")
    if package is None or not package.submodule_search_locations:
        pytest.skip("SGLang is not installed")
    source = Path(package.submodule_search_locations[0]) / "srt/entrypoints/http_server.py"
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source.read_text())):
        for call in getattr(node, "decorator_list", ()):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            if not (isinstance(call.func.value, ast.Name) and call.func.value.id == "app"):
                continue
            if call.func.attr not in ("get", "post", "head", "api_route", "websocket"):
                continue
            path = call.args[0]
            if isinstance(path, ast.Call):
                path = path.args[1]  # os.environ.get(NAME, PATH)
            if isinstance(path, ast.Name):
                continue  # an operator's own path for "/"
            assert isinstance(path, ast.Constant), ast.unparse(call)
            methods = {call.func.attr.upper()}
            for keyword in call.keywords:
                if keyword.arg == "methods":
                    methods = set(ast.literal_eval(keyword.value))
            found.setdefault(str(path.value), set()).update(methods)
    return found


def test_every_route_has_an_answer() -> None:
    found = routes()
    assert len(found) > 80
    passed = {path for path in ANY_INSTANCE if "{" not in path}
    served = set(PATHS) | passed | ROUTER | set(FLEET_PATHS) | ONE_INSTANCE
    unknown = {path for path in found if path not in served and not path.startswith("/v1/")}
    assert not unknown, "dispatch it, pass it on, or list it as one instance's own"
    assert set(PATHS) <= set(found), "SGLang serves these no more"
    assert set(found) >= ONE_INSTANCE


def test_every_route_of_v1_that_runs_the_model_is_dispatched() -> None:
    posted = {path for path, methods in routes().items() if methods & {"POST", "PUT"}}
    apart = {
        "/v1/tokenize", "/v1/detokenize", "/v1/messages/count_tokens",
        "/v1/responses/{response_id}/cancel",
    }  # fmt: skip
    assert {path for path in posted if path.startswith("/v1/")} - apart <= set(PATHS)
    for path, methods in routes().items():
        if path in PATHS:
            assert set(PATHS[path].methods) == methods
