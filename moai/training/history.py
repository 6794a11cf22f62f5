"""history.jsonl: what a run logged, one JSON object a line, written by rank 0 as it happens.

    {"kind": "start", "step": 0, "steps": 2000, "world_size": 2, "sources": {"web": {"rows": 900, ...}}, ...}
    {"kind": "train", "step": 10, "position": 80, "tokens": 163840, "loss": 8.1, "consumed": {"web": 80}, ...}
    {"kind": "eval", "step": 100, "eval_loss": 5.2, "eval_web_bits_per_byte": 1.9, ..., "time": "..."}

Lines are only ever added, but for one moment: a run that goes on from step N first drops what was logged beyond N, by
steps that nothing came of. So every step stands here once, however often the run was stopped. Each start is a session.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moai.core.files import write_atomic
from moai.core.fsops import read_regular

logger = logging.getLogger(__name__)

NAME = "history.jsonl"
_MOST_BYTES = 1 << 32
Entry = dict[str, Any]


@dataclass
class History:
    """The file of one run. A disk that is full costs lines and one warning, not the run."""

    path: Path
    complained: bool = field(default=False, init=False)

    def begin(self, step: int, before: Sequence[Mapping[str, Any]], start: Mapping[str, Any]) -> None:
        """A session that goes on after `step`. `before` is the trainer's own log, for a run that has no file here."""
        try:
            entries = read(self.path)
        except FileNotFoundError:
            entries = [entry for line in before if (entry := _of_trainer(line))]
        except (OSError, ValueError) as error:
            logger.warning("%s: %s; what it held is not in the new one", self.path, error)
            entries = []
        kept = [entry for entry in entries if entry["step"] <= step] if step else []
        lines = map(_line, [*kept, _stamped({"kind": "start", "step": step, **start})])
        with self._complaining():
            write_atomic(self.path, b"".join(lines))

    def add(self, entry: Mapping[str, Any]) -> None:
        with self._complaining(), open(self.path, "ab") as file:
            file.write(_line(_stamped(entry)))

    @contextlib.contextmanager
    def _complaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.complained:
                logger.warning("%s: %s; lines will be missing there, training goes on", self.path, error.strerror)
            self.complained = True


def _stamped(entry: Mapping[str, Any]) -> Entry:
    return {**entry, "time": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")}


def read(path: Path) -> list[Entry]:
    """All whole lines; the last may have been cut by a crash. Raises OSError, ValueError where it is no file."""
    entries = []
    for line in read_regular(path, _MOST_BYTES).splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and isinstance(entry.get("kind"), str):
            entries.append(entry)
    return entries


def _of_trainer(line: Mapping[str, Any]) -> Entry | None:
    """An entry of trainer_state.json's log_history as one of ours."""
    if "loss" in line:
        return {"kind": "train", **line, "tokens": line.get("tokens_seen")}
    return {"kind": "eval", **line} if "eval_loss" in line else None


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"
