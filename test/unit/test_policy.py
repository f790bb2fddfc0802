"""The policies' contracts: what they must never do, whatever the snapshot."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_star.errors import ConfigError
from sglang_star.migration import admission
from sglang_star_router.policy import limits
from sglang_star_router.policy.holding import retry_order, with_room
from sglang_star_router.policy.params import StarParams
from sglang_star_router.policy.registry import (
    DISPATCH_NAMES,
    RESCHEDULER_NAMES,
    make_dispatch,
    make_rescheduler,
)
from sglang_star_router.policy.sanity import sane
from sglang_star_router.policy.snapshot import Arrival, FleetSnapshot, Instances, Placed, Requests

CAPACITY = 40_000


def fleet(
    seed: int, instances: int, each: int, *, fill: float = 1.0, groups: int = 1
) -> FleetSnapshot:
    """A random fleet; ``fill`` scales how full it is. Some instances drain, refuse or queue.

    Moves are possible only within each of its ``groups``.
    """
    rng = np.random.default_rng(seed)
    count = instances * each
    owner = rng.integers(0, instances, count)
    prompt = rng.integers(1, int(3000 * fill) + 2, count)
    output = rng.integers(1, int(3000 * fill) + 2, count)
    queued = rng.random(count) < 0.05
    used = np.bincount(owner[~queued], (prompt + output)[~queued], instances).astype(np.int64)
    median = rng.lognormal(6.5, 1.0, count)
    draining = rng.random(instances) < 0.1
    none = np.zeros(instances, dtype=np.int64)
    return FleetSnapshot(
        now_s=1000.0,
        instances=Instances(
            ids=tuple(f"d{i}" for i in range(instances)),
            kv_capacity=np.maximum(none + CAPACITY, used),
            kv_used=used,
            kv_reserved=none,
            reserve_each=none + 512,
            guest_reserve=none + 512,
            running=np.bincount(owner[~queued], minlength=instances),
            queued=np.bincount(owner[queued], minlength=instances),
            retracted=(rng.random(instances) < 0.05).astype(np.int64),
            step_ms=rng.uniform(20, 40, instances),
            age_s=np.zeros(instances),
            accepts=~draining & (rng.random(instances) > 0.1),
            draining=draining,
            group=rng.integers(0, groups, instances),
            moves_out=(rng.random(instances) < 0.1).astype(np.int64),
            moves_in=none,
        ),
        requests=Requests(
            rids=tuple(f"r{i}" for i in range(count)),
            instance=owner,
            prompt_tokens=prompt,
            output_tokens=output,
            max_new_tokens=np.full(count, 32_768),
            remaining=median[:, None] * np.array([0.4, 0.65, 1.0, 1.5, 2.5]),
            true_remaining=median,
            movable=rng.random(count) < 0.9,
            queued=queued,
            since_move_s=rng.uniform(0, 60, count),
        ),
    )


def shuffled(snapshot: FleetSnapshot, seed: int) -> FleetSnapshot:
    """The same fleet with instances and requests listed in another order."""
    rng = np.random.default_rng(seed)
    inst, reqs = snapshot.instances, snapshot.requests
    order = rng.permutation(len(inst.ids))
    back = np.argsort(order)
    rows = rng.permutation(len(reqs.rids))

    def pick(name: str, value: Any, by: np.ndarray) -> Any:
        return tuple(value[k] for k in by) if name in ("ids", "rids") else value[by]

    columns = {f.name: pick(f.name, getattr(inst, f.name), order) for f in fields(inst)}
    cells = {f.name: pick(f.name, getattr(reqs, f.name), rows) for f in fields(reqs)}
    cells["instance"] = back[cells["instance"]]
    return FleetSnapshot(snapshot.now_s, Instances(**columns), Requests(**cells))


fleets = st.builds(
    fleet,
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(0, 20),
    fill=st.sampled_from([0.2, 0.6, 1.0]),
    groups=st.integers(1, 3),
)
arrival = Arrival(rid="new", prompt_tokens=300, max_new_tokens=4096, arrived_s=1000.0)


@settings(max_examples=120, deadline=None)
@given(fleets, st.sampled_from(RESCHEDULER_NAMES))
def test_orders_respect_targets_slots_and_cooldown(snapshot: FleetSnapshot, name: str) -> None:
    policy = make_rescheduler(name)
    inst, reqs = snapshot.instances, snapshot.requests
    row_of = {rid: k for k, rid in enumerate(reqs.rids)}
    place = {name: k for k, name in enumerate(inst.ids)}
    taken = inst.moves_in + inst.moves_out
    moved: set[str] = set()
    landing = np.zeros(len(inst.ids), dtype=np.int64)
    for order in policy.orders(snapshot):
        row, target = row_of[order.rid], place[order.target]
        assert order.rid not in moved
        moved.add(order.rid)
        assert inst.ids[reqs.instance[row]] == order.source != order.target
        assert reqs.movable[row]
        assert not reqs.queued[row]
        assert reqs.since_move_s[row] >= policy.params.cooldown_s
        assert inst.accepts[target]
        assert inst.group[target] == inst.group[reqs.instance[row]]
        assert not inst.draining[target]
        assert inst.queued[target] == inst.retracted[target] == 0
        for end in (place[order.source], target):
            taken[end] += 1
            assert taken[end] <= policy.params.moves_per_instance
        landing[target] += reqs.prompt_tokens[row] + reqs.output_tokens[row]
        assert inst.kv_used[target] + landing[target] <= inst.kv_capacity[target]
        assert order.explain
        assert all(np.isfinite(v) for v in order.explain.values())


@settings(max_examples=60, deadline=None)
@given(fleets, st.integers(0, 2**31))
def test_results_do_not_depend_on_the_order_of_the_input(
    snapshot: FleetSnapshot, seed: int
) -> None:
    other = shuffled(snapshot, seed)
    for name in RESCHEDULER_NAMES:
        policy = make_rescheduler(name)
        here = [(o.rid, o.source, o.target) for o in policy.orders(snapshot)]
        there = [(o.rid, o.source, o.target) for o in policy.orders(other)]
        assert here == there
    for name in DISPATCH_NAMES:
        dispatch = make_dispatch(name)
        for sequence in range(3):
            here_to = dispatch.place(snapshot, arrival, sequence).instance
            assert here_to == dispatch.place(other, arrival, sequence).instance


@settings(max_examples=60, deadline=None)
@given(fleets, st.sampled_from(DISPATCH_NAMES))
def test_dispatch_goes_only_where_it_is_accepted(snapshot: FleetSnapshot, name: str) -> None:
    placement = make_dispatch(name).place(snapshot, arrival, 0)
    if placement.instance is None:
        holds = name == "star" or name.startswith("queued-")
        assert holds or not snapshot.instances.accepts.any()
    else:
        assert snapshot.instances.accepts[snapshot.instances.ids.index(placement.instance)]


@pytest.mark.parametrize("name", DISPATCH_NAMES)
def test_nobody_accepting_means_hold(name: str) -> None:
    snapshot = fleet(0, 4, 3)
    nobody = replace(
        snapshot, instances=replace(snapshot.instances, accepts=np.zeros(4, dtype=bool))
    )
    assert make_dispatch(name).place(nobody, arrival, 0).instance is None


def test_round_robin_takes_turns_over_accepting_instances() -> None:
    snapshot = fleet(0, 5, 1)
    accepts = np.array([True, False, True, True, False])
    snapshot = replace(snapshot, instances=replace(snapshot.instances, accepts=accepts))
    policy = make_dispatch("round-robin")
    chosen = [policy.place(snapshot, arrival, k).instance for k in range(6)]
    assert chosen == ["d0", "d2", "d3"] * 2


def test_what_was_placed_since_the_status_counts() -> None:
    snapshot = two_instances(used=(10_000, 11_000))
    for name in ("least-tokens", "least-requests", "star"):
        policy = make_dispatch(name)
        assert policy.place(snapshot, arrival, 0).instance == "a"
        after = replace(snapshot, placed=Placed(np.array([0, 0]), np.array([5_000, 5_000])))
        assert policy.place(after, arrival, 1).instance == "b"


def two_instances(
    used: tuple[int, int],
    *,
    remaining: float = 2000.0,
    capacity: int = CAPACITY,
    step_ms: tuple[float, float] = (25.0, 25.0),
    group: tuple[int, int] = (0, 0),
) -> FleetSnapshot:
    """Instances a and b; each holds equal requests of 1,000 tokens that make up what it uses."""
    counts = [u // 1000 for u in used]
    owner = np.repeat([0, 1], counts)
    count = owner.size
    none = np.zeros(2, dtype=np.int64)
    return FleetSnapshot(
        now_s=1000.0,
        instances=Instances(
            ids=("a", "b"),
            kv_capacity=none + capacity,
            kv_used=np.array(used),
            kv_reserved=none,
            reserve_each=none + 512,
            guest_reserve=none + 512,
            running=np.array(counts),
            queued=none,
            retracted=none,
            step_ms=np.array(step_ms),
            age_s=np.zeros(2),
            accepts=np.ones(2, dtype=bool),
            draining=np.zeros(2, dtype=bool),
            group=np.array(group),
            moves_out=none,
            moves_in=none,
        ),
        requests=Requests(
            rids=tuple(f"r{k:02}" for k in range(count)),
            instance=owner,
            prompt_tokens=np.full(count, 500),
            output_tokens=np.full(count, 500),
            max_new_tokens=np.full(count, 32_768),
            remaining=np.full((count, 5), remaining) * np.array([0.8, 0.9, 1.0, 1.1, 1.25]),
            true_remaining=np.full(count, remaining),
            movable=np.ones(count, dtype=bool),
            queued=np.zeros(count, dtype=bool),
            since_move_s=np.full(count, 100.0),
        ),
    )


def test_star_moves_only_what_is_going_to_overflow() -> None:
    policy = make_rescheduler("star")
    full_soon = two_instances((30_000, 5_000))
    orders = policy.orders(full_soon)
    assert [(o.source, o.target, o.reason) for o in orders] == [("a", "b", "overflow")]
    # The same imbalance with requests that end first needs no move; reactive moves on both.
    ends_first = two_instances((30_000, 5_000), remaining=50.0)
    assert policy.orders(ends_first) == []
    assert make_rescheduler("reactive").orders(ends_first)


def test_star_does_not_move_to_where_it_will_overflow_too() -> None:
    both_full = two_instances((30_000, 26_000))
    assert make_rescheduler("star").orders(both_full) == []


def test_star_asks_no_target_that_would_keep_its_memory_for_those_it_has() -> None:
    # Room for the forecast, but SGLang keeps 512 tokens for each of the 5 requests and the guest.
    snapshot = two_instances((9_500, 5_000), remaining=300.0, capacity=9_500)
    policy = make_rescheduler("star")
    small = replace(snapshot.instances, guest_reserve=np.array([512, 512]))
    assert policy.orders(replace(snapshot, instances=small))
    full = replace(snapshot.instances, guest_reserve=np.array([512, 700]))
    assert policy.orders(replace(snapshot, instances=full)) == []
    # A draining instance is emptied all the same: the target makes room for its requests.
    leaving = replace(full, draining=np.array([True, False]), accepts=np.array([False, True]))
    assert policy.orders(replace(snapshot, instances=leaving))


def test_policies_and_targets_keep_the_same_headroom() -> None:
    # Policies import nothing of ours, so the number stands twice.
    assert limits.GUEST_HEADROOM == admission.HEADROOM_TOKENS


def test_star_leaves_an_instance_that_misses_the_tpot_limit() -> None:
    slow = two_instances((10_000, 5_000), step_ms=(70.0, 25.0))
    orders = make_rescheduler("star").orders(slow)
    assert [(o.source, o.target) for o in orders] == [("a", "b")]


def test_star_recomputes_only_when_that_is_cheaper() -> None:
    snapshot = two_instances((30_000, 5_000))
    cheap = make_rescheduler("star", copy_tokens_per_s=1e3, recompute_tokens_per_s=1e4)
    dear = make_rescheduler("star", copy_tokens_per_s=1e5, recompute_tokens_per_s=1e4)
    assert [o.mode for o in cheap.orders(snapshot)] == ["recompute"]
    assert [o.mode for o in dear.orders(snapshot)] == ["copy"]
    # Moving 1,000 tokens at 5 tokens/s takes longer than the requests live.
    assert make_rescheduler("star", copy_tokens_per_s=5).orders(snapshot) == []


def test_draining_instances_are_emptied() -> None:
    snapshot = two_instances((10_000, 5_000))
    draining = np.array([True, False])
    snapshot = replace(
        snapshot,
        instances=replace(snapshot.instances, draining=draining, accepts=~draining),
    )
    for name in ("star", "oracle", "reactive"):
        orders = make_rescheduler(name).orders(snapshot)
        assert [(o.source, o.reason) for o in orders] == [("a", "drain")]


def test_oracle_believes_the_truth_and_star_the_estimate() -> None:
    snapshot = two_instances((30_000, 5_000), remaining=50.0)
    truth = np.full(len(snapshot.requests.rids), 2000.0)
    snapshot = replace(snapshot, requests=replace(snapshot.requests, true_remaining=truth))
    assert make_rescheduler("star").orders(snapshot) == []
    assert make_rescheduler("oracle").orders(snapshot)


def test_star_holds_when_nobody_would_admit_and_refuses_in_the_end() -> None:
    full = two_instances((39_000, 39_000))
    policy = make_dispatch("star", hold_max_s=20.0)
    fresh = policy.place(full, arrival, 0)
    assert (fresh.instance, fresh.reject) == (None, False)
    assert fresh.explain["waited_s"] == 0.0
    late = replace(arrival, arrived_s=full.now_s - 21.0)
    assert policy.place(full, late, 0).reject
    crowded = replace(full, held=10_000)
    assert policy.place(crowded, arrival, 0).reject


def test_late_requests_leave_room_for_fresh_ones_only_when_others_wait() -> None:
    snapshot = two_instances((25_000, 25_000), remaining=100.0)
    policy = make_dispatch("star")
    late = replace(arrival, arrived_s=snapshot.now_s - 10.0)
    assert policy.place(replace(snapshot, held=1), late, 0).instance is not None
    assert policy.place(replace(snapshot, held=50), late, 0).instance is None
    assert policy.place(replace(snapshot, held=50), arrival, 0).instance is not None


def test_retry_order_puts_those_in_time_first() -> None:
    held = [replace(arrival, arrived_s=t) for t in (0.0, 5.0, 9.0, 9.5)]
    assert retry_order(held, 10.0, 1.5) == ([2, 3, 0, 1], 2)


@pytest.mark.parametrize("name", RESCHEDULER_NAMES)
def test_nonsense_in_a_snapshot_never_stops_a_round(name: str) -> None:
    snapshot = fleet(3, 5, 10)
    rng = np.random.default_rng(0)
    reqs, inst = snapshot.requests, snapshot.instances
    remaining = reqs.remaining.copy()
    remaining[rng.random(remaining.shape) < 0.3] = np.nan
    remaining[0], remaining[1] = np.inf, -5.0
    owner = reqs.instance.copy()
    owner[::7], owner[3::7] = 99, -1
    step = inst.step_ms.copy()
    step[0] = np.nan
    bad = replace(
        snapshot,
        requests=replace(
            reqs, remaining=remaining, instance=owner, prompt_tokens=reqs.prompt_tokens - 1500
        ),
        instances=replace(
            inst, step_ms=step, kv_capacity=inst.kv_capacity * 0, kv_used=inst.kv_used - 10**6
        ),
    )
    assert make_rescheduler(name).orders(bad) == []
    for dispatch in DISPATCH_NAMES:
        placement = make_dispatch(dispatch).place(bad, arrival, 0)
        assert dispatch == "round-robin" or placement.instance is None


@pytest.mark.parametrize("name", RESCHEDULER_NAMES)
def test_empty_fleet_and_empty_instances(name: str) -> None:
    empty = fleet(0, 3, 0)
    assert make_rescheduler(name).orders(empty) == []
    reqs = empty.requests
    nothing = {f.name: getattr(empty.instances, f.name)[:0] for f in fields(empty.instances)}
    nobody = FleetSnapshot(0.0, Instances(**nothing), reqs)
    assert make_rescheduler(name).orders(nobody) == []
    for dispatch in DISPATCH_NAMES:
        assert make_dispatch(dispatch).place(nobody, arrival, 0).instance is None


@pytest.mark.parametrize("name", RESCHEDULER_NAMES)
def test_nothing_moves_between_instances_that_cannot_exchange_requests(name: str) -> None:
    assert make_rescheduler(name).orders(two_instances((30_000, 5_000)))
    assert make_rescheduler(name).orders(two_instances((30_000, 5_000), group=(0, 1))) == []


def test_unknown_names_and_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="no dispatch policy"):
        make_dispatch("best")
    with pytest.raises(ConfigError, match="no rescheduler"):
        make_rescheduler("off")
    with pytest.raises(ConfigError, match="no parameter 'gapp'"):
        make_rescheduler("reactive", gapp=1.0)
    with pytest.raises(ConfigError, match="at least 0"):
        make_rescheduler("star", horizon_steps=-1)
    with pytest.raises(ConfigError, match="wants a float"):
        make_rescheduler("star", risk_sigma="high")
    with pytest.raises(ConfigError, match="at least 0"):
        make_rescheduler("star", risk_sigma=float("nan"))


@settings(max_examples=60, deadline=None)
@given(fleets, st.integers(0, 5))
def test_a_queued_policy_chooses_among_those_with_room(
    snapshot: FleetSnapshot, sequence: int
) -> None:
    room = with_room(sane(snapshot), arrival, StarParams())
    for name in ("round-robin", "least-requests", "least-tokens"):
        placement = make_dispatch(f"queued-{name}").place(snapshot, arrival, sequence)
        if room.any():
            assert placement.instance is not None
            assert room[snapshot.instances.ids.index(placement.instance)]
        else:
            assert placement.instance is None
        if room.all():
            plain = make_dispatch(name).place(snapshot, arrival, sequence)
            assert placement.instance == plain.instance
