"""STAR's routes on SGLang's HTTP app: ``/star/status|migrate|disarm|drain|undrain``.

They stand under the same keys as SGLang's own admin routes: the admin key if there is one, else the
API key. The HTTP process passes orders to the scheduler over a private socket; the scheduler
answers between two decode steps. No key of this instance goes to an address in an order.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import aiohttp
import msgspec
import zmq
import zmq.asyncio
from fastapi import FastAPI, Request, Response

from sglang_star.errors import (
    ConfigError,
    MalformedMessage,
    OrderRefused,
    PeerError,
    ProtocolError,
    StarError,
    VersionMismatch,
)
from sglang_star.launch import ATTRIBUTE
from sglang_star.protocol import (
    PROTOCOL_VERSION,
    Advertisement,
    DisarmOrder,
    DrainOrder,
    MigrateOrder,
    OrderReply,
    Peer,
    StatusOrder,
    UndrainOrder,
    decode,
    encode,
)
from sglang_star.secrets import Redaction

Handler = Callable[[Request], Awaitable[Response]]

ORDER_TIMEOUT_S = 30.0
RESOLVE_TIMEOUT_S = 5.0


class PeerBody(msgspec.Struct, forbid_unknown_fields=True):
    """What a router knows of a target, so that nobody need ask it; a :class:`Peer` in JSON."""

    instance_id: Annotated[str, msgspec.Meta(min_length=1)]
    incarnation: int
    address: Annotated[str, msgspec.Meta(pattern=r"^tcp://.+:\d+$")]


class MigrateBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /star/migrate``; see :class:`~sglang_star.protocol.MigrateOrder`.

    Without ``peer`` the target is asked for it at its base URL ``target``.
    """

    rid: Annotated[str, msgspec.Meta(min_length=1)]
    target: str
    peer: PeerBody | None = None
    reason: str = "order"
    at_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    hold_after: Annotated[int, msgspec.Meta(ge=0)] | None = None
    expire_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 600.0


class DisarmBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /star/disarm``; without a ``rid`` all armed orders are meant."""

    rid: str = ""


class DrainBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /star/drain``; ``targets`` are base URLs, may be absent.

    ``peers``, if given, has for each target what is known of it, or null.
    """

    targets: list[str] = []
    peers: list[PeerBody | None] = []


class OrderClient:
    """Sends orders to this instance's scheduler and pairs the replies."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[OrderReply]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def ask(self, make: Callable[[int], Any]) -> bytes:
        """Send the order ``make(order_id)`` and return its JSON payload.

        Raises:
            StarError: what the scheduler answered.
            PeerError: it did not answer in time.
        """
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())
        order_id = next(self._ids)
        future: asyncio.Future[OrderReply] = asyncio.get_running_loop().create_future()
        self._waiting[order_id] = future
        try:
            await self._socket.send(encode(make(order_id)))
            reply = await asyncio.wait_for(future, ORDER_TIMEOUT_S)
        except TimeoutError:
            raise PeerError(
                f"the scheduler did not answer within {ORDER_TIMEOUT_S:g} s",
                hint="see its log; a long prefill can hold it, retry",
            ) from None
        finally:
            del self._waiting[order_id]
        if reply.error_type:
            raise _named(reply.error_type)(reply.message, hint=reply.hint)
        return reply.payload

    async def _read(self) -> None:
        while True:
            try:
                reply = decode(await self._socket.recv())
            except ProtocolError:
                continue
            future = self._waiting.get(getattr(reply, "order_id", -1))
            if isinstance(reply, OrderReply) and future is not None and not future.done():
                future.set_result(reply)


class Endpoints:
    """The routes' handlers."""

    def __init__(self, orders: OrderClient) -> None:
        self._orders = orders

    def join(self, app: FastAPI, level: Callable[[Handler], Handler]) -> None:
        """Add the routes to ``app``.

        Not through a router of their own: SGLang reads the level off the routes of the app itself
        and takes what an included router serves for ordinary.

        Args:
            level: marks a handler with what key it needs.
        """
        for path, method, handler in (
            ("/star/status", "GET", self.status),
            ("/star/migrate", "POST", self.migrate),
            ("/star/disarm", "POST", self.disarm),
            ("/star/drain", "POST", self.drain),
            ("/star/undrain", "POST", self.undrain),
        ):
            app.add_api_route(path, level(_answering(handler)), methods=[method])

    async def status(self, request: Request) -> Response:
        """The instance's status now."""
        return _json(await self._orders.ask(lambda n: StatusOrder(order_id=n)))

    async def migrate(self, request: Request) -> Response:
        """Start a move, or arm one: 202 once accepted."""
        body = await _body(request, MigrateBody)
        target = await self._peer(body.target, body.peer)
        payload = await self._orders.ask(
            lambda n: MigrateOrder(
                order_id=n,
                rid=body.rid,
                target=target,
                reason=body.reason,
                at_tokens=body.at_tokens,
                hold_after=-1 if body.hold_after is None else body.hold_after,
                expire_s=body.expire_s,
            )
        )
        return _json(payload, 202)

    async def disarm(self, request: Request) -> Response:
        """Forget armed orders; answers with their migration ids."""
        body = await _body(request, DisarmBody)
        return _json(await self._orders.ask(lambda n: DisarmOrder(order_id=n, rid=body.rid)))

    async def drain(self, request: Request) -> Response:
        """Refuse guests and move everything movable to the targets."""
        body = await _body(request, DrainBody)
        if body.peers and len(body.peers) != len(body.targets):
            raise MalformedMessage(
                f"request body: {len(body.peers)} peers for {len(body.targets)} targets",
                hint="give one, or null, for each target, or leave peers out",
            )
        peers = body.peers or [None] * len(body.targets)
        known = zip(body.targets, peers, strict=True)
        targets = tuple(await asyncio.gather(*(self._peer(url, peer) for url, peer in known)))
        payload = await self._orders.ask(lambda n: DrainOrder(order_id=n, targets=targets))
        return _json(payload, 202)

    async def undrain(self, request: Request) -> Response:
        """Accept work again."""
        return _json(await self._orders.ask(lambda n: UndrainOrder(order_id=n)))

    async def _peer(self, url: str, known: PeerBody | None) -> Peer:
        """Where the target receives moves: as the order says, else as the target itself says.

        Raises:
            PeerError: it has to be asked and cannot be reached.
            OrderRefused: it cannot receive migrations.
        """
        if known is None:
            return await self._resolve(url)
        return Peer(
            instance_id=known.instance_id,
            incarnation=known.incarnation,
            address=known.address,
        )

    async def _resolve(self, url: str) -> Peer:
        """Ask an instance for its migration address.

        Raises:
            PeerError: it cannot be reached.
            OrderRefused: it cannot receive migrations.
        """
        if not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"target {url!r} is not a URL",
                hint="give the instance's base URL, http://host:port",
            )
        timeout = aiohttp.ClientTimeout(total=RESOLVE_TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(url.rstrip("/") + "/server_info", allow_redirects=False) as answer,
            ):
                answer.raise_for_status()
                info = msgspec.json.decode(await answer.read())
        except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError, ValueError) as error:
            raise PeerError(
                f"target {url} does not answer: {error}",
                hint="is it running? If it asks for a key, name it by peer as well, "
                "or order the move at the router",
            ) from error
        if not isinstance(info, dict) or "star" not in info:
            raise OrderRefused(f"target {url} runs without STAR", hint="launch it with --star")
        try:
            star = msgspec.convert(info["star"], Advertisement)
        except msgspec.ValidationError as error:
            raise PeerError(f"target {url} describes itself wrongly: {error}") from None
        if star.protocol_version != PROTOCOL_VERSION:
            raise OrderRefused(
                f"target {url} speaks STAR protocol {star.protocol_version}, this instance "
                f"{PROTOCOL_VERSION}",
                hint="run the same release on both",
            )
        if not star.migration_address:
            raise OrderRefused(
                f"target {url} is a {star.role} instance and receives no migrations",
                hint="name a decode or aggregated instance",
            )
        return Peer(
            instance_id=star.instance_id,
            incarnation=star.incarnation,
            address=star.migration_address,
        )


