"""How the columns of a source make a text: the shape is chosen once per source, from its first records, and is part of
the key.

Parts are joined by a blank line; no special tokens are added. The instruction of an Alpaca row is looked for before its
input and output, which alone would also match.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moai.core.errors import SourceError
from moai.engine.schema import Columns

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a turn's parts that are text, under the key `text`."""
_SINGLE = ("text", "content", "document", "context", "body", "article")


class BadRecord(Exception):
    """A record that gives no text; `reason` is a class of reasons, the message the detail."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """How the columns of a source make a text.

    required, optional  columns joined by a blank line, in this order; optional ones may be absent or null
    order               the joining order where optional columns stand between required ones
    turns               (column, key) of a list of turns, like ("messages", "content")
    lists               required columns that are lists
    template            overrides both: '{title}\\n\\n{body}'
    unless              sets of columns of other shapes, which come first: a record that has one is none of this
    """

    name: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    turns: tuple[str, str] | None = None
    lists: tuple[str, ...] = ()
    template: str | None = None
    unless: tuple[tuple[str, ...], ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that must be there."""
        return (*self.required, *((self.turns[0],) if self.turns else ()))

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.turns[0], *self.optional) if self.turns else (self.order or self.required)

    @property
    def column(self) -> str:
        """The one column that is the text as it stands; empty where a text is more than that."""
        return (
            self.required[0] if len(self.required) == 1 and not (self.optional or self.turns or self.template) else ""
        )

    def render(self, row: Mapping[str, Any]) -> str:
        """The text of one record. Raises BadRecord."""
        self.check(row)
        if self.turns:
            return "\n\n".join(_turns(row, *self.turns))
        if self.template:
            values = {name: _string(row, name) for name in self.required}
            return "".join(
                text + (values[name] if name else "") for text, name, _, _ in string.Formatter().parse(self.template)
            )
        if self.column:
            return _string(row, self.column)
        parts = [_string(row, name) if name in self.required else _optional(row, name) for name in self.columns]
        return "\n\n".join(part for part in parts if part)

    def check(self, row: Mapping[str, Any]) -> None:
        """Raises BadRecord for one that has the columns of another shape, which the first records did not show."""
        for names in self.unless:
            if all(isinstance(row.get(name), str | list) for name in names):
                raise BadRecord("another shape", f"has {' and '.join(names)} too, the first records only {self.name}")


def choose_shape(
    columns: Mapping[str, str], *, source: str, text_column: str | None = None, template: str | None = None
) -> TextShape:
    """The first shape that the columns (name -> type, like {"text": "string"}) fit. Raises SourceError listing what was
    found.
    """
    if template:
        names = _names_in(template)
        need_columns(names, columns, source, f"--text_template {template!r}")
        shape = TextShape(name=f"template {template!r}", required=names, template=template)
    elif text_column:
        need_columns((text_column,), columns, source, f"--text_column {text_column}")
        shape = _pair(f"column {text_column}", text_column)
    elif (found := first_fitting(_KNOWN, columns)) is None:
        raise SourceError(
            f"{source}: no known shape among its columns ({described(columns)}); set --text_column NAME or "
            f"--text_template '{{a}}\\n\\n{{b}}'"
        )
    else:
        shape = found
    return in_each_file(shape, columns, optional=("string",))


def first_fitting(shapes: Sequence[TextShape], columns: Mapping[str, str]) -> TextShape | None:
    """The first of `shapes` whose required columns are there; where none fits, columns that were null so far fit, too.
    Optional columns may come later.
    """
    for nulls_fit in (False, True):
        for index, shape in enumerate(shapes):
            if all(_fits(columns.get(name, ""), name, shape, nulls_fit) for name in shape.needed):
                earlier = (before.needed for before in shapes[:index])
                return replace(shape, unless=tuple(names for names in earlier if set(names) != set(shape.needed)))
    return None


def in_each_file(shape: TextShape, columns: Mapping[str, str], *, optional: tuple[str, ...]) -> TextShape:
    """The shape, once each file that says what it holds is known to hold it; `optional` are types of optional columns.
    Raises SourceError.
    """
    of_files = columns.of_files if isinstance(columns, Columns) else []
    for path, own in of_files:
        for name in shape.columns:
            if name not in shape.needed:
                fits = own.get(name, "null") in ("null", *optional)
            else:
                fits = _fits(own.get(name, ""), name, shape, nulls_fit=True)
            if not fits and name not in own:
                other, others = next((path, its) for path, its in of_files if name in its)
                raise SourceError(
                    f"{path}: has no column {name!r} (found: {described(own)}), which {other} has (found: "
                    f"{described(others)}); make them alike, or read them as two sources, each with its own columns"
                )
            if not fits:
                wanted = "a list" if _is_list(name, shape) else "text"
                raise SourceError(f"{path}: its column {name!r} is {own[name]}, not {wanted} (found: {described(own)})")
    return shape


