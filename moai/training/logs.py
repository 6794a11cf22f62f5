"""Logging that knows its rank before torch does.

Rank 0 speaks on the console; the others warn there, and tell what they wait for while the data is prepared; every rank
writes everything to `<output_dir>/logs/rank<n>.log`.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from moai.core.errors import ConfigError

_WAITING = ("moai.core.distributed", "moai.pretraining.recipe")
"""Whose lines about the wait every rank shows."""


def start_logging(output_dir: Path, rank: int) -> None:
    """Raises ConfigError when `output_dir` cannot be written."""
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter("%(asctime)s %(who)s%(message)s", "%H:%M:%S"))

    def admit(record: logging.LogRecord) -> bool:
        waiting = record.name in _WAITING  # these name their rank themselves
        record.who = "" if rank == 0 or waiting else f"[Rank {rank}] "
        return rank == 0 or waiting or record.levelno >= logging.WARNING

    console.addFilter(admit)
    try:
        (output_dir / "logs").mkdir(parents=True, exist_ok=True)
        log = output_dir / "logs" / f"rank{rank}.log"
        if os.path.lexists(log) and not log.is_file():  # a FIFO would be waited for
            raise ConfigError(f"{log}: no file stands there; remove it, or name another --output_dir")
        file = _LogFile(log, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--output_dir {output_dir}: {error.strerror}; name a directory that can be written"
        ) from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[console, file], force=True)
    logging.getLogger("moai").setLevel(logging.INFO)
    logging.captureWarnings(True)


class _LogFile(logging.FileHandler):
    """On a full disk a line is missing here; logging's own way is a traceback on the console for each of them."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def quiet_libraries() -> None:
    """Send what transformers and datasets log through the same two places, warnings only, and switch their bars off."""
    import datasets
    from transformers.utils import logging as library

    untyped: Any = library
    untyped.disable_default_handler()
    untyped.enable_propagation()
    untyped.set_verbosity_warning()
    untyped.disable_progress_bar()
    # Of a run that goes on in steps of another size: moai says itself what changed.
    logging.getLogger("transformers.trainer_utils").addFilter(
        lambda record: "do not match the ones in the `trainer_state.json`" not in record.getMessage()
    )
    datasets.disable_progress_bars()
