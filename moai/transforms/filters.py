"""Filters over `text`. Each says in a counter how many documents it dropped, and why."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from moai import columns
from moai.engine.pipeline import count

# What Python's str.strip() takes for white space.
_SPACE = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"


@dataclass(frozen=True, kw_only=True)
class Length:
    """Keep documents by their characters (code points) without surrounding white space; empty ones always go."""

    min_chars: int = 1
    max_chars: int | None = None

    @property
    def drops_only_blank(self) -> bool:
        return self.min_chars <= 1 and self.max_chars is None

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            trimmed = pc.utf8_trim(batch["text"], characters=_SPACE)
            empty = pc.equal(pc.binary_length(trimmed), 0)
            wrong = self._wrong_length(trimmed, empty)
            count("filtered.empty", _number(empty))
            for reason, which in wrong.items():
                count(f"filtered.{reason}", _number(which))
            drop = functools.reduce(pc.or_, wrong.values(), empty)
            dropped = _number(drop)
            count("filtered", dropped)
            count("kept", batch.num_rows - dropped)
            if dropped < batch.num_rows:
                yield batch.filter(pc.invert(drop)) if dropped else batch

    def _wrong_length(self, trimmed: pa.Array, empty: pa.Array) -> dict[str, pa.Array]:
        """Which documents are too short or too long. Characters are only counted where a bound asks for them."""
        if self.drops_only_blank:
            return {}
        length = pc.utf8_length(trimmed)
        short = pc.and_(pc.less(length, self.min_chars), pc.invert(empty))
        return {"short": short} if self.max_chars is None else {"short": short, "long": pc.greater(length, self.max_chars)}


@dataclass(frozen=True, kw_only=True)
class Split:
    """Documents for evaluation, or all but them. The hash of a text decides, so that equal documents are never on both sides."""

    ratio: float
    """Share of the documents that is held out."""
    held_out: bool
    """Whether these are kept, or the others."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            keep = pa.array([self.keeps(text) for text in columns.byte_strings(batch["text"])], pa.bool_())
            dropped = batch.num_rows - _number(keep)
            self.count_dropped(dropped)
            if dropped < batch.num_rows:
                yield batch.filter(keep) if dropped else batch

    def keeps(self, text: memoryview | bytes) -> bool:
        return (xxhash.xxh3_64_intdigest(text) < self.ratio * 2**64) == self.held_out

    def count_dropped(self, number: int) -> None:
        count("filtered", number)
        count("filtered.not_held_out" if self.held_out else "filtered.held_out", number)


def without_blank(texts: list[str]) -> list[str]:
    """What Length with its defaults does, for strings that are no column."""
    kept = [text for text in texts if text and not text.isspace()]
    count("filtered.empty", len(texts) - len(kept))
    count("filtered", len(texts) - len(kept))
    count("kept", len(kept))
    return kept


def _number(which: pa.Array) -> int:
    return int(pc.sum(which).as_py() or 0)
