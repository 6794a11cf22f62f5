"""What a user writes to look at documents, and what moai ships of the same kind: Filter, Map and Signal.

    @dataclass(frozen=True)
    class MostlyLetters(Filter):
        needs = ("text",)
        min_share: float = 0.5

        def keep(self, batch):
            return [sum(map(str.isalpha, text)) >= self.min_share * len(text) for text in batch["text"].to_pylist()]

A part is a frozen dataclass: its fields are its configuration. It does not count, name its key or carry columns it does
not know: what stands here does that for all of them. A part is in the key of a shard by what it is: class, version,
fields and, for a class that is not moai's, the text of the files that define it and its bases. What such a file imports
is not looked at: raise `version` when that changes.
"""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
import xxhash

from moai.core.errors import ConfigError, MoaiError, PartFailed
from moai.core.files import canonical_json, digest_file
from moai.engine.documents import DOCUMENT, SCHEMA
from moai.engine.pipeline import drop, measured
from moai.engine.schema import Column

T = TypeVar("T")
Mask = Any
"""A bool a row: an Arrow or numpy array, or a list."""


UNKEYED = {"keyed": False}
"""Metadata of a field that is in no key, because the bytes that come out do not depend on it."""
OF_DOCUMENTS = ("source", "shard", "row")
"""What `PreparedData.documents` says of each document besides its columns."""
EXAMPLES = "examples"
"""The column of conversations that what is learned is made of; `text` and `messages` beside it are only to look at."""


@dataclass(frozen=True)
class Part:
    """One step of a recipe: batches in, batches out."""

    version: ClassVar[int] = 1
    """Raised when the same input would give another output."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Columns it reads: `text`, of conversations also `messages`, what an earlier part adds, or any column of the
    source (null where it is absent).
    """
    adds: ClassVar[tuple[Column, ...]] = ()
    """Columns it makes; a property where they depend on the fields."""

    @property
    def name(self) -> str:
        """`MostlyLetters` -> `mostly_letters`: what its counters are called."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def identity(self) -> dict[str, Any]:
        """What the key of a shard holds of it. Raises ConfigError for a field whose value has no lasting spelling."""
        found: dict[str, Any] = identity_of(self)
        return found

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        raise ConfigError(f"{described(self)} is no Filter, Map or Signal: derive it from one of them")


@dataclass(frozen=True)
class Filter(Part):
    """Keeps some of the documents."""

    def keep(self, batch: pa.RecordBatch) -> Mask | tuple[Mask, Sequence[str]]:
        """A bool a row; or that, and a reason for each row that goes, in order."""
        raise PartFailed(f"{described(self)} has no method keep")

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            found = guarded(self, self.keep, batch)
            mask, reasons = (
                found
                if isinstance(found, tuple) and len(found) == 2 and not isinstance(found[0], bool)
                else (found, None)
            )
            keep = _as_mask(self, mask, batch.num_rows)
            gone = batch.num_rows - int(keep.sum())
            if gone:
                reasons = _as_reasons(self, reasons, gone, batch.num_rows)
                drop(self.name, batch.filter(pa.array(~keep)), reasons)
            if gone < batch.num_rows:
                yield batch.filter(pa.array(keep)) if gone else batch


@dataclass(frozen=True)
class Map(Part):
    """Changes `text` or adds columns, row by row: as many rows come out as went in, in the same order."""

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """A batch of which the columns that it needs or adds are taken over; all others stay as they were."""
        raise PartFailed(f"{described(self)} has no method apply")

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            made = guarded(self, self.apply, batch)
            if not isinstance(made, pa.RecordBatch) or made.num_rows != batch.num_rows:
                got = f"{made.num_rows} rows" if isinstance(made, pa.RecordBatch) else type(made).__name__
                raise PartFailed(
                    f"{described(self)} gave {got} for a batch of {batch.num_rows} rows; a Map gives as many rows as "
                    f"it got, in the same order"
                )
            changed = {
                name: _column(self, name, made[name], batch[name].type, batch.num_rows)
                for name in made.schema.names
                if name in self.needs
            }
            if "text" in changed and changed["text"].null_count:
                raise PartFailed(
                    f"{described(self)} gave null for the text of {changed['text'].null_count} documents; give an "
                    f"empty one, which is filtered"
                )
            if EXAMPLES in batch.schema.names and (
                odd := [name for name in ("text", "messages") if name in changed and changed[name] != batch[name]]
            ):
                raise PartFailed(
                    f"{described(self)} changes {odd[0]!r} of conversations, which would change nothing that is "
                    f"learned; change the data, or drop it"
                )
            yield with_columns(batch, {**changed, **_added(self, made, batch.num_rows)})


@dataclass(frozen=True)
class Signal(Part):
    """Measures documents: a number, a bool or a string each. Drops nothing."""

    def measure(self, batch: pa.RecordBatch) -> Mapping[str, Any] | pa.RecordBatch:
        """A value a row for every column it adds."""
        raise PartFailed(f"{described(self)} has no method measure")

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            added = _added(self, guarded(self, self.measure, batch), batch.num_rows)
            for name, values in added.items():
                measured(batch, name, values)
            yield with_columns(batch, added)


def with_columns(batch: pa.RecordBatch, columns: Mapping[str, pa.Array]) -> pa.RecordBatch:
    """The batch with these columns, in place of those of the same name."""
    made = {name: batch[name] for name in batch.schema.names} | dict(columns)
    return pa.record_batch(list(made.values()), names=list(made))


def described(part: Any) -> str:
    """`filter MostlyLetters (my_filters.py)`: which part an error is about."""
    cls = part if isinstance(part, type) else type(part)
    kind = next((base.__name__.lower() for base in (Filter, Map, Signal) if issubclass(cls, base)), "part")
    return f"{kind} {named(cls)}"


def named(cls: type) -> str:
    """`MostlyLetters (my_filters.py)`; of moai's own classes the name."""
    return cls.__qualname__ if is_ours(cls) else f"{cls.__qualname__} ({_where(cls)})"


