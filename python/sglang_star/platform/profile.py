"""Roofline latency of a model on a card, from the model's config and the card's datasheet.

A decode step reads all weights and all KV of its batch once, and computes one token per request::

    step = (weights + kv_bytes * L) / (bandwidth * e_b) + n * 2 * parameters / (flops * e_c) + fixed

with ``n`` requests holding ``L`` KV tokens. Prefill of ``p`` tokens is bound by compute::

    prefill = (2 * parameters * p + 2 * layers * hidden * p**2) / (flops * e_c) + fixed

(the quadratic term is causal attention: QK and PV, each ``2 * hidden * p**2 / 2`` per layer).
KV capacity is what the memory fraction leaves after weights and activations.

Sources. Model ``7b``: the config of Qwen2.5-7B, 28 layers, hidden 3,584, 4 KV heads of 128,
7.62e9 parameters in bf16. Cards: NVIDIA H100 SXM datasheet (80 GB, 3.35 TB/s, 989 dense bf16
TFLOPS) and NVIDIA RTX 4090 (24 GB, 1.008 TB/s, 165 dense bf16 TFLOPS with fp32 accumulation).
The efficiencies ``e_b`` = 0.8, ``e_c`` = 0.5 and the fixed 1.5 ms per step are round assumptions
in the range serving engines reach; nothing here was fitted to a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sglang_star.errors import ConfigError

GB = 1e9


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of instance.

    Attributes:
        base_ms: step time of an empty batch; per_request_ms, per_token_ms: added by each request
            and by each KV token it holds.
        prefill_base_ms, prefill_token_ms, prefill_square_ms: prefill of ``p`` tokens takes
            ``base + token * p + square * p**2``.
        kv_capacity: tokens; kv_bytes: bytes per token; weight_tokens: weights in KV tokens.
        host_bytes_per_s: copies between card and host memory, for retraction.
        link_bytes_per_s, link_latency_ms: one direction of the instance's network link.
        max_running: requests in one batch at most.
    """

    name: str
    base_ms: float
    per_request_ms: float
    per_token_ms: float
    prefill_base_ms: float
    prefill_token_ms: float
    prefill_square_ms: float
    kv_capacity: int
    kv_bytes: float
    weight_tokens: float
    host_bytes_per_s: float
    link_bytes_per_s: float
    link_latency_ms: float = 1.0
    max_running: int = 2048

    def step_ms(self, requests: int, tokens: float) -> float:
        """Decode step time of ``requests`` holding ``tokens`` of KV."""
        return self.base_ms + self.per_request_ms * requests + self.per_token_ms * tokens

    def prefill_ms(self, tokens: int) -> float:
        """Time to prefill one prompt."""
        return (
            self.prefill_base_ms
            + self.prefill_token_ms * tokens
            + self.prefill_square_ms * tokens * tokens
        )

    def slowed(self, factor: float) -> Profile:
        """The same instance with every step and prefill ``factor`` times as long."""
        return replace(
            self,
            name=f"{self.name}*{factor:g}",
            base_ms=self.base_ms * factor,
            per_request_ms=self.per_request_ms * factor,
            per_token_ms=self.per_token_ms * factor,
            prefill_base_ms=self.prefill_base_ms * factor,
            prefill_token_ms=self.prefill_token_ms * factor,
            prefill_square_ms=self.prefill_square_ms * factor,
        )


def roofline(
    name: str,
    *,
    memory_gb: float,
    bandwidth: float,
    flops: float,
    link_bytes_per_s: float,
    parameters: float = 7.62e9,
    layers: int = 28,
    hidden: int = 3584,
    kv_width: int = 4 * 128,
    memory_fraction: float = 0.9,
    activations_gb: float = 1.0,
    bandwidth_efficiency: float = 0.8,
    compute_efficiency: float = 0.5,
    fixed_ms: float = 1.5,
) -> Profile:
    """Derive a profile; ``bandwidth`` in bytes/s, ``flops`` dense bf16 per second."""
    weights = 2.0 * parameters
    kv_bytes = 2.0 * 2.0 * layers * kv_width
    read = bandwidth * bandwidth_efficiency
    compute = flops * compute_efficiency
    free = memory_gb * GB * memory_fraction - weights - activations_gb * GB
    return Profile(
        name=name,
        base_ms=1e3 * weights / read + fixed_ms,
        per_request_ms=1e3 * 2.0 * parameters / compute,
        per_token_ms=1e3 * kv_bytes / read,
        prefill_base_ms=fixed_ms,
        prefill_token_ms=1e3 * 2.0 * parameters / compute,
        prefill_square_ms=1e3 * 2.0 * layers * hidden / compute,
        kv_capacity=int(free / kv_bytes),
        kv_bytes=kv_bytes,
        weight_tokens=weights / kv_bytes,
        host_bytes_per_s=25e9,
        link_bytes_per_s=link_bytes_per_s,
    )


PROFILES = {
    "80gb-7b": roofline(
        "80gb-7b", memory_gb=80, bandwidth=3.35e12, flops=989e12, link_bytes_per_s=25e9
    ),
    "24gb-7b": roofline(
        "24gb-7b", memory_gb=24, bandwidth=1.008e12, flops=165e12, link_bytes_per_s=12.5e9
    ),
}
"""Links: 200 Gb/s for the 80 GB card, 100 Gb/s for the 24 GB card."""


def find(name: str) -> Profile:
    """Look a profile up; ``NAME*F`` is ``NAME`` slowed by ``F``.

    Raises:
        ConfigError: no such profile, or a factor that is no positive number.
    """
    base, _, factor = name.partition("*")
    if base not in PROFILES:
        raise ConfigError(f"no profile {base!r}", hint=f"choose from {', '.join(PROFILES)}")
    if not factor:
        return PROFILES[base]
    try:
        slow = float(factor)
    except ValueError:
        slow = 0.0
    if not 0 < slow < float("inf"):
        raise ConfigError(f"{factor!r} is not a factor to slow {base} by")
    return PROFILES[base].slowed(slow)
