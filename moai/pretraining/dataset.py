"""The entries of `--dataset`: a path or a Hub name, with settings of its own where it has any.

    dataset:
      - data/web
      - {path: data/forum.jsonl.gz, name: forum, text_column: post_body, weight: 0.2, transforms: [Length: {min_chars:
        200}]}
      - {source: my_sources:Wiki: {language: ko}, name: wiki}

On the command line `--dataset data/web forum=data/forum.jsonl.gz,text_column=post_body,weight=0.2`; an existing path of
that spelling wins. An entry's own setting wins over the global one; its transforms run behind the global ones of their
kind.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai.core.config import did_you_mean
from moai.core.errors import ConfigError, SourceError
from moai.engine.part import Part
from moai.engine.part import described as described_part
from moai.quality.rules import parse_profile
from moai.quality.rules import spelled as spelled_profile
from moai.sources.discover import short_name
from moai.sources.inputs import distinct_names
from moai.transforms.named import load_class, make, name_and_fields, parse_parts, spelled, yaml_value

if TYPE_CHECKING:
    from moai.pretraining.options import DataConfig

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_SETTING = re.compile(r",(?=[a-z_]+=)")
_SOURCE_METHODS = ("name", "shards", "digest", "read", "remember")


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One entry; what is None is as the global setting says."""

    path: str = ""
    """File, folder, glob or Hub name; or instead `source`."""
    source: Any = None
    """An object with `name`, `shards`, `digest`, `read`, `remember` (moai.engine.pipeline.Source)."""
    name: str | None = None
    """What mixtures, logs, manifest and `verify` call it; the path's last part otherwise."""
    text_column: str | None = None
    text_template: str | None = None
    txt_document: str | None = None
    encoding: str | None = None
    """Of CSV and TSV files, where it is neither UTF-8 nor UTF-16 with its mark."""
    transforms: tuple[Part, ...] = ()
    min_chars: int | None = None
    max_chars: int | None = None
    sample: float | None = None
    """The share of its documents that is taken, by the hash of their text."""
    weight: float | None = None
    """As in --mixture."""
    max_epochs: float | None = None
    """As in --mixture_epochs."""
    priority: int | None = None
    """With --dedup: of two copies the one of the source with the higher priority stays; 0 otherwise."""
    quality: Any = None
    """Its own profile, in place of --quality's (moai.quality.rules.Profile)."""
    split: str | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.source):
            raise ConfigError(
                f"an entry of dataset has {'both a path and' if self.path else 'neither a path nor'} a source; it "
                f"needs one of them"
            )
        if self.sample is not None and not 0 < self.sample <= 1:
            raise ConfigError(f"{self}: sample = {self.sample}: must lie above 0, and 1 at most")
        for field in ("weight", "max_epochs"):
            if (value := getattr(self, field)) is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{self}: {field} = {value}: must be a number, and not negative")
        if self.source is not None and (
            missing := [method for method in _SOURCE_METHODS if not hasattr(self.source, method)]
        ):
            raise ConfigError(
                f"{self}: is no source: it has no {missing[0]} (a source has {', '.join(_SOURCE_METHODS)})"
            )
        if self.source is not None and not dataclasses.is_dataclass(self.source):
            raise ConfigError(
                f"{self}: {described_part(self.source)} has no fields to be told by; write @dataclass(frozen=True) "
                f"above the class"
            )

    def __str__(self) -> str:
        return self.path or self.name or str(getattr(self.source, "name", type(self.source).__name__))

    @property
    def spec(self) -> str:
        """What is looked for: the path, with configuration and split where the entry names them."""
        return self.path + (f":{self.config}" if self.config else "") + (f"@{self.split}" if self.split else "")

    def settings(self) -> dict[str, Any]:
        """What it says itself, as JSON; not where its data lies, nor what is said of it in training."""
        left = ("path", "source", "name", "weight", "max_epochs", "transforms", "quality")
        said = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in left and getattr(self, f.name) is not None
        }
        return {
            **said,
            **({"transforms": [part.identity() for part in self.transforms]} if self.transforms else {}),
            **({"quality": self.quality.identity()} if self.quality else {}),
        }

    def applied_to(self, config: DataConfig) -> DataConfig:
        """The configuration of this source alone."""
        own = {
            name: getattr(self, name)
            for name in ("text_column", "text_template", "txt_document", "min_chars", "max_chars", "sample")
        }
        own = {name: value for name, value in own.items() if value is not None}
        if "text_column" in own or "text_template" in own:
            own = {"text_column": None, "text_template": None, **own}
        try:
            return replace(config, **own, transforms=(*config.transforms, *self.transforms))
        except ConfigError as error:
            raise ConfigError(f"{self}: {error}") from error

    def as_yaml(self) -> Any:
        """As a file would say it, so that `repair` finds the data again."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in (None, (), "")}
        return {
            **said,
            **({"transforms": [spelled(part) for part in self.transforms]} if self.transforms else {}),
            **({"source": spelled(self.source)} if self.source else {}),
            **({"quality": spelled_profile(self.quality)} if self.quality else {}),
        }


def entries_of(dataset: Sequence[Any]) -> list[DatasetEntry]:
    """Every entry as an object. From Python an entry may be a string, a mapping, a DatasetEntry or a source."""
    return [_entry(given, place="dataset", folder=None) for given in dataset]


def parse_dataset(written: Any, *, place: str, folder: Path | None = None) -> tuple[DatasetEntry, ...]:
    """From YAML or flags. Raises ConfigError, naming entry and place."""
    given = [written] if isinstance(written, str | Mapping) else written
    if not isinstance(given, Sequence):
        raise ConfigError(f"{place}: expected a list of paths or entries, found {type(given).__name__}")
    return tuple(_entry(one, place=place, folder=folder) for one in given)


def spelled_dataset(dataset: Sequence[Any]) -> list[Any]:
    """The entries as `parse_dataset` reads them; one that is a path alone as that path."""
    return [
        entry.path if entry == DatasetEntry(path=entry.path or ".") else entry.as_yaml()
        for entry in entries_of(dataset)
    ]


def own_mixture(dataset: Sequence[Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the entries' own weights and epochs say, as --mixture and --mixture_epochs would. Raises ConfigError where
    only some have a weight.
    """
    entries = entries_of(dataset)
    named = list(zip(distinct_names([entry.name or short_name(str(entry)) for entry in entries]), entries))
    without = [name for name, entry in named if entry.weight is None]
    if without and len(without) < len(named):
        raise ConfigError(
            f"dataset: {without[0]} has no weight and others have one; give each entry a weight (0 leaves it out)"
        )
    weights = tuple(f"{name}={entry.weight:g}" for name, entry in named if entry.weight is not None)
    return weights, tuple(f"{name}={entry.max_epochs:g}" for name, entry in named if entry.max_epochs is not None)


