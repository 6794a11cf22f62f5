"""Rules: a number of a document beside a threshold. A profile is a set of thresholds; a document that fails one goes.

    profile = parse_profile("fineweb")                   # one that moai ships, or the path of a YAML file
    profile = profile.changed(("gopher.min_words=40", "fineweb.max_short_lines=off"))

    # my_profile.yaml
    extends: [gopher]
    gopher.min_words: 40
    sources:
      forum: {gopher.min_stop_words: off}

A rule is called after the tool whose numbers it equals: `gopher`, `repetition` and `fineweb` are datatrove 0.10's
(GopherQualityFilter, GopherRepetitionFilter, FineWebQualityFilter) on moai's words; `min_` fails below its threshold,
`max_` above.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moai.core.config import did_you_mean, read_names
from moai.core.errors import ConfigError
from moai.core.files import canonical_json, digest_json

Numbers = Mapping[str, npt.NDArray[Any]]
"""The columns of TextStatistics, a value a document."""
Measure = Callable[[Numbers], npt.NDArray[np.float64]]


def _number(name: str) -> Measure:
    return lambda found: found[name].astype(np.float64)


def _share(part: str, whole: str) -> Measure:
    """A share of nothing is 0."""
    return lambda found: found[part] / np.maximum(found[whole], 1.0)


RULES: dict[str, Measure] = {
    "min_chars": _number("chars"),
    "gopher.min_words": _number("plain_words"),
    "gopher.max_words": _number("plain_words"),
    "gopher.min_word_length": _share("plain_word_chars", "plain_words"),
    "gopher.max_word_length": _share("plain_word_chars", "plain_words"),
    "gopher.max_hashes": _share("hashes", "words"),
    "gopher.max_ellipses": _share("ellipses", "words"),
    "gopher.max_bullet_lines": _share("bullet_lines", "lines"),
    "gopher.max_ellipsis_lines": _share("ellipsis_lines", "lines"),
    "gopher.min_alpha_words": _share("alpha_words", "words"),
    "gopher.min_stop_words": _number("stop_words"),
    "repetition.max_dup_paragraphs": _share("dup_paragraphs", "paragraphs"),
    "repetition.max_dup_paragraph_chars": _share("dup_paragraph_chars", "chars"),
    "repetition.max_dup_lines": _share("dup_spans", "spans"),
    "repetition.max_dup_line_chars": _share("dup_span_chars", "chars"),
    **{f"repetition.max_top_{n}_gram": _share(f"top_{n}_gram_chars", "chars") for n in (2, 3, 4)},
    **{f"repetition.max_dup_{n}_grams": _share(f"dup_{n}_gram_chars", "chars") for n in range(5, 11)},
    "fineweb.min_punctuated_lines": _share("punctuated_lines", "full_lines"),
    "fineweb.max_short_lines": _share("short_lines", "full_lines"),
    "fineweb.max_dup_line_chars": lambda found: (
        found["dup_full_line_chars"] / np.maximum(found["chars"].astype(np.int64) - found["newlines"], 1.0)
    ),
    "fineweb.max_newlines": _share("newlines", "words"),
}
"""What each rule measures."""
_REPETITION = {
    **{f"repetition.max_dup_{what}": 0.3 for what in ("paragraphs", "lines")},
    **{f"repetition.max_dup_{what}_chars": 0.2 for what in ("paragraph", "line")},
    **{f"repetition.max_top_{n}_gram": top for n, top in ((2, 0.2), (3, 0.18), (4, 0.16))},
    **{f"repetition.max_dup_{n}_grams": round(0.2 - 0.01 * n, 2) for n in range(5, 11)},
}
_GOPHER = {
    "gopher.min_words": 50,
    "gopher.max_words": 100_000,
    "gopher.min_word_length": 3,
    "gopher.max_word_length": 10,
    "gopher.max_hashes": 0.1,
    "gopher.max_ellipses": 0.1,
    "gopher.max_bullet_lines": 0.9,
    "gopher.max_ellipsis_lines": 0.3,
    "gopher.min_alpha_words": 0.8,
    "gopher.min_stop_words": 2,
    **_REPETITION,
}
PROFILES: dict[str, dict[str, float]] = {
    "gopher": _GOPHER,
    "fineweb": {
        **_GOPHER,
        "fineweb.min_punctuated_lines": 0.12,
        "fineweb.max_short_lines": 0.67,
        "fineweb.max_dup_line_chars": 0.01,
        "fineweb.max_newlines": 0.3,
    },
    "repetition": _REPETITION,
}
"""`gopher` after Rae et al. 2021 (arXiv 2112.11446), table A1; `fineweb` adds the rules of FineWeb (arXiv 2406.17557).
Both expect English: of other languages and of code, `repetition` alone.
"""


@dataclass(frozen=True)
class Profile:
    """Thresholds by rule, for all sources and, where they differ, for one."""

    thresholds: Mapping[str, float]
    sources: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """By the name of a source; None switches a rule off there."""

    def of(self, source: str) -> dict[str, float]:
        """Those of one source, in the order of RULES."""
        found = {**self.thresholds, **self.sources.get(source, {})}
        return {name: float(value) for name in RULES if (value := found.get(name)) is not None}

    def changed(self, settings: Sequence[str]) -> Profile:
        """`rule=number` or `rule=off` each. Raises ConfigError."""
        return Profile(
            _merged(self.thresholds, (one.partition("=")[::2] for one in settings), "quality_set"), self.sources
        )

    def identity(self) -> dict[str, Any]:
        """What decides, and nothing of how it was written."""
        return {"thresholds": dict(self.thresholds), **({"sources": self.sources} if self.sources else {})}

    @property
    def digest(self) -> str:
        return digest_json(self.identity())


def parse_profile(written: Any, *, place: str = "quality", folder: Path | None = None) -> Profile | None:
    """A shipped name, the path of a YAML file, or its content. Raises ConfigError, naming value and place."""
    if written is None or isinstance(written, Profile):
        return written
    if isinstance(written, str) and written in PROFILES:
        return Profile(PROFILES[written])
    if isinstance(written, str | Path):
        path = Path(folder or "", Path(written).expanduser())
        if not path.is_file():
            near = did_you_mean(str(written), PROFILES)
            raise ConfigError(
                f"{place}: no profile is called {str(written)!r}{near}, nor is it a file ({', '.join(PROFILES)})"
            )
        written, place = read_names(path, place=str(path)), str(path)
    if not isinstance(written, Mapping):
        raise ConfigError(f"{place}: expected rules and thresholds, found {type(written).__name__}")
    rest = dict(written)
    thresholds: dict[str, float] = {}
    extends = rest.pop("extends", [])
    for name in [extends] if isinstance(extends, str) else extends:
        if name not in PROFILES:
            raise ConfigError(f"{place}: extends {name!r}, which is none of {', '.join(PROFILES)}")
        thresholds |= PROFILES[name]
    own = rest.pop("sources", None) or {}
    if not isinstance(own, Mapping) or not all(isinstance(rules, Mapping) for rules in own.values()):
        raise ConfigError(f"{place}: sources holds rules by the name of a source")
    sources = {str(name): _checked(rules.items(), f"{place}: sources: {name}") for name, rules in own.items()}
    return Profile(_merged(thresholds, rest.items(), place), sources)


def spelled(profile: Profile | None) -> dict[str, Any] | None:
    """As a YAML would say it, for settings.json."""
    return {**profile.thresholds, **({"sources": profile.sources} if profile.sources else {})} if profile else None


def failures(numbers: Numbers, thresholds: Mapping[str, float]) -> npt.NDArray[np.uint64]:
    """A bit for every rule that a document fails, by the rule's place in RULES."""
    places = {name: place for place, name in enumerate(RULES)}
    bits = np.zeros(len(numbers["chars"]), np.uint64)
    for name, threshold in thresholds.items():
        value = RULES[name](numbers)
        failed = value < threshold if is_least(name) else value > threshold
        bits |= failed.astype(np.uint64) << np.uint64(places[name])
    return bits


def is_least(rule: str) -> bool:
    """Whether a document fails below the threshold, not above it."""
    return rule.split(".")[-1].startswith("min_")


def _merged(thresholds: Mapping[str, float], settings: Any, place: str) -> dict[str, float]:
    found = {**thresholds, **_checked(settings, place)}
    return {name: value for name, value in found.items() if value is not None}


def _checked(settings: Any, place: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, value in settings:
        if name not in RULES:
            raise ConfigError(f"{place}: no rule is called {name!r}{did_you_mean(str(name), RULES)}")
        try:
            # YAML reads `off` as false.
            found[name] = None if value in ("off", False, None) else float(value)
            canonical_json(found[name])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{place}: {name} = {value!r}: expected a number, or off") from error
    return found
