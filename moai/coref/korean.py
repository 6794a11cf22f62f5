"""Which Korean documents are worth analysing (four cheap rules) and which are worth keeping (what Kiwi says of them).

    1 length      min_length <= characters <= max_length
    2 sentences   `.` + `?` + `!` >= min_sentences
    3 hangul      share of U+AC00..U+D7A3 >= min_hangul_ratio
    4 special     share of what is neither alphanumeric nor space, newline, tab <= max_special_ratio
    5 nnp         min_nnp_ratio <= proper nouns / morphemes <= max_nnp_ratio
    6 pronoun     no pronoun anywhere: only by the rules of v2; otherwise one drops the mention beside it

The bounds of both sets of rules are in moai.coref.options. A document is dropped at the first rule it fails, and
counted there; `alone.<rule>` counts those that pass the other rules of the same stage, characters or tags. Rules 1 to
4 look every character up in one table (numpy), at about a thousandth of what Kiwi costs; Kiwi then runs once a
document, and its morphemes serve rules 5, 6 and the search for names.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.core.errors import ConfigError
from moai.engine.part import Filter
from moai.engine.pipeline import count

RULES = ("source", "length", "sentences", "hangul", "special", "nnp", "pronoun")
"""In the order in which they are applied, numbered from 0, what HPLT itself says of its documents;
`filtered.rule.<rule>` counts each.
"""
RULE = "rule"
KIWI_MODELS = ("cong", "cong-global", "largest", "knlm", "sbg")
_HANGUL, _SPECIAL = 1, 2


@dataclass(frozen=True, kw_only=True)
class CheapRules(Filter):
    """Rules 1 to 4, before Kiwi. All bounds are inclusive."""

    needs = ("text",)

    min_length: int = 800
    max_length: int = 2500
    min_sentences: int = 3
    min_hangul_ratio: float = 0.40
    max_special_ratio: float = 0.30

    @property
    def name(self) -> str:
        return RULE

    def keep(self, batch: pa.RecordBatch) -> tuple[list[bool], list[str]]:
        failed = [self.failed_by(text) for text in batch["text"].to_pylist()]
        for rules in failed:
            if len(rules) == 1:
                count(f"alone.{rules[0]}")
        return [not rules for rules in failed], [rules[0] for rules in failed if rules]

    def failed_by(self, text: str) -> list[str]:
        """Those of the rules that `text` fails, in their order."""
        classes = _classes()[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
        passed = {
            "length": self.min_length <= len(text) <= self.max_length,
            "sentences": text.count(".") + text.count("?") + text.count("!") >= self.min_sentences,
            "hangul": np.count_nonzero(classes & _HANGUL) / max(1, len(text)) >= self.min_hangul_ratio,
            "special": np.count_nonzero(classes & _SPECIAL) / max(1, len(text)) <= self.max_special_ratio,
        }
        return [rule for rule, ok in passed.items() if not ok]


@dataclass(frozen=True, kw_only=True)
class KiwiQuality:
    """Rules 5 and 6, on the tags of a whole document's morphemes."""

    min_nnp_ratio: float = 0.05
    max_nnp_ratio: float = 0.20
    pronoun_filter: bool = True

    def failed_by(self, tags: Sequence[str]) -> list[str]:
        """Those of the two rules that a document with these tags fails."""
        named = self.min_nnp_ratio <= tags.count("NNP") / max(1, len(tags)) <= self.max_nnp_ratio
        return [*(() if named else ("nnp",)), *(("pronoun",) if self.pronoun_filter and "NP" in tags else ())]


@dataclass(frozen=True)
class Kiwi:
    """The analyser as a field of the part that uses it."""

    model: str

    def identity(self) -> dict[str, str]:
        """What of it changes its answers. Raises ConfigError where it is not installed."""
        if find_spec("kiwipiepy") is None:
            raise ConfigError(
                "kiwipiepy is not installed, and without it Korean cannot be analysed: pip install 'moai[korean]'"
            )
        return {name: version(name) for name in ("kiwipiepy", "kiwipiepy_model")} | {"model_type": self.model}


def warm(model: str) -> None:
    """Load what analysing needs where workers are forked from. With num_workers=0 Kiwi keeps no thread of its own, so a
    forked child may use it.
    """
    analyser(model)
    _classes()


@functools.lru_cache(maxsize=1)
def analyser(model: str) -> Any:
    """The process's Kiwi: built once, by `warm` before workers are forked, whose pages they then share (3 to 7 MB
    private each instead of 500).
    """
    from kiwipiepy import Kiwi

    with warnings.catch_warnings():  # it warns that num_workers=0 has a new meaning, which is the one wanted here
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            kiwi = Kiwi(num_workers=0, model_type=model)
        except OSError as error:
            raise ConfigError(
                f"--kiwi-model {model}: the installed kiwipiepy_model has none of that type ({error}); cong and "
                f"cong-global come with it"
            ) from error
    kiwi.tokenize("")  # the constructor is lazy: the first document would wait 1.2 s
    return kiwi


@functools.cache
def _classes() -> npt.NDArray[np.uint8]:
    """One byte for each code point: is it a Hangul syllable, is it special."""
    points = range(0x110000)
    alphanumeric = np.fromiter(map(str.isalnum, map(chr, points)), bool, len(points))
    classes = np.where(alphanumeric, 0, _SPECIAL).astype(np.uint8)
    classes[[ord(space) for space in " \n\t"]] = 0
    classes[0xAC00:0xD7A4] |= _HANGUL
    return classes
