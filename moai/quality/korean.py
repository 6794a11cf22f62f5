"""Korean stop words: the 21 that FineWeb-2 counts (huggingface/fineweb-2, configs/kor_Hang.yml, Apache-2.0).

They are morphemes there, as Kiwi cuts them. Here each counts where a word ends in it, so that no analyser is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moai.engine.part import Signal
from moai.engine.schema import Column

STOP_WORDS = (
    *("의", "다", "이", "는", "에", "을", "한", "년", "하", "은", "를"),
    *("했", "고", "에서", "가", "있", "으로", "인", "월", "로", "되"),
)


@dataclass(frozen=True)
class KoreanWords(Signal):
    """`ko_stop_words`: how many of the 21 occur."""

    needs: ClassVar[tuple[str, ...]] = ("text",)
    adds: ClassVar[tuple[Column, ...]] = (Column("ko_stop_words", "uint8", per="document"),)

    def measure(self, batch: pa.RecordBatch) -> dict[str, Any]:
        # RE2 stops at the first match, so that a Korean text is left after its first sentences.
        found = [pc.match_substring_regex(batch["text"], rf"{word}(?:[^\pL\pN_]|$)") for word in STOP_WORDS]
        return {"ko_stop_words": np.sum([one.to_numpy(zero_copy_only=False) for one in found], axis=0, dtype=np.uint8)}
