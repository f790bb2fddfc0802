"""What an engine's kind is read from: each argument and entry of the configuration counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

identity = pytest.importorskip("sglang_star.identity")
from sglang.srt.configs.model_config import AttentionArch  # noqa: E402
from sglang.srt.disaggregation.utils import DisaggregationMode  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

LAYOUT = {
    "kv_pool": "MHATokenToKVPool",
    "kv_dtype": "torch.bfloat16",
    "kv_storage": "torch.bfloat16",
    "kv_page_size": 1,
    "kv_first_layer": 0,
    "kv_tensors": 4,
    "kv_rows": "torch.bfloat16[2, 8]",
}


def kind(
    arguments: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **model: Any,
) -> Any:
    entries = {"_name_or_path": "a", "transformers_version": "5", "rope_theta": 1e4, 7: "x"}
    described = {
        "hf_config": SimpleNamespace(to_dict=lambda: {**entries, **(config or {})}),
        "dtype": "torch.bfloat16",
        "quantization": None,
        "attention_arch": AttentionArch.MHA,
        "context_len": 2048,
        **model,
    }
    scheduler: Any = SimpleNamespace(
        server_args=ServerArgs(model_path="none", **(arguments or {})),
        model_config=SimpleNamespace(**described),
        disaggregation_mode=DisaggregationMode.DECODE,
        enable_overlap=True,
    )
    return identity.kind_of(scheduler, SimpleNamespace(layout=LAYOUT))


def test_where_a_model_was_loaded_from_does_not_count() -> None:
    assert kind() == kind(config={"_name_or_path": "b", "transformers_version": "6"})


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"config": {"rope_theta": 1e6}}, "model"),
        ({"config": {"rope_scaling": {"type": "yarn", "factor": 4.0}}}, "model"),
        ({"context_len": 4096}, "context"),
        ({"dtype": "torch.float16"}, "dtype"),
        ({"quantization": "fp8"}, "quantization"),
        ({"attention_arch": AttentionArch.MLA}, "attention"),
        ({"arguments": {"tp_size": 2}}, "tp"),
        ({"arguments": {"pp_size": 2}}, "pp"),
        ({"arguments": {"ep_size": 2}}, "ep"),
        ({"arguments": {"dcp_size": 2}}, "dcp"),
        ({"arguments": {"grammar_backend": "outlines"}}, "grammar"),
    ],
    ids=str,
)
def test_what_it_is_does(changed: dict[str, Any], field: str) -> None:
    one, other = kind(), kind(**changed)
    assert {n for n in one.__struct_fields__ if getattr(one, n) != getattr(other, n)} == {field}
