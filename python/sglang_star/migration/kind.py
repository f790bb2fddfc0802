"""What must be equal of two engines for KV of one to be of use to the other."""

from __future__ import annotations

import hashlib

import msgspec


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """All of it that stays as it is while an engine runs; its weights do not, and stand apart.

    Attributes:
        star, protocol, sglang: releases, of STAR and of its protocol, and of SGLang.
        role: prefill, decode or both.
        model: digest of the model's configuration, with overrides; not of where it was loaded from.
        dtype, quantization: of the weights; attention: MHA or MLA; context: longest, in tokens.
        overlap: whether a step is in flight at a boundary, which penalties tell.
        tp, pp, dp, ep, dcp: ranks, and what of the model each of them has; dp_attention: likewise.
        grammar: what compiles grammars, whose state a target repeats.
        kv_pool, kv_dtype, kv_storage, kv_page_size: SGLang's class of pool, the type of its
            numbers, the type they are stored as, tokens per page.
        kv_first_layer, kv_tensors, kv_rows: first layer of a rank; how many tensors, and what a
            token is in them.
    """

    star: str
    protocol: int
    sglang: str
    role: str
    model: str
    dtype: str
    quantization: str
    attention: str
    context: int
    overlap: bool
    tp: int
    pp: int
    dp: int
    ep: int
    dcp: int
    dp_attention: bool
    grammar: str
    kv_pool: str
    kv_dtype: str
    kv_storage: str
    kv_page_size: int
    kv_first_layer: int
    kv_tensors: int
    kv_rows: str

    def text(self) -> str:
        """All fields, as JSON: what an engine sends with a request that is to come."""
        return msgspec.json.encode(self).decode()

    def fingerprint(self) -> str:
        """16 hexadecimal digits; equal kinds have equal ones."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]


def difference(theirs: str, ours: str) -> str:
    """How two kinds differ, for people; empty if they do not.

    Args:
        theirs: as from :meth:`Kind.text`, or whatever a stranger sends.
        ours: as from :meth:`Kind.text`.
    """
    if theirs == ours:
        return ""
    try:
        known = (msgspec.json.decode(text, type=dict[str, object]) for text in (theirs, ours))
        one, other = known
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return "another model, dtype, KV layout, parallelism or release runs here"
    names = [name for name in {**other, **one} if one.get(name) != other.get(name)]
    return ", ".join(f"{name} is {one.get(name)} there, {other.get(name)} here" for name in names)
