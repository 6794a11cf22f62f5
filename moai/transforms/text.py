"""Records and rows of any known shape -> one `text` a document, and what is kept beside it. What gives none is set
aside with its reason.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from moai.core.errors import SourceError
from moai.engine.documents import DOCUMENT
from moai.engine.part import Part
from moai.engine.pipeline import add_documents, advance, count, quarantine
from moai.engine.schema import Column
from moai.transforms.shapes import BadRecord, TextShape

T = TypeVar("T")
_BOM = b"\xef\xbb\xbf"
_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_EXPLAINED_LEVELS = 500
"""Up to here the standard library says why a record is broken. How deep it gets depends on the caller's stack, and a
reason must not.
"""


@dataclass(frozen=True, kw_only=True)
class ToText(Part):
    """Batches of records or columns -> batches of `text`; what gives none is quarantined with its place.

    `plain` records are text themselves (.txt); others are JSON objects. `columns` of the source are kept beside the
    text.
    """

    version: ClassVar[int] = 3  # 2 took a part of a turn without `text` for an empty one

    shape: TextShape
    plain: bool = False
    columns: tuple[Column, ...] = ()
    max_doc_bytes: int = 16 << 20

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            texts, beside = self.read(batch)
            if texts:
                yield beside.append_column("text", pa.array(texts, pa.large_string()))

    def read(self, batch: pa.RecordBatch) -> tuple[list[str], pa.RecordBatch]:
        """The texts of one batch, and `document` and the columns beside them: at once where every record is as good as
        most are, else record by record."""
        is_records = "record" in batch.schema.names
        found = None
        batch = batch if is_records else with_plain(batch, self.columns)
        if self.shape.column and batch.num_rows:
            found = self._plain_records(batch) if is_records else self._plain_column(batch)
        if found is None:
            good, texts, values = self._one_by_one(batch, is_records)
            batch = places_of(batch, good)
        else:
            count("read", batch.num_rows)
            texts, values = found
        sizes = (
            pc.binary_length(batch["record"]).to_numpy()
            if is_records
            else np.array([len(text.encode()) for text in texts], np.int64)
        )
        beside = {DOCUMENT: pa.array(add_documents(batch, sizes))}
        beside |= {column.name: values_of(column, given) for column, given in zip(self.columns, values)}
        return texts, pa.record_batch(list(beside.values()), names=list(beside))

    def strings(self, batch: pa.RecordBatch) -> list[str]:
        """The texts of one batch."""
        return self.read(batch)[0]

    def _plain_records(self, batch: pa.RecordBatch) -> tuple[list[str], list[list[Any]]] | None:
        """Texts and values of a batch whose records all are JSON objects with a string; None if any is not."""
        if self.plain or batch["problem"].null_count < batch.num_rows:
            advance(0)
            return None
        name, others = self.shape.column, {names[0] for names in self.shape.unless}
        try:
            rows = [orjson.loads(record) for record in batch["record"].to_pylist()]
            texts = [row[name] for row in rows]
            values = [[column_value(row, column) for row in rows] for column in self.columns]
        except (orjson.JSONDecodeError, KeyError, TypeError, IndexError, BadRecord):
            return None
        if not set(map(type, texts)) <= {str} or (others and not all(map(others.isdisjoint, rows))):
            return None
        advance(batch.num_rows)
        return texts, values

    def _plain_column(self, batch: pa.RecordBatch) -> tuple[list[str], list[Any]] | None:
        """The column, if it holds strings of valid UTF-8 and no null, none of them too large; None if not."""
        if self.shape.column not in batch.schema.names:
            return None
        column = batch[self.shape.column]
        if not _is_string(column.type) or column.null_count:
            return None
        try:
            column.validate(full=True)
            values = [_cast(batch, wanted) for wanted in self.columns]
        except (pa.ArrowException, ValueError, OverflowError, BadRecord):
            return None
        if pc.max(pc.binary_length(column)).as_py() > self.max_doc_bytes:
            return None
        advance(batch.num_rows)
        return column.to_pylist(), values

    def _one_by_one(self, batch: pa.RecordBatch, is_records: bool) -> tuple[list[int], list[str], list[list[Any]]]:
        """The numbers of the good records, their texts, and the values of each column."""
        names = (*self.shape.columns, *(column.name for column in self.columns))
        found = (
            each_record(batch, self._of_record, self.max_doc_bytes)
            if is_records
            else each_row(batch, names, self._of_row)
        )
        rows = list(found)
        advance(batch.num_rows)
        values = [[beside[at] for _, (_, beside) in rows] for at in range(len(self.columns))]
        return [index for index, _ in rows], [text for _, (text, _) in rows], values

    def _of_record(self, record: bytes) -> tuple[str, list[Any]]:
        if self.plain:
            return _decode(record), [None] * len(self.columns)
        row = parse_object(record)
        return self.shape.render(row), [column_value(row, column) for column in self.columns]

    def _of_row(self, row: Mapping[str, Any]) -> tuple[str, list[Any]]:
        text = self.shape.render(row)
        if len(text) > self.max_doc_bytes // 4 and len(text.encode()) > self.max_doc_bytes:
            raise BadRecord("too large", f"over {self.max_doc_bytes} bytes")
        return text, [column_value(row, column) for column in self.columns]


def column_value(row: Mapping[str, Any], column: Column) -> Any:
    """A value of the source in the column's type; None where it is absent. Raises BadRecord for one of another type."""
    value = row.get(column.name)
    if value is None:
        return None
    if column.type == "string":
        return _as_text(value, column.name)
    fits = (
        isinstance(value, bool)
        if column.type == "bool"
        else isinstance(value, int | float) and not isinstance(value, bool)
    )
    if not fits or (column.type == "int64" and not (isinstance(value, int) and -(2**63) <= value < 2**63)):
        raise BadRecord(
            "column type", f"{column.name!r} is {type(value).__name__} {str(value)[:40]}, others are {column.type}"
        )
    return float(value) if column.type == "float64" else value


