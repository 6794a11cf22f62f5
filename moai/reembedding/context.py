"""What stands before a chunk when it is embedded: which statute, article or case it is from; and how it is cited.

    templates = Templates.read(Path("context.yaml"))      # or Templates.default()
    templates.contexts(database, kind, 1, 300)            # {1: "대한민국헌법 제1조 제1항 / ②대한민국의 주권은", ...}
    templates.citations(database, kind, [1])              # {1: "대한민국헌법 제1조 제1항"}

A template is a list of pieces. A piece names columns of the documents' own table or of the one above it, and is left
out where one of them is empty or not there, so one template serves rows that have a clause and rows that have none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from moai.core.errors import ConfigError, SourceError
from moai.reembedding.database import Database
from moai.reembedding.kinds import KINDS, Kind, is_deleted

DEFAULT = """\
statute_article:
  cite: ["{name}", " {article_no:article}", " {clause_no:clause}", " {item_no:item}"]
  context: ["{name}", " {article_no:article}", "({heading})", " {clause_no:clause}", " {item_no:item}"]
  siblings: 120
case_paragraph:
  cite: ["{court} ", "{announce_date:date} 선고 ", "{doc_id}", " 판결"]
  context: ["{court} ", "{doc_id}", " {casenames}"]
decision_paragraph:
  cite: ["{org} ", "{decision_date:date} ", "{doc_id}", " 결정"]
  context: ["{org} ", "{doc_id}"]
interpretation_paragraph:
  cite: ["{org} ", "{response_date:date} ", "{doc_id}", " 해석"]
  context: ["{org} ", "{doc_id}", " {title}"]
"""
_FIELD = re.compile(r"\{(\w+)(?::(\w+))?\}")
_NEIGHBOURS = 16
"""Rows before and behind an article's row that are looked at for its other clauses: they were written together."""


def _numbered(unit: str) -> Callable[[str], str]:
    """ "24의2" -> "제24조의2"; what is written out already stays."""

    def form(value: str) -> str:
        value = "".join(str(ord(mark) - 0x245F) if "\u2460" <= mark <= "\u2473" else mark for mark in value)
        found = re.fullmatch(r"(\d+)((?:의\d+)*)", value.replace(" ", "").replace("-", "의"))
        return f"제{found[1]}{unit}{found[2]}" if found else value

    return form


def _item(value: str) -> str:
    return f"{value}목" if re.fullmatch(r"[가-하]", value) else _numbered("호")(value)


def _date(value: str) -> str:
    found = re.fullmatch(r"(\d{4})\D?(\d{1,2})\D?(\d{1,2})", value)
    return f"{found[1]}. {int(found[2])}. {int(found[3])}." if found else value


FORMS: Mapping[str, Callable[[str], str]] = {
    "article": _numbered("조"),
    "clause": _numbered("항"),
    "item": _item,
    "date": _date,
}


@dataclass(frozen=True)
class Template:
    """Of one source type."""

    cite: tuple[str, ...]
    context: tuple[str, ...]
    siblings: int = 0
    """Characters of the article's other clauses, in total; only whole ones that fit."""


@dataclass(frozen=True)
class Templates:
    by_type: Mapping[str, Template]
    spec: Mapping[str, Any]
    """As it was read, for the version's metadata."""

    @classmethod
    def default(cls) -> Templates:
        return cls.of(yaml.safe_load(DEFAULT), "the default")

    @classmethod
    def read(cls, path: Path) -> Templates:
        """Raises SourceError, or ConfigError naming the place. What the file leaves out keeps its default."""
        try:
            spec = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            said = " ".join(str(error).split())
            raise SourceError(f"{path}: not a YAML file that can be read ({said}); see --context") from error
        default = yaml.safe_load(DEFAULT)
        changed = {
            name: {**default.get(name, {}), **_mapping(given, f"{path}, {name}")}
            for name, given in _mapping(spec, str(path)).items()
        }
        return cls.of({**default, **changed}, str(path))

    @classmethod
    def of(cls, spec: Mapping[str, Any], where: str) -> Templates:
        return cls({name: _template(name, given, where) for name, given in spec.items()}, spec)

    def contexts(self, database: Database, source_type: str, first: int, last: int) -> dict[int, str]:
        """By source id, of the documents from `first` to `last`."""
        template, table = self.by_type[source_type], _Table.of(database, KINDS[source_type])
        heads = table.rendered(database, template.context, "BETWEEN ? AND ?", (first, last))
        clauses = table.siblings(database, first, last, template.siblings) if template.siblings else {}
        return {key: " / ".join(filter(None, (head, clauses.get(key, "")))) for key, head in heads.items()}

    def citations(self, database: Database, source_type: str, ids: Sequence[int]) -> dict[int, str]:
        """By source id; a document that has nothing to be cited by is named by its type and id."""
        if source_type not in self.by_type:
            return {key: f"{source_type} {key}" for key in ids}
        template, table = self.by_type[source_type], _Table.of(database, KINDS[source_type])
        found = table.rendered(database, template.cite, f"IN ({','.join('?' * len(ids))})", ids)
        return {key: found.get(key) or f"{source_type} {key}" for key in ids}


