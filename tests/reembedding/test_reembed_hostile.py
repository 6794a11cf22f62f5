"""What users, other programs and a second process do to a database of several versions: one clear line each, and
nothing lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_law
from tiny_law import active, reembed

from moai.core.distributed import owner
from moai.core.errors import ConfigError, DamagedError, SourceError, StorageError
from moai.core.stopping import Stop
from moai.reembedding import command, runs, search, versions
from moai.reembedding import database as databases
from moai.reembedding.build import plan
from moai.reembedding.chunk import GONE
from moai.reembedding.database import Database
from moai.reembedding.documents import LawDocuments
from moai.reembedding.embed import Unfinished
from moai.reembedding.kinds import KINDS
from moai.reembedding.options import ReembedConfig
from moai.reembedding.writer import VersionWriter


def act(*words: object) -> None:
    command.main([str(word) for word in words], {})


def a_run_is_at_work(db: Path) -> None:
    """Its owner is this process."""
    tiny_law.change(db, "UPDATE reembed_runs SET state = 'running', owner = ?", (json.dumps(owner()),))


# --- another process --------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_before_it_registers_or_copies_anything(law: Path) -> None:
    reembed(law)
    a_run_is_at_work(law)
    before = tiny_law.rows(law, "SELECT * FROM embedding_versions"), sorted(law.parent.iterdir())
    with pytest.raises(StorageError, match=f"pid {os.getpid()}.*Nothing was changed"):
        reembed(law, version_id=6)
    assert (tiny_law.rows(law, "SELECT * FROM embedding_versions"), sorted(law.parent.iterdir())) == before


def test_a_way_back_is_open_while_another_version_is_built_and_deleting_is_not(law: Path) -> None:
    reembed(law)
    reembed(law, version_id=6)
    a_run_is_at_work(law)
    act("rollback", "--db", law, "--version-id", 6)
    assert active(law) == {1, 5}
    act("activate", "--db", law, "--version-id", 6)
    assert active(law) == {1, 6}
    for words in (("delete", "--version-id", 5), ("gc", "--keep", 0), ("restore-index",)):
        with pytest.raises(StorageError, match="is writing to it"):
            act(words[0], "--db", law, *words[1:])
    assert len(tiny_law.content(law, 5)) == len(tiny_law.content(law, 6)) > 24


@pytest.mark.parametrize(("ended", "said", "code"), [(False, "is writing to it", 74), (True, "version 5 is active", 2)])
def test_a_run_that_begins_while_its_version_is_deleted_ends_the_deletion_and_makes_the_version_whole(
    law: Path, tmp_path: Path, ended: bool, said: str, code: int
) -> None:
    reembed(law, activate=False)
    before, points = len(tiny_law.content(law, 5)), tmp_path / "points"
    command = [sys.executable, "-m", "moai", "reembed", "delete", "--db", str(law), "--version-id", "5"]
    deleting = tiny_law.paused(command, points, "reembed.delete.committed:1")
    reembed(law) if ended else a_run_is_at_work(law)
    (points / "go").touch()
    assert said in deleting.communicate(timeout=60)[1]
    assert deleting.returncode == code
    tiny_law.change(law, "UPDATE reembed_runs SET state = 'done'")
    assert reembed(law).complete
    assert len(tiny_law.content(law, 5)) == before


def test_a_signal_right_behind_begin_leaves_no_transaction_open(law: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = databases._plain

    @contextlib.contextmanager
    def signalled(path: Path) -> Iterator[None]:
        with honest(path):
            yield
        raise Stop("now")

    with Database.open(law, writable=True) as db:
        monkeypatch.setattr(databases, "_plain", signalled)
        with pytest.raises(Stop), db.transaction("test"):
            raise AssertionError("not reached")
        monkeypatch.setattr(databases, "_plain", honest)
        with db.transaction("test"):
            db.run("UPDATE embedding_versions SET description = 'x'")


def test_what_another_program_took_from_a_version_is_embedded_again(law: Path) -> None:
    reembed(law)
    whole = len(tiny_law.content(law, 5))
    tiny_law.change(
        law,
        "DELETE FROM text_chunks WHERE embedding_version_id = 5 AND source_type = 'case_paragraph' AND source_id = 2",
    )
    tiny_law.change(
        law, "DELETE FROM embeddings WHERE chunk_id = (SELECT min(id) FROM text_chunks WHERE embedding_version_id = 5)"
    )
    report = reembed(law)
    assert (report.counts["documents_embedded"], report.complete) == (2, True)
    assert len(tiny_law.content(law, 5)) == whole
    assert reembed(law).counts["documents_embedded"] == 0


# --- versions that go -------------------------------------------------------------------------------------------------


def test_no_rollback_leaves_a_strategy_without_the_version_that_is_deleted_since(law: Path) -> None:
    reembed(law)
    reembed(law, version_id=6)
    act("delete", "--db", law, "--version-id", 5)
    with pytest.raises(ConfigError, match="active before version 6 is deleted: activate another"):
        act("rollback", "--db", law, "--version-id", 6)
    reembed(law, activate=False)  # the number is given again, and is another version
    with pytest.raises(ConfigError, match="is deleted"):
        act("rollback", "--db", law, "--version-id", 6)
    assert active(law) == {1, 6}


def test_no_rollback_to_a_version_that_was_emptied(law: Path) -> None:
    reembed(law)
    reembed(law, version_id=6, replace_all_versions=True)
    with pytest.raises(ConfigError, match="version 5, which was active before version 6, holds no chunks any more"):
        act("rollback", "--db", law, "--version-id", 6)
    assert active(law) == {1, 6}


def test_collecting_keeps_the_newest_by_time_and_says_when_there_is_nothing(
    law: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for version_id in (9, 7, 8):
        reembed(law, version_id=version_id)
    tiny_law.change(
        law,
        "UPDATE embedding_versions SET created_at = CASE id WHEN 9 THEN '2026-01-01 00:00:00' ELSE '2026-02-01 "
        "00:00:00' END WHERE id > 1",
    )
    act("gc", "--db", law)
    assert "version 9 is deleted" in capsys.readouterr().out
    act("gc", "--db", law)
    assert "nothing to delete" in capsys.readouterr().out


def test_the_unique_index_gets_its_own_name_back(law: Path) -> None:
    tiny_law.change(law, "DROP INDEX ux_text_chunks")
    tiny_law.change(law, 'CREATE UNIQUE INDEX "내 색인" ON text_chunks(source_type, source_id, chunk_index)')
    before = tiny_law.rows(
        law, "SELECT name FROM sqlite_master WHERE tbl_name = 'text_chunks' AND type = 'index' AND name NOT LIKE 'ix_%'"
    )
    tiny_law.change(law, "UPDATE text_chunks SET embedding_version_id = NULL WHERE id = 2")
    reembed(law)
    with pytest.raises(ConfigError, match=r"more than one version \(no version, 1, 5\)"):
        act("restore-index", "--db", law)
    act("rollback", "--db", law, "--version-id", 5)
    act("delete", "--db", law, "--version-id", 5)
    act("restore-index", "--db", law)
    assert (
        tiny_law.rows(
            law,
            "SELECT name FROM sqlite_master WHERE tbl_name = 'text_chunks' AND type = 'index' AND name NOT LIKE 'ix_%'",
        )
        == before
    )


# --- vectors and indexes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", ["vector = substr(vector, 1, 20)", "vector = x'00000000', dim = 1", "vector = 'text'"]
)
def test_a_damaged_vector_is_one_line_whose_way_out_works(law: Path, damage: str) -> None:
    reembed(law)
    chunk = tiny_law.rows(law, "SELECT max(chunk_id) FROM embeddings")[0][0]
    tiny_law.change(law, f"UPDATE embeddings SET {damage} WHERE chunk_id = ?", (chunk,))
    query = np.ones((1, 16), np.float32)
    with (
        Database.open(law) as db,
        pytest.raises(DamagedError, match=f"the vector of chunk {chunk} has .* delete its row"),
    ):
        search.brute_force(db, 5, query)
    tiny_law.change(law, "DELETE FROM embeddings WHERE chunk_id = ?", (chunk,))
    assert reembed(law).counts["documents_embedded"] == 1
    with Database.open(law) as db:
        assert len(search.brute_force(db, 5, query)[0]) == 5


@pytest.mark.parametrize("left", [0, 500])
def test_a_damaged_index_is_one_line_and_is_built_again(law: Path, left: int) -> None:
    pytest.importorskip("faiss")
    reembed(law, faiss="flat")
    path = search.index_path(law, 5)
    path.write_bytes(path.read_bytes()[:left])
    with Database.open(law) as db:
        noted = versions.get(db, 5).made["faiss"]
    with pytest.raises(
        DamagedError, match="not a whole FAISS index; delete that file and build it again with --faiss flat"
    ):
        search.search_index(law, 5, noted, np.ones((1, 16), np.float32))
    reembed(law, faiss="flat")
    assert len(search.search_index(law, 5, noted, np.ones((1, 16), np.float32), k=10**12)[0]) == noted["vectors"]
    with pytest.raises(ConfigError, match="16 dimensions, the query has 8"):
        search.search_index(law, 5, noted, np.ones((1, 8), np.float32))


# --- what was asked for -----------------------------------------------------------------------------------------------


def test_a_database_without_documents_is_refused_and_keeps_what_it_holds(law: Path) -> None:
    reembed(law)
    before = tiny_law.content(law, 5)
    for table in ("statute_articles", *tiny_law.PARENTS):  # whose paragraphs go with them
        tiny_law.change(law, f"DELETE FROM {table}")
    for version_id in (5, 6):
        with pytest.raises(SourceError, match=r"no documents of statute_article, .*: fill the tables"):
            reembed(law, version_id=version_id)
    assert tiny_law.content(law, 5) == before
    assert tiny_law.rows(law, "SELECT id FROM embedding_versions ORDER BY id") == [(1,), (5,)]


def test_numbers_and_devices_that_no_database_or_machine_has(law: Path) -> None:
    before = law.read_bytes()
    for words in (
        "gc --keep -1",
        "search --top 0",
        "activate --version-id 0",
        f"delete --version-id {2**70}",
        "compare --other -1",
        "search --device banana",
        f"build --doc-batch-size {2**63}",
    ):
        with pytest.raises(ConfigError, match=words.split()[1].removeprefix("--").replace("-", "_") + " = "):
            act(*words.split(), "--db", law)
    assert law.read_bytes() == before


@pytest.mark.parametrize("column", ["created_at", "description"])
def test_a_version_table_without_a_column_is_one_line(law: Path, column: str) -> None:
    tiny_law.change(law, f"ALTER TABLE embedding_versions DROP COLUMN {column}")
    with pytest.raises(SourceError, match=f"embedding_versions has no column {column}"):
        reembed(law)


def test_chunks_that_know_no_versions_yet_can_be_planned_for_and_listed_later(law: Path) -> None:
    tiny_law.change(law, "DROP INDEX ix_chunks_lookup")
    tiny_law.change(law, "ALTER TABLE text_chunks DROP COLUMN embedding_version_id")
    with pytest.raises(ConfigError, match="know no versions yet: build one first"):
        act("versions", "--db", law)
    assert plan(ReembedConfig(db=str(law), chunking_strategy="standard"), model=tiny_law.HashingModel(), environ={})
    assert reembed(law).complete
    act("versions", "--db", law)


def test_a_directory_and_a_rule_of_the_database_are_one_line(law: Path) -> None:
    with pytest.raises(SourceError, match="is a directory"):
        reembed(law.parent)
    tiny_law.change(
        law, "CREATE TRIGGER no_more BEFORE INSERT ON text_chunks BEGIN SELECT RAISE(ABORT, 'not today'); END"
    )
    with pytest.raises(DamagedError, match=r"a rule of the database itself refuses a row.*not today"):
        reembed(law)
    assert tiny_law.rows(law, "SELECT count(*) FROM text_chunks") == [(3,)]


@dataclass(frozen=True)
class Broken(tiny_law.HashingModel):
    def open(self, precision: str) -> tiny_law.HashingEncoder:
        raise OSError("no file named model.safetensors\nand more")


def test_a_model_that_cannot_be_loaded_is_one_line(law: Path) -> None:
    with pytest.raises(
        SourceError, match=r"hashing: this model could not be loaded \(OSError: no file named model.safetensors\)"
    ):
        reembed(law, Broken())
    assert tiny_law.rows(law, "SELECT count(*) FROM text_chunks") == [(3,)]


# --- a large database -------------------------------------------------------------------------------------------------


def test_documents_that_are_gone_come_and_go_a_page_at_a_time(law: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reembed(law, doc_batch_size=2)
    for table in ("statute_articles", "interpretation_paragraphs", "interpretations"):
        tiny_law.change(
            law,
            f"DELETE FROM {table} WHERE {'interpretation_id' if table == 'interpretation_paragraphs' else 'id'} NOT IN "
            f"(1, 6)",
        )
    said = plan(
        ReembedConfig(db=str(law), version_id=5, chunking_strategy="dynamic"), model=tiny_law.HashingModel(), environ={}
    )
    assert [line.rpartition(", ")[2] for line in said[1:5]] == ["5 gone", "0 gone", "0 gone", "4 gone"]
    batches = [
        batch
        for batch in LawDocuments(path=law, version_id=5, content_key="other", doc_batch_size=2).pages()
        if GONE in batch["reason"].to_pylist()
    ]
    assert sum(batch.num_rows for batch in batches) == 9
    assert max(batch.num_rows for batch in batches) == 2
    committed, honest = [], VersionWriter._transact

    def count(into: VersionWriter, unfinished: Unfinished | None) -> None:
        committed.append(len(into._waiting))
        honest(into, unfinished)

    monkeypatch.setattr(VersionWriter, "_transact", count)
    report = reembed(law, doc_batch_size=2, commit_interval=2)
    assert report.counts["documents_gone"] == 9
    assert max(committed) == 2
    assert reembed(law).counts["documents_gone"] == 0


def test_how_a_version_is_made_is_noted_though_its_first_commits_need_no_model(law: Path) -> None:
    tiny_law.change(law, "UPDATE statute_articles SET text = '(삭제)'")
    reembed(law, commit_interval=1)
    with Database.open(law) as db:
        assert {"precision": "float32", "dim": 16, "complete": True}.items() <= versions.get(db, 5).made.items()


def test_a_run_gives_signs_of_life_also_while_it_never_waits(law: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reembed(law)
    monkeypatch.setattr(runs, "BEAT_SECONDS", 0.0)
    reembed(law, doc_batch_size=1)
    assert tiny_law.rows(law, "SELECT count(*) > 4 FROM reembed_samples WHERE run_id = 2") == [(1,)]


def test_no_page_searches_a_whole_table(law: Path) -> None:
    """With the library of the operating system, whose planner is the older one."""
    reembed(law)
    of_version = "source_type = ? AND source_id = ? AND embedding_version_id = ?"
    pages = [sql for kind in KINDS.values() for sql in (kind.page_sql(), kind.text_sql())] + [
        f"SELECT 1 FROM text_chunks WHERE {of_version} LIMIT 1",
        f"DELETE FROM embeddings WHERE chunk_id IN (SELECT id FROM text_chunks WHERE {of_version})",
        f"DELETE FROM text_chunks WHERE {of_version}",
        "SELECT source_id FROM reembed_receipts WHERE version_id = ? AND source_type = ? AND source_id > ? ORDER BY "
        "source_id LIMIT ?",
        "SELECT count(*) FROM text_chunks WHERE embedding_version_id = ?",
        "SELECT count(*) FROM embeddings WHERE version_id = ?",
    ]
    with contextlib.closing(sqlite3.connect(law)) as db:
        for sql in (*pages, *(kind.count_sql() for kind in KINDS.values())):
            values = [0] * (2 if "?2" in sql else sql.count("?"))
            steps = [str(row[3]) for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
            assert not any("TEMP" in step for step in steps), (sql, steps)
            assert sql not in pages or not any(step.startswith("SCAN") for step in steps), (sql, steps)


def test_check_finds_what_is_lost_and_what_is_damaged(law: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reembed(law)
    command.main(["check", "--db", str(law)], {})
    assert capsys.readouterr().out == f"{law}: whole; 2 versions have what their receipts say\n"
    tiny_law.change(law, "DELETE FROM embeddings WHERE id = (SELECT max(id) FROM embeddings)")
    with contextlib.closing(sqlite3.connect(law)) as db, db:  # foreign keys are off here, as other programs leave them
        db.execute("DELETE FROM text_chunks WHERE id = 1")
    with pytest.raises(DamagedError, match="2 problems"):
        command.main(["check", "--db", str(law)], {})
    assert capsys.readouterr().out.splitlines() == [
        "embeddings 1 belongs to a row of text_chunks that is not there",
        "version 5: 1 documents have lost chunks or embeddings; run its build again",
    ]
    with contextlib.closing(sqlite3.connect(law)) as db:
        page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'ix_reembed_chunk_version'").fetchone()[0]
        size = db.execute("PRAGMA page_size").fetchone()[0]
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(law, "r+b") as file:
        file.seek((page - 1) * size + 200)
        file.write(b"\xff" * (size - 200))
    with pytest.raises(DamagedError):
        command.main(["check", "--db", str(law)], {})
