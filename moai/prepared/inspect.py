"""Look at prepared rows as a model sees them: token by token, what is learned, where documents end.

    python -m moai inspect DIR                     the first rows as text, what is learned between « and »
    python -m moai inspect DIR --html FILE         the same as a page: a colour for what is learned, an id for each
                                                   token under the pointer

A character that is several tokens (most Korean ones in a small vocabulary) is shown once, for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from pathlib import Path
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
class View:
    """A prepared directory and its tokenizer. Raises DamagedError, TokenizerError."""

    prepared: Prepared
    reference: Reference

    @classmethod
    def open(cls, path: Path) -> View:
        prepared = Prepared.open(path)
        spec = load_tokenizer(str(path / "tokenizer.json"), eos_token=prepared.content["tokenizer"]["eos_token"])
        return cls(prepared, Reference(spec=spec))

    def rows(self) -> Iterator[list[Document]]:
        """Every row as its documents."""
        for shard in self.prepared.content["shards"]:
            if shard["file"]:
                with pa.memory_map(str(self.prepared.path / shard["file"])) as file:
                    for batch in pa.ipc.open_stream(file):
                        for row in range(batch.num_rows):
                            yield list(self._documents({name: batch[name][row] for name in batch.schema.names}))

    def lines(self, rows: int) -> Iterator[str]:
        """As text: a learned stretch stands between « and »."""
        for number, documents in enumerate(islice(self.rows(), rows)):
            yield f"--- {self._held_out}row {number}: {_figures(documents)}"
            for document in documents:
                yield printable(_as_text(document))

    def html(self, rows: int) -> str:
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
            [head, *(_row(number, documents) for number, documents in enumerate(islice(self.rows(), rows)))],
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


def inspect(directory: Path, *, rows: int, html: Path | None) -> Iterator[str]:
    """Lines about the first rows; with `html`, the page is written and its path is the line."""
    if rows < 1:
        raise ConfigError(f"--rows {rows}: must be at least 1")
    view = View.open(directory)
    if html is None:
        yield from view.lines(rows)
        return
    if html.is_dir():
        raise StorageError(f"--html {html}: is a directory; name a file")
    if not html.parent.is_dir():
        raise StorageError(f"--html {html}: there is no directory {html.parent}; make it, or name another file")
    with storage_errors(html):
        write_atomic(html, view.html(rows).encode())
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


def _row(number: int, documents: Sequence[Document]) -> str:
    boxes = "".join(
        f"<div class=document>{_beside(document)}{''.join(map(_span, document.pieces))}</div>" for document in documents
    )
    return f"<div class=row><h2>Row {number} <small>{_figures(documents)}</small></h2>{boxes}</div>"


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
