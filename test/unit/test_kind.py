"""Every field of a kind keeps KV away from an engine that differs in it, and says so."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sglang_star.errors import OrderRefused
from sglang_star.migration import admission
from sglang_star.migration.kind import Kind, difference
from sglang_star.protocol import Peer, Reserve, Route

HERE = Kind(
    star="1.0",
    protocol=3,
    sglang="0.5.23",
    role="decode",
    model="0123456789abcdef",
    dtype="torch.bfloat16",
    quantization="None",
    attention="MHA",
    context=4096,
    overlap=True,
    tp=2,
    pp=1,
    dp=1,
    ep=1,
    dcp=1,
    dp_attention=False,
    grammar="xgrammar",
    kv_pool="MHATokenToKVPool",
    kv_dtype="torch.float8_e4m3fn",
    kv_storage="torch.uint8",
    kv_page_size=1,
    kv_first_layer=0,
    kv_tensors=64,
    kv_rows="torch.uint8[8, 128]",
)

OTHERS: dict[str, Any] = {
    "star": "1.1",
    "protocol": 4,
    "sglang": "0.5.22",
    "role": "aggregated",
    "model": "fedcba9876543210",  # another rope base, or any other entry
    "dtype": "torch.float16",
    "quantization": "fp8",
    "attention": "MLA",
    "context": 8192,
    "overlap": False,
    "tp": 4,
    "pp": 2,
    "dp": 2,
    "ep": 2,
    "dcp": 2,
    "dp_attention": True,
    "grammar": "outlines",
    "kv_pool": "MLATokenToKVPool",
    "kv_dtype": "torch.float8_e5m2",  # the same bytes, of other numbers
    "kv_storage": "torch.bfloat16",
    "kv_page_size": 16,
    "kv_first_layer": 32,
    "kv_tensors": 32,
    "kv_rows": "torch.uint8[4, 128]",
}


class Engine:
    """Only its weights are asked for here."""

    def weights(self) -> str:
        return "default@1234"


def reserve(kind: str, weights: str = "default@1234") -> Reserve:
    peer = Peer(instance_id="other", incarnation=1, address="tcp://127.0.0.1:1")
    return Reserve(
        route=Route(migration_id="m", stream_id="s", receiver=1),
        source=peer,
        home=peer,
        fingerprint=kind,
        client_rid="x",
        request=b"",
        prompt_ids=b"",
        weights=weights,
        context_tokens=1,
        max_new_tokens=1,
        moves=0,
        reason="test",
        offers=(),
    )


def test_an_equal_kind_is_taken() -> None:
    admission.check_kind(Engine(), reserve(HERE.text()), HERE.text())  # type: ignore[arg-type]


def test_every_field_has_its_other() -> None:
    assert list(OTHERS) == list(Kind.__struct_fields__)


@pytest.mark.parametrize("name", OTHERS)
def test_a_difference_in_any_field_is_refused_and_named(name: str) -> None:
    there = msgspec.structs.replace(HERE, **{name: OTHERS[name]})
    assert there.fingerprint() != HERE.fingerprint()
    with pytest.raises(OrderRefused) as refused:
        admission.check_kind(Engine(), reserve(there.text()), HERE.text())  # type: ignore[arg-type]
    told = f"{name} is {OTHERS[name]} there, {getattr(HERE, name)} here"
    assert told in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize("theirs", ["default@5678", "two@1234", ""])
def test_other_weights_are_refused(theirs: str) -> None:
    with pytest.raises(OrderRefused, match="no use here"):
        admission.check_kind(Engine(), reserve(HERE.text(), theirs), HERE.text())  # type: ignore[arg-type]


@pytest.mark.parametrize("theirs", ["", "another model's", "[1]", '"x"', "{", "null", "{}"])
def test_what_a_stranger_sends_is_refused(theirs: str) -> None:
    assert difference(theirs, HERE.text())
    assert difference(HERE.text(), HERE.text()) == ""
