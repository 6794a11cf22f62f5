"""`tokens` of a shard -> rows of at most `seq_len`, with the lengths of the pieces that share a row.

    wrapped    documents one behind the other, cut anywhere: every row is full but the last
    bfd        best fit decreasing over whole documents; what a document has over seq_len is dropped, and counted
    bfd_split  the same, but long documents are split first: no token is lost
    none       a document a row; longer ones are truncated (and counted) or split

Columns beside the tokens travel with them: one value a piece (its document's), or one a token. Of conversations that is
`trained_runs` (list<uint32>): how many tokens of a row are not learned, then how many are, then not, ... A row of
nothing but context has one number.

Best fit decreasing after Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830). A shard is
packed by itself, so its rows depend on its documents alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.core import columns
from moai.core.errors import DamagedError
from moai.engine.documents import DOCUMENT
from moai.engine.part import Part
from moai.engine.pipeline import count, documents
from moai.engine.schema import Column

ROWS_PER_BATCH = 1024
_SLICE_TOKENS = 64
"""Pieces longer than this on average are copied slice by slice, shorter ones through an index: a slice costs as much as
64 ids do there.
"""
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Pack(Part):
    """`dtype` is numpy's name of the type of `input_ids`, the narrowest that holds the vocabulary."""

    needs: ClassVar[tuple[str, ...]] = ("tokens",)

    seq_len: int
    strategy: str
    dtype: str
    split_long: bool = False
    """Without packing: split documents over seq_len instead of truncating them."""
    beside: tuple[Column, ...] = ()
    """Columns of the batches that travel with the tokens, per piece or per token."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        gathered = _Gathered.of(batches, self.dtype, self.beside)
        if not len(gathered.lengths):
            return
        pieces = STRATEGIES[self.strategy](self, gathered.lengths)
        kept = int(pieces.lengths.sum())
        count("tokens.dropped", len(gathered.ids) - kept)
        count("tokens.rows", kept)
        count("rows", pieces.rows)
        gathered.note_places(pieces)
        yield from _rows(gathered, pieces, self.beside)


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents in the order of the rows they fill: where each begins in the flat array, how long it is, its
    row.
    """

    starts: Ints
    lengths: Ints
    row_of: Ints
    rows: int


def pack_wrapped(pack: Pack, lengths: Ints) -> Pieces:
    """Rows of exactly seq_len from the concatenation; a piece ends where its document or its row ends."""
    ends = np.cumsum(lengths)
    cuts = np.unique(np.concatenate((ends, np.arange(pack.seq_len, ends[-1], pack.seq_len))))
    starts = np.concatenate(([0], cuts[:-1]))
    return Pieces(starts, cuts - starts, starts // pack.seq_len, int(-(-ends[-1] // pack.seq_len)))


def pack_whole(pack: Pack, lengths: Ints) -> Pieces:
    """Best fit over documents, each truncated to seq_len."""
    starts = np.cumsum(lengths) - lengths
    return _best_fit(pack.seq_len, starts, np.minimum(lengths, pack.seq_len))


def pack_split(pack: Pack, lengths: Ints) -> Pieces:
    """Best fit over pieces of at most seq_len."""
    return _best_fit(pack.seq_len, *_split(pack.seq_len, lengths))


def pack_none(pack: Pack, lengths: Ints) -> Pieces:
    """A document, or a piece of one, a row."""
    if pack.split_long:
        starts, sizes = _split(pack.seq_len, lengths)
    else:
        starts, sizes = np.cumsum(lengths) - lengths, np.minimum(lengths, pack.seq_len)
    return Pieces(starts, sizes, np.arange(len(sizes)), len(sizes))


STRATEGIES: dict[str, Callable[[Pack, Ints], Pieces]] = {
    "wrapped": pack_wrapped,
    "bfd": pack_whole,
    "bfd_split": pack_split,
    "none": pack_none,
}


def best_fit_decreasing(lengths: Ints, capacity: int) -> Ints:
    """The bin of each item: longest items first, each into the fullest bin that still takes it. No item is longer than
    `capacity`.

    `open_spaces` has bit s set when some bin has s left, so the tightest bin is the lowest set bit at or above the
    length.
    """
    order = np.argsort(-lengths, kind="stable")
    full = int(np.count_nonzero(lengths == capacity))  # the first in order, each a bin of its own
    bins_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_spaces, bins = 0, full
    chosen = list(range(full))
    for length in lengths[order[full:]].tolist():
        fitting = open_spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            with_space = bins_with[space]
            bin_ = with_space.pop()
            if not with_space:
                open_spaces ^= 1 << space
        else:
            space, bin_, bins = capacity, bins, bins + 1
        chosen.append(bin_)
        left = space - length
        if left:
            with_left = bins_with[left]
            if not with_left:
                open_spaces |= 1 << left
            with_left.append(bin_)
    bin_of = np.empty(len(lengths), np.int64)
    bin_of[order] = chosen
    return bin_of


def _best_fit(capacity: int, starts: Ints, lengths: Ints) -> Pieces:
    bins = best_fit_decreasing(lengths, capacity)
    # Rows in the order of their first piece, pieces in the order of the documents: the order of the text, not of its
    # lengths.
    first = np.empty(bins.max() + 1, np.int64)
    first[bins[::-1]] = np.arange(len(bins))[::-1]  # of several, the last one written stays: the lowest
    opens = np.zeros(len(bins), np.int64)
    opens[first] = 1
    row_of = (np.cumsum(opens) - 1)[first][bins]
    order = np.argsort(row_of, kind="stable")
    return Pieces(starts[order], lengths[order], row_of[order], len(first))


def _split(seq_len: int, lengths: Ints) -> tuple[Ints, Ints]:
    """Starts and lengths of the pieces of each document: full ones, then the rest."""
    parts = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), parts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = (np.cumsum(lengths) - lengths)[document] + number * seq_len
    return starts, np.minimum(seq_len, lengths[document] - number * seq_len)


