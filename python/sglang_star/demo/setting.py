"""What the comparison holds equal and what it models, in words for whoever reads the report."""

from __future__ import annotations

from sglang_star.demo import comparison as c
from sglang_star.demo.workload import LONGEST, Workload
from sglang_star.platform.profile import find


def caption(workload: Workload) -> str:
    """Return one line for below the picture."""
    return (
        f"{workload.requests} requests in {workload.bursts} bursts; "
        f"1 prefill and 2 decode engines of SGLang, paced to a 24 GB card slowed {c.SLOWED:g} times"
    )


def paragraphs(workload: Workload) -> list[str]:
    """Return what ran, what was the same, what is modelled and what was chosen."""
    profile = find(c.CARD)
    return [
        f"Load: {workload.requests} requests in {workload.bursts} bursts of {workload.size}, "
        f"{workload.gap_s:g} s apart; the same ones, at the same times, with the same seeds in "
        f"both runs. They are problems for a small reasoning model that writes out every step, so "
        f"how long an answer becomes shows only as it is written. Answers end where the model ends "
        f"them; the clients' limit is {workload.max_tokens} tokens for all.",
        "Both runs use the same engines, started once, with empty caches; the same router, the "
        "same queue and the same dispatch (least-tokens, the best that does not look ahead). Only "
        "the rescheduler differs. It goes by the estimates of the model's packaged head.",
        f"What is modelled: these are real SGLang engines on a CPU, but every step is held back "
        f"until a 24 GB card with a 7B model ({profile.base_ms:.0f} ms a step), slowed "
        f"{c.SLOWED:g} times, would have finished it. Answers are about {c.SHRUNK} times shorter "
        f"than such a model's, and so are the pool of each decode engine ({c.POOL_TOKENS:,} tokens "
        f"of KV; the card would hold {profile.kv_capacity:,}) and SGLang's reserve per running "
        f"request ({512 // c.SHRUNK} instead of 512 tokens).",
        "What was chosen: bursts whose peak both pools together can hold, but one pool alone may "
        "not, since this is where moving can help. At half this load nothing overflows and nothing "
        "moves; at twice of it both pools are full and moving cannot make room.",
        f"Problems whose worked solution is longer than {LONGEST} tokens are left out, so that the "
        "demo stays short.",
    ]
