"""A small law database and an encoder without torch; as a program, a re-embedding with both.

    python tests/tiny_law.py DB [flags of reembed]

The encoder's vectors depend on the whole device batch, on purpose: a run that resumes with other batches than the
undisturbed run had gives other bits. Each of its calls appends the number of its rows to the file named by CALLS, if
that is set, and takes SLOW seconds.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from moai.reembedding.build import Report

ROOT = Path(__file__).parent.parent
SCHEMA = """
CREATE TABLE domains(id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL);
CREATE TABLE statutes(id INTEGER PRIMARY KEY, domain_id INTEGER REFERENCES domains(id), name TEXT NOT NULL,
  UNIQUE(domain_id, name));
CREATE TABLE statute_articles(id INTEGER PRIMARY KEY,
  statute_id INTEGER NOT NULL REFERENCES statutes(id) ON DELETE CASCADE, article_no TEXT, clause_no TEXT,
  heading TEXT, text TEXT NOT NULL);
CREATE TABLE cases(id INTEGER PRIMARY KEY, doc_id TEXT UNIQUE, court TEXT);
CREATE TABLE case_paragraphs(id INTEGER PRIMARY KEY, case_id INTEGER NOT NULL REFERENCES cases(id) ON DELETE CASCADE,
  para_index INTEGER NOT NULL, text TEXT NOT NULL, UNIQUE(case_id, para_index));
CREATE TABLE decisions(id INTEGER PRIMARY KEY, doc_id TEXT UNIQUE);
CREATE TABLE decision_paragraphs(id INTEGER PRIMARY KEY,
  decision_id INTEGER NOT NULL REFERENCES decisions(id) ON DELETE CASCADE, para_index INTEGER NOT NULL,
  text TEXT NOT NULL, UNIQUE(decision_id, para_index));
CREATE TABLE interpretations(id INTEGER PRIMARY KEY, doc_id TEXT UNIQUE);
CREATE TABLE interpretation_paragraphs(id INTEGER PRIMARY KEY,
  interpretation_id INTEGER NOT NULL REFERENCES interpretations(id) ON DELETE CASCADE, para_index INTEGER NOT NULL,
  text TEXT NOT NULL, UNIQUE(interpretation_id, para_index));
CREATE TABLE embedding_versions(id INTEGER PRIMARY KEY AUTOINCREMENT, version_name TEXT UNIQUE NOT NULL,
  chunking_strategy TEXT NOT NULL, model_name TEXT NOT NULL, description TEXT,
  created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP, is_active INTEGER DEFAULT 0, metadata TEXT);
CREATE TABLE text_chunks(id INTEGER PRIMARY KEY AUTOINCREMENT, source_type TEXT NOT NULL, source_id INTEGER NOT NULL,
  level TEXT, chunk_index INTEGER NOT NULL, start_char INTEGER, end_char INTEGER, overlap_chars INTEGER,
  text TEXT NOT NULL, token_count INTEGER, meta TEXT, chunking_strategy TEXT, chunk_size_category TEXT,
  query_type TEXT, chunk_group_id TEXT, original_document_id INTEGER,
  embedding_version_id INTEGER REFERENCES embedding_versions(id));
CREATE TABLE embeddings(id INTEGER PRIMARY KEY AUTOINCREMENT,
  chunk_id INTEGER NOT NULL REFERENCES text_chunks(id) ON DELETE CASCADE, model TEXT NOT NULL, dim INTEGER NOT NULL,
  vector BLOB NOT NULL, version_id INTEGER);
