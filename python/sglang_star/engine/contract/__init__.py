"""Everything of SGLang that our code relies on, beside the hooks: one row each, by area.

The rows are for the release in ``sglang_star.SGLANG_VERSION``. What they cannot say is how SGLang
behaves; ``docs/upgrading-sglang.md`` tells which tests do.
"""

from __future__ import annotations

from typing import Final

from sglang_star.engine.contract import (
    batch,
    disaggregation,
    memory,
    model,
    platform,
    request,
    scheduler,
    server,
)
from sglang_star.engine.contract.row import Row

ROWS: Final[tuple[Row, ...]] = (
    *request.ROWS,
    *scheduler.ROWS,
    *batch.ROWS,
    *memory.ROWS,
    *disaggregation.ROWS,
    *model.ROWS,
    *server.ROWS,
    *platform.ROWS,
)
