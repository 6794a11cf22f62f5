"""Packing: no token lost but those that are named, none moved to another document, none over `seq_len`, and the
tightest fit.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moai.core.errors import DamagedError
from moai.engine import pipeline
from moai.engine.pipeline import Tally
from moai.transforms.pack import ROWS_PER_BATCH, STRATEGIES, Pack, best_fit_decreasing, unpack

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)
SEQ_LEN = st.integers(1, 17)
EVERY = [("wrapped", False), ("bfd", False), ("bfd_split", False), ("none", False), ("none", True)]
DROPPING = [("bfd", False), ("none", False)]

Row = tuple[list[int], list[int]]


def documents_of(lengths: list[int]) -> list[list[int]]:
    """Every token is another number, so that a lost, repeated or moved one shows."""
    ends = np.cumsum(lengths).tolist()
    return [list(range(end - length, end)) for end, length in zip(ends, lengths)]


def pack(
    lengths: list[int], seq_len: int, strategy: str, split_long: bool, *, batch: int = 1000
) -> tuple[list[Row], Counter[str]]:
    """The rows as (input_ids, seq_lengths), and the counters."""
    documents = documents_of(lengths)
    batches = (
        pa.record_batch([pa.array(documents[start : start + batch], pa.large_list(pa.uint32()))], names=["tokens"])
        for start in range(0, len(documents), batch)
    )
    tally = Tally()
    token = pipeline._tally.set(tally)
    try:
        rows = [
            (row["input_ids"], row["seq_lengths"])
            for out in Pack(seq_len=seq_len, strategy=strategy, dtype="uint16", split_long=split_long)(batches)
            for row in out.to_pylist()
        ]
    finally:
        pipeline._tally.reset(token)
    return rows, tally.counts


def pieces_of(rows: list[Row]) -> list[list[int]]:
    return [
        ids[end - length : end] for ids, lengths in rows for end, length in zip(np.cumsum(lengths).tolist(), lengths)
    ]


@pytest.mark.parametrize(("strategy", "split_long"), EVERY)
@given(LENGTHS, SEQ_LEN)
@example([1], 1)
@example([17, 17, 1], 17)
def test_every_token_is_in_a_row_once_or_counted_as_dropped(
    strategy: str, split_long: bool, lengths: list[int], seq_len: int
) -> None:
    rows, counts = pack(lengths, seq_len, strategy, split_long)
    kept = [token for ids, _ in rows for token in ids]
    assert len(kept) == len(set(kept))
    assert len(kept) == counts["tokens.rows"] == sum(lengths) - counts["tokens.dropped"]
    assert counts["rows"] == len(rows)
    over = sum(max(0, length - seq_len) for length in lengths) if (strategy, split_long) in DROPPING else 0
    assert counts["tokens.dropped"] == over


@pytest.mark.parametrize(("strategy", "split_long"), EVERY)
@given(LENGTHS, SEQ_LEN)
def test_rows_keep_to_their_length_and_pieces_to_their_documents(
    strategy: str, split_long: bool, lengths: list[int], seq_len: int
) -> None:
    rows, _ = pack(lengths, seq_len, strategy, split_long)
    assert all(0 < len(ids) <= seq_len and sum(pieces) == len(ids) and min(pieces) > 0 for ids, pieces in rows)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for piece in pieces_of(rows):
        assert piece == list(range(piece[0], piece[0] + len(piece)))  # the document's own order, nothing between
        assert len(set(document_of[piece].tolist())) == 1
    if strategy == "none":
        assert all(len(pieces) == 1 for _, pieces in rows)


@pytest.mark.parametrize(("strategy", "split_long"), EVERY)
@given(LENGTHS, SEQ_LEN)
def test_rows_stand_in_the_order_of_the_text(strategy: str, split_long: bool, lengths: list[int], seq_len: int) -> None:
    rows, _ = pack(lengths, seq_len, strategy, split_long)
    firsts = [ids[0] for ids, _ in rows]
    assert firsts == sorted(firsts)
    assert all(ids == sorted(ids) for ids, _ in rows)


@pytest.mark.parametrize(("strategy", "split_long"), EVERY)
@given(LENGTHS, SEQ_LEN, st.integers(1, 7))
def test_rows_do_not_depend_on_the_batches(
    strategy: str, split_long: bool, lengths: list[int], seq_len: int, batch: int
) -> None:
    assert pack(lengths, seq_len, strategy, split_long, batch=batch) == pack(lengths, seq_len, strategy, split_long)


@pytest.mark.parametrize(("strategy", "split_long"), EVERY)
@given(LENGTHS, SEQ_LEN)
def test_unpacked_rows_are_the_documents_joined_and_in_order(
    strategy: str, split_long: bool, lengths: list[int], seq_len: int
) -> None:
    rows, _ = pack(lengths, seq_len, strategy, split_long)
    ids, cut = (np.array([value for row in rows for value in row[column]]) for column in (0, 1))
    packer = Pack(seq_len=seq_len, strategy=strategy, dtype="uint16", split_long=split_long)
    tokens, found = unpack(packer, np.array(lengths), ids, cut)
    most = seq_len if (strategy, split_long) in DROPPING else sum(lengths)
    assert [document.tolist() for document in np.split(tokens, np.cumsum(found)[:-1])] == [
        document[:most] for document in documents_of(lengths)
    ]
    with pytest.raises(DamagedError, match="its rows are not what"):
        unpack(packer, np.array([*lengths, 1]), ids, cut)


@given(LENGTHS, SEQ_LEN)
def test_wrapped_is_the_concatenation_cut_every_seq_len(lengths: list[int], seq_len: int) -> None:
    rows, _ = pack(lengths, seq_len, "wrapped", False)
    tokens = list(range(sum(lengths)))
    assert [ids for ids, _ in rows] == [tokens[start : start + seq_len] for start in range(0, len(tokens), seq_len)]
    ends = {*np.cumsum(lengths).tolist(), *range(seq_len, len(tokens), seq_len)}
    assert np.cumsum([length for _, pieces in rows for length in pieces]).tolist() == sorted(ends)


@given(LENGTHS, SEQ_LEN)
def test_only_what_is_longer_than_a_row_is_split_and_into_as_few_pieces_as_possible(
    lengths: list[int], seq_len: int
) -> None:
    rows, _ = pack(lengths, seq_len, "bfd_split", False)
    assert len(pieces_of(rows)) == sum(-(-length // seq_len) for length in lengths)
    assert sorted(map(len, pieces_of(rows))) == sorted(
        part
        for length in lengths
        for part in [seq_len] * (length // seq_len) + [length % seq_len] * (length % seq_len > 0)
    )


def best_fit_by_hand(lengths: list[int], capacity: int) -> list[int]:
    """Every bin is looked at for every item: O(n^2). Spaces of the bins, in the order they were opened."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces[spaces.index(min(fitting))] -= length
        else:
            spaces.append(capacity - length)
    return spaces


