"""numpy buffers as Arrow columns, without a copy and without a Python object per value."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_TYPES = {np.dtype(name): pa.type_for_alias(name) for name in ("uint8", "uint16", "uint32", "uint64", "int32", "int64")}


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


def byte_strings(texts: pa.Array) -> Iterator[memoryview]:
    """The UTF-8 bytes of each string of a column without nulls."""
    _, offset_buffer, data = texts.buffers()
    wide = pa.types.is_large_string(texts.type)
    offsets = np.frombuffer(offset_buffer, np.int64 if wide else np.int32)[
        texts.offset : texts.offset + len(texts) + 1
    ].tolist()
    view = memoryview(data) if data is not None else memoryview(b"")
    return (view[start:end] for start, end in itertools.pairwise(offsets))
