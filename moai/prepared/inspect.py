"""Look at prepared rows as a model sees them: token by token, what is learned, where documents end.

    python -m moai inspect DIR                     the first rows as text, what is learned between « and »
    python -m moai inspect DIR --random            rows from everywhere, as many of each source as its share
    python -m moai inspect DIR --html FILE         the same as a page: a colour for what is learned, an id for each
                                                   token under the pointer

A character that is several tokens (most Korean ones in a small vocabulary) is shown once, for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa

from moai.core.errors import ConfigError, StorageError, printable
from moai.core.files import storage_errors, write_atomic
from moai.core.pages import page
from moai.engine.schema import TRAINED
from moai.prepared.manifest import Prepared
from moai.tokenizers.backends import Reference
from moai.tokenizers.load import load_tokenizer

_LONGEST_CHARACTER = 8
"""Tokens that one character may take; more that give no text are shown as they are."""
_STYLE = """
main { max-width: none; } .row { margin: 1rem 0 2rem; }
.document { border: 1px solid var(--line); border-radius: 4px; padding: .5rem .7rem; margin: .4rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.document span { border-radius: 2px; box-shadow: inset 0 0 0 1px var(--line); }
.learned { background: #9bd3a8; color: #0d2413; } .special { color: #b3541e; font-size: .85em; }
.learned.special { color: #7a2e05; }
.mixed { background: repeating-linear-gradient(45deg, #9bd3a8, #9bd3a8 4px, transparent 4px, transparent 8px); }
@media (prefers-color-scheme: dark) { .learned { background: #245c33; color: #d8f5df; }
.special, .learned.special { color: #ffb27a; } }
"""


@dataclass(frozen=True)
class Piece:
    """A character or more, the tokens that make it, and which of them are learned."""

    text: str
    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    is_special: bool


@dataclass(frozen=True)
class Document:
    """A piece of a document as it stands in a row, and what travels beside it."""

    pieces: list[Piece]
    beside: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row by its number among all rows, and the source it is of."""

    number: int
    source: str
    documents: list[Document]


@dataclass(frozen=True)
class View:
    """A prepared directory and its tokenizer. Raises DamagedError, TokenizerError."""

    prepared: Prepared
    reference: Reference

    @classmethod
    def open(cls, path: Path) -> View:
        prepared = Prepared.open(path)
        spec = load_tokenizer(str(path / "tokenizer.json"), eos_token=prepared.content["tokenizer"]["eos_token"])
        return cls(prepared, Reference(spec=spec))

    def rows(self, number: int, *, at_random: bool = False, source: str | None = None) -> Iterator[Row]:
        """The first `number` rows, or as many from everywhere, the same ones each time; of one source or of all.
        Raises ConfigError for a source that is not there.
        """
        shards = [shard for shard in self.prepared.content["shards"] if shard["rows"]]
        names = sorted({shard["source"] for shard in shards})
        if source is not None and source not in names:
            raise ConfigError(f"--source {source}: has no rows here (sources: {', '.join(names)})")
        chosen = [shard for shard in shards if source in (None, shard["source"])]
        total = sum(shard["rows"] for shard in chosen)
        number = min(number, total)
        wanted = sorted(Random(0).sample(range(total), number)) if at_random else list(range(number))
        first = before = at = 0  # rows before a shard: of all sources, and of the chosen ones
        for shard in shards:
            if source in (None, shard["source"]):
                inside = []
                while at < len(wanted) and wanted[at] < before + shard["rows"]:
                    inside.append(wanted[at] - before)
                    at += 1
                yield from self._of_shard(shard, first, inside)
                before += shard["rows"]
            first += shard["rows"]

    def row(self, number: int) -> Row:
        """Raises IndexError."""
        first = 0
        for shard in self.prepared.content["shards"]:
            if number < first + shard["rows"]:
                return next(self._of_shard(shard, first, [number - first]))
            first += shard["rows"]
        raise IndexError(f"row {number}: there are {first:,}, from 0 on")

    def _of_shard(self, shard: dict[str, Any], first: int, inside: Sequence[int]) -> Iterator[Row]:
        if not inside:
            return
        with pa.memory_map(str(self.prepared.path / shard["file"])) as file:
            table = pa.ipc.open_stream(file).read_all()  # mapped, not copied
            for row in inside:
                values = {name: table[name][row] for name in table.column_names}
                yield Row(first + row, shard["source"], list(self._documents(values)))

    def lines(self, rows: Iterable[Row]) -> Iterator[str]:
        """As text: a learned stretch stands between « and »."""
        for row in rows:
            yield f"--- {self._held_out}row {row.number} of {row.source}: {_figures(row.documents)}"
            for document in row.documents:
                yield printable(_as_text(document))

    def html(self, rows: Iterable[Row]) -> str:
        content = self.prepared.content
        what = (
            "what the assistant says is learned"
            if TRAINED in self.prepared.columns
            else "every token is learned but the first of a document"
        )
        learned = content["token_counts"].get("trained")
        head = (
            f"<h1>{escape(self.prepared.path.name)}</h1><p>{content['documents']:,} {self._held_out}documents, "
            f"{content['tokens']:,} "
            f"tokens"
            f"{f' ({learned:,} learned)' if learned is not None else ''}, {content['rows']:,} rows of "
            f"{content['seq_len']} ({escape(content['packing'])}), "
            f"{content['fill_rate']:.1%} filled; {what}.</p>"
            "<p class=soft><span class=learned>learned</span> &nbsp; context &nbsp; <span class=special>special "
            "token</span> &nbsp; "
            "<span class=mixed>a character of which some tokens are learned</span>; a box is a document, which sees no "
            "other; ids show under the pointer.</p>"
        )
        return page(
            f"moai inspect {self.prepared.path.name}",
            [head, _sources(content), *map(_row, rows)],
            style=_STYLE,
        )

    @property
    def _held_out(self) -> str:
        return "held-out " if self.prepared.content["config"].get("held_out") else ""

    def _documents(self, row: dict[str, Any]) -> Iterator[Document]:
        ids = row["input_ids"].values.to_numpy()
        learned = np.ones(len(ids), bool)
        if TRAINED.name in row:
            runs = row[TRAINED.name].values.to_numpy()
            learned = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        beside = {column.name: row[column.name].as_py() for column in self.prepared.beside if column.per == "piece"}
        start = 0
        for number, length in enumerate(row["seq_lengths"].values.to_pylist()):
            learned[start] = False  # nothing stands before it that could predict it
            found = list(
                pieces(self.reference, ids[start : start + length].tolist(), learned[start : start + length].tolist())
            )
            yield Document(found, {name: values[number] for name, values in beside.items()})
            start += length


def inspect(
    directory: Path, *, rows: int, html: Path | None, at_random: bool = False, source: str | None = None
) -> Iterator[str]:
    """Lines about some rows; with `html`, the page is written and its path is the line."""
    if rows < 1:
        raise ConfigError(f"--rows {rows}: must be at least 1")
    view = View.open(directory)
    chosen = view.rows(rows, at_random=at_random, source=source)
    if html is None:
        yield from view.lines(chosen)
        return
    if html.is_dir():
        raise StorageError(f"--html {html}: is a directory; name a file")
    if not html.parent.is_dir():
        raise StorageError(f"--html {html}: there is no directory {html.parent}; make it, or name another file")
    with storage_errors(html):
        write_atomic(html, view.html(chosen).encode())
    yield str(html)


def pieces(reference: Reference, ids: Sequence[int], learned: Sequence[bool]) -> Iterator[Piece]:
    """Tokens joined until they are whole characters. What a token adds is told in its place: many decoders drop a space
    at the beginning.
    """
    special = set(reference.spec.special_ids)
    base = start = 0  # `base`: where the piece before began
    for at, token in enumerate(ids, 1):
        if token in special and start < at - 1:
            yield _piece(reference, ids, learned, base, start, at - 1)
            base, start = start, at - 1
        text = reference.decode(ids[base:at])
        if token not in special and text.endswith("\ufffd") and at - start < _LONGEST_CHARACTER and at < len(ids):
            continue
        piece = _piece(reference, ids, learned, base, start, at)
        yield Piece(reference.decode([token]), piece.ids, piece.learned, True) if token in special else piece
        base, start = start, at


def _piece(reference: Reference, ids: Sequence[int], learned: Sequence[bool], base: int, start: int, end: int) -> Piece:
    text = reference.decode(ids[base:end])[len(reference.decode(ids[base:start])) :]
    return Piece(text, tuple(ids[start:end]), tuple(learned[start:end]), False)


def _figures(documents: Sequence[Document]) -> str:
    tokens = sum(len(piece.ids) for document in documents for piece in document.pieces)
    learned = sum(sum(piece.learned) for document in documents for piece in document.pieces)
    return f"{len(documents)} documents, {tokens} tokens, {learned} learned"


def _as_text(document: Document) -> str:
    text, inside = "".join(f"[{name} = {value}] " for name, value in document.beside.items()), False
    for piece in document.pieces:
        if any(piece.learned) != inside:
            text, inside = text + ("»" if inside else "«"), not inside
        text += piece.text
    return text + ("»" if inside else "")


def _sources(content: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(source['name'])}</td><td>{source['documents']:,}</td><td>{source['tokens']:,}</td></tr>"
        for source in content["sources"]
    )
    return f"<table><tr><th>source</th><th>documents</th><th>tokens</th></tr>{rows}</table>"


def _row(row: Row) -> str:
    boxes = "".join(
        f"<div class=document>{_beside(document)}{''.join(map(_span, document.pieces))}</div>"
        for document in row.documents
    )
    title = f"Row {row.number} of {escape(row.source)}"
    return f"<div class=row><h2>{title} <small>{_figures(row.documents)}</small></h2>{boxes}</div>"


def _beside(document: Document) -> str:
    return (
        f"<p class=soft>{escape(', '.join(f'{name} = {value}' for name, value in document.beside.items()))}</p>"
        if document.beside
        else ""
    )


def _span(piece: Piece) -> str:
    kinds = ["learned" if all(piece.learned) else "mixed"] if any(piece.learned) else []
    kinds += ["special"] if piece.is_special else []
    text = escape(piece.text).replace("\n", "↵\n")
    return f"<span class='{' '.join(kinds)}' title='{' '.join(map(str, piece.ids))}'>{text}</span>"