CREATE UNIQUE INDEX ux_text_chunks ON text_chunks(source_type, source_id, chunk_index);
CREATE INDEX ix_chunks_lookup ON text_chunks(source_type, source_id, chunking_strategy, embedding_version_id);
"""
TEXT = (
    "대한민국 국민의 모든 권리는 법률이 정하는 바에 의하여 보장된다. 제한하는 경우에도 자유와 본질적인 내용을 침해할 "
    "수 없다. 법원은 판단한다."
)
WORDS = TEXT.split()
PARENTS = {"cases": "case", "decisions": "decision", "interpretations": "interpretation"}


def sentence(seed: int, characters: int) -> str:
    """Korean-looking text, another one for each seed, of that length."""
    rng = np.random.default_rng(seed)
    words: list[str] = []
    while sum(map(len, words)) + len(words) <= characters:
        words.append(f"{WORDS[int(rng.integers(len(WORDS)))]}" if len(words) % 7 else f"{seed}호")
    return " ".join(words)[:characters]


def make(path: Path, *, documents: int = 6) -> Path:
    """`documents` of each type, with the same ids in every type; one deleted statute, one case without paragraphs, an
    old version 1.
    """
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executescript(SCHEMA)
        db.execute("INSERT INTO domains VALUES(1, '헌법')")
        db.execute("INSERT INTO statutes VALUES(1, 1, '대한민국헌법')")
        articles = [
            (n, str(n), f"제{n}조(목적) ① {sentence(n, 150 + 130 * (n % 9))}\n② {sentence(1000 + n, 120)}")
            for n in range(1, documents + 1)
        ]
        db.executemany(
            "INSERT INTO statute_articles(id, statute_id, article_no, text) VALUES(?, 1, ?, ?)",
            [*articles, (documents + 1, None, "(삭제)")],
        )
        for table, name in PARENTS.items():
            db.executemany(
                f"INSERT INTO {table}(id, doc_id) VALUES(?, ?)", [(n, f"{name}-{n}") for n in range(1, documents + 1)]
            )
            rows = [
                (n, index, sentence(10_000 * len(table) + 10 * n + index, 200 + 250 * ((n + index) % 4)))
                for n in range(1, documents + 1)
                for index in (2, 0, 1)
            ]
            db.executemany(f"INSERT INTO {name}_paragraphs({name}_id, para_index, text) VALUES(?,?,?)", rows)
        db.execute("INSERT INTO cases(id, doc_id) VALUES(?, 'empty')", (documents + 1,))
        db.execute(
            "INSERT INTO embedding_versions(id, version_name, chunking_strategy, model_name, is_active) VALUES(1, "
            "'v1.0.0-standard', 'standard', 'legacy-model', 1)"
        )
        for n in range(1, 4):
            db.execute(
                "INSERT INTO text_chunks(source_type, source_id, chunk_index, text, chunking_strategy, "
                "embedding_version_id) VALUES('statute_article', ?, 0, ?, 'standard', 1)",
                (n, f"옛 조각 {n}"),
            )
            db.execute(
                "INSERT INTO embeddings(chunk_id, model, dim, vector, version_id) VALUES(?, 'legacy-model', 8, ?, 1)",
                (n, np.arange(8, dtype="<f4").tobytes()),
            )
    return path


def rows(path: Path, sql: str, values: Sequence[object] = ()) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(sql, values).fetchall()


def change(path: Path, sql: str, values: Sequence[object] = ()) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute(sql, values)


def content(path: Path, version_id: int) -> list[tuple[object, ...]]:
    """Everything of a version that a run makes, ids and bits included."""
    return rows(
        path,
        "SELECT c.*, e.id, e.model, e.dim, e.vector, e.version_id FROM text_chunks c LEFT JOIN embeddings e ON "
        "e.chunk_id = c.id WHERE embedding_version_id = ? ORDER BY c.id",
        (version_id,),
    )


def document(path: Path, source_type: str, source_id: int) -> str:
    """The source text that offsets point into."""
    if source_type == "statute_article":
        return str(rows(path, "SELECT text FROM statute_articles WHERE id = ?", (source_id,))[0][0])
    name = source_type.removesuffix("_paragraph")
    return "\n".join(
        str(row[0])
        for row in rows(
            path, f"SELECT text FROM {name}_paragraphs WHERE {name}_id = ? ORDER BY para_index", (source_id,)
        )
    )


@dataclass(frozen=True)
class Pieces:
    """Tokens of up to three characters, one added at each end."""

    max_tokens: int = 128

    def spans(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        return [
            np.array([match.span() for match in re.finditer(r"\S{1,3}", text)], np.int64).reshape(-1, 2)
            for text in texts
        ]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            [1, *(2 + zlib.crc32(piece.encode()) % 30_000 for piece in re.findall(r"\S{1,3}", text)), 0]
            for text in texts
        ]


@dataclass(frozen=True)
class HashingEncoder:
    dim: int = 16
    tokens: Pieces = Pieces()
    batch_tokens: int = 600
    lanes: int = 2

    def encode(self, rows: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        if os.environ.get("CALLS"):
            with open(os.environ["CALLS"], "a") as calls:
                calls.write(f"{len(rows)}\n")
        time.sleep(float(os.environ.get("SLOW", "0")))
        batch = zlib.crc32(repr([len(row) for row in rows]).encode()) % 1000 / 1e5
        found = np.stack(
            [np.sin(np.outer(np.array(row), np.arange(1, self.dim + 1))).sum(axis=0) + batch for row in rows]
        )
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class HashingModel:
    """Goes where a sentence-transformers model goes: `build(config, model=HashingModel())`."""

    name: str = "hashing"
    revision: str = "1"
    dim: int = 16
    max_tokens: int = 128

    def open(self, precision: str) -> HashingEncoder:
        if os.environ.get("CALLS"):
            with open(os.environ["CALLS"], "a") as calls:
                calls.write("loaded\n")
        return HashingEncoder(self.dim, Pieces(self.max_tokens))


def reembed(db: Path, model: Any = None, **changes: Any) -> Report:
    """In this process, as version 5."""
    from moai.reembedding.build import build
    from moai.reembedding.options import ReembedConfig

    given = {"version_id": 5, "chunking_strategy": "dynamic", "doc_batch_size": 4, "embedding_batch_size": 8}
    config = ReembedConfig(db=str(db), **given | {"commit_interval": 2} | changes)
    return build(config, model=model or HashingModel(), environ={})


def active(db: Path) -> set[object]:
    return {row[0] for row in rows(db, "SELECT id FROM embedding_versions WHERE is_active = 1")}


def paused(command: Sequence[str], points: Path, at: str) -> subprocess.Popen[str]:
    """The command at work, waiting at the failpoint `at` until `points / "go"` is there."""
    points.mkdir()
    wanted = {"MOAI_TESTING": "1", "MOAI_FAILPOINT_DIR": str(points), "MOAI_FAILPOINT": f"{at}=pause"}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | wanted, stderr=subprocess.PIPE, text=True)
    while not (points / at.replace(":", ".")).exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


def small(path: Path, *flags: str) -> list[str]:
    """Flags that make several batches and commits of the small database."""
    words = "--chunking-strategy dynamic --version-id 5 --doc-batch-size 4 --embedding-batch-size 8 --commit-interval 2"
    return ["--db", str(path), *words.split(), *flags]


def main(flags: Iterable[str]) -> int:
    from moai.core.config import resolve
    from moai.core.errors import MoaiError
    from moai.core.stopping import stoppable
    from moai.reembedding.build import build
    from moai.reembedding.options import ReembedConfig

    assert "torch" not in sys.modules
    try:
        with stoppable("kept"):
            build(resolve([ReembedConfig], list(flags), {}, prog="tiny_law")[ReembedConfig], model=HashingModel())
    except MoaiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    assert "torch" not in sys.modules
    return 0


if __name__ == "__main__":
    from moai.core.without_pandas import without_pandas

    without_pandas()
    sys.exit(main(small(Path(sys.argv[1]), *sys.argv[2:])))