def unpack(pack: Pack, lengths: Ints, ids: npt.NDArray[Any], cut: Ints) -> tuple[npt.NDArray[Any], Ints]:
    """The documents of a shard's rows, one behind the other as they were read, and their lengths. Pieces are joined;
    what was dropped is absent.

    lengths    of the documents before `pack` cut them
    ids, cut   the tokens of the rows, and the lengths of the pieces they are
    Raises DamagedError where `pack` makes other pieces of these documents.
    """
    pieces = STRATEGIES[pack.strategy](pack, lengths)
    if not np.array_equal(pieces.lengths, cut):
        raise DamagedError(f"its rows are not what {pack.strategy} makes of its documents")
    order = np.argsort(pieces.starts, kind="stable")
    in_rows = np.cumsum(cut) - cut
    document = np.searchsorted(np.cumsum(lengths), pieces.starts, side="right")
    return _take(ids, in_rows[order], cut[order]), np.bincount(document, cut).astype(np.int64)


@dataclass(frozen=True)
class _Gathered:
    """A shard's documents: all ids in one array of the final type, and what there is of each."""

    ids: np.ndarray
    lengths: Ints
    numbers: Ints
    """Which document of the shard each is; empty where nobody asks."""
    beside: dict[str, Any]
    """Per token an array as long as `ids`, per piece a column as long as `lengths`."""

    @classmethod
    def of(cls, batches: Iterator[pa.RecordBatch], dtype: str, beside: Sequence[Column]) -> _Gathered:
        ids: list[np.ndarray] = []
        lengths: list[Ints] = [np.empty(0, np.int64)]
        numbers: list[Ints] = [np.empty(0, np.int64)]
        found: dict[str, list[Any]] = {column.name: [] for column in beside}
        for batch in batches:
            tokens = batch["tokens"]
            ids.append(tokens.values.to_numpy().astype(dtype, copy=False))
            lengths.append(np.diff(tokens.offsets.to_numpy()))
            if DOCUMENT in batch.schema.names:
                numbers.append(batch[DOCUMENT].to_numpy())
            for column in beside:
                values = batch[column.name]
                found[column.name].append(values.values.to_numpy() if column.per == "token" else values)
        if not ids:
            return cls(np.empty(0, dtype), lengths[0], numbers[0], {})
        joined = {
            column.name: (np.concatenate if column.per == "token" else pa.concat_arrays)(found[column.name])
            for column in beside
        }
        return cls(np.concatenate(ids), np.concatenate(lengths), np.concatenate(numbers), joined)

    def note_places(self, pieces: Pieces) -> None:
        """Tell the documents how many tokens they gave, and where their pieces lie."""
        if not len(self.numbers):
            return
        documents().note_tokens(self.numbers, self.lengths)
        in_row = np.cumsum(pieces.lengths) - pieces.lengths
        first_of_row = np.searchsorted(pieces.row_of, pieces.row_of)
        positions = in_row - in_row[first_of_row]
        order = np.argsort(pieces.starts, kind="stable")
        number = self.numbers[
            self.document_of(pieces)[order]
        ]  # ascending; np.unique would load modules for what two differences tell
        first = np.flatnonzero(np.diff(number, prepend=-1))
        documents().note_places(
            number[first], pieces.row_of[order][first], positions[order][first], np.diff(first, append=len(number))
        )

    def document_of(self, pieces: Pieces) -> Ints:
        """The index in `lengths` of each piece's document."""
        return np.searchsorted(np.cumsum(self.lengths), pieces.starts, side="right")


