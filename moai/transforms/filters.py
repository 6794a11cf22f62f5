"""Filters over `text` that moai ships."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from moai.core import columns
from moai.engine.part import Filter
from moai.engine.pipeline import drop

# What Python's str.strip() takes for white space.
_SPACE = (
    " \t\n"
    "\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True, kw_only=True)
class Length(Filter):
    """Keep documents by their characters (code points) without surrounding white space; empty ones always go."""

    needs: ClassVar[tuple[str, ...]] = ("text",)

    min_chars: int = 1
    max_chars: int | None = None

    @property
    def drops_only_blank(self) -> bool:
        return self.min_chars <= 1 and self.max_chars is None

    def keep(self, batch: pa.RecordBatch) -> tuple[np.ndarray, list[str]]:
        trimmed = pc.utf8_trim(batch["text"], characters=_SPACE)
        empty = pc.equal(pc.binary_length(trimmed), 0).to_numpy(zero_copy_only=False)
        if self.drops_only_blank:  # characters are only counted where a bound asks for them
            return ~empty, ["empty"] * int(empty.sum())
        length = pc.utf8_length(trimmed).to_numpy()
        long = length > self.max_chars if self.max_chars is not None else np.zeros(len(length), bool)
        reasons = np.select([empty, length < self.min_chars, long], ["empty", "short", "long"], "")
        return reasons == "", reasons[reasons != ""].tolist()

    def without_blank(self, texts: list[str], beside: pa.RecordBatch) -> tuple[list[str], pa.RecordBatch]:
        """The same with default bounds, for strings that are no column yet."""
        keep = [bool(text) and not text.isspace() for text in texts]
        if all(keep):
            return texts, beside
        gone = beside.filter(pa.array([not kept for kept in keep], pa.bool_()))
        drop(self.name, gone, ["empty"] * gone.num_rows)
        return [text for text, kept in zip(texts, keep) if kept], beside.filter(pa.array(keep, pa.bool_()))


@dataclass(frozen=True, kw_only=True)
class Split(Filter):
    """Documents for evaluation, or all but them. The hash of a text decides, so that equal documents are never on both
    sides.
    """

    needs: ClassVar[tuple[str, ...]] = ("text",)

    ratio: float
    """Share of the documents that is held out."""
    held_out: bool
    """Whether these are kept, or the others."""

    def keep(self, batch: pa.RecordBatch) -> tuple[np.ndarray, list[str]]:
        share = [xxhash.xxh3_64_intdigest(text) < self.ratio * 2**64 for text in columns.byte_strings(batch["text"])]
        keep = np.array(share, bool) == self.held_out
        return keep, ["not_held_out" if self.held_out else "held_out"] * int((~keep).sum())


@dataclass(frozen=True, kw_only=True)
class Sample(Filter):
    """A share of the documents, by the hash of their text: the same ones wherever they stand."""

    needs: ClassVar[tuple[str, ...]] = ("text",)

    share: float

    def keep(self, batch: pa.RecordBatch) -> np.ndarray:
        # Another seed than Split's: what is sampled must not decide what is held out.
        return np.array(
            [
                xxhash.xxh3_64_intdigest(text, seed=1) < self.share * 2**64
                for text in columns.byte_strings(batch["text"])
            ],
            bool,
        )