def guarded(part: Part, call: Callable[..., T], *arguments: Any) -> T:
    """What a part gives. What it raises becomes one line that names it and the place. Raises PartFailed."""
    try:
        return call(*arguments)
    except (MoaiError, MemoryError):
        raise
    except Exception as error:
        raise PartFailed(f"{described(part)} {failure(type(part), error)}") from error


def failure(cls: type, error: Exception) -> str:
    """`failed in line 12 (return ...): ValueError: ...`: where in a class's file something was raised, and what."""
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in reversed(frames) if frame.filename == _file(cls)), frames[-1])
    return f"failed in line {place.lineno} ({place.line}): {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def identity_of(value: Any) -> Any:
    """A value of a part's configuration as JSON that says what it is: files by their content, classes by version and
    source.
    """
    if isinstance(value, str | float):
        try:
            value.encode() if isinstance(value, str) else canonical_json(value)
        except ValueError as error:
            raise ConfigError(f"{value!r} has no lasting spelling ({error}); for no bound use None") from error
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        try:
            return {"file": digest_file(value.expanduser())}
        except OSError as error:
            raise ConfigError(
                f"{value}: {error.strerror}; a part's fields of type Path are files that it reads"
            ) from error
    if isinstance(value, list | tuple):
        return [identity_of(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): identity_of(item) for name, item in sorted(value.items(), key=lambda item: str(item[0]))}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise ConfigError(
            f"{value!r} has no lasting spelling: a part's fields are numbers, bools, strings, paths, and lists or "
            f"dataclasses of these"
        )
    cls = type(value)
    if "__dataclass_params__" not in vars(cls) and set(vars(cls)) & {"__init__", "__annotations__"}:
        raise ConfigError(
            f"{described(value)}: its fields cannot be told; write @dataclass(frozen=True) above the class"
        )
    keyed = [f.name for f in dataclasses.fields(value) if f.metadata.get("keyed", True)]
    fields = {}
    for name in keyed:
        inner = getattr(value, name)
        try:
            fields[name] = inner.identity() if hasattr(inner, "identity") else identity_of(inner)
        except ConfigError as error:
            raise ConfigError(f"{described(value)}, field {name}: {error}") from error
    return {**class_identity(cls), **({"fields": fields} if fields else {})}


def class_identity(cls: type) -> dict[str, Any]:
    """Name and version; of a class that is not moai's the digest of the files that define it and its bases too."""
    named = {"class": cls.__qualname__, "version": getattr(cls, "version", 1)}
    return named if is_ours(cls) else {**named, "source": source_digest(cls)}


def is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "moai"


