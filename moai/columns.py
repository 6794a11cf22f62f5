"""numpy buffers as Arrow columns, without a copy and without a Python object per value."""

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