def _rows(gathered: _Gathered, pieces: Pieces, beside: Sequence[Column]) -> Iterator[pa.RecordBatch]:
    """`input_ids`, `seq_lengths` and what travels beside them, a bounded number of rows at a time."""
    first_piece = np.searchsorted(pieces.row_of, np.arange(pieces.rows + 1))
    document = gathered.document_of(pieces) if beside else np.empty(0, np.int64)
    for row in range(0, pieces.rows, ROWS_PER_BATCH):
        bounds = first_piece[row : row + ROWS_PER_BATCH + 1]
        which = slice(bounds[0], bounds[-1])
        starts, lengths = pieces.starts[which], pieces.lengths[which]
        row_ends = np.concatenate(([0], np.cumsum(lengths)))[bounds - bounds[0]]
        in_row = (bounds - bounds[0]).astype(np.int32)
        made = {
            "input_ids": columns.lists(row_ends.astype(np.int32), _take(gathered.ids, starts, lengths)),
            "seq_lengths": columns.lists(in_row, lengths.astype(np.uint32)),
        }
        for column in beside:
            values = gathered.beside[column.name]
            if column.per == "piece":
                taken = values.take(pa.array(document[which]))
                count(f"nulls.{column.name}", taken.null_count)
                made[column.name] = pa.ListArray.from_arrays(pa.array(in_row), taken)
            elif column.runs:
                made[column.name] = columns.lists(*run_lengths(_take(values, starts, lengths), row_ends))
            else:
                made[column.name] = columns.lists(row_ends.astype(np.int32), _take(values, starts, lengths))
        yield pa.record_batch(list(made.values()), names=list(made))


def run_lengths(trained: np.ndarray, row_ends: Ints) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint32]]:
    """Offsets by row and run lengths of 0s, 1s, 0s, ... `row_ends` begins with 0, and every row begins with a 0: its
    first token is never learned.
    """
    assert not trained[row_ends[:-1]].any()
    starts = np.union1d(row_ends[:-1], np.flatnonzero(np.diff(trained)) + 1)
    return np.searchsorted(starts, row_ends).astype(np.int32), np.diff(starts, append=row_ends[-1]).astype(np.uint32)


def _take(ids: np.ndarray, starts: Ints, lengths: Ints) -> np.ndarray:
    """The pieces one behind the other."""
    ends = starts + lengths
    if np.array_equal(starts[1:], ends[:-1]):
        return ids[starts[0] : ends[-1]]
    if len(starts) * _SLICE_TOKENS > lengths.sum():
        # An index an id, as a running sum: 1 inside a piece, a jump where one begins.
        steps = np.ones(lengths.sum(), np.int64)
        steps[0] = starts[0]
        steps[np.cumsum(lengths)[:-1]] = starts[1:] - ends[:-1] + 1
        return ids[np.cumsum(steps, out=steps)]
    return np.concatenate([ids[start:end] for start, end in zip(starts.tolist(), ends.tolist())])
