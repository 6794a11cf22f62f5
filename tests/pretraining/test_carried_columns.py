"""Columns of columnar files beside the rows: every type has its values, whatever the size of the batches and whatever
stands in the same batch.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run

from moai.core.errors import SourceError
from moai.prepared.manifest import Prepared
from moai.prepared.rows import PackedRows
from moai.prepared.verify import verify
from moai.training.data import PackedCollator

ROWS = 12
BAD = 5
"""A row whose text is null, so that its batch is read row by row."""
NOON = datetime.datetime(2020, 1, 2, 12, 0, 0, 250_000)
COLUMNS: dict[str, tuple[pa.Array, list[Any]]] = {
    "int8": (pa.array(range(ROWS), pa.int8()), list(range(ROWS))),
    "uint64": (pa.array([2**63 + n for n in range(ROWS)], pa.uint64()), [str(2**63 + n) for n in range(ROWS)]),
    "float16": (pa.array([np.float16(n / 2) for n in range(ROWS)]), [n / 2 for n in range(ROWS)]),
    "bool": (
        pa.array([None if n % 4 == 3 else n % 2 == 0 for n in range(ROWS)]),
        [None if n % 4 == 3 else n % 2 == 0 for n in range(ROWS)],
    ),
    "nanoseconds": (
        pa.array([10**9 * n + 1 for n in range(ROWS)], pa.timestamp("ns")),
        [f"1970-01-01 00:00:{n:02}.000000001" for n in range(ROWS)],
    ),
    "time stamp": (pa.array([NOON] * ROWS), ["2020-01-02 12:00:00.250000"] * ROWS),
    "date": (pa.array([NOON.date()] * ROWS), ["2020-01-02"] * ROWS),
    "decimal": (pa.array([decimal.Decimal("1.50")] * ROWS), ["1.50"] * ROWS),
    "dictionary": (pa.array(["a", "b"] * (ROWS // 2)).dictionary_encode(), ["a", "b"] * (ROWS // 2)),
    "list": (pa.array([[n, n] for n in range(ROWS)]), [f"[{n},{n}]" for n in range(ROWS)]),
    "struct": (pa.array([{"a": n} for n in range(ROWS)]), [f'{{"a":{n}}}' for n in range(ROWS)]),
    "large string": (pa.array([f"s{n}" for n in range(ROWS)], pa.large_string()), [f"s{n}" for n in range(ROWS)]),
    "string view": (pa.array([f"s{n}" for n in range(ROWS)], pa.string_view()), [f"s{n}" for n in range(ROWS)]),
    "binary": (pa.array([b"a\xff"] * ROWS), ["a\\xff"] * ROWS),
    "null": (pa.nulls(ROWS), [None] * ROWS),
}


def write(path: Path, columns: dict[str, pa.Array]) -> Path:
    table = pa.table({"text": [None if n == BAD else f"number {n}" for n in range(ROWS)], **columns})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_every_type_has_its_values_for_any_size_of_batches(
    prepare: Callable[..., Prepared], tmp_path: Path, kind: str
) -> None:
    path = write(tmp_path / f"a.{kind}", {name: array for name, (array, _) in COLUMNS.items()})
    digests = set()
    for size in (1, 5, 1000):
        prepared = prepare(
            path,
            carry_columns=tuple(COLUMNS),
            dataset_batch_size=size,
            writer_batch_size=size,
            cache_dir=str(tmp_path / f"cache{size}"),
        )
        digests.add(prepared.content_digest)
    assert len(digests) == 1
    rows = datasets.load_from_disk(str(prepared.path))
    for name, (_, values) in COLUMNS.items():
        assert [value for (value,) in rows[name]] == [value for n, value in enumerate(values) if n != BAD], name
    assert all(check.ok for check in verify(prepared.path))
    packed = PackedRows.of(prepared)
    batch = PackedCollator(pad_id=0, beside=prepared.beside)([packed[n] for n in range(ROWS - 1)])
    assert [None if math.isnan(value) else bool(value) for value in batch["bool"][:, 0].tolist()] == [
        v for n, v in enumerate(COLUMNS["bool"][1]) if n != BAD
    ]


def test_types_are_the_same_where_pandas_is_not_loaded(start_moai: Any, tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write(tmp_path / "a.parquet", {"nanoseconds": COLUMNS["nanoseconds"][0]})
    done = start_moai(
        "prepare",
        "--dataset",
        path,
        "--tokenizer_path",
        tokenizer_dir,
        "--cache_dir",
        tmp_path / "c",
        "--carry_columns",
        "nanoseconds",
        "--num_proc",
        "1",
    )
    assert done.returncode == 0, done.stderr
    rows = datasets.load_from_disk(done.stdout.splitlines()[-1])
    assert rows[0]["nanoseconds"] == ["1970-01-01 00:00:00.000000001"]


def test_nanoseconds_in_a_list_are_refused(prepare: Callable[..., Prepared], tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", {"when": pa.array([[1]] * ROWS, pa.list_(pa.timestamp("ns")))})
    with pytest.raises(SourceError, match=r"the column 'when' of type .* cannot be carried"):
        prepare(path, carry_columns=("when",))


def test_whole_numbers_beside_fractions_of_another_source_are_fractions(
    prepare: Callable[..., Prepared], tmp_path: Path
) -> None:
    big = 2**60 + 1  # more digits than a fraction has
    one = write(tmp_path / "a.parquet", {"n": pa.array([big] * ROWS)})
    (tmp_path / "b.jsonl").write_text('{"text": "fraction", "n": 0.5}\n{"text": "no number"}\n')
    prepared = prepare(one, tmp_path / "b.jsonl", carry_columns=("n",))
    assert [value for (value,) in datasets.load_from_disk(str(prepared.path))["n"]] == [float(big)] * (ROWS - 1) + [
        0.5,
        None,
    ]


def test_what_json_cannot_spell_is_a_bad_record(prepare: Callable[..., Prepared], tmp_path: Path) -> None:
    deep = "[" * 400 + "]" * 400
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": [1]}\n{"text": "b", "n": ' + deep + "}\n")
    assert prepare(tmp_path / "a.jsonl", carry_columns=("n",)).content["quarantined"] == {"column type": 1}


def test_numbers_with_a_null_somewhere_have_one_type_in_every_batch(
    prepare: Callable[..., Prepared], tmp_path: Path
) -> None:
    rows = [
        {"text": f"text {number}", "n": None if number == 5 else number, "b": number % 2 == 0, "i": number}
        for number in range(10)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(tmp_path / "a.jsonl", carry_columns=("n", "b", "i"))
    assert prepared.content["nulls"] == {"n": 1}
    packed, collate = PackedRows.of(prepared), PackedCollator(pad_id=0, beside=prepared.beside)
    batches = [collate([packed[at], packed[at + 1]]) for at in range(0, 10, 2)]
    assert {(str(batch["n"].dtype), str(batch["b"].dtype), str(batch["i"].dtype)) for batch in batches} == {
        ("torch.float64", "torch.bool", "torch.int64")
    }
    assert [value for batch in batches for value in batch["n"].flatten().tolist()][:5] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert batches[2]["n"].isnan().tolist() == [[False], [True]]


def test_training_takes_columns_off_before_the_model(
    train_py: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most models take any argument and say nothing. The losses are those without any column."""
    from transformers import Qwen3ForCausalLM

    forward, got = Qwen3ForCausalLM.forward, set[str]()

    @functools.wraps(forward)
    def heard(self: Any, *given: Any, **named: Any) -> Any:
        got.update(named)
        return forward(self, *given, **named)

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", heard)
    tokenizer, model = tiny_run.write_tokenizer(tmp_path / "tokenizer"), tiny_run.write_model_config(tmp_path)
    lines = [{"text": f"some words and number {number}", "n": number, "url": f"u/{number}"} for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        "--dataset",
        str(tmp_path / "a.jsonl"),
        "--tokenizer_path",
        str(tokenizer),
        "--model_config",
        str(model),
        "--seq_len",
        "32",
        "--packing",
        "bfd_split",
    ]
    words += [
        "--cache_dir",
        str(tmp_path / "cache"),
        "--max_steps",
        "2",
        "--batch_size",
        "4",
        "--logging_steps",
        "1",
        "--use_cpu",
        "true",
        "--num_proc",
        "0",
    ]
    losses = []
    for name, more in (("without", []), ("with", ["--carry_columns", "n", "url"])):
        said = train_py(*words, *more, "--output_dir", str(tmp_path / name))
        losses.append(re.findall(r"loss (\d+\.\d+)", said))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert "input_ids" in got
    assert not got & {"n", "url"}