def install(
    server_args: Any,
    tokenizer_manager: Any,
    template_manager: Any,
    port_args: Any,
    scheduler_infos: list[dict[str, Any]],
    *args: Any,
    **kwargs: Any,
) -> None:
    """BEFORE ``http_server._setup_and_run_http_server``."""
    if getattr(server_args, ATTRIBUTE, None) is None:
        return
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.utils.auth import AuthLevel, auth_level

    # The order socket is this instance's own: take it out of what /server_info shows.
    address = scheduler_infos[0].pop("star_order_address")
    Endpoints(OrderClient(address)).join(app, auth_level(AuthLevel.ADMIN_OPTIONAL))
    app.add_middleware(Redaction)


def keep_latest_estimate(
    manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, Any],
    index: int,
    finish_reason: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """BEFORE ``TokenizerManager.update_request_meta_info``.

    SGLang would append one entry per token to ``meta_info``; only the latest is of use.
    """
    values = customized_info.get("star_remaining")
    if values is None:
        return None
    latest = values[index] or getattr(state, "star_remaining", None)
    if latest:
        state.star_remaining = latest
        low, _, median, _, high = latest[-1]
        meta_info["star_remaining"] = {"p10": low, "p50": median, "p90": high}
    rest = {key: value for key, value in customized_info.items() if key != "star_remaining"}
    return (manager, meta_info, state, rest, index, finish_reason), {}


def _answering(handler: Handler) -> Handler:
    """Turn a StarError into its JSON answer."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except StarError as error:
            return _json(msgspec.json.encode(error.to_json()), error.status)

    return answer


async def _body(request: Request, kind: type[Any]) -> Any:
    data = await request.body()
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(
            f"request body: {error}",
            hint=f"send JSON with {', '.join(kind.__struct_fields__)}",
        ) from error


def _json(payload: bytes, status: int = 200) -> Response:
    return Response(content=payload, status_code=status, media_type="application/json")


def _named(name: str) -> type[StarError]:
    """The error class of that name; the scheduler's answers carry names only."""
    known: dict[str, type[StarError]] = {
        kind.__name__: kind for kind in _subclasses(StarError) if kind is not VersionMismatch
    }
    return known.get(name, StarError)


def _subclasses(kind: type[StarError]) -> list[type[StarError]]:
    found = [kind]
    for child in kind.__subclasses__():
        found.extend(_subclasses(child))
    return found