def _mapping(given: object, where: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: {given!r} is no mapping of names to values; see docs/reembedding.md, Context")
    return given


def _template(name: str, given: object, where: str) -> Template:
    if name not in KINDS:
        raise ConfigError(f"{where}: no source type {name!r}: choose from {', '.join(KINDS)}")
    found = dict(_mapping(given, f"{where}, {name}"))
    siblings = found.pop("siblings", 0)
    pieces = {part: found.pop(part, None) for part in ("cite", "context")}
    if found or isinstance(siblings, bool) or not isinstance(siblings, int) or siblings < 0:
        wrong = next(iter(found)) if found else f"siblings: {siblings!r}"
        raise ConfigError(
            f"{where}, {name}: {wrong}: there are cite and context, lists of text, and siblings, a number"
        )
    for part, value in pieces.items():
        if not isinstance(value, list) or not all(isinstance(piece, str) for piece in value):
            raise ConfigError(f'{where}, {name}, {part}: {value!r} is no list of text such as ["{{name}}"]')
        for piece in value:
            for _, form in _FIELD.findall(piece):
                if form and form not in FORMS:
                    raise ConfigError(f"{where}, {name}, {part}: no form {form!r}: choose from {', '.join(FORMS)}")
    return Template(tuple(pieces["cite"]), tuple(pieces["context"]), siblings)


@dataclass(frozen=True)
class _Table:
    """Where the columns of one source type are in this database."""

    kind: Kind
    columns: Mapping[str, str]
    """Their names in `source`, by name."""

    @classmethod
    def of(cls, database: Database, kind: Kind) -> _Table:
        own, above = kind.parents or kind.texts, kind.above
        columns = {name: f"a.{name}" for name in database.columns(own)}
        if above and above[1] in columns:
            columns = {name: f"b.{name}" for name in database.columns(above[0])} | columns
        return cls(kind, columns)

    @cached_property
    def source(self) -> str:
        own, above = self.kind.parents or self.kind.texts, self.kind.above
        joined = any(name.startswith("b.") for name in self.columns.values())
        return f"{own} a LEFT JOIN {above[0]} b ON b.id = a.{above[1]}" if above and joined else f"{own} a"

    def rendered(self, database: Database, pieces: Sequence[str], which: str, values: Sequence[int]) -> dict[int, str]:
        names = sorted({name for piece in pieces for name, _ in _FIELD.findall(piece)} & self.columns.keys())
        listed = ", ".join(["a.id", *(f"CAST({self.columns[name]} AS BLOB)" for name in names)])
        rows = database.rows(f"SELECT {listed} FROM {self.source} WHERE a.id {which} ORDER BY a.id", values)
        return {row[0]: _text(pieces, dict(zip(names, map(_plain, row[1:])))) for row in rows}

    def siblings(self, database: Database, first: int, last: int, most: int) -> dict[int, str]:
        """Short other clauses of the same article, in their order: those before the row first, the nearest first."""
        if not {"statute_id", "article_no", "clause_no"} <= self.columns.keys():
            return {}
        columns = f"id, statute_id, article_no, CAST(text AS BLOB) FROM {self.kind.texts} WHERE id"
        before = database.rows(f"SELECT {columns} < ? ORDER BY id DESC LIMIT {_NEIGHBOURS}", (first,))[::-1]
        within = database.rows(f"SELECT {columns} BETWEEN ? AND ? ORDER BY id", (first, last))
        behind = database.rows(f"SELECT {columns} > ? ORDER BY id LIMIT {_NEIGHBOURS}", (last,))
        rows = [*before, *within, *behind]
        texts = [_plain(row[3]) for row in rows]
        found = {}
        for place in range(len(before), len(before) + len(within)):
            article, left, chosen = rows[place][1:3], most, []
            near = [*range(place - 1, place - 1 - _NEIGHBOURS, -1), *range(place + 1, place + 1 + _NEIGHBOURS)]
            for other in near if article[1] is not None else ():
                if not 0 <= other < len(rows) or rows[other][1:3] != article:
                    continue
                if 0 < len(texts[other]) <= left and not is_deleted(texts[other]):
                    chosen.append(other)
                    left -= len(texts[other])
            found[rows[place][0]] = " / ".join(texts[other] for other in sorted(chosen))
        return found


def _plain(data: bytes | None) -> str:
    """On one line; empty for what is no text."""
    try:
        return " ".join(bytes(data).decode().split()) if data is not None else ""
    except UnicodeDecodeError:
        return ""


def _text(pieces: Iterable[str], values: Mapping[str, str]) -> str:
    """The pieces whose columns all say something; empty where none does."""
    said = []
    for piece in pieces:
        fields = [(match, values.get(match[1], "")) for match in _FIELD.finditer(piece)]
        if all(value for _, value in fields):
            said.append((bool(fields), _FIELD.sub(lambda m: FORMS.get(m[2], str)(values[m[1]]), piece)))
    return "".join(text for _, text in said).strip() if any(named for named, _ in said) else ""
