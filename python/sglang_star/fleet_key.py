"""The fleet key: whoever holds it is a member, and nobody else can speak to a member's sockets.

Every socket between engines and router speaks CURVE (ZeroMQ's handshake and encryption on
Curve25519): a server shows that it holds a key of the fleet, and so must whoever connects to it.
The key lies in a file of lines, one secret key each. The first is what a process that starts serves
and connects with; all of them are accepted, so that keys can be exchanged while the fleet runs.

An address names the key of its server behind a ``#``, so that a client knows which to expect; it
is believed only if the file has that key.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import zmq
from zmq.auth.thread import ThreadAuthenticator

from sglang_star.errors import ConfigError, PeerError

logger = logging.getLogger(__name__)

FLAG: Final = "--star-fleet-key"
_SECRET_CHARS: Final = 40
_ID_CHARS: Final = 16
_COMMENT: Final = "#"
HEADER: Final = (
    "# Fleet key of STAR: one secret key a line, the first is used, all are accepted.\n"
    "# Keep it to the fleet: whoever has this file is a member.\n"
)


def access(key_file: str, *, insecure: bool) -> Access:
    """The access of a process that was given this key file, or none.

    Raises:
        ConfigError: the file is not there, others may read it, or it is no key file.
    """
    return FleetKey(key_file) if key_file else Unlocked(insecure=insecure)


class Access(Protocol):
    """Who may speak to this process's sockets, and to whom it speaks."""

    def guard(self, context: zmq.Context[Any]) -> ThreadAuthenticator | None:
        """Let nobody else through to the context's sockets; before they bind.

        What is returned is to be stopped before the context ends.
        """

    def serve(self, socket: zmq.Socket[Any]) -> None:
        """Make a socket a server; before it binds."""

    def connect(self, socket: zmq.Socket[Any], address: str) -> None:
        """Connect to a member.

        Raises:
            PeerError: the address is no member's.
        """

    def advertise(self, address: str) -> str:
        """What others must be told to reach a socket that serves at ``address``."""


class Unlocked:
    """Without a key: whoever reaches a socket is believed, so that only this machine may."""

    def __init__(self, *, insecure: bool = False) -> None:
        """``insecure`` connects to other machines all the same."""
        self._insecure = insecure

    def guard(self, context: zmq.Context[Any]) -> None:
        """See :class:`Access`."""

    def serve(self, socket: zmq.Socket[Any]) -> None:
        """See :class:`Access`."""

    def connect(self, socket: zmq.Socket[Any], address: str) -> None:
        """See :class:`Access`."""
        place, named = _split(address)
        if named:
            raise PeerError(
                f"{place} wants fleet key {named}, and this process has none",
                hint=f"give it {FLAG}",
            )
        if not self._insecure and not is_loopback(_host(place)):
            raise PeerError(
                f"{place} is on another machine, and this process has no fleet key",
                hint=f"give every member {FLAG}",
            )
        socket.connect(place)

    def advertise(self, address: str) -> str:
        """See :class:`Access`."""
        return address


