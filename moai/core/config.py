"""Dataclass <-> flags, YAML and environment, under one precedence: default < file < environment < flag.

A configuration is a frozen dataclass whose fields are made by `option`; the field is the flag, the YAML key and the
documentation. Every resolved value keeps where it came from.

    @dataclass(frozen=True, kw_only=True)
    class DataConfig:
        num_proc: int | None = option(None, "worker processes", env="DATASET_NUM_PROC")

    resolved = resolve([DataConfig], argv, os.environ, prog="python -m moai prepare")
    resolved[DataConfig].num_proc               # 12
    resolved.origins["num_proc"]                # "environment DATASET_NUM_PROC"
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from moai.core.errors import ConfigError

T = TypeVar("T")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Setting:
    """A value that moai chose itself, with the reason it will be asked for."""

    value: Any
    reason: str


def option(
    default: Any,
    help: str,
    *,
    affects_output: bool = False,
    only: str | None = None,
    parse: Callable[..., Any] | None = None,
    spell: Callable[[Any], Any] | None = None,
    env: str | None = None,
    names: Sequence[str] = (),
    choices: Sequence[str] = (),
    bare: str | None = None,
) -> Any:
    """A dataclass field that is also a flag, a YAML key and, with `env`, an environment variable.

    affects_output  the prepared bytes depend on it, so it belongs to the plan key
    only            the one value of `data_format` that it has a meaning for
    parse           makes the value of what was written: `parse(written, place=..., folder=...)`, the place for errors,
                    the folder of the YAML or None
    spell           the way back: what a file would say, for settings.json
    names           further spellings of the flag and the YAML key, without dashes
    bare            what the flag means when it is given without a value
    """
    metadata = {
        "help": help,
        "affects_output": affects_output,
        "only": only,
        "parse": parse,
        "spell": spell,
        "env": env,
        "names": tuple(names),
        "choices": tuple(choices),
        "bare": bare,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Resolved:
    """Instances by class, and for each field name where its value came from."""

    instances: Mapping[type, Any]
    origins: Mapping[str, str]

    def __getitem__(self, cls: type[T]) -> T:
        return typing.cast(T, self.instances[cls])

    def table(self) -> dict[str, dict[str, Any]]:
        """`{name: {"value": ..., "origin": ...}}` over all classes, for printing and for saving beside a run."""
        values = {
            f.name: _spelled(f, getattr(instance, f.name))
            for instance in self.instances.values()
            for f in dataclasses.fields(instance)
        }
        return {name: {"value": value, "origin": self.origins[name]} for name, value in sorted(values.items())}


def resolve(
    classes: Sequence[type],
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    prog: str,
    description: str = "",
    epilog: str = "",
    others: Sequence[type] = (),
) -> Resolved:
    """Merge defaults, `--config FILE`, environment and flags. Raises ConfigError naming value, place and the way out.

    others  classes whose names the file may hold too: one file serves several commands
    """
    fields, hints = _fields_of(classes)
    parser = build_parser(classes, prog=prog, description=description, epilog=epilog)
    completed(parser)
    flags = vars(parser.parse_args(list(argv)))
    values: dict[str, Any] = {name: f.default for name, f in fields.items()}
    origins = dict.fromkeys(fields, "default")
    config_path = flags.pop("config", None)
    for name, value in _read_file(config_path, fields, others).items() if config_path else ():
        place = f"{config_path}: {name}"
        values[name], origins[name] = (
            _read(value, fields[name], hints[name], place, Path(str(config_path)).absolute().parent),
            f"file {config_path}",
        )
    _read_environment(environ, fields, hints, values, origins)
    for name, value in flags.items():
        values[name], origins[name] = _read(value, fields[name], hints[name], f"--{name}"), "flag"
    return _resolved(classes, values, origins)


def configured(
    classes: Sequence[type], options: Mapping[str, Any], environ: Mapping[str, str], *, caller: str
) -> Resolved:
    """Merge defaults, environment and a caller's keyword arguments. Raises ConfigError naming argument, value and the
    way out.
    """
    fields, hints = _fields_of(classes)
    values: dict[str, Any] = {name: f.default for name, f in fields.items()}
    origins = dict.fromkeys(fields, "default")
    _read_environment(environ, fields, hints, values, origins)
    for name, value in options.items():
        place = f"{caller}({name}=...)"
        if name not in fields:
            raise ConfigError(f"{caller}: no option is called {name!r}{did_you_mean(name, fields)}")
        if value is None and fields[name].default is not None:
            raise ConfigError(f"{place}: None is not a value for it; leave it away for the default")
        one = (value,) if isinstance(value, str | Path) and _is_tuple(_base(hints[name])) else value
        values[name], origins[name] = _read(one, fields[name], hints[name], place), "the caller"
    return _resolved(classes, values, origins)


def _fields_of(classes: Sequence[type]) -> tuple[dict[str, dataclasses.Field[Any]], dict[str, Any]]:
    """Every field and its type, by name."""
    return (
        {f.name: f for cls in classes for f in dataclasses.fields(cls)},
        {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()},
    )


def _read_environment(
    environ: Mapping[str, str],
    fields: Mapping[str, dataclasses.Field[Any]],
    hints: Mapping[str, Any],
    values: dict[str, Any],
    origins: dict[str, str],
) -> None:
    for name, f in fields.items():
        variable = f.metadata["env"]
        if variable and environ.get(variable, "") != "":
            values[name], origins[name] = _read(environ[variable], f, hints[name], variable), f"environment {variable}"


def _resolved(classes: Sequence[type], values: Mapping[str, Any], origins: Mapping[str, str]) -> Resolved:
    for cls in classes:
        for f in dataclasses.fields(cls):
            _check_choice(values[f.name], f, origins[f.name])
    return Resolved({cls: cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)}) for cls in classes}, origins)


def build_parser(
    classes: Sequence[type], *, prog: str, description: str = "", epilog: str = ""
) -> argparse.ArgumentParser:
    """One argument group a class; absent flags leave no attribute, so that a flag is told from a default."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [flags]",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON file of these names; environment and flags win over it"
    )
    for cls in classes:
        group = parser.add_argument_group((cls.__doc__ or cls.__name__).splitlines()[0].rstrip("."))
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            _add_flag(group, f, hints[f.name])
    return parser


