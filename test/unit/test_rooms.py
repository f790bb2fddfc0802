from __future__ import annotations

from types import SimpleNamespace

from sglang_star import rooms


def request(room: int | None, n: int) -> SimpleNamespace:
    return SimpleNamespace(bootstrap_room=room, sampling_params=SimpleNamespace(n=n))


def test_samples_get_rooms_of_their_own_on_both_sides_alike() -> None:
    given = []
    for _ in range(2):
        rooms._sent.clear()
        sent = [request(1000, 3) for _ in range(4)]
        for one in sent:
            rooms.send_one_request(None, one)
        given.append([one.bootstrap_room for one in sent])
    assert given == [[1000, 1001, 1002, 1003]] * 2


def test_single_requests_keep_theirs() -> None:
    for one in (request(5, 1), request(None, 3)):
        before = one.bootstrap_room
        rooms.send_one_request(None, one)
        rooms.send_one_request(None, one)
        assert one.bootstrap_room == before


def test_memory_is_bounded() -> None:
    for room in range(3 * rooms.REMEMBERED):
        rooms.send_one_request(None, request(10 * room, 2))
    assert len(rooms._sent) == rooms.REMEMBERED