def _entry(given: Any, *, place: str, folder: Path | None) -> DatasetEntry:
    if isinstance(given, DatasetEntry):
        return given
    if isinstance(given, str) and not given.strip():
        raise SourceError(f"{given!r}: names no data; is a variable empty?")
    if isinstance(given, str):
        if not given:
            raise SourceError(f"{place}: an empty word names no data")
        return DatasetEntry(path=given) if "=" not in given or _is_there(given) else _of_flag(given, place)
    if isinstance(given, Path):
        return DatasetEntry(path=str(given))
    if isinstance(given, Mapping):
        return _of_mapping(given, place, folder)
    if all(hasattr(given, method) for method in _SOURCE_METHODS):
        return DatasetEntry(source=given)
    raise ConfigError(f"{place}: {given!r} is no path, no entry and no source")


def _is_there(path: str) -> bool:
    """Whether it names a file, a folder, or files by a pattern."""
    return Path(path).expanduser().exists() or (
        glob.has_magic(path) and next(glob.iglob(os.path.expanduser(path), recursive=True), None) is not None
    )


def _of_flag(given: str, place: str) -> DatasetEntry:
    """`NAME=PATH[,setting=value...]`; a path that holds an equals sign stays one."""
    named = _NAMED.fullmatch(given)
    bare, *rest = _SETTING.split(given)
    if rest and not named and _is_there(bare):
        raise ConfigError(f"{place}: {given!r}: settings follow a name; write NAME={given}")
    if not named or "/" in named[1] or any(c in named[1] for c in "*?"):
        return DatasetEntry(path=given)
    path, *settings = _SETTING.split(named[2])
    found: dict[str, Any] = {"name": named[1], "path": path}
    for setting in settings:
        key, _, value = setting.partition("=")
        found[key] = (
            value
            if key in ("text_column", "text_template", "split", "config", "encoding", "quality")
            else yaml_value(value, f"{place}: {named[1]}: {key}")
        )
    return _of_mapping(found, place, None)


def _of_mapping(given: Mapping[str, Any], place: str, folder: Path | None) -> DatasetEntry:
    known = [f.name for f in fields(DatasetEntry)]
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{place}: an entry of dataset has no setting {key!r}{did_you_mean(str(key), known)} (it has "
                f"{', '.join(known)})"
            )
    found = {key: value for key, value in given.items() if value is not None}
    where = f"{place}: {found.get('name') or found.get('path') or found.get('source')}"
    if "transforms" in found:
        found["transforms"] = parse_parts(found["transforms"], place=f"{where}: transforms", folder=folder)
    if "quality" in found:
        found["quality"] = parse_profile(found["quality"], place=f"{where}: quality", folder=folder)
    if isinstance(found.get("source"), str | Mapping):
        name, settings = name_and_fields(found["source"], where)
        found["source"] = make(
            load_class(name, place=where, folder=folder), settings, place=f"{where}: {name}", folder=folder
        )
    if isinstance(found.get("path"), Path):
        found["path"] = str(found["path"])
    entry: DatasetEntry = make(DatasetEntry, found, place=where)
    if entry.txt_document not in (None, "line", "file"):
        raise ConfigError(f"{where}: txt_document = {entry.txt_document!r}: choose from line, file")
    return entry


def described(entry: DatasetEntry) -> str:
    """Its own settings, for the log; empty where it has none."""
    said = {name: value for name, value in entry.settings().items() if name not in ("transforms", "quality")}
    if entry.quality:
        said["judged by"] = f"{len(entry.quality.thresholds)} rules of its own"
    return ", ".join([*(f"{name} {value}" for name, value in said.items()), *(part.name for part in entry.transforms)])