class FleetKey:
    """The keys of one file, read again when it changes."""

    def __init__(self, path: str | Path) -> None:
        """Read the file.

        Raises:
            ConfigError: it is not there, others may read it, or it is no key file.
        """
        self._path = Path(path)
        self._stamp: tuple[int, int, int] | None = None
        self._secrets: tuple[bytes, ...] = ()
        self._publics: frozenset[bytes] = frozenset()
        self._trouble = ""
        self._read()

    # ------------------------------------------------------------------ sockets

    def guard(self, context: zmq.Context[Any]) -> ThreadAuthenticator:
        """See :class:`Access`."""
        guard = ThreadAuthenticator(context)
        guard.start()
        guard.configure_curve_callback(credentials_provider=self)
        return guard

    def serve(self, socket: zmq.Socket[Any]) -> None:
        """See :class:`Access`; with the first key."""
        socket.curve_secretkey, socket.curve_publickey = self._first()
        socket.curve_server = True

    def connect(self, socket: zmq.Socket[Any], address: str) -> None:
        """See :class:`Access`."""
        place, named = _split(address)
        if not named:
            raise PeerError(
                f"{place} speaks without a fleet key", hint=f"start it with {FLAG}, and this file"
            )
        server = self._public(named)
        if server is None:
            raise PeerError(
                f"{place} has fleet key {named}, which {self._path} does not have",
                hint="give every member the same file",
            )
        socket.curve_serverkey = server
        socket.curve_secretkey, socket.curve_publickey = self._first()
        socket.connect(place)

    def advertise(self, address: str) -> str:
        """See :class:`Access`: the address with the key's name."""
        return f"{address}#{self.ids()[0]}"

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client's public key is one of ours; asked by the guard at each handshake."""
        return key in self._refreshed()

    # ------------------------------------------------------------------ the file

    def ids(self) -> tuple[str, ...]:
        """Names of the keys, the first first; they say nothing about the secrets."""
        self._refreshed()
        return tuple(_id_of(zmq.curve_public(secret)) for secret in self._secrets)

    def _public(self, named: str) -> bytes | None:
        return next((one for one in self._refreshed() if _id_of(one) == named), None)

    def _first(self) -> tuple[bytes, bytes]:
        self._refreshed()
        return self._secrets[0], zmq.curve_public(self._secrets[0])

    def _refreshed(self) -> frozenset[bytes]:
        """The public keys. A file that is unreadable now leaves what was read before."""
        try:
            if _stamp(os.stat(self._path)) != self._stamp:
                self._read()
        except (ConfigError, OSError) as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                logger.error("STAR keeps to the fleet keys it has read before: %s", error)
        return self._publics

    def _read(self) -> None:
        try:
            with open(self._path, encoding="ascii") as file:
                status = os.fstat(file.fileno())
                lines = [line.strip() for line in file]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{FLAG} {self._path} cannot be read: {error}", hint="make one: star keys new FILE"
            ) from error
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(
                f"{FLAG} {self._path} may be read by others", hint=f"chmod 600 {self._path}"
            )
        secrets = tuple(line.encode() for line in lines if line and not line.startswith(_COMMENT))
        try:
            publics = frozenset(map(zmq.curve_public, secrets))
        except (ValueError, zmq.ZMQError, AssertionError) as error:
            raise ConfigError(f"{FLAG} {self._path} has a line that is no key") from error
        if not secrets or any(len(secret) != _SECRET_CHARS for secret in secrets):
            raise ConfigError(
                f"{FLAG} {self._path} is no key file", hint="make one: star keys new FILE"
            )
        self._secrets, self._publics, self._stamp = secrets, publics, _stamp(status)

    def write(self, secrets: tuple[bytes, ...]) -> None:
        """Put these keys into the file in place of its own, all at once."""
        _write(self._path, secrets)
        self._read()

    @property
    def secrets(self) -> tuple[bytes, ...]:
        """The secret keys, the first first; for whoever writes the file."""
        return self._secrets


def new_secret() -> bytes:
    """A secret key that nobody else has."""
    _, secret = zmq.curve_keypair()
    return secret


def create(path: Path) -> FleetKey:
    """Make a file with one new key, which only this user may read.

    Raises:
        ConfigError: the file exists, or cannot be made.
    """
    if path.exists():
        raise ConfigError(f"{path} exists", hint="star keys add FILE adds a key to it")
    try:
        _write(path, (new_secret(),))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    return FleetKey(path)


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine can reach a socket bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _split(address: str) -> tuple[str, str]:
    place, _, named = address.partition("#")
    return place, named


def _host(place: str) -> str:
    return urlsplit(place).hostname or ""


def _id_of(public: bytes) -> str:
    return hashlib.sha256(public).hexdigest()[:_ID_CHARS]


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _write(path: Path, secrets: tuple[bytes, ...]) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # mode 600
    try:
        with open(descriptor, "wb") as file:
            file.write(HEADER.encode() + b"".join(secret + b"\n" for secret in secrets))
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
