"""Which documents a law database has: the tables of each source type, and which of their texts are left out.

KINDS["case_paragraph"].page_sql()
skip_reason(["제3조 삭제 <2014. 5. 20.>"])      # "deleted (삭제)"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moai.core.errors import SourceError
from moai.reembedding.database import Database

NO_TEXT = "no text"
DELETED = "deleted (삭제)"
NOT_UTF8 = "no valid UTF-8"
REASONS = (NO_TEXT, DELETED, NOT_UTF8)
"""Why a document gets no chunk. There is no fourth: the shortest clause of a statute is found too."""
_DELETED = re.compile(
    r"""\s*(제\s*\d+\s*조(\s*의\s*\d+)*\s*(\([^)]*\))?)?      # 제3조의2(정의)
    \s*([\u2460-\u2473]|제\s*\d+\s*항)?                       # ①
    \s*((\d+(의\d+)*|[가-하])\s*\.|제\s*\d+\s*호)?            # 1.
    \s*[(\[<〈]?\s*삭\s*제\s*[)\]>〉]?                        # 삭제, (삭제)
    \s*([(\[<〈][^()\[\]<>〈〉]*[)\]>〉])?\s*\.?\s*           # <2014. 5. 20.>
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Kind:
    """Where the documents of one source type are: `texts` holds their text, `parents` lists them, if it is another
    table; `above` is (the table of what a document belongs to, the column that names its row).
    """

    texts: str
    key: str
    parents: str | None = None
    above: tuple[str, str] | None = None

    def tables(self) -> dict[str, tuple[str, ...]]:
        if self.parents is None:
            return {self.texts: (self.key, "text")}
        return {self.texts: (self.key, "para_index", "text"), self.parents: ("id",)}

    def page_sql(self) -> str:
        listed = f"SELECT {self.key} FROM {self.texts} WHERE {self.key} > ?1"
        if self.parents:
            # A merge of two indexes: a parent without paragraphs is counted, a paragraph without parent is not lost.
            listed = f"SELECT id FROM {self.parents} WHERE id > ?1 UNION {listed}"
        return f"{listed} ORDER BY 1 LIMIT ?2"

    def count_sql(self) -> str:
        parents = f"SELECT id FROM {self.parents} UNION " if self.parents else ""
        # In order, so that both sides are merged: an older SQLite keeps all ids in a temporary table otherwise.
        return f"SELECT count(*) FROM ({parents}SELECT {self.key} FROM {self.texts} ORDER BY 1)"

    def characters_sql(self) -> str:
        return f"SELECT coalesce(sum(length(text)), 0) FROM {self.texts}"

    def text_sql(self) -> str:
        order = f"{self.key}, para_index" if self.parents else self.key
        # As bytes: SQLite keeps in a TEXT column whatever was put there, valid UTF-8 or not.
        listed = f"SELECT {self.key}, CAST(text AS BLOB), length(text) FROM {self.texts}"
        return f"{listed} WHERE {self.key} BETWEEN ?1 AND ?2 ORDER BY {order}"


KINDS = {
    "statute_article": Kind("statute_articles", "id", above=("statutes", "statute_id")),
    "case_paragraph": Kind("case_paragraphs", "case_id", "cases"),
    "decision_paragraph": Kind("decision_paragraphs", "decision_id", "decisions"),
    "interpretation_paragraph": Kind("interpretation_paragraphs", "interpretation_id", "interpretations"),
}
_OF_VERSIONS = {
    "text_chunks": ("id", "source_type", "source_id", "chunk_index", "text"),
    "embeddings": ("id", "chunk_id", "model", "dim", "vector"),
    "embedding_versions": (
        *("id", "version_name", "chunking_strategy", "model_name", "description", "created_at", "is_active"),
        "metadata",
    ),
}


def check_tables(database: Database, source_types: Sequence[str] = ()) -> None:
    """Raises SourceError naming what is missing and what would have to be there, for these source types."""
    needed = {table: names for name in source_types for table, names in KINDS[name].tables().items()} | _OF_VERSIONS
    found = {table: database.columns(table) for table in needed}
    missing = [table for table, columns in found.items() if not columns]
    if missing:
        what = "is not a law database" if len(missing) == len(needed) else "lacks part of a law database"
        raise SourceError(
            f"{database.path}: {what}: no table {', '.join(missing)}; name another file with --db, embed only what "
            f"is there with --source-type, or run the program's own migrations first"
        )
    for table, columns in needed.items():
        absent = [column for column in columns if column not in found[table]]
        if absent:
            raise SourceError(
                f"{database.path}: table {table} has no column {', '.join(absent)} (found: {', '.join(found[table])})"
            )


def present(database: Database) -> tuple[str, ...]:
    """The source types whose tables are there."""
    return tuple(name for name, kind in KINDS.items() if all(database.columns(table) for table in kind.tables()))


def count_documents(database: Database, source_types: Sequence[str]) -> dict[str, int]:
    return {source_type: int(database.value(KINDS[source_type].count_sql())) for source_type in source_types}


def count_characters(database: Database, source_types: Sequence[str]) -> int:
    return sum(int(database.value(KINDS[source_type].characters_sql())) for source_type in source_types)


def is_deleted(text: str) -> bool:
    """Whether nothing is said but that the article, clause or item was deleted, and when."""
    return _DELETED.fullmatch(text) is not None


def skip_reason(paragraphs: Sequence[str]) -> str | None:
    text = "\n".join(paragraphs)
    return NO_TEXT if not text.strip() else DELETED if is_deleted(text) else None
