"""Packed rows on disk -> batches that keep every document to itself.

A batch has `input_ids`, `position_ids` that begin at 0 again in every document, and `labels`; no attention mask. From the
positions alone the model makes a block-diagonal mask, for any number of rows. Padding is one more document at the end of its
row, so that it neither sees nor is seen.

    row  ids 5 6 7 8 9, seq_lengths 2 3, beside a row of 6 ids
    input_ids     5    6  7    8  9  pad
    position_ids  0    1  0    1  2    0
    labels     -100    6 -100  8  9 -100          the first token of a document has nothing that could predict it

Everything is vectorised: 8 rows of 2,048 tokens take 0.16 ms, no token becomes a Python object.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.errors import DamagedError

IGNORE = -100
"""The label no loss is computed for."""


@dataclass(frozen=True)
class PackedRows:
    """The rows of a prepared directory, mapped and never copied as a whole. A torch map-style dataset that is read by batch."""

    path: str

    @cached_property
    def _dataset(self) -> Any:
        import datasets

        return datasets.load_from_disk(self.path).with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> pa.Table:
        return self._dataset[[index]]

    def __getitems__(self, indices: list[int]) -> pa.Table:
        """What torch's loader calls for a batch; the table goes to the collator as it is."""
        return self._dataset[indices]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # a spawned reader opens the files itself


@dataclass(frozen=True, kw_only=True)
class PackedCollator:
    """Rows -> {"input_ids", "position_ids", "labels"}, int64 tensors of shape (rows, longest row).

    pad_id   any valid id: padding is never a target
    pad_to   a fixed width, for compiled models that would compile anew for every other
    flatten  all documents one after another in one row without padding, with the lengths flash attention asks for
    """

    pad_id: int
    pad_to: int | None = None
    flatten: bool = False

    def __call__(self, rows: pa.Table) -> dict[str, Any]:
        import torch

        tokens, row_lengths, pieces, pieces_per_row = _columns(rows)
        if self.flatten:
            positions = _positions(pieces)
            labels = np.where(positions == 0, IGNORE, tokens)
            ends = torch.from_numpy(np.concatenate([[0], np.cumsum(pieces)]).astype(np.int32))
            longest = int(pieces.max())
            flat = {"input_ids": tokens, "position_ids": positions, "labels": labels}
            return {name: torch.from_numpy(value)[None] for name, value in flat.items()} | {
                "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}  # fmt: skip
        width = self.pad_to or int(row_lengths.max())
        # A padding piece closes every row, so that the pieces of each sum to the width and one cumulative sum serves all rows.
        ends_of_rows = np.cumsum(pieces_per_row)
        positions = _positions(np.insert(pieces, ends_of_rows, width - row_lengths)).reshape(-1, width)
        real = np.arange(width) < row_lengths[:, None]
        input_ids = np.full(real.shape, self.pad_id, np.int64)
        input_ids[real] = tokens
        labels = np.where(real & (positions > 0), input_ids, IGNORE)
        return {"input_ids": torch.from_numpy(input_ids), "position_ids": torch.from_numpy(positions), "labels": torch.from_numpy(labels)}


@dataclass
class EpochOrder:
    """The order of rows: a permutation that follows from (seed, epoch) alone, cut to whole steps.

    The rows of an epoch's last, incomplete step are left out (others in every epoch), so that all steps are of one size and
    their number does not depend on how `rows_per_step` is divided among ranks and accumulation.
    """

    rows: int
    rows_per_step: int
    seed: int
    epoch: int = 0

    @property
    def steps(self) -> int:
        """Whole steps in an epoch."""
        return self.rows // self.rows_per_step

    def __len__(self) -> int:
        return self.steps * self.rows_per_step

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        yield from map(int, order[: len(self)])


def table(rows: Sequence[Sequence[Sequence[int]]]) -> pa.Table:
    """Rows given as lists of documents, in the columns of a prepared directory."""
    return pa.table({
        "input_ids": pa.array([[token for piece in row for token in piece] for row in rows], pa.list_(pa.uint32())),
        "seq_lengths": pa.array([[len(piece) for piece in row] for row in rows], pa.list_(pa.uint32())),
    })  # fmt: skip


def read_ahead(directory: Path) -> int:
    """Ask the kernel to bring the shards into the page cache while the model is built. Returns the bytes asked for; 0 where it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return 0
    total = 0
    for path in sorted(directory.glob("data-*.arrow")):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            total += path.stat().st_size
    return total


def _columns(rows: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(all tokens, tokens per row, all piece lengths, pieces per row). Raises DamagedError when they contradict one another."""
    tokens, row_lengths = _flat(rows["input_ids"])
    pieces, pieces_per_row = _flat(rows["seq_lengths"])
    ends = np.cumsum(pieces_per_row)
    sums = np.diff(np.concatenate([[0], np.cumsum(pieces)])[np.concatenate([[0], ends])])
    if not np.array_equal(sums, row_lengths) or (pieces == 0).any():
        raise DamagedError("a row's seq_lengths do not sum to its tokens; check the prepared directory: python -m moai verify DIR")
    return tokens, row_lengths, pieces, pieces_per_row


def _flat(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A list column as (all values, lengths). `flatten` and `value_lengths` respect a slice's offsets, `values` would not."""
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
    lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate(values).astype(np.int64), np.concatenate(lengths).astype(np.int64)


def _positions(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`[2, 3]` -> `[0, 1, 0, 1, 2]`."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