@cache
def source_digest(cls: type) -> str:
    """Of the text of the files that define a class and its bases. Raises ConfigError where there is none."""
    texts: dict[str, bytes] = {}
    for base in cls.__mro__:
        if is_ours(base) or base.__module__.split(".")[0] in sys.stdlib_module_names - {"__main__"}:
            continue
        try:
            file = inspect.getsourcefile(base)
            name = f"{base.__module__}:{base.__qualname__}"
            texts[name] = Path(file).read_bytes() if file and Path(file).is_file() else inspect.getsource(base).encode()
        except (OSError, TypeError) as error:
            raise ConfigError(
                f"{base.__qualname__} has no source to be told by ({error}); put it into a file of its own, as "
                f"my_filters.py"
            ) from error
    return xxhash.xxh3_128_hexdigest(b"\0".join(texts.values()))


def check_importable(values: Sequence[Any]) -> None:
    """Raises ConfigError for parts and sources of a class that a worker process could not import."""
    out = (
        "put the class into a file beside it, as my_filters.py, and import it from there; or work in this process: "
        "num_proc=0"
    )
    for value in values:
        if own := next((cls for cls in _classes(value) if cls.__module__ == "__main__"), None):
            raise ConfigError(
                f"{described(own)} is defined in the program itself, where worker processes cannot import it: {out}"
            )
        try:
            pickle.dumps(value)
        except Exception as error:  # whatever a class's own way of being pickled raises
            raise ConfigError(
                f"{described(value)} cannot be sent to worker processes ({' '.join(str(error).split())[:160]}): {out}"
            ) from error


