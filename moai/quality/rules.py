"""Rules: a number of a document beside a threshold. A profile is a set of thresholds; a document that fails one goes.

    profile = parse_profile("fineweb")                   # one that moai ships, or the path of a YAML file
    profile = profile.changed(("gopher.min_words=40", "fineweb.max_short_lines=off"))

    # my_profile.yaml
    extends: [gopher]
    gopher.min_words: 40
    sources:
      forum: {gopher.min_stop_words: off}
    languages:
      ko: {gopher.min_stop_words: off, gopher.min_word_length: 1}
    own.min_my_score: 0.5                                # over the column my_score of a Signal of yours

A rule is called after the tool whose numbers it equals: `gopher`, `repetition` and `fineweb` are datatrove 0.10's
(GopherQualityFilter, GopherRepetitionFilter, FineWebQualityFilter) on moai's words; `min_` fails below its threshold,
`max_` above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moai.core.config import did_you_mean, read_names
from moai.core.errors import ConfigError
from moai.core.files import canonical_json, digest_json
from moai.engine.schema import Column
from moai.quality.profiles import LANGUAGES, PROFILES

Numbers = Mapping[str, npt.NDArray[Any]]
"""The columns of Signals that are numbers, a value a document."""
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
    "c4.max_lorem_ipsum": _number("c4_lorem_ipsum"),
    "c4.max_braces": _number("c4_braces"),
    "c4.min_sentences": _number("c4_sentences"),
    "fineweb2_ko.min_stop_words": _number("ko_stop_words"),
    "language.max_other": _number("other_language"),
    "contamination.max_share": _number("contaminated_share"),
}
"""What each rule measures."""
_OTHER, CONTAMINATED, _OWN = "language.max_other", "contamination.max_share", "own."
SURE = 0.65
"""Probability from which on a language counts as told, as FineWeb has it."""
_ASKED = {_OTHER: SURE, CONTAMINATED: 0.5}
"""Thresholds of rules that are asked for by a flag of their own, --languages and --decontaminate."""
_MOST_RULES = 64  # bits of a verdict


@dataclass(frozen=True)
class Profile:
    """Thresholds by rule, for all documents and, where they differ, for those of a language or of a source."""

    thresholds: Mapping[str, float]
    sources: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """By the name of a source; None switches a rule off there. They win over those of a language."""
    languages: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    """Languages that are wanted; all, where none is named."""

    @property
    def needs_language(self) -> bool:
        return bool(self.languages or self.only)

    @property
    def names(self) -> tuple[str, ...]:
        """All rules, in the order of their bits: moai's, then those over Signals of the user that it has."""
        return (*RULES, *sorted(self.used - {*RULES}))

    @property
    def used(self) -> set[str]:
        """Rules that it says something of, for any document."""
        return {name for rules in (self.thresholds, *self.sources.values(), *self.languages.values()) for name in rules}

    def of(self, source: str, language: str | None = None) -> dict[str, float]:
        """Those of one source, or of its documents in one language, in the order of `names`."""
        found = {**self.thresholds, **self.languages.get(language or "", {}), **self.sources.get(source, {})}
        return {name: float(value) for name in self.names if (value := found.get(name)) is not None}

    def asked(self, languages: Sequence[str], *, decontaminates: bool) -> Profile:
        """With the rules that flags ask for, where the profile itself does not set them."""
        rules = [name for name, wanted in ((_OTHER, languages), (CONTAMINATED, decontaminates)) if wanted]
        return replace(
            self, thresholds={**{name: _ASKED[name] for name in rules}, **self.thresholds}, only=tuple(languages)
        )

    def of_sources(self, own: Mapping[str, Profile]) -> Profile:
        """With another profile for some sources, by their names; what is said of a source here wins."""
        off = dict.fromkeys(name for name in self.thresholds if name not in _ASKED)
        found = {name: {**off, **one.thresholds, **self.sources.get(name, {})} for name, one in own.items()}
        return replace(self, sources={**self.sources, **found})

    def check(self, measured: Iterable[Column]) -> None:
        """Raises ConfigError where a rule looks at a number that no Signal measures."""
        numbers = {column.name for column in measured if column.is_number}
        for name in self.names[len(RULES) :]:
            if own_column(name) not in numbers:
                raise ConfigError(
                    f"quality: rule {name}: no Signal measures a number called {own_column(name)!r}"
                    f"{did_you_mean(own_column(name), numbers)}; name the Signal that does with --transforms"
                )

    def changed(self, settings: Sequence[str]) -> Profile:
        """`rule=number` or `rule=off` each. Raises ConfigError."""
        said = (one.partition("=")[::2] for one in settings)
        return replace(self, thresholds=_merged(self.thresholds, said, "quality_set"))

    def identity(self) -> dict[str, Any]:
        """What decides, and nothing of how it was written."""
        beside = {"sources": self.sources, "languages": self.languages, "only": list(self.only)}
        return {"thresholds": dict(self.thresholds), **{name: value for name, value in beside.items() if value}}

    @property
    def digest(self) -> str:
        return digest_json(self.identity())


