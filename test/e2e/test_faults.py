"""A message that says what cannot be costs nothing."""

from __future__ import annotations

import asyncio

import pytest
import zmq

from e2e.conftest import in_one_layout
from e2e.fleet import PROMPT_IDS, Fleet, new_rid, until
from sglang_star.cluster import Cluster
from sglang_star.protocol import TokenChunk, Tokens, encode

pytestmark = pytest.mark.e2e

TOKENS = 256
"""As many of them are bad as come while the message is on its way, and more."""
NO_TOKEN = 1 << 63
"""Fits into a message, and into no array of token ids."""

BYSTANDER = {
    "input_ids": PROMPT_IDS[::-1],
    "sampling_params": {"max_new_tokens": 400, "temperature": 0, "ignore_eos": True},
}


def send(address: str, message: Tokens) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.connect(address)
    socket.send(encode(message))
    socket.close()
    context.term()  # waits until all is sent


@in_one_layout
def test_a_token_that_no_model_has_costs_nothing(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet:
            await fleet.settle()
            _, alone = await fleet.post(fleet.router + "/generate", BYSTANDER)
            await fleet.settle()
            rid = new_rid("struck")
            async with fleet.endless(rid):
                home, _ = await fleet.found(rid)
                bystander = asyncio.create_task(fleet.post(fleet.router + "/generate", BYSTANDER))
                code, order = await fleet.order(rid, home, fleet.other(home))
                assert code == 202, order
                assert (await fleet.report(order["migration_id"]))["outcome"] == "moved"
                star = (await fleet.get(fleet.engines[home] + "/server_info"))["star"]
                _, request = await fleet.found(rid)
                now = request["output_tokens"]
                # Whatever comes next in the stream, one of these is it.
                bad = [
                    TokenChunk(
                        migration_id=order["migration_id"],
                        stream_id=order["stream_id"],
                        index=index,
                        token_ids=(NO_TOKEN,),
                    )
                    for index in range(now, now + TOKENS)
                ]
                message = Tokens(receiver=star["incarnation"], chunks=tuple(bad))
                await asyncio.to_thread(send, star["migration_address"], message)
                # It is looked at before it is used: the stream goes on where it is.

                async def goes_on() -> bool:
                    _, request = await fleet.found(rid)
                    return bool(request["output_tokens"] > now + TOKENS)

                await until(goes_on, "the stream goes on")
                for engine in fleet.engines:
                    await fleet.faults(engine, {})
                _, beside = await bystander
                assert beside["output_ids"] == alone["output_ids"]

    asyncio.run(scenario())