@given(st.lists(st.integers(1, 64), min_size=1, max_size=120))
@example([64] * 3)
@example([32, 33, 31, 32])
def test_the_fit_is_as_tight_as_looking_at_every_bin(lengths: list[int]) -> None:
    bins = best_fit_decreasing(np.array(lengths), 64)
    filled = Counter[int]()
    for length, bin_ in zip(lengths, bins):
        filled[bin_] += length
    assert sorted(64 - size for size in filled.values()) == sorted(best_fit_by_hand(lengths, 64))
    assert sorted(filled) == list(range(len(filled)))


def test_an_example_a_person_can_check() -> None:
    """5 fills up 3+2, 4 stays open for 1: rows in the order of their first documents."""
    rows, counts = pack([3, 4, 2, 1, 12], 5, "bfd", False)
    assert [pieces for _, pieces in rows] == [[3, 2], [4, 1], [5]]
    assert [ids for ids, _ in rows] == [[0, 1, 2, 7, 8], [3, 4, 5, 6, 9], [10, 11, 12, 13, 14]]
    assert counts["tokens.dropped"] == 7


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_nothing_in_nothing_out(strategy: str) -> None:
    assert list(Pack(seq_len=8, strategy=strategy, dtype="uint16")(iter(()))) == []


def test_more_rows_than_a_batch_holds_come_in_several_batches_of_the_narrow_type() -> None:
    tokens = pa.array([[7, 8]] * (2 * ROWS_PER_BATCH + 1), pa.large_list(pa.uint32()))
    token = pipeline._tally.set(Tally())
    try:
        out = list(Pack(seq_len=2, strategy="bfd", dtype="uint16")(iter([pa.record_batch([tokens], names=["tokens"])])))
    finally:
        pipeline._tally.reset(token)
    assert [batch.num_rows for batch in out] == [ROWS_PER_BATCH, ROWS_PER_BATCH, 1]
    assert out[0].schema.field("input_ids").type == pa.list_(pa.uint16())
    assert all(row == [7, 8] for batch in out for row in batch["input_ids"].to_pylist())
