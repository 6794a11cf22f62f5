"""The Signal behind every rule: what a text's words, lines and n-grams are like, in numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from moai.core import columns
from moai.engine.part import Signal
from moai.engine.schema import Column
from moai.quality import plain

logger = logging.getLogger(__name__)

EXCERPT = "excerpt"
_EXCERPT_CHARS, _EXCERPT_OF = 600, 8


@dataclass(frozen=True)
class TextStatistics(Signal):
    """The numbers of moai.quality.plain.NAMES, and of one document in eight its first 600 characters, so that a report
    can show what a rule drops without the source.
    """

    needs: ClassVar[tuple[str, ...]] = ("text",)
    adds: ClassVar[tuple[Column, ...]] = (
        *(Column(name, "uint32", per="document") for name in plain.NAMES),
        Column(EXCERPT, "string", per="document"),
    )

    def measure(self, batch: pa.RecordBatch) -> dict[str, Any]:
        found = _measuring()(batch["text"])
        # Which texts are shown depends on them alone: the same ones in any order.
        shown = [
            xxhash.xxh3_64_intdigest(text, seed=2) % _EXCERPT_OF == 0 for text in columns.byte_strings(batch["text"])
        ]
        beginning = pc.utf8_slice_codeunits(batch["text"], 0, _EXCERPT_CHARS).cast(pa.string())
        excerpt = pc.if_else(pa.array(shown, pa.bool_()), beginning, pa.scalar(None, pa.string()))
        return {**{name: found[:, index] for index, name in enumerate(plain.NAMES)}, EXCERPT: excerpt}


@cache
def _measuring() -> Callable[[pa.Array], Any]:
    try:
        from moai.quality import scan
    except ImportError:
        return lambda texts: np.array([plain.statistics(text) for text in texts.to_pylist()], np.uint32).reshape(
            -1, len(plain.NAMES)
        )
    return scan.statistics


def warn_without_numba() -> None:
    """Said once, where a preparation begins."""
    try:
        import numba  # noqa: F401
    except ImportError:
        logger.warning(
            "numba is not installed: documents are measured in plain Python, some 30 times slower, with the same "
            "numbers; pip install 'moai[quality]'"
        )
