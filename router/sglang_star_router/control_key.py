"""Keys for the control plane, each with a name and a role."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_star.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ControlKey:
    """A key for the control plane, as ``sglang_router`` writes it: ``ID:NAME:ROLE:KEY``.

    Attributes:
        name: what the audit log calls its bearer; admin: may give orders, not only look.
    """

    name: str
    admin: bool
    key: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> ControlKey:
        """Read one.

        Raises:
            ConfigError: another form; the key itself is not repeated.
        """
        parts = text.split(":", 3)
        if len(parts) != 4 or parts[2].lower() not in ("admin", "user") or not parts[3]:
            who = f"the one of {parts[0]}" if len(parts) == 4 else "one"
            raise ConfigError(
                f"--control-plane-api-keys: {who} is not ID:NAME:ROLE:KEY",
                hint="ROLE is admin or user",
            )
        return cls(f"{parts[0]} ({parts[1]})", parts[2].lower() == "admin", parts[3])