def completed(parser: argparse.ArgumentParser) -> None:
    """Where a shell asks for completions (`moai completion`), answer it and end this process."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser, always_complete_options=False)


def parse_size(text: str) -> int:
    """`"16MB"` -> 16,000,000; `"16MiB"` -> 16,777,216; a bare number is bytes."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size (like 16MB, 512MiB or 1000000)")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_files(written: Any, *, place: str, folder: Path | None = None) -> tuple[str, ...]:
    """Names of files; of a YAML's those that lie beside it are looked for there first. Raises ConfigError."""
    names = [written] if isinstance(written, str | Path) else written
    if not isinstance(names, Sequence) or not all(isinstance(name, str | Path) for name in names):
        raise ConfigError(f"{place}: expected names of files, found {written!r}")
    beside = [Path(folder or "", Path(name).expanduser()) for name in names]
    return tuple(str(path if path.exists() else Path(name)) for path, name in zip(beside, names, strict=True))


def identity(instance: Any) -> dict[str, Any]:
    """The fields whose value changes the prepared bytes, as plain JSON values."""
    values = {
        f.name: getattr(instance, f.name) for f in dataclasses.fields(instance) if f.metadata.get("affects_output")
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _spelled(f: dataclasses.Field[Any], value: Any) -> Any:
    spell = f.metadata.get("spell")
    return spell(value) if spell else value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            known = [s for action in self._actions for s in action.option_strings]
            message += did_you_mean(unknown[1].split("=")[0], known)
        self.exit(2, f"{self.prog}: error: {message} (--help lists every flag)\n")


def _add_flag(group: argparse._ArgumentGroup, f: dataclasses.Field[Any], hint: Any) -> None:
    meta = f.metadata
    shown = [f"--{name}" for name in (f.name, *meta["names"])]
    dashed = [s for s in (f"--{flag[2:].replace('_', '-')}" for flag in shown) if s not in shown]
    note = f" [{meta['env']}]" if meta["env"] else ""
    default = "" if f.default in (None, (), "") else f" (default {f.default})"
    base = _base(hint)
    kind: dict[str, Any] = {"metavar": "|".join(meta["choices"]) or {int: "N", float: "X"}.get(base, "TEXT")}
    if base is bool:
        kind = {"nargs": "?", "const": True, "metavar": "true|false"}
    elif _is_tuple(base):
        kind = {"nargs": "+", "action": "extend", "metavar": "X"}
    elif meta["bare"] is not None:
        kind |= {"nargs": "?", "const": meta["bare"]}
    flag = group.add_argument(*shown, dest=f.name, help=(meta["help"] + note + default).replace("%", "%%"), **kind)
    if meta["choices"]:
        flag.completer = lambda **_: meta["choices"]  # type: ignore[attr-defined]
    if dashed:  # the same words with dashes, which the help need not repeat
        group.add_argument(*dashed, dest=f.name, help=argparse.SUPPRESS, **kind)
    if base is bool:
        no = [s.replace("--", "--no_" if "_" in s or "-" not in s[2:] else "--no-", 1) for s in (*shown, *dashed)]
        group.add_argument(*no, dest=f.name, action="store_false", help=argparse.SUPPRESS)


def _yaml(text: str) -> Any:
    """As yaml.safe_load, but a name that is written twice in one place is an error: YAML would take the last without a
    word.
    """
    import yaml

    class Once(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            lines: dict[str, int] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in lines:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value!r} is there twice, first in line {lines[key.value]}",
                        problem_mark=key.start_mark,
                    )
                lines[key.value] = key.start_mark.line + 1
            return node

    return yaml.load(text, Once)


