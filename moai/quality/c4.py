"""The rules of C4 (Raffel et al. 2020, arXiv 1910.10683) as the C4QualityFilter of datatrove 0.10 has them: which lines
stay, and what a text is dropped for.

    transforms: [C4Lines]                # keeps the lines: changes the text
    c4.max_braces: 0                     # rules over the whole text, in a profile

A line stays when no word is over 1,000 characters, it ends in a terminal mark, has three words, and speaks neither of
javascript nor of a policy. Marks of citations go. Lines of code and of most lists end otherwise: never for code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from moai.engine.part import Map, Signal
from moai.engine.schema import Column

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_SENTENCE_END = re.compile(r"""[.?!。！？…]+["'”’)\]]*(?=\s|$)""")
_ENDS, _ELLIPSIS = (".", "?", "!", '"', "'"), "..."
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_MOST_WORD_CHARS, _LEAST_WORDS = 1000, 3


@dataclass(frozen=True)
class C4Statistics(Signal):
    """Of the lines that stay: those with "lorem ipsum" and those with a curly bracket, for which C4 drops a text, and
    sentences, of which it wants five. A sentence ends in a terminal mark before white space, or with its line.
    """

    needs: ClassVar[tuple[str, ...]] = ("text",)
    adds: ClassVar[tuple[Column, ...]] = tuple(
        Column(f"c4_{name}", "uint32", per="document") for name in ("lorem_ipsum", "braces", "sentences")
    )

    def measure(self, batch: pa.RecordBatch) -> dict[str, Any]:
        found = [judged_lines(text)[1:] for text in batch["text"].to_pylist()]
        return {column.name: pa.array([one[at] for one in found], pa.uint32()) for at, column in enumerate(self.adds)}


@dataclass(frozen=True, kw_only=True)
class C4Lines(Map):
    """Leaves of a text the lines that C4 keeps."""

    needs: ClassVar[tuple[str, ...]] = ("text",)
    seen_by: ClassVar[type[Signal]] = C4Statistics
    """What measures the text before it is changed."""

    terminal_marks: bool = True
    """Whether a line must end in one of . ? ! " '; FineWeb leaves that out."""

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        made = [
            "\n".join(judged_lines(text, terminal_marks=self.terminal_marks)[0]).strip()
            for text in batch["text"].to_pylist()
        ]
        return batch.set_column(batch.schema.get_field_index("text"), "text", pa.array(made, batch["text"].type))


def judged_lines(text: str, *, terminal_marks: bool = True) -> tuple[list[str], int, int, int]:
    """The lines that stay; lines that drop the text for lorem ipsum, and for a bracket; sentences of what stays."""
    kept, lorem, braces, sentences = list[str](), 0, 0, 0
    for line in text.splitlines():
        line = line.strip()
        words = line.split()
        if any(len(word) > _MOST_WORD_CHARS for word in words):
            continue
        line = _CITATION.sub("", line)
        if terminal_marks and (not line.endswith(_ENDS) or line.endswith(_ELLIPSIS)):
            continue
        if len(words) < _LEAST_WORDS:
            continue
        lowered = line.lower()
        if "lorem ipsum" in lowered:
            lorem += 1
        elif "javascript" in lowered:
            continue
        elif "{" in line:
            braces += 1
        elif any(policy in lowered for policy in _POLICIES):
            continue
        sentences += max(1, len(_SENTENCE_END.findall(line)))
        kept.append(line)
    return kept, lorem, braces, sentences
