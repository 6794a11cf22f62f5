"""Megatron's indexed dataset: tokens one after another in .bin, lengths and byte positions of the documents in .idx."""

from pathlib import Path

import numpy as np

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def id_dtype(vocab_size: int) -> np.dtype:
    """Two bytes a token below 65,500 ids, as Megatron decides it."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


def read_dtype(path: Path) -> np.dtype:
    with open(path, "rb") as file:
        code = file.read(len(MAGIC) + 9)[-1]
    return next(dtype for dtype, known in CODES.items() if known == code)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """`lengths`: tokens of each document, its end included."""
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    with open(path, "wb") as file:
        file.write(MAGIC + np.uint64(VERSION).tobytes() + np.uint8(CODES[dtype]).tobytes())
        file.write(np.array([len(lengths), len(lengths) + 1], np.uint64).tobytes())
        file.write(np.asarray(lengths, np.int32).tobytes())
        file.write(np.concatenate([[0], ends[:-1]]).astype(np.int64).tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
