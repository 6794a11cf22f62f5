"""What the page asks of a prepared directory: its documents and rows by number, why a document went, what is learned.

Numbers are given to all documents that were read, dropped ones too, in the order of the shards. Text comes from the
tokens; of a document without tokens its record is read from the source file, while that is there. The page says which.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moai.core.errors import DamagedError, SourceError
from moai.core.files import read_range
from moai.prepared.inspect import Document, Row, View
from moai.sources.streams import COMPRESSIONS, open_blocks, skip
from moai.transforms.pack import STRATEGIES, Pack

MOST_CHARS = 200_000
"""Of one document in one answer."""
MOST_TOKENS = 64_000
MOST_LISTED = 200
_OPENING_CHARS = 160
_MOST_SKIPPED = 64 << 20
"""Bytes that are decompressed to reach a record."""
_LINES = (".jsonl", ".ndjson", ".txt", ".csv", ".tsv")
_HASHES = ("document_hash", "min_hash")
"""Signals that are numbers to compare, not to read."""


@dataclass(frozen=True)
class Directory:
    """A prepared directory under a key that stands in addresses."""

    key: str
    view: View

    @classmethod
    def open(cls, path: Path, key: str) -> Directory:
        """Raises DamagedError, TokenizerError."""
        return cls(key, View.open(path))

    def summary(self) -> dict[str, Any]:
        content = self.content
        return {
            "key": self.key,
            "name": self.path.name,
            "read": content["records"]["read"],
            "documents": content["documents"],
            "tokens": content["tokens"],
            "rows": content["rows"],
            "seq_len": content["seq_len"],
            "packing": content["packing"],
            "fill": content["fill_rate"],
            "filtered": content["filtered"],
            "quarantined": content["records"]["quarantined"],
            "sources": content["sources"],
            "judged": (self.path / "quality.json").is_file(),
        }

    def answer(self, what: str, asked: Mapping[str, str]) -> Any:
        """Raises KeyError for what nobody can ask, IndexError and ValueError for a number that is not there."""
        match what:
            case "documents":
                return self.listing(int(asked.get("from", 0)), asked)
            case "document":
                return self.document(int(asked["n"]))
            case "near":
                return self.near(int(asked["n"]), asked)
            case "row":
                return self.row(int(asked["n"]))
            case "quarantine":
                return self.quarantine(int(asked.get("from", 0)))
        raise KeyError(f"{what}: no such view")

    def listing(self, first: int, asked: Mapping[str, str]) -> dict[str, Any]:
        """Documents from `first` on that pass the filter, MOST_LISTED at most, and where the next ones begin."""
        found, numbers = [], self._matching(first, asked)
        for number in numbers:
            found.append(self._line(number))
            if len(found) == MOST_LISTED:
                break
        return {"documents": found, "next": next(numbers, None), "total": self.total, "reasons": self._reasons}

    def near(self, number: int, asked: Mapping[str, str]) -> dict[str, int | None]:
        """The next document behind `number` that passes the filter, and the one before it."""
        return {
            "next": next(self._matching(number + 1, asked), None),
            "previous": next(self._matching(number - 1, asked, backwards=True), None),
        }

    def document(self, number: int) -> dict[str, Any]:
        shard, at = self._place(number)
        facts = self._documents(shard).slice(at, 1).to_pylist()[0]
        listed = self.content["shards"][shard]
        found: dict[str, Any] = {
            "number": number,
            "total": self.total,
            "source": listed["source"],
            "shard": shard,
            "file": self._file(shard, facts),
            **facts,
            "first_row": self._first_rows[shard] + facts["first_row"] if facts["pieces"] else None,
            "signals": {},
            "failed": [],
            "text": None,
            "from": "nothing",
        }
        for table in self._measured(shard):
            values = table.slice(at, 1).to_pylist()[0]
            found["signals"] |= {name: value for name, value in values.items() if isinstance(value, int | float)}
        if verdict := self._verdict(shard, at):
            found |= verdict
        if facts["pieces"]:
            pieces = self._pieces(shard, at)
            text = "".join(piece["text"] for piece in pieces)[:MOST_CHARS]
            found |= {"text": text, "from": "tokens", "pieces_of": pieces[:MOST_TOKENS]}
        elif (record := self._record(shard, facts)) is not None:
            found |= {"text": record[:MOST_CHARS], "from": "record"}
        return found

    def row(self, number: int) -> dict[str, Any]:
        row = self._row(number)
        documents: list[dict[str, Any]] = [
            {"pieces": _pieces(document), "beside": document.beside, "torn": False, "number": None}
            for document in row.documents
        ]
        for document, (of, is_first) in zip(documents, self._owners(number)):
            document |= {"number": of, "torn": not is_first}
        return {"number": number, "total": self.content["rows"], "source": row.source, "documents": documents}

    def quarantine(self, first: int) -> dict[str, Any]:
        file = self.path / "quarantine.jsonl"
        lines = file.read_bytes().splitlines() if file.is_file() else []
        some = [json.loads(line) for line in lines[first : first + MOST_LISTED]]
        counted = {name: number for name, number in self.content["records"].items() if "quarantined" in name}
        return {"records": some, "listed": len(lines), "counted": counted}

    @property
    def path(self) -> Path:
        return self.view.prepared.path

    @property
    def content(self) -> dict[str, Any]:
        return self.view.prepared.content

    @cached_property
    def total(self) -> int:
        return self._firsts[-1]

    @cached_property
    def _firsts(self) -> list[int]:
        """The number of the first document of each shard, and of all documents."""
        counts = (self._documents(shard).num_rows for shard in range(len(self.content["shards"])))
        return list(accumulate(counts, initial=0))

    @cached_property
    def _first_rows(self) -> list[int]:
        return list(accumulate((shard["rows"] for shard in self.content["shards"]), initial=0))

    @cached_property
    def _reasons(self) -> list[str]:
        return sorted({reason.partition(".")[0] for reason in self.content["filtered"]})

    def _place(self, number: int) -> tuple[int, int]:
        if not 0 <= number < self.total:
            raise IndexError(f"document {number}: there are {self.total:,}, from 0 on")
        shard = bisect_right(self._firsts, number) - 1
        return shard, number - self._firsts[shard]

    def _matching(self, first: int, asked: Mapping[str, str], *, backwards: bool = False) -> Iterator[int]:
        reason, source = asked.get("reason"), asked.get("source")
        shards = range(len(self._firsts) - 1)
        for shard in reversed(shards) if backwards else shards:
            begin, end = self._firsts[shard], self._firsts[shard + 1]
            if (begin > first if backwards else end <= first) or (
                source and self.content["shards"][shard]["source"] != source
            ):
                continue
            reasons = self._documents(shard)["reason"]
            if not reason:
                passes: Any = range(end - begin)
            else:
                wanted = pc.is_null(reasons) if reason == "kept" else pc.starts_with(reasons, reason).fill_null(False)
                passes = pc.indices_nonzero(wanted).to_pylist()
            for at in reversed(passes) if backwards else passes:
                if begin + at <= first if backwards else begin + at >= first:
                    yield begin + at

    def _line(self, number: int) -> dict[str, Any]:
        shard, at = self._place(number)
        facts = self._documents(shard).slice(at, 1).to_pylist()[0]
        opening = ""
        if facts["pieces"]:
            opening = "".join(piece["text"] for piece in self._pieces(shard, at, most=60))
        return {
            "number": number,
            "source": self.content["shards"][shard]["source"],
            "opening": opening[:_OPENING_CHARS],
            **{name: facts[name] for name in ("tokens", "bytes", "reason")},
        }

    def _documents(self, shard: int) -> pa.Table:
        return _table(self.path / self.content["shards"][shard]["documents_file"]["file"])

    def _measured(self, shard: int) -> list[pa.Table]:
        files = sorted(self.path.glob(f"signals-{shard:05d}-*.arrow"))
        return [_table(file) for file in files if not file.stem.endswith(_HASHES)]

    def _record(self, shard: int, facts: Mapping[str, Any]) -> str | None:
        """The bytes of a document's record in its file, as it is now; None where the file is not there, is no file of
        lines, or would have to be decompressed for long.
        """
        place, number = self._file(shard, facts), self._source_of(shard)[0]
        inputs = self.view.prepared.manifest["run"].get("inputs", [])
        if place is None or number >= len(inputs):
            return None
        path = Path(inputs[number])
        path = path / place["name"] if path.is_dir() else path
        packed = COMPRESSIONS.get(path.suffix, "")
        kind = path.with_suffix("").suffix if packed else path.suffix
        if kind not in _LINES or path.name != Path(place["name"]).name or not path.is_file():
            return None
        start, end = place["offset"], place["offset"] + min(facts["bytes"], 4 * MOST_CHARS)
        if packed and end > _MOST_SKIPPED:
            return None
        try:
            blocks = open_blocks(str(path), packed, 1 << 20) if packed else read_range(str(path), start, end, 1 << 20)
            raw = b"".join(skip(blocks, start, end) if packed else blocks)
        except (SourceError, OSError):
            return None
        return raw.decode("utf-8", "backslashreplace")

    def _verdict(self, shard: int, at: int) -> dict[str, Any] | None:
        """The rules that a document fails, and the document that stayed in its place."""
        file = self.path / f"verdicts-{shard:05d}.arrow"
        if not file.is_file():
            return None
        table = _table(file)
        rules = (table.schema.metadata or {}).get(b"rules", b"").decode().split()
        values = table.slice(at, 1).to_pylist()[0]
        found: dict[str, Any] = {
            "failed": [rule for bit, rule in enumerate(rules) if (values.get("failed") or 0) >> bit & 1]
        }
        if (
            values.get("keeper_row") is not None
            and values.get("keeper_shard") is not None
            and not values.get("against")
        ):
            found["keeper"] = self._firsts[values["keeper_shard"]] + values["keeper_row"]
            found["jaccard"] = values.get("jaccard")
        return found

    def _file(self, shard: int, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """The file that a document is of, and where its segment begins there."""
        number, at = self._source_of(shard)
        if number == len(self._sources) or facts["segment"] >= len(self._sources[number]["shards"][at]):
            return None
        source = self._sources[number]
        file, before, records = source["shards"][at][facts["segment"]]
        return {"name": source["files"][file], "offset": before + facts["offset"], "records_before": records}

    def _source_of(self, shard: int) -> tuple[int, int]:
        """The number of a shard's source, and the shard's number in it."""
        for number, source in enumerate(self._sources):
            if shard < len(source["shards"]):
                return number, shard
            shard -= len(source["shards"])
        return len(self._sources), 0

    @cached_property
    def _sources(self) -> list[dict[str, Any]]:
        file = self.path / "sources.json"
        return list(json.loads(file.read_bytes())) if file.is_file() else []

    def _pieces(self, shard: int, at: int, most: int = MOST_TOKENS) -> list[dict[str, Any]]:
        """The tokens of a document, from all its rows that are known."""
        found: list[dict[str, Any]] = []
        layout = self._layout(shard)
        for piece in layout.pieces_of(at):
            start = 0
            for document in self._row(self._first_rows[shard] + int(layout.rows[piece])).documents:
                if start == layout.positions[piece]:
                    found += _pieces(document)
                start += sum(len(one.ids) for one in document.pieces)
            if len(found) >= most:
                break
        return found[:most]

    def _owners(self, row: int) -> list[tuple[int | None, bool]]:
        """Of each piece of a row, the document it is of, where that is known, and whether it is that document's
        first.
        """
        shard = bisect_right(self._first_rows, row) - 1
        layout = self._layout(shard)
        inside = np.flatnonzero(layout.rows == row - self._first_rows[shard])
        owner = {
            int(layout.positions[piece]): (
                self._firsts[shard] + int(layout.documents[piece]),
                bool(layout.firsts[piece]),
            )
            for piece in inside
        }
        found, start = list[tuple[int | None, bool]](), 0
        for document in self._row(row).documents:
            found.append(owner.get(start, (None, True)))
            start += sum(len(piece.ids) for piece in document.pieces)
        return found

    def _layout(self, shard: int) -> Layout:
        found: Layout = self._layouts(shard)
        return found

    @cached_property
    def _layouts(self) -> Any:
        return lru_cache(8)(lambda shard: Layout.of(self._documents(shard), self.content))

    def _row(self, number: int) -> Row:
        found: Row = self._rows(number)
        return found

    @cached_property
    def _rows(self) -> Any:
        return lru_cache(64)(self.view.row)


@dataclass(frozen=True)
class Layout:
    """Where the pieces of a shard's documents lie, in the order of the text: row, position in it, document, and whether
    it is that document's first. The documents file names first pieces; the others follow from lengths and packing.
    """

    rows: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    firsts: np.ndarray

    @classmethod
    def of(cls, table: pa.Table, content: Mapping[str, Any]) -> Layout:
        tokens, rows, positions, pieces = (
            table[name].to_numpy() for name in ("tokens", "first_row", "position", "pieces")
        )
        kept = np.flatnonzero(pieces)
        known = cls(rows[kept], positions[kept], kept, np.ones(len(kept), bool))
        if "chat" in content or not len(kept):  # an example is a whole piece, and a conversation may have several
            return known
        numbers = np.flatnonzero(tokens)
        pack = Pack(
            seq_len=content["seq_len"],
            strategy=content["packing"],
            dtype="uint32",
            split_long=content["config"]["long_documents"] == "split",
        )
        lengths = tokens[numbers].astype(np.int64)
        made = STRATEGIES[pack.strategy](pack, lengths)
        in_row = np.cumsum(made.lengths) - made.lengths
        places = in_row - in_row[np.searchsorted(made.row_of, made.row_of)]
        order = np.argsort(made.starts, kind="stable")
        of = numbers[np.searchsorted(np.cumsum(lengths), made.starts, "right")][order]
        firsts = np.diff(of, prepend=-1) != 0
        found = cls(made.row_of[order], places[order], of, firsts)
        agrees = np.array_equal(found.rows[firsts], known.rows) and np.array_equal(
            found.positions[firsts], known.positions
        )
        return found if agrees and np.array_equal(of[firsts], kept) else known

    def pieces_of(self, document: int) -> range:
        return range(*np.searchsorted(self.documents, (document, document + 1)).tolist())


def _pieces(document: Document) -> list[dict[str, Any]]:
    return [
        {
            "text": piece.text,
            "ids": list(piece.ids),
            "learned": all(piece.learned) if any(piece.learned) == all(piece.learned) else None,
            "special": piece.is_special,
        }
        for piece in document.pieces
    ]


@lru_cache(maxsize=256)
def _table(path: Path) -> pa.Table:
    """Mapped; a file of either kind of Arrow. Raises DamagedError."""
    try:
        mapped = pa.memory_map(str(path))
        try:
            return pa.ipc.open_file(mapped).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_stream(mapped).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise DamagedError(f"{path}: not readable as Arrow ({' '.join(str(error).split())[:200]})") from error
