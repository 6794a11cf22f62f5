"""Rows on disk to batches: the mapped shards give what was written, and the collator what the model needs."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from moai.core.errors import DamagedError
from moai.engine.schema import arrow_schema, row_columns
from moai.prepared import rows as rows_module
from moai.prepared.manifest import Prepared, write_dataset_files
from moai.prepared.rows import PackedRows, Row, read_ahead
from moai.training.data import PackedCollator

ROWS = [9, 1, 14]
"""Of three shards: with five rows a record batch, the last rows of the first and the third stand in short ones."""

linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts mappings in /proc")


def write_shard(
    path: Path,
    rows: Sequence[Row],
    dtype: str,
    *,
    names: Sequence[str] = ("input_ids", "seq_lengths"),
    per_batch: int = 5,
) -> None:
    schema = pa.schema(
        [pa.field(name, field.type) for name, field in zip(names, arrow_schema(row_columns(dtype)))],
        arrow_schema(row_columns(dtype)).metadata,
    )
    with pa.ipc.new_stream(str(path), schema) as writer:
        for start in range(0, len(rows), per_batch):
            part = rows[start : start + per_batch]
            writer.write_batch(
                pa.record_batch(
                    [
                        pa.array([row.input_ids for row in part], schema[0].type),
                        pa.array([row.seq_lengths for row in part], schema[1].type),
                    ],
                    schema=schema,
                )
            )


def make_rows(count: int, highest: int, seed: int = 0) -> list[Row]:
    """Of 1 to 4 pieces of 1 to 9 tokens."""
    generator = np.random.default_rng(seed)
    return [
        Row.of(
            [
                generator.integers(0, highest, length).tolist()
                for length in generator.integers(1, 10, generator.integers(1, 5))
            ]
        )
        for _ in range(count)
    ]


def write_directory(path: Path, dtype: str) -> PackedRows:
    path.mkdir()
    names = [f"data-{number:05d}-of-{len(ROWS):05d}.arrow" for number in range(len(ROWS))]
    rows = make_rows(sum(ROWS), np.iinfo(dtype).max)
    for name, count, end in zip(names, ROWS, np.cumsum(ROWS).tolist()):
        write_shard(path / name, rows[end - count : end], dtype)
    write_dataset_files(path, names, arrow_schema(row_columns(dtype)), "0" * 32)
    shards = [{"file": name, "rows": count} for name, count in zip(names, ROWS)]
    shards.insert(1, {"file": None, "rows": 0})  # all of its documents were filtered
    return PackedRows.of(
        Prepared(path, {"content": {"shards": shards, "columns": [column.as_json() for column in row_columns(dtype)]}})
    )


@pytest.fixture
def rows(tmp_path: Path) -> PackedRows:
    return write_directory(tmp_path / "prepared", "uint16")


def lists(rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
    return [(row.input_ids.tolist(), row.seq_lengths.tolist()) for row in rows]


def through_datasets(path: Path) -> list[tuple[list[int], list[int]]]:
    return [(row["input_ids"], row["seq_lengths"]) for row in datasets.load_from_disk(str(path))]


# -- out of the shards


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_rows_are_those_that_datasets_loads(tmp_path: Path, dtype: str) -> None:
    rows = write_directory(tmp_path / "prepared", dtype)
    expected = through_datasets(tmp_path / "prepared")
    assert len(rows) == len(expected) == sum(ROWS)
    assert [count for _, count in rows.shards] == ROWS, "without the one that has no file"
    assert lists(list(rows)) == expected
    wanted = [23, 3, 3, 0, 9, 10, 8]
    assert lists(rows.__getitems__(wanted)) == [expected[index] for index in wanted]
    assert rows[0].input_ids.dtype == dtype
    for outside in (-1, len(rows)):
        with pytest.raises(IndexError, match=f"row {outside} of 24"):
            rows[outside]


@pytest.mark.parametrize("packing", ["wrapped", "bfd_split"])
def test_prepared_rows_are_those_that_datasets_loads(
    prepare: Callable[..., Prepared], tmp_path: Path, packing: str
) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{"word " * (n % 90)}"}}\n' for n in range(4000)))
    prepared = prepare(tmp_path / "texts.jsonl", seq_len=32, packing=packing, shard_bytes=200_000)
    rows = PackedRows.of(prepared)
    assert len(rows.shards) > 2
    assert max(count for _, count in rows.shards) > 1024, "several record batches"
    assert lists(list(rows)) == through_datasets(prepared.path)


def test_rows_are_views_into_the_file(rows: PackedRows) -> None:
    first, again = rows[4], rows[4]
    for one, other in zip(first[:2], again[:2]):
        assert not one.flags.owndata
        assert not one.flags.writeable
        assert one.ctypes.data == other.ctypes.data


def test_a_shard_is_opened_with_its_first_row(rows: PackedRows) -> None:
    """Opening the directory and reading other shards touch it so little that it may be absent."""
    last = rows.path / rows.shards[-1][0]
    last.unlink()
    again = PackedRows(rows.path, rows.shards, rows.columns)
    assert len(again) == sum(ROWS)
    again.__getitems__(range(10))
    with pytest.raises(DamagedError, match=f"{last}: .*No such file"):
        again[10]


@linux
def test_few_shards_stay_open_and_no_descriptor(rows: PackedRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_OPEN", 1)
    expected, descriptors = through_datasets(rows.path), len(os.listdir("/proc/self/fd"))
    kept = rows[0]
    for index in [23, 9, 0, 12, 9, 3]:
        assert lists([rows[index]]) == [expected[index]]
        assert mappings(rows.path) <= 1 + 1, "the latest, and the one that `kept` looks into"
    assert lists([kept]) == [expected[0]], "a view outlives its shard"
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    del kept, rows.__dict__["_shard"]
    assert mappings(rows.path) == 0


def mappings(path: Path) -> int:
    return sum(f"{path}/data-" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_that_read_give_the_same_batches(rows: PackedRows, start: str) -> None:
    list(rows)  # all mapped here
    load = partial(DataLoader, rows, batch_size=5, shuffle=False, collate_fn=PackedCollator(pad_id=7))  # type: ignore[var-annotated]
    here, there = list(load()), list(load(num_workers=1 + (start == "fork"), multiprocessing_context=start))
    assert len(here) == len(there) == 5
    for one, other in zip(here, there):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(pickle.dumps(rows)) < 1000


def test_rows_beyond_2_gigabytes_of_a_file(tmp_path: Path) -> None:
    """In a sparse file: its first row is 2.2 GB of zeros that are never written nor read."""
    row = Row.of([[5, 6, 7], [8]])
    with (
        open(tmp_path / "data.arrow", "wb") as file,
        pa.ipc.new_stream(pa.PythonFile(_Sparse(file), mode="w"), arrow_schema(row_columns("uint16"))) as writer,
    ):
        for ids, pieces in [
            (np.zeros(1_100_000_000, np.uint16), [1_100_000_000]),
            (row.input_ids.astype(np.uint16), row.seq_lengths),
        ]:
            columns = [
                pa.ListArray.from_arrays([0, len(values)], pa.array(values, kind))
                for values, kind in ((ids, pa.uint16()), (pieces, pa.uint32()))
            ]
            writer.write_batch(pa.record_batch(columns, schema=arrow_schema(row_columns("uint16"))))
    status = (tmp_path / "data.arrow").stat()
    assert status.st_size > 2**31 > 100 * 512 * status.st_blocks
    rows = PackedRows(tmp_path, (("data.arrow", 2),), row_columns("uint16"))
    assert lists([rows[1]]) == lists([row])
    assert len(rows[0].input_ids) == 1_100_000_000


class _Sparse:
    """A file that skips what is long instead of writing it."""

    closed = False

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if view.nbytes > 1_000_000:
            self.file.seek(view.nbytes, os.SEEK_CUR)
        else:
            self.file.write(view)
        return view.nbytes

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        pass


def with_a_null(path: Path) -> None:
    with pa.ipc.new_stream(str(path), arrow_schema(row_columns("uint16"))) as writer:
        writer.write_batch(
            pa.record_batch(
                [pa.array([[1, None]], pa.list_(pa.uint16())), pa.array([[2]], pa.list_(pa.uint32()))],
                schema=arrow_schema(row_columns("uint16")),
            )
        )


def cut(path: Path) -> None:
    write_shard(path, make_rows(1, 9), "uint16")
    os.truncate(path, path.stat().st_size - 40)


@pytest.mark.parametrize(
    ("write", "difference"),
    [
        (lambda path: write_shard(path, make_rows(2, 9), "uint16"), "2 rows, the manifest says 1"),
        (lambda path: write_shard(path, [], "uint16"), "0 rows, the manifest says 1"),
        (
            lambda path: write_shard(path, make_rows(1, 9), "uint32"),
            "its columns are input_ids list<item: uint32>, .* the manifest says input_ids list<item: uint16>",
        ),
        (
            lambda path: write_shard(path, make_rows(1, 9), "uint16", names=("input_ids", "lengths")),
            "its columns are .* lengths list.* says .* seq_lengths list",
        ),
        (cut, "not readable as Arrow"),
        (lambda path: path.write_bytes(b""), "not readable as Arrow"),
        (lambda path: path.write_bytes(b"text" * 99), "not readable as Arrow"),
        (with_a_null, "not readable as Arrow"),
        (lambda path: None, "not readable as Arrow .*No such file"),
    ],
)
def test_a_shard_that_is_not_what_the_manifest_says_is_named(
    tmp_path: Path, write: Callable[[Path], None], difference: str
) -> None:
    write(tmp_path / "data.arrow")
    with pytest.raises(
        DamagedError,
        match=f"{re.escape(str(tmp_path))}/data.arrow: {difference}.*; remove {re.escape(str(tmp_path))} and prepare "
        f"again",
    ):
        PackedRows(tmp_path, (("data.arrow", 1),), row_columns("uint16"))[0]


def test_shards_are_read_ahead(rows: PackedRows) -> None:
    size = sum(path.stat().st_size for path in rows.path.glob("data-*.arrow"))
    assert read_ahead(rows) == (size if hasattr(os, "posix_fadvise") else 0)
    assert size > 0


# -- into batches


def test_collator_by_hand() -> None:
    rows = [Row.of([[5, 6], [7, 8, 9]]), Row.of([[1], [2, 3], [4], [5, 6]])]
    batch = {name: tensor.tolist() for name, tensor in PackedCollator(pad_id=99)(rows).items()}
    assert batch == {
        "input_ids": [[5, 6, 7, 8, 9, 99], [1, 2, 3, 4, 5, 6]],
        "position_ids": [[0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 0, 1]],
        "labels": [[-100, 6, -100, 8, 9, -100], [-100, -100, 3, -100, -100, 6]],
    }


def test_padding_is_a_document_of_its_own_at_a_fixed_width_too() -> None:
    batch = PackedCollator(pad_id=0, pad_to=6)([Row.of([[5, 6, 7]]), Row.of([[1, 2, 3]])])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]] * 2
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, -100], [-100, 2, 3, -100, -100, -100]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["position_ids"].dtype == torch.int64


def test_flat_batches_carry_the_bounds_of_documents() -> None:
    batch = PackedCollator(pad_id=0, flatten=True)([Row.of([[5, 6], [7]]), Row.of([[8, 9, 4]])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 9, 4]]
    assert (batch["cu_seq_lens_q"].tolist(), batch["cu_seq_lens_q"].dtype, batch["max_length_q"]) == (
        [0, 2, 3, 6],
        torch.int32,
        3,
    )
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["position_ids"].dtype == torch.int64


def test_rows_that_contradict_their_lengths_are_refused() -> None:
    for tokens, lengths in ([5, 6, 7], [2]), ([5, 6], [2, 0]):
        bad = Row(np.array(tokens, np.uint32), np.array(lengths, np.uint32))
        with pytest.raises(DamagedError, match="seq_lengths do not sum"):
            PackedCollator(pad_id=0)([bad, Row.of([[1]])])


def test_batches_hold_the_rows_of_the_disk(rows: PackedRows) -> None:
    expected, wanted = through_datasets(rows.path), [23, 3, 3, 0, 9]
    batch = PackedCollator(pad_id=0)(rows.__getitems__(wanted))
    assert batch["input_ids"].shape == (5, max(len(expected[index][0]) for index in wanted))
    for number, index in enumerate(wanted):
        ids, pieces = expected[index]
        assert batch["input_ids"][number, : len(ids)].tolist() == ids
        assert (
            np.flatnonzero(batch["position_ids"][number, : len(ids)] == 0).tolist()
            == (np.cumsum(pieces) - pieces).tolist()
        )