def described(columns: Mapping[str, str]) -> str:
    """Columns with their types, for people."""
    return ", ".join(f"{name} ({kind[:60]})" for name, kind in columns.items()) or "none"


def _string(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise BadRecord("no text", f"no {name!r} among {', '.join(map(str, row)) or 'no keys'}"[:200])
    value = row[name]
    if isinstance(value, str):
        return value
    raise BadRecord("null text" if value is None else "text is no string", f"{name!r} is {type(value).__name__}")


def _optional(row: Mapping[str, Any], name: str) -> str:
    return "" if row.get(name) is None else _string(row, name)


def _turns(row: Mapping[str, Any], column: str, key: str) -> Iterator[str]:
    turns = row.get(column)
    if not isinstance(turns, list):
        raise BadRecord(
            "no text" if turns is None else "text is no string",
            f"{column!r} is {type(turns).__name__}, not a list of turns",
        )
    if (
        turns
        and not any(key in turn for turn in turns if isinstance(turn, dict))
        and not any(isinstance(turn, str) for turn in turns)
    ):
        raise BadRecord("no text", f"no turn of {column!r} has {key!r}; the first is {str(turns[0])[:80]}")
    for turn in turns:
        value = turn.get(key) if isinstance(turn, dict) else turn
        if isinstance(value, list):  # content in parts: only text parts are text
            value = "".join(_part(part, column) for part in value)
        if isinstance(value, str):
            yield from [value] if value else []
        elif value is not None or not isinstance(turn, dict):
            raise BadRecord("text is no string", f"a turn's {key!r} is {type(value).__name__}")


def _part(part: Any, column: str) -> str:
    """The text of one part of a turn; an image, a tool's call or null has none."""
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(text, str):
        return text
    if text is None:
        if not isinstance(part, dict) or part.get("type", "text") not in TEXT_PARTS:
            return ""
        others = [name for name, value in part.items() if name != "type" and isinstance(value, str) and value]
        if not others:
            return ""
        raise BadRecord("no text", f"a part of a turn of {column!r} has {', '.join(others)[:80]} instead of 'text'")
    raise BadRecord("text is no string", f"a part of a turn of {column!r} is {type(text).__name__}")


def _names_in(template: str) -> tuple[str, ...]:
    """The columns of a template: names in braces and nothing else, so that filling it in cannot fail on a record."""
    try:
        fields = [
            (name, spec, conversion)
            for _, name, spec, conversion in string.Formatter().parse(template)
            if name is not None
        ]
    except ValueError as error:
        raise SourceError(f"--text_template {template!r}: {error} (a brace that is text is written twice)") from error
    for name, spec, conversion in fields:
        if not name or spec or conversion:
            raise SourceError(
                f"--text_template {template!r}: only column names may stand in braces, as in '{{title}}\\n\\n{{body}}' "
                f"(a brace that is text is written twice)"
            )
    return tuple(dict.fromkeys(name for name, _, _ in fields))


def need_columns(names: tuple[str, ...], columns: Mapping[str, str], source: str, flag: str) -> None:
    """Raises SourceError where a flag names a column that is not there."""
    missing = [name for name in names if name not in columns]
    if missing or not names:
        lacking = (
            f"{', '.join(map(repr, missing))}, which is not there"
            if missing
            else "no column; a column stands in braces, as in '{title}'"
        )
        raise SourceError(f"{source}: {flag} names {lacking} (found: {described(columns)})")


def _fits(kind: str, name: str, shape: TextShape, nulls_fit: bool) -> bool:
    wanted = "list" if _is_list(name, shape) else "string"
    return wanted in kind.split(" or ") or (nulls_fit and kind in ("null", "NoneType"))


def _is_list(name: str, shape: TextShape) -> bool:
    return name in shape.lists or bool(shape.turns and shape.turns[0] == name)


def _pair(name: str, *required: str, optional: tuple[str, ...] = (), order: tuple[str, ...] = ()) -> TextShape:
    return TextShape(name=name, required=required, optional=optional, order=order or (*required, *optional))


_KNOWN = (
    _pair("column text", "text"),
    _pair(
        "instruction (input) output",
        "instruction",
        "output",
        optional=("input",),
        order=("instruction", "input", "output"),
    ),
    _pair(
        "instruction (input) response",
        "instruction",
        "response",
        optional=("input", "context"),
        order=("instruction", "context", "input", "response"),
    ),
    TextShape(name="messages", turns=("messages", "content")),
    TextShape(name="conversations", turns=("conversations", "value")),
    _pair(
        "input content (reasoning_content)",
        "input",
        "content",
        optional=("reasoning_content",),
        order=("input", "reasoning_content", "content"),
    ),
    _pair("input output", "input", "output"),
    _pair("prompt response", "prompt", "response"),
    _pair("question answer", "question", "answer"),
    _pair("prompt completion", "prompt", "completion"),
    *(_pair(f"column {name}", name) for name in _SINGLE[1:]),
)
