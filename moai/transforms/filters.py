"""Filters over `text`. Each says in a counter how many documents it dropped, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from moai.engine.pipeline import count

# What Python's str.strip() takes for white space.
_SPACE = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"


@dataclass(frozen=True, kw_only=True)
class Length:
    """Keep documents by their characters (code points) without surrounding white space; empty ones always go."""

    min_chars: int = 1
    max_chars: int | None = None

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            length = pc.utf8_length(pc.utf8_trim(batch["text"], characters=_SPACE))
            empty = pc.equal(length, 0)
            short = pc.and_(pc.less(length, self.min_chars), pc.invert(empty))
            long = pc.greater(length, self.max_chars) if self.max_chars is not None else pa.scalar(False)
            count("filtered.empty", pc.sum(empty).as_py() or 0)
            count("filtered.short", pc.sum(short).as_py() or 0)
            count("filtered.long", (pc.sum(long).as_py() or 0) if self.max_chars is not None else 0)
            keep = pc.invert(pc.or_(pc.or_(empty, short), long))
            kept = batch.filter(keep)
            count("filtered", batch.num_rows - kept.num_rows)
            count("kept", kept.num_rows)
            if kept.num_rows:
                yield kept