def parse_profile(written: Any, *, place: str = "quality", folder: Path | None = None) -> Profile | None:
    """A shipped name, the path of a YAML file, or its content. Raises ConfigError, naming value and place."""
    if written is None or isinstance(written, Profile):
        return written
    if isinstance(written, str) and written in PROFILES:
        return Profile(PROFILES[written], languages=LANGUAGES.get(written, {}))
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
    extended: dict[str, Mapping[str, float | None]] = {}
    extends = rest.pop("extends", [])
    for name in [extends] if isinstance(extends, str) else extends:
        if name not in PROFILES:
            raise ConfigError(f"{place}: extends {name!r}, which is none of {', '.join(PROFILES)}")
        thresholds |= PROFILES[name]
        extended |= LANGUAGES.get(name, {})
    sources, languages = (
        _beside(rest.pop(f"{of}s", None) or {}, f"{place}: {of}s", of) for of in ("source", "language")
    )
    languages = {name: {**extended.get(name, {}), **languages.get(name, {})} for name in {**extended, **languages}}
    profile = Profile(_merged(thresholds, rest.items(), place), sources, languages)
    if len(profile.names) > _MOST_RULES:
        raise ConfigError(f"{place}: {len(profile.names) - len(RULES)} rules over signals of your own are too many")
    return profile


def spelled(profile: Profile | None) -> dict[str, Any] | None:
    """As a YAML would say it, for settings.json."""
    if profile is None:
        return None
    beside = {"sources": profile.sources, "languages": profile.languages}
    return {**profile.thresholds, **{name: value for name, value in beside.items() if value}}


def failures(
    numbers: Numbers, thresholds: Mapping[str, float], names: Sequence[str] = tuple(RULES)
) -> npt.NDArray[np.uint64]:
    """A bit for every rule that a document fails, by the rule's place in `names`."""
    bits: Any = np.uint64(0)
    for name, threshold in thresholds.items():
        value = measure(name, numbers)
        failed = value < threshold if is_least(name) else value > threshold
        bits = bits | failed.astype(np.uint64) << np.uint64(names.index(name))
    return np.asarray(bits, np.uint64)


def measure(rule: str, numbers: Numbers) -> npt.NDArray[np.float64]:
    """What a rule looks at, a value a document."""
    return RULES[rule](numbers) if rule in RULES else numbers[own_column(rule)].astype(np.float64)


def own_column(rule: str) -> str:
    """The column of a user's Signal: `own.min_my_score` -> `my_score`."""
    return rule.removeprefix(_OWN)[len("min_") :]


def is_least(rule: str) -> bool:
    """Whether a document fails below the threshold, not above it."""
    return rule.split(".")[-1].startswith("min_")


def _merged(thresholds: Mapping[str, float], settings: Any, place: str) -> dict[str, float]:
    found = {**thresholds, **_checked(settings, place)}
    return {name: value for name, value in found.items() if value is not None}


def _beside(written: Any, place: str, of: str) -> dict[str, Mapping[str, float | None]]:
    if not isinstance(written, Mapping) or not all(isinstance(rules, Mapping) for rules in written.values()):
        raise ConfigError(f"{place} holds rules by the name of a {of}")
    return {str(name): _checked(rules.items(), f"{place}: {name}") for name, rules in written.items()}


def _checked(settings: Any, place: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, value in settings:
        if name not in RULES and not str(name).startswith((f"{_OWN}min_", f"{_OWN}max_")):
            raise ConfigError(f"{place}: no rule is called {name!r}{did_you_mean(str(name), RULES)}")
        try:
            # YAML reads `off` as false.
            found[name] = None if value is None or value is False or value == "off" else float(value)
            canonical_json(found[name])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{place}: {name} = {value!r}: expected a number, or off") from error
    return found
