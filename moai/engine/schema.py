"""The columns of rows: one declaration that the sink, the manifest, `verify`, `repair`, readers and the collator go by.

Column("url", "string", per="piece")         # one value a document, repeated for each piece it is cut into
arrow_schema(row_columns("uint16"))          # input_ids: list<uint16>, seq_lengths: list<uint32>
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from moai.core.errors import ConfigError

PER = ("row", "piece", "token", "document")
NUMBERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")
_FEATURE_NAMES = {"float": "float32", "double": "float64"}
"""Where `datasets` calls a type otherwise than Arrow does."""


@dataclass(frozen=True)
class Column:
    """One named value a row, a piece (a document's part of a row), a token, or a document.

    type  Arrow's name of one value: "uint16", "float32", "bool", "string", or "list<...>" of one
    per   what has a value; of a document it stands in the documents file, not beside the rows
    runs  per token, 0 or 1: stored as run lengths, how many 0s, then how many 1s, then 0s, ...
    """

    name: str
    type: str
    per: str = "row"
    runs: bool = False

    def __post_init__(self) -> None:
        if self.per not in PER:
            raise ConfigError(f"column {self.name}: per={self.per!r} is none of {', '.join(PER)}")
        self.value_type  # noqa: B018 - refuses a type that Arrow does not know

    @property
    def value_type(self) -> pa.DataType:
        """Of one value."""
        return _arrow_type(self.type, self.name)

    @property
    def stored_type(self) -> pa.DataType:
        """Of the column in a shard, where pieces and tokens are lists."""
        return (
            pa.list_(pa.uint32() if self.runs else self.value_type)
            if self.per in ("piece", "token")
            else self.value_type
        )

    @property
    def is_number(self) -> bool:
        return self.type in NUMBERS

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "type": self.type, "per": self.per, **({"runs": True} if self.runs else {})}

    identity = as_json


class Columns(dict[str, str]):
    """What an input has: column -> "string", "list", "string or list" or another type's name, of all files together.

    of_files  (path, its own columns) of each file that says of itself what all of its rows have
    """

    def __init__(self, found: Mapping[str, str] | None = None) -> None:
        super().__init__(found or {})
        self.of_files: list[tuple[str, Mapping[str, str]]] = []

    def add(self, found: Mapping[str, str]) -> None:
        """Those of one more file, or record, with the types that hold the values of all."""
        for name, kind in found.items():
            self[name] = _type_of_both(self.get(name, "null"), kind)


def _type_of_both(one: str, other: str) -> str:
    kinds = {*one.split(" or "), *other.split(" or ")} - {"null", "NoneType"}
    if texts := [kind for kind in ("string", "list") if kind in kinds]:
        return " or ".join(texts)
    if len(kinds) < 2:
        return kinds.pop() if kinds else one
    if all(kind.startswith(("int", "uint", "float", "double", "halffloat")) for kind in kinds):
        return "int64" if all(kind.startswith(("int", "uint")) for kind in kinds) else "double"
    return "mixed"


def row_columns(dtype: str, beside: Sequence[Column] = ()) -> tuple[Column, ...]:
    """The columns of packed rows: ids of Arrow's type `dtype`, the lengths of the pieces, and what travels beside
    them.
    """
    return (Column("input_ids", dtype, per="token"), Column("seq_lengths", "uint32", per="piece"), *beside)


def columns_from_json(entries: Iterable[Mapping[str, Any]]) -> tuple[Column, ...]:
    """The columns that a manifest lists."""
    return tuple(Column(**entry) for entry in entries)


def arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    """The schema of a shard, with what `datasets` reads off an Arrow file."""
    return with_features(pa.schema([pa.field(column.name, column.stored_type) for column in columns]))


def with_features(schema: pa.Schema) -> pa.Schema:
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features(schema)}})})


def features(schema: pa.Schema) -> dict[str, Any]:
    """The columns as `datasets` writes them down: numbers, strings, and lists of them."""
    return {field.name: _feature(field.type) for field in schema}


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": _FEATURE_NAMES.get(str(kind), str(kind)), "_type": "Value"}


def _arrow_type(name: str, column: str) -> pa.DataType:
    if name.startswith("list<") and name.endswith(">"):
        return pa.list_(_arrow_type(name[5:-1], column))
    if name not in (*NUMBERS, "string"):
        raise ConfigError(
            f"column {column}: type {name!r} is none of {', '.join(NUMBERS)}, string, or list<...> of one"
        )
    return pa.type_for_alias(name)


TRAINED = Column("trained_runs", "uint8", per="token", runs=True)
"""Which tokens of a conversation are learned."""