def _classes(value: Any) -> Iterator[type]:
    """Of a value and of the dataclasses in its fields."""
    yield type(value)
    if isinstance(value, list | tuple):
        for item in value:
            yield from _classes(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _classes(getattr(value, field.name, None))


def check_columns(
    parts: Sequence[Part],
    *,
    made: Sequence[str],
    shown: Sequence[str],
    kept_free: Sequence[str],
    carried: Sequence[str],
) -> None:
    """Raises ConfigError where the columns of parts, in the order they run, do not fit one another or the recipe.

    made       columns that the recipe makes, of which parts see `shown`
    kept_free  names that nothing beside the rows may have
    carried    columns of the source that travel with the rows
    """
    own = {*made, DOCUMENT}
    there = {*own, *kept_free, *carried}
    if taken := [name for name in carried if name in (*own, *kept_free)]:
        raise ConfigError(
            f"carry_columns: {taken[0]!r} is a name that moai uses itself; give the column of the source another name"
        )
    makers = {column.name: part for part in reversed(parts) for column in _adds(part)}
    seen = {*shown, *carried}
    for part in parts:
        needs: Any = part.needs
        if isinstance(needs, str):
            raise ConfigError(f"{described(part)}: needs is a string; write a tuple, needs = ({part.needs!r},)")
        for name in part.needs:
            if name in makers and name not in seen:
                order = (
                    "maps run before filters, and filters before signals; make what adds it a Map that stands before"
                )
                raise ConfigError(
                    f"{described(part)} needs the column {name!r}, which {described(makers[name])} adds only later: "
                    f"{order}"
                )
            if name in own and name not in seen:
                raise ConfigError(
                    f"{described(part)} needs the column {name!r}, a name that moai uses itself; parts see "
                    f"{', '.join(shown)} and columns of the source"
                )
        seen |= {column.name for column in part.adds}
        if part.adds and isinstance(part, Filter):
            raise ConfigError(
                f"{described(part)} adds the column {part.adds[0].name!r}, but a filter only keeps or drops; let a Map "
                f"add it"
            )
        for column in part.adds:
            if column.name in SCHEMA.names or (column.name in OF_DOCUMENTS and isinstance(part, Signal)):
                raise ConfigError(
                    f"{described(part)} adds the column {column.name!r}, which every documents file has already; give "
                    f"it another name"
                )
            if column.name in there:
                raise ConfigError(
                    f"{described(part)} adds the column {column.name!r}, which is there already; give it another name"
                )
            if column.per not in ("piece", "document"):
                raise ConfigError(
                    f'{described(part)} adds {column.name!r} per {column.per}; a part works on documents: per="piece" '
                    f'travels with the rows, per="document" does not'
                )
            there.add(column.name)


def _adds(part: Part) -> tuple[Column, ...]:
    """Raises ConfigError for anything but a tuple of columns."""
    if isinstance(part.adds, tuple | list) and all(isinstance(column, Column) for column in part.adds):
        return tuple(part.adds)
    raise ConfigError(
        f'{described(part)}: adds is no tuple of columns; write adds = (Column("name", "float32", per="piece"),)'
    )


def source_columns(parts: Sequence[Part], given: Sequence[str]) -> tuple[str, ...]:
    """Columns that parts need and neither the recipe nor an earlier part makes: they are read from the source."""
    made, wanted = {*given}, list[str]()
    for part in parts:
        wanted += [name for name in part.needs if name not in made and name not in wanted]
        made |= {column.name for column in part.adds}
    return tuple(wanted)


def ordered(parts: Sequence[Part]) -> tuple[list[Map], list[Filter], list[Signal]]:
    """Maps run first, then filters, then signals; within each kind the order of the list. Raises ConfigError for
    anything else.
    """
    if odd := next((part for part in parts if not isinstance(part, Map | Filter | Signal)), None):
        is_class = isinstance(odd, type) and issubclass(odd, Part)
        raise ConfigError(
            f"{described(odd)} is "
            f"{'a class: give an object of it' if is_class else 'no Filter, Map or Signal: derive it from one of them'}"
        )
    return (
        [p for p in parts if isinstance(p, Map)],
        [p for p in parts if isinstance(p, Filter)],
        [p for p in parts if isinstance(p, Signal)],
    )


def _as_mask(part: Part, mask: Any, rows: int) -> np.ndarray:
    """Raises PartFailed unless it is one bool a row."""
    try:
        values = np.asarray(mask.to_pylist() if isinstance(mask, pa.Array | pa.ChunkedArray) else mask)
    except (TypeError, ValueError) as error:
        raise PartFailed(
            f"{described(part)} gave {type(mask).__name__}, not a bool for each of {rows} documents"
        ) from error
    if values.shape != (rows,) or (rows and values.dtype != np.bool_):
        got = (
            f"{values.shape[0]} values"
            if values.ndim == 1 and values.shape != (rows,)
            else f"values of type {values.dtype}"
        )
        raise PartFailed(f"{described(part)} gave {got}, not a bool for each of {rows} documents")
    return values


def _as_reasons(part: Part, reasons: Any, gone: int, rows: int) -> list[str] | None:
    """Raises PartFailed unless there is one for each document that goes."""
    found = reasons.to_pylist() if isinstance(reasons, pa.Array | pa.ChunkedArray) else reasons
    if found is None:
        return None
    if isinstance(found, str) or not hasattr(found, "__len__"):
        raise PartFailed(
            f"{described(part)} gave {type(found).__name__} for reasons, not one for each of the {gone} of {rows} "
            f"documents that it drops"
        )
    if len(found) != gone:
        raise PartFailed(
            f"{described(part)} gave {len(found)} reasons for the {gone} of {rows} documents that it drops"
        )
    return [str(reason) for reason in found]


def _added(part: Part, made: Any, rows: int) -> dict[str, pa.Array]:
    """The columns that a part adds, in the types that it says. Raises PartFailed."""
    names = made.schema.names if isinstance(made, pa.RecordBatch) else list(made) if isinstance(made, Mapping) else []
    added = {}
    for column in part.adds:
        if column.name not in names:
            raise PartFailed(f"{described(part)} adds {column.name!r} and gave {', '.join(names) or 'no column'}")
        added[column.name] = _column(part, column.name, made[column.name], column.value_type, rows)
    return added


def _column(part: Part, name: str, values: Any, kind: pa.DataType, rows: int) -> pa.Array:
    """The values in this type. Raises PartFailed unless there is one for each row."""
    try:
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        array = values if isinstance(values, pa.Array) else pa.array([values] if isinstance(values, str) else values)
        made = array.cast(kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise PartFailed(f"{described(part)}: {name!r} is no {kind} ({' '.join(str(error).split())[:200]})") from error
    if len(made) != rows:
        raise PartFailed(f"{described(part)} gave {len(made)} values of {name!r} for {rows} documents")
    return made


def _file(cls: type) -> str | None:
    try:
        return inspect.getsourcefile(cls)
    except TypeError:
        return None


def _where(cls: type) -> str:
    file = _file(cls)
    return Path(file).name if file else cls.__module__
