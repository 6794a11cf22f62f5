"""The hash of a document: tells exact copies, and orders documents without regard to where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from moai.core import columns
from moai.engine.part import Signal
from moai.engine.schema import Column

CONTENT = ("content_high", "content_low")


@dataclass(frozen=True)
class DocumentHash(Signal):
    """xxh3_128 of a text's UTF-8 bytes, in two halves."""

    needs: ClassVar[tuple[str, ...]] = ("text",)
    adds: ClassVar[tuple[Column, ...]] = tuple(Column(name, "uint64", per="document") for name in CONTENT)

    def measure(self, batch: pa.RecordBatch) -> dict[str, Any]:
        found = halves(b"".join(map(xxhash.xxh3_128_digest, columns.byte_strings(batch["text"]))))
        return dict(zip(CONTENT, (columns.numbers(half) for half in found)))


def halves(digests: bytes) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """The upper and lower 64 bits of each digest of 16 bytes."""
    both = np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)
    return both[:, 0].copy(), both[:, 1].copy()
