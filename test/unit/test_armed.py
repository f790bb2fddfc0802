from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_star.errors import OrderRefused
from sglang_star.migration.armed import MAX_ARMED, ArmedOrder, ArmedOrders
from sglang_star.protocol import Peer

PEER = Peer(instance_id="b", incarnation=1, address="tcp://127.0.0.1:1")


def order(
    rid: str = "r", at_tokens: int = 5, *, name: str = "m", until: float = 60.0
) -> ArmedOrder:
    return ArmedOrder(
        migration_id=name,
        rid=rid,
        target=PEER,
        reason="test",
        at_tokens=at_tokens,
        hold_after=None,
        armed_at=1.0,
        expires_at=until,
    )


def table(*orders: ArmedOrder) -> ArmedOrders:
    made = ArmedOrders()
    for one in orders:
        made.add(one)
    return made


def due(orders: ArmedOrders, **running: int) -> list[tuple[str, str]]:
    return [(one.migration_id, rid) for one, rid in orders.due(running.items())]


def test_an_order_is_due_from_its_token_on_and_stays_until_it_is_taken_out() -> None:
    armed = table(order(at_tokens=5))
    assert due(armed, r=4) == []
    assert due(armed, r=5) == due(armed, r=9) == [("m", "r")]
    [(found, _)] = armed.due([("r", 5)])
    armed.remove(found)
    assert not armed
    assert due(armed, r=9) == []


def test_a_name_is_matched_whole_unless_it_ends_in_a_star() -> None:
    assert due(table(order("r")), r1=9) == []
    assert due(table(order("r*")), r1=9) == [("m", "r1")]
    assert due(table(order("*")), any=9) == [("m", "any")]
    assert due(table(order("r*")), s=9) == []


def test_each_request_is_paired_with_one_order_and_each_order_with_one_request() -> None:
    armed = table(order("*", name="first"), order("*", name="second"), order("a", name="third"))
    assert due(armed, a=9) == [("first", "a")]
    assert due(armed, a=9, b=9) == [("first", "a"), ("second", "b")]
    assert due(armed, b=9, c=9, a=9) == [("first", "b"), ("second", "c"), ("third", "a")]


def test_orders_for_later_tokens_wait_for_theirs() -> None:
    armed = table(order(at_tokens=20, name="late"), order(at_tokens=5, name="soon"))
    assert due(armed, r=7) == [("soon", "r")]
    assert due(armed, r=20) == [("late", "r")]


def test_the_table_is_bounded_and_says_what_to_do() -> None:
    armed = table(*(order() for _ in range(MAX_ARMED)))
    with pytest.raises(OrderRefused) as caught:
        armed.add(order())
    assert "/star/disarm" in caught.value.hint
    assert len(armed) == MAX_ARMED


def test_orders_expire_and_are_disarmed_by_name() -> None:
    armed = table(order("a", until=1.0), order("b", until=2.0), order("b*", until=3.0), order("c"))
    assert [one.rid for one in armed.expire(1.5)] == ["a"]
    assert [one.rid for one in armed.disarm("b")] == ["b"]
    assert armed.disarm("b") == []
    assert [one.rid for one in armed.disarm("")] == ["b*", "c"]
    assert len(armed) == 0


def test_the_report_of_an_order_that_never_started() -> None:
    report = order("x*").unstarted("a", "expired", "why", 9.0)
    assert (report.migration_id, report.rid, report.source, report.target) == ("m", "x*", "a", "b")
    assert (report.outcome, report.detail, report.reason) == ("expired", "why", "test")
    assert (report.started_at, report.finished_at) == (1.0, 9.0)


NAMES = st.sampled_from(["a", "b", "ab", "a*", "b*", "*"])


@given(
    st.lists(st.tuples(NAMES, st.integers(1, 9)), max_size=12),
    st.dictionaries(st.sampled_from(["a", "b", "ab", "ba"]), st.integers(0, 9)),
)
def test_pairs_fit_and_nothing_that_fits_is_left_over(
    wanted: list[tuple[str, int]], running: dict[str, int]
) -> None:
    orders = [order(rid, tokens, name=str(n)) for n, (rid, tokens) in enumerate(wanted)]
    pairs = table(*orders).due(running.items())
    assert all(one.fits(rid, running[rid]) for one, rid in pairs)
    assert len({rid for _, rid in pairs}) == len({one.migration_id for one, _ in pairs})
    assert len({rid for _, rid in pairs}) == len(pairs)
    paired = {one.migration_id for one, _ in pairs}
    for left in (one for one in orders if one.migration_id not in paired):
        for rid in running.keys() - {rid for _, rid in pairs}:
            assert not left.fits(rid, running[rid])
