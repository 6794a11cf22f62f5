"""Parts by name: from what a YAML file or a flag says to filters, maps and signals.

    transforms:
      - Length: {min_chars: 200}                       # one that moai ships
      - my_filters:MostlyLetters: {min_share: 0.6}     # a class of yours, in my_filters.py

A class is looked for in the folder of the YAML, then in the working directory, then on `sys.path`; workers and other
ranks find it at the same place. Nothing is imported that nobody named.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import sys
import typing
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from moai.core.config import did_you_mean
from moai.core.errors import ConfigError
from moai.engine.part import Part, described
from moai.quality.c4 import C4Lines
from moai.quality.fasttext import FastText
from moai.transforms.filters import Length

SHIPPED: dict[str, type[Part]] = {"Length": Length, "C4Lines": C4Lines, "FastText": FastText}


def parse_parts(written: Any, *, place: str, folder: Path | None = None) -> tuple[Part, ...]:
    """The parts of a list as YAML has it; a flag's words are such entries. Raises ConfigError, naming entry and
    place.
    """
    entries = [written] if isinstance(written, str | Mapping) else written
    if not isinstance(entries, Sequence):
        raise ConfigError(f"{place}: expected a list of parts, found {type(entries).__name__}")
    return tuple(_part(entry, place, folder) for entry in entries)


def spelled(part: Part) -> dict[str, Any]:
    """A part as `parse_parts` reads it. Raises ConfigError for fields that YAML has no spelling for."""
    cls = type(part)
    name = cls.__qualname__ if SHIPPED.get(cls.__qualname__) is cls else f"{cls.__module__}:{cls.__qualname__}"
    fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}
    return {name: {field: _plain(value) for field, value in fields.items()}}


def spelled_parts(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [spelled(part) for part in parts]


def load_class(name: str, *, place: str, folder: Path | None = None) -> type:
    """The class that `module:Class` names. Raises ConfigError."""
    module_name, _, class_name = name.partition(":")
    module = _module(module_name, place, folder)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [
            n for n, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__
        ]
        said = f"is {type(found).__name__}, not a class" if found is not None else "is not there"
        raise ConfigError(
            f"{place}: {class_name!r} {said} in {module.__file__ or module_name}{did_you_mean(class_name, classes)}"
        )
    return found


def _part(entry: Any, place: str, folder: Path | None) -> Part:
    if isinstance(entry, Part):
        return entry
    name, fields = name_and_fields(entry, place)
    if ":" not in name:
        if name not in SHIPPED:
            raise ConfigError(
                f"{place}: no part is called {name!r}{did_you_mean(name, SHIPPED)} (moai has {', '.join(SHIPPED)}; "
                f"yours is my_module:MyFilter)"
            )
        cls: type = SHIPPED[name]
    else:
        cls = load_class(name, place=place, folder=folder)
    if not issubclass(cls, Part):
        raise ConfigError(
            f"{place}: {name} is no Filter, Map or Signal: derive it from one of them (from moai import Filter)"
        )
    return typing.cast(Part, make(cls, fields, place=f"{place}: {name}", folder=folder))


def make(cls: type, fields: Mapping[str, Any], *, place: str, folder: Path | None = None) -> Any:
    """An instance of a dataclass from plain values. Raises ConfigError for names and values that it does not take."""
    known = {f.name: f for f in dataclasses.fields(cls) if f.init} if dataclasses.is_dataclass(cls) else {}
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ConfigError(
                f"{place} has no field {name!r}; "
                f"{f'did you mean {near[0]}?' if near else 'it has ' + (', '.join(known) or 'none')}"
            )
    hints = typing.get_type_hints(cls) if fields else {}
    values = {name: _valued(value, hints.get(name), f"{place}, field {name}", folder) for name, value in fields.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{place}: {error}") from error


def name_and_fields(entry: Any, place: str) -> tuple[str, dict[str, Any]]:
    """`Name`, or `Name: {field: value}`. Raises ConfigError."""
    if isinstance(entry, str):
        entry = yaml_value(entry, place)
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, Mapping) or len(entry) != 1 or not isinstance(next(iter(entry)), str):
        raise ConfigError(
            f"{place}: {entry!r} is not a part; write Name, Name: {{field: value}} or my_module:MyFilter: {{field: "
            f"value}}"
        )
    ((name, fields),) = entry.items()
    if fields is not None and not isinstance(fields, Mapping):
        if " {" in name:  # Name {field: value}
            raise ConfigError(
                f"{place}: "
                f"{name.split(' {')[0]!r} and its fields are not told apart; "
                f"write {name.split(' {')[0]}: {{field: value}}"
            )
        raise ConfigError(f"{place}: {name}: {fields!r} is not a set of fields; write {name}: {{field: value}}")
    return name, dict(fields or {})


def yaml_value(written: str, place: str) -> Any:
    """A flag's word as a YAML file has it. Raises ConfigError."""
    import yaml  # only where somebody wrote some: it takes 30 ms

    try:
        return yaml.safe_load(written)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{place}: {written!r} is not readable as YAML ({' '.join(str(error).split())[:160]})"
        ) from error


def _module(name: str, place: str, folder: Path | None) -> Any:
    """Imported so that a worker that looks for it by its name finds the same file."""
    looked = list(dict.fromkeys(str(place) for place in (folder, Path.cwd()) if place))
    top = name.split(".")[0]
    here = next((path for path in looked if PathFinder.find_spec(top, [path])), None)
    if here:
        ours = PathFinder.find_spec(top, [here])
        theirs = (
            None if top in sys.modules else PathFinder.find_spec(top, [p for p in sys.path if p not in ("", *looked)])
        )
        loaded = getattr(sys.modules.get(top), "__file__", None)
        if other := (theirs.origin if theirs else loaded if loaded and ours and loaded != ours.origin else None):
            raise ConfigError(
                f"{place}: {name} is a module of {here} and another of that name is installed ({other}); give yours "
                f"another name"
            )
        if here not in sys.path:
            sys.path.append(here)  # workers start with this list
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{place}: {name} imports {error.name!r}, which is not installed") from error
        raise ConfigError(f"{place}: no module {name!r} in {', '.join(looked)} or on sys.path") from error
    except Exception as error:
        raise ConfigError(
            f"{place}: {name} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error


def _valued(value: Any, hint: Any, place: str, folder: Path | None) -> Any:
    """A value of YAML as the field's type wants it: paths, tuples, numbers. A relative path is looked for beside the
    YAML first.
    """
    wanted = [hint, *typing.get_args(hint)] if hint is not None else []
    if isinstance(value, str) and Path in wanted:
        beside = folder / value if folder else Path(value)
        return beside if beside.exists() else Path(value)
    if isinstance(value, list) and any(typing.get_origin(one) is tuple for one in wanted):
        return tuple(value)
    kinds = [one for one in wanted if one in (int, float, bool, str)]
    if len(kinds) == 1 and value is not None:
        hint = kinds[0]
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
            raise ConfigError(f"{place} = {value!r}: is no {hint.__name__}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else {"": described(value)}
