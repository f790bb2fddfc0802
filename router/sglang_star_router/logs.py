"""Where the log goes."""

from __future__ import annotations

import logging
from pathlib import Path

from sglang_star.errors import ConfigError


def configure_logging(level: str, log_dir: str | None = None) -> None:
    """Log to standard error, one line per event, and to a file if a folder is given.

    Raises:
        ConfigError: the folder cannot be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if log_dir is not None:
        try:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(Path(log_dir) / "star-router.log"))
        except OSError as error:
            raise ConfigError(f"--log-dir {log_dir} cannot be written: {error}") from None
    # ``star router`` comes through a command line that has set logging up for its own messages.
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=handlers, force=True,
    )  # fmt: skip
