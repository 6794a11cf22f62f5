"""Files read as far as their texts, in this process or, where one may end its process, in another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moai.core.errors import MoaiError
from moai.engine.pipeline import Meter, tallied
from moai.sources.discover import discover
from moai.sources.inputs import open_input
from moai.transforms.shapes import TextShape, choose_shape
from moai.transforms.text import ToText


@dataclass
class Read:
    """What became of a file or folder: texts, blank ones too; (line, reason) of bad records; or the error."""

    texts: list[str] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    error: str = ""
    count: int = 0
    """Of records."""


def read(path: Path, *, keep: bool = True, shard_bytes: int = 1 << 20, **how: Any) -> Read:
    """`how` is text_column or template. Without `keep` the texts are only counted."""
    found = Read()
    places = {"cache": Path(os.devnull), "spool_dir": path.parent, "trust_stamps": False}
    try:
        for given in discover(str(path)):
            source, columns = open_input(given, shard_bytes=shard_bytes, **places, batch_bytes=1 << 20)
            shape = TextShape(name="plain") if given.kind.plain else choose_shape(columns, source="the data", **how)
            source = type(source)(**{**vars(source), "columns": shape.columns})
            to_text = ToText(shape=shape, plain=given.kind.plain)
            for shard in source.shards():
                source.digest(shard) if not any(segment.spool for segment in shard.segments) else None
                for batch in source.read(shard, Meter()):
                    with tallied() as tally:
                        texts = to_text.strings(batch)
                    found.texts += texts if keep else []
                    found.bad += [(entry["line"], entry["reason"]) for entry in tally.quarantine]
                    found.count += tally.counts["read"]
    except MoaiError as error:
        found.error = str(error)
    return found


def read_apart(cases: Iterable[tuple[Path, str | None]], *, keep: bool = True) -> list[tuple[Read, int]]:
    """Each file by a column's name, or by none, in another process, with that process's peak memory in MB. One that
    ends it fails the test by name.
    """
    listed = [[str(path), column, keep] for path, column in cases]
    ended = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(listed),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, f"{listed[len(lines)]}: ended by {ended.returncode}: {ended.stderr[-2000:]}"
    return [(Read(**{**line, "bad": [tuple(bad) for bad in line["bad"]]}), peak) for line, peak in lines]


if __name__ == "__main__":
    for where, column, keep in json.load(sys.stdin):
        found = read(Path(where), keep=keep, **({"text_column": column} if column else {}))
        # Of this process alone: ru_maxrss begins with what the one that started it had.
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        print(json.dumps([asdict(found), int(peak[1]) >> 10 if peak else 0]), flush=True)
