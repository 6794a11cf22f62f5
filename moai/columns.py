"""numpy buffers as Arrow columns, without a copy and without a Python object per value; lists of strings, with one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_TYPES = {np.dtype(name): pa.type_for_alias(name) for name in ("uint16", "uint32", "int32", "int64")}


def numbers(values: npt.NDArray[np.integer]) -> pa.Array:
    """One number a row."""
    return pa.Array.from_buffers(_TYPES[values.dtype], len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def lists(offsets: npt.NDArray[np.integer], values: npt.NDArray[np.integer]) -> pa.Array:
    """Row i is values[offsets[i]:offsets[i + 1]]. int32 offsets make lists, int64 offsets large lists."""
    kind = pa.list_ if offsets.dtype == np.int32 else pa.large_list
    child = numbers(values)
    return pa.Array.from_buffers(kind(child.type), len(offsets) - 1, [None, pa.py_buffer(offsets)], children=[child])


def binaries(offsets: npt.NDArray[np.int32], data: bytes) -> pa.Array:
    """Row i is data[offsets[i]:offsets[i + 1]]."""
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


_last_texts: tuple[pa.Buffer, list[str]] | None = None


def texts(strings: list[str]) -> pa.Array:
    """A column of strings. The list itself is remembered until the next one, since a tokenizer will ask for it again."""
    global _last_texts
    column = pa.array(strings, pa.large_string())
    _last_texts = (column.buffers()[2], strings) if column.buffers()[2] is not None else None
    return column


def strings(column: pa.Array) -> list[str]:
    """The column as Python strings: those it was made of if it still is what `texts` made, else new ones."""
    last, buffer = _last_texts, column.buffers()[2]
    # An address can only be the same while the remembered buffer is alive, and buffers do not change.
    if last and buffer is not None and column.offset == 0 and len(column) == len(last[1]) and buffer.address == last[0].address:
        return last[1]
    made: list[str] = column.to_pylist()
    return made
