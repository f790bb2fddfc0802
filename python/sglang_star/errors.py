"""Every error STAR raises on purpose. Each says what to do next.

StarError
├── ConfigError            a flag or file the user gave is wrong
│   └── HeadError          a predictor head is missing, damaged or for another model
├── HookError              a hook into SGLang did not take effect, or SGLang is another version
│   └── ContractError      SGLang lacks something that STAR relies on
├── SetupError             the machine cannot run this (memory, disk, port, package)
├── ProtocolError          bytes from a socket are not ours
│   ├── VersionMismatch    ... or are of another protocol version
│   └── MalformedMessage   ... or do not decode
├── OrderRefused           a migration or drain order cannot be carried out
│   ├── UnknownRequest     no running request has that rid
│   ├── NotMovable         the request uses a feature that cannot move
│   └── NoTransport        two instances have no way in common to carry KV
├── PeerError              another instance is unreachable, dead or answered wrongly
├── RankDivergence         a defect of ours: the ranks of one engine went different ways
└── IllegalTransition      a defect of ours: the state machine refused an event
"""

from __future__ import annotations


class StarError(Exception):
    """Base of all STAR errors.

    Attributes:
        hint: what the user can do about it, one sentence; may be empty.
        status: the HTTP status an endpoint answers with when this reaches it.
    """

    status: int = 500

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def message(self) -> str:
        """The text without the hint."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def to_json(self) -> dict[str, dict[str, str]]:
        """The body every STAR endpoint answers an error with."""
        return {"error": {"type": type(self).__name__, "message": self.message, "hint": self.hint}}


class ConfigError(StarError):
    """A flag, file or combination of them is wrong."""

    status = 400


class HeadError(ConfigError):
    """A predictor head is missing, damaged, or was trained for another model."""


class HookError(StarError):
    """SGLang is not the release STAR was built against, or a hook did not take effect."""


class ContractError(HookError):
    """The installed SGLang lacks, or has otherwise, something that STAR relies on."""


class SetupError(StarError):
    """This machine cannot run what was asked: memory, disk, port, package, network."""

    status = 503


class ProtocolError(StarError):
    """Bytes received on a socket are not a STAR message this release understands."""

    status = 400


class VersionMismatch(ProtocolError):
    """The peer speaks another protocol version."""


class MalformedMessage(ProtocolError):
    """The bytes are not a STAR message at all."""


class OrderRefused(StarError):
    """A migration or drain order cannot be carried out; the request keeps running."""

    status = 409


class UnknownRequest(OrderRefused):
    """No running request has this rid on this instance."""

    status = 404


class NotMovable(OrderRefused):
    """The request uses a feature that cannot move between instances."""


class NoTransport(OrderRefused):
    """Two instances have no way in common by which KV could travel."""


class PeerError(StarError):
    """Another instance is unreachable, has died, or answered out of turn."""

    status = 503


class RankDivergence(StarError):
    """The ranks of one engine have gone different ways: it stops, or its tokens would be wrong."""


class IllegalTransition(StarError):
    """The migration state machine was asked for a step it does not allow: a defect of ours."""
