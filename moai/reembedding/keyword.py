"""Keyword search in one version: an FTS5 table of pairs of syllables, written in the transaction that writes chunks.

    keyword.build(database, 5)
    keyword.find(database, 5, "임차인의 갱신 요구", k=10)        # [(score, chunk id), ...], best first

Korean glues particles to nouns, and most legal nouns have two syllables: words miss "상속인은" for "상속", and trigrams
find nothing for "상속" at all. Pairs of syllables find both, with no dictionary (benchmarks/RESULTS.md has them beside
words, trigrams and morphemes). A number is a term by itself and with the syllable behind it: 제1조 is not 제11조.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from moai.reembedding.database import Database, Row, sqlite_version

ANALYZER = 1
"""Raised when `terms` gives others: the next run makes the table of a version anew."""
CONTEXT_WEIGHT, BODY_WEIGHT = 0.25, 1.0
_MOST_TERMS = 512
_RUN = re.compile(r"[가-힣]+|[\u3400-\u9fff]+|[0-9]+|[^\W\d_가-힣\u3400-\u9fff]+")
_PAGE = 1000


def terms(text: str) -> Iterator[str]:
    """In their order. Letters of other scripts are whole words in lower case."""
    number = ""
    for match in _RUN.finditer(text):
        run = match[0].lower()
        if run[0].isdigit():
            number, end = run, match.end()
            yield run
            continue
        if "가" <= run[0] <= "힣" or "\u3400" <= run[0] <= "\u9fff":
            if number and end == match.start():
                yield number + run[0]
            yield from (run[at : at + 2] for at in range(len(run) - 1)) if len(run) > 1 else (run,)
        else:
            yield run
        number = ""


def table(version_id: int) -> str:
    return f"reembed_words_{version_id}"


def is_there(database: Database, version_id: int) -> bool:
    return bool(database.columns(table(version_id)))


def create(database: Database, version_id: int, *, schema: str = "main") -> None:
    """Empty. Without the text itself where this SQLite can delete from such a table: it stands in text_chunks."""
    content = ", content='', contentless_delete=1" if sqlite_version() >= (3, 43, 0) else ""
    database.run(
        f"CREATE VIRTUAL TABLE {schema}.{table(version_id)} USING fts5(context, body, kind{content}, "
        f"tokenize=\"unicode61 remove_diacritics 0 tokenchars '_'\")"
    )


def drop(database: Database, version_id: int) -> None:
    database.run(f"DROP TABLE IF EXISTS {table(version_id)}")


def add(database: Database, version_id: int, chunks: Iterable[Sequence[Any]], *, schema: str = "main") -> None:
    """(chunk id, source type, text, length of its context) each."""
    database.run_many(
        f"INSERT INTO {schema}.{table(version_id)}(rowid, context, body, kind) VALUES(?,?,?,?)",
        (
            (chunk_id, " ".join(terms(text[:context])), " ".join(terms(text[context:])), kind)
            for chunk_id, kind, text, context in chunks
        ),
    )


def build(database: Database, version_id: int, *, schema: str = "main") -> None:
    """From the chunks that are there, in the caller's transaction."""
    create(database, version_id, schema=schema)
    last = 0
    sql = (
        "SELECT id, source_type, text, coalesce(json_extract(meta, '$.context_chars'), 0) FROM text_chunks WHERE "
        "embedding_version_id = ? AND id > ? ORDER BY id LIMIT ?"
    )
    while rows := database.rows(sql, (version_id, last, _PAGE)):
        add(database, version_id, rows, schema=schema)
        last = rows[-1][0]


def find(
    database: Database, version_id: int, question: str, *, k: int, source_types: Sequence[str] = ()
) -> list[tuple[float, int]]:
    """(BM25, chunk id), best first; equal ones by id. A version without a table gets one for this connection."""
    wanted = list(dict.fromkeys(terms(question)))[:_MOST_TERMS]
    if not wanted:
        return []
    if not is_there(database, version_id):
        build(database, version_id, schema="temp")
    match = "{context body} : (" + " OR ".join(f'"{term}"' for term in wanted) + ")"
    if source_types:
        match += " AND kind : (" + " OR ".join(f'"{name}"' for name in source_types) + ")"
    name = table(version_id)
    rows: list[Row] = database.rows(
        f"SELECT rowid, bm25({name}, {CONTEXT_WEIGHT}, {BODY_WEIGHT}, 0.0) AS score FROM {name} WHERE {name} MATCH ? "
        f"ORDER BY score, rowid LIMIT ?",
        (match, k),
    )
    return [(-score, chunk_id) for chunk_id, score in rows]