def _as_text(value: Any, name: str) -> str:
    """A value of any type as text: lists and objects as JSON. Raises BadRecord for what JSON has no spelling for."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    try:
        return orjson.dumps(value, default=str).decode()
    except TypeError as error:
        raise BadRecord("column type", f"{name!r} cannot be written as JSON ({error})") from error


def with_plain(batch: pa.RecordBatch, columns: Sequence[Column]) -> pa.RecordBatch:
    """The batch of a columnar file, in which columns that travel as text and are times, decimals and the like are text
    already: of these Arrow's spelling holds. Raises SourceError for nanoseconds inside lists and structs, which Python
    has no type for.
    """
    for column in columns:
        kind = batch.schema.field(column.name).type if column.name in batch.schema.names else pa.null()
        if pa.types.is_nested(kind) and "[ns" in str(kind):
            raise SourceError(
                f"the column {column.name!r} of type {kind} cannot be carried: nanoseconds inside lists and structs "
                f"are not read; write microseconds"
            )
        if (
            column.type == "string"
            and kind != pa.month_day_nano_interval()
            and (pa.types.is_temporal(kind) or pa.types.is_decimal(kind))
        ):
            batch = batch.set_column(
                batch.schema.names.index(column.name), column.name, batch[column.name].cast(pa.string())
            )
    return batch


def places_of(batch: pa.RecordBatch, good: Sequence[int]) -> pa.RecordBatch:
    """Where these records stand: not all types of what else they hold can be picked from."""
    if len(good) == batch.num_rows:
        return batch
    names = [name for name in ("segment", "line", "offset", "record") if name in batch.schema.names]
    return batch.select(names).take(pa.array(good, pa.int64()))


def values_of(column: Column, values: Any) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values, column.value_type)


def each_record(batch: pa.RecordBatch, make: Callable[[bytes], T], max_doc_bytes: int) -> Iterator[tuple[int, T]]:
    """The index of each good record and what `make` gives for it, of a file of lines or values. Where it raises
    BadRecord the record is quarantined; blank lines are none.
    """
    problems = batch["problem"].to_pylist() if batch["problem"].null_count < batch.num_rows else None
    blank = 0
    for index, record in enumerate(batch["record"].to_pylist()):
        problem = problems[index] if problems else None
        try:
            if problem:
                raise BadRecord(problem, f"over {max_doc_bytes} bytes")
            yield index, make(record)
        except BadRecord as bad:
            if record.strip() or bad.reason == problem:
                _set_aside(bad, batch, index, record[:max_doc_bytes] if problem else record)
            else:
                blank += 1
    count("read", batch.num_rows - blank)


def each_row(
    batch: pa.RecordBatch, columns: Sequence[str], make: Callable[[Mapping[str, Any]], T]
) -> Iterator[tuple[int, T]]:
    """The index of each good row and what `make` gives for it, of a columnar file. Where it raises BadRecord, or the
    file says what is wrong with it, the row is quarantined."""
    count("read", batch.num_rows)
    problems = (
        batch["problem"].to_pylist()
        if "problem" in batch.schema.names and batch["problem"].null_count < batch.num_rows
        else None
    )
    for index, row in enumerate(_rows(batch.select([name for name in batch.schema.names if name in columns]))):
        problem = problems[index] if problems else None
        try:
            if problem:
                raise BadRecord(problem["reason"], problem["detail"])
            if isinstance(row, BadRecord):
                raise row
            yield index, make(row)
        except BadRecord as bad:
            _set_aside(
                bad,
                batch,
                index,
                problem["sample"] if problem else b"" if row is bad else str(row).encode("utf-8", "replace"),
            )


def parse_object(record: bytes) -> dict[str, Any]:
    """A record as a JSON object. Raises BadRecord with the reason."""
    try:
        row = orjson.loads(record)
    except orjson.JSONDecodeError as error:
        row = _explain(record, error)
    if not isinstance(row, dict):
        raise BadRecord("not an object", f"found {type(row).__name__}")
    return row


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadRecord]:
    """Rows as objects. Columnar files do not check that a text is UTF-8, and hold times that Python has no value for;
    where one is so, the rows are taken one by one.
    """
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for index in range(batch.num_rows):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as bad:
                yield BadRecord("invalid UTF-8", f"byte {bad.start}: {bad.reason}")
            except (ValueError, OverflowError) as bad:
                yield BadRecord("column type", f"a value that Python cannot hold ({bad})")


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _cast(batch: pa.RecordBatch, column: Column) -> pa.Array | list[Any]:
    """A column of a columnar file in the type it is wanted in. Raises ArrowInvalid, BadRecord."""
    if column.name not in batch.schema.names:
        return pa.nulls(batch.num_rows, column.value_type)
    values = batch[column.name]
    values.validate(full=True)
    if column.type == "string" and not _is_string(values.type):
        return [column_value({column.name: value}, column) for value in values.to_pylist()]
    return values.cast(column.value_type)


def _set_aside(bad: BadRecord, batch: pa.RecordBatch, index: int, sample: bytes) -> None:
    place = {name: batch[name][index].as_py() for name in ("segment", "line", "offset")}
    quarantine(bad.reason, detail=str(bad), sample=sample, **place)


def _explain(record: bytes, error: orjson.JSONDecodeError) -> Any:
    """Why a record is refused. A byte order mark in front of good JSON is not a reason."""
    if record.startswith(_BOM) and not record.startswith(_BOM * 2):
        return parse_object(record.removeprefix(_BOM))
    try:
        text = record.decode("utf-8")
    except UnicodeDecodeError as bad:
        raise BadRecord("invalid UTF-8", f"byte {bad.start}: {bad.reason}") from None
    if "recursion" in str(error) or "depth" in str(error):
        raise BadRecord("too deep", "more than 1,024 levels")
    if _levels(text) <= _EXPLAINED_LEVELS:
        try:
            json.loads(text, parse_constant=_refuse_constant)
        except ValueError:
            raise BadRecord("broken JSON", str(error)) from None
    # The standard library takes what orjson does not: half of a surrogate pair, numbers beyond a double's range.
    raise BadRecord("lone surrogate" if "surrogate" in str(error) else "broken JSON", str(error))


def _levels(text: str) -> int:
    """How deep brackets nest; those in strings are none."""
    return max(itertools.accumulate((mark in "[{") - (mark in "]}") for mark in _BRACKETS.findall(text)), default=0)


def _refuse_constant(name: str) -> Any:
    raise BadRecord("NaN", f"{name} is not JSON")


def _decode(record: bytes) -> str:
    try:
        text = record.decode("utf-8")
    except UnicodeDecodeError as bad:
        raise BadRecord("invalid UTF-8", f"byte {bad.start}: {bad.reason}") from None
    return text.removeprefix("\ufeff").rstrip("\r\n")