def _complaint(error: Exception) -> str:
    """What is wrong, and where; of YAML without the name that it has for a text in memory."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if not mark or not problem:
        return " ".join(str(error).split())
    where = f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'context', None) or ''} {problem}"
    if "'\\t'" in problem:
        where += "; indent with spaces"
    return " ".join(where.split())


def read_names(path: Path, *, place: str) -> dict[Any, Any]:
    """The names and values of a YAML or JSON file. Raises ConfigError, beginning with `place`."""
    import yaml

    is_json = path.suffix == ".json"
    try:
        text = path.read_text(encoding="utf-8")
        loaded = json.loads(text) if is_json else _yaml(text)
    except OSError as error:
        raise ConfigError(f"{place}: {error.strerror}") from error
    except RecursionError:
        raise ConfigError(f"{place}: nested too deeply; names and values are expected at the top") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{place}: not readable as {'JSON' if is_json else 'YAML'}: {_complaint(error)}") from error
    if not isinstance(loaded or {}, dict):
        raise ConfigError(f"{place}: expected names and values at the top, found {type(loaded).__name__}")
    return loaded or {}


def _read_file(path: str, fields: Mapping[str, dataclasses.Field[Any]], others: Sequence[type]) -> dict[str, Any]:
    loaded = read_names(Path(path), place=f"--config {path}")
    spellings = {spelling: name for name, f in fields.items() for spelling in (name, *f.metadata["names"])}
    passed_over = {
        spelling for cls in others for f in dataclasses.fields(cls) for spelling in (f.name, *f.metadata["names"])
    }
    values = {}
    for key, value in loaded.items():
        name = spellings.get(str(key).replace("-", "_"))
        if name is None and str(key).replace("-", "_") in passed_over:
            continue
        if name is None:
            raise ConfigError(f"--config {path}: unknown name {key!r}{did_you_mean(str(key), spellings)}")
        if value is not None:
            values[name] = value
    return values


def _read(value: Any, f: dataclasses.Field[Any], hint: Any, place: str, folder: Path | None = None) -> Any:
    parse = f.metadata["parse"]
    return parse(value, place=place, folder=folder) if parse else _coerce(value, hint, f.name, place)


def _coerce(value: Any, hint: Any, name: str, place: str) -> Any:
    """`value` as the field's type; `place` is what the error names."""
    base = _base(hint)
    try:
        if _is_tuple(base):
            return tuple(str(item) for item in (value.split(",") if isinstance(value, str) else value))
        if value is None or (
            isinstance(value, str) and value.lower() == "none" and type(None) in typing.get_args(hint)
        ):
            return None
        if base is bool:
            return _to_bool(value)
        if base is int:
            if name.endswith("_bytes"):
                return parse_size(str(value))
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError("not a whole number")
            return int(float(value)) if not isinstance(value, str) or "e" in value.lower() else int(value)
        return float(value) if base is float else str(value)
    except (ValueError, TypeError) as error:
        reason = (
            str(error)
            if "is not" in str(error)
            else f"{value!r} is not {'a whole number' if base is int else f'of type {base.__name__}'}"
        )
        raise ConfigError(f"{place}: {reason}") from error


def _check_choice(value: Any, f: dataclasses.Field[Any], origin: str) -> None:
    choices = f.metadata["choices"]
    if choices and value is not None and value not in choices:
        raise ConfigError(f"{f.name} = {value!r} ({origin}): choose from {', '.join(choices)}")


def _to_bool(value: Any) -> bool:
    text = str(value).lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise ValueError(f"{value!r} is not true or false")


def _base(hint: Any) -> Any:
    """`int | None` -> int; anything else as it is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _is_tuple(base: Any) -> bool:
    return typing.get_origin(base) is tuple


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean length?`, or nothing where no word is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
