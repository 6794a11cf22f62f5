"""Versions side by side, what a second run does, and the way back, through the command line's own functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_law
from tiny_law import active, reembed

from moai.core import resources
from moai.core.errors import ConfigError, DamagedError, MoaiError, SourceError, StorageError
from moai.reembedding import command, making, search, versions
from moai.reembedding import database as databases
from moai.reembedding.build import plan
from moai.reembedding.database import Database
from moai.reembedding.options import ReembedConfig

NO_CHUNKS = [("deleted (삭제)", "statute_article"), ("no text", "case_paragraph")]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "calls"
    monkeypatch.setenv("CALLS", str(path))
    return path


@pytest.fixture(params=["sqlite3", "apsw"])
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "sqlite3":
        monkeypatch.setattr(databases, "apsw", None)
    else:
        pytest.importorskip("apsw")
    return str(request.param)


def lines(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    command.main([str(word) for word in words], {})
    return capsys.readouterr().out.splitlines()


def test_a_version_is_built_beside_the_old_one_and_covers_every_document(law: Path, driver: str) -> None:
    report = reembed(law)
    assert (report.complete, report.active, report.version_id) == (True, True, 5)
    assert tiny_law.rows(law, "SELECT count(*) FROM text_chunks WHERE embedding_version_id = 1") == [(3,)]
    assert tiny_law.rows(
        law, "SELECT version_name, chunking_strategy, model_name FROM embedding_versions WHERE id = 5"
    ) == [("v5.0.0-dynamic", "dynamic", "hashing")]
    found = tiny_law.rows(
        law,
        "SELECT source_type, source_id, chunk_index, start_char, end_char, text, token_count, meta FROM text_chunks "
        "WHERE embedding_version_id = 5 ORDER BY 1, 2, 3",
    )
    assert len({row[:2] for row in found}) == 24  # six of each of the four types
    for source_type, source_id, _, start, end, text, tokens, meta in found:
        noted = json.loads(str(meta))
        source = tiny_law.document(law, str(source_type), int(str(source_id)))[int(str(start)) : int(str(end))]
        assert str(text)[noted["context_chars"] + 1 :] == source
        assert tokens == len(tiny_law.Pieces().ids([str(text)])[0])
        assert not noted["truncated"]
    vectors = tiny_law.rows(law, "SELECT vector, dim FROM embeddings WHERE version_id = 5")
    assert len(vectors) == len(found)
    assert all(
        abs(float(np.linalg.norm(np.frombuffer(bytes(row[0]), "<f4"))) - 1) < 1e-5 and row[1] == 16 for row in vectors
    )  # type: ignore[call-overload]


def test_a_second_run_encodes_nothing_and_loads_no_model(law: Path, calls: Path) -> None:
    first = reembed(law)
    assert sum(int(line) for line in calls.read_text().split() if line != "loaded") == first.counts["chunks"] > 24
    calls.unlink()
    before = tiny_law.content(law, 5)
    second = reembed(law)
    assert not calls.exists()
    assert second.counts["documents_seen"] == 26
    assert (second.counts["encode_batches"], second.complete, second.active) == (0, True, True)
    assert tiny_law.content(law, 5) == before


def test_documents_without_chunks_are_recorded_with_their_reason_so_that_all_are_done(law: Path) -> None:
    report = reembed(law)
    assert (
        sorted(tiny_law.rows(law, "SELECT reason, source_type FROM reembed_receipts WHERE reason IS NOT NULL"))
        == NO_CHUNKS
    )
    assert report.counts["documents_embedded"] + report.counts["documents_skipped"] == report.documents_total == 26
    assert tiny_law.rows(law, "SELECT count(*) FROM reembed_receipts WHERE version_id = 5") == [(26,)]


def test_an_edited_document_is_encoded_again_and_no_other(law: Path, calls: Path) -> None:
    reembed(law)
    reembed(law, version_id=6)
    beside = tiny_law.content(law, 6)
    others = (
        "SELECT c.id, vector FROM text_chunks c JOIN embeddings ON chunk_id = c.id WHERE embedding_version_id = 5 "
        "AND NOT (source_type = 'decision_paragraph' AND source_id = 3) ORDER BY 1"
    )
    before = tiny_law.rows(law, others)
    tiny_law.change(
        law,
        "UPDATE decision_paragraphs SET text = ? WHERE decision_id = 3 AND para_index = 1",
        (tiny_law.sentence(5, 900),),
    )
    calls.unlink()
    report = reembed(law)
    chunks = tiny_law.rows(
        law,
        "SELECT count(*) FROM text_chunks WHERE embedding_version_id = 5 AND source_type = 'decision_paragraph' AND "
        "source_id = 3",
    )
    assert report.counts["documents_embedded"] == 1
    assert (sum(int(line) for line in calls.read_text().split() if line != "loaded"),) == chunks[0]
    assert tiny_law.rows(law, others) == before
    assert tiny_law.content(law, 6) == beside


def test_a_deleted_a_shortened_and_a_new_document_are_noticed(law: Path) -> None:
    reembed(law)
    tiny_law.change(law, "DELETE FROM cases WHERE id = 2")
    tiny_law.change(law, "UPDATE statute_articles SET text = '(삭제)' WHERE id = 4")
    tiny_law.change(
        law, "INSERT INTO statute_articles(id, statute_id, text) VALUES(99, 1, ?)", (tiny_law.sentence(99, 200),)
    )
    report = reembed(law)
    assert (
        report.counts["documents_embedded"],
        report.counts["documents_skipped"],
        report.counts["documents_gone"],
    ) == (1, 1, 1)
    assert tiny_law.rows(
        law,
        "SELECT count(*) FROM text_chunks WHERE embedding_version_id = 5 AND ((source_type = 'case_paragraph' AND "
        "source_id = 2) OR (source_type = 'statute_article' AND source_id = 4))",
    ) == [(0,)]
    assert (
        tiny_law.rows(
            law,
            "SELECT count(*) FROM text_chunks WHERE embedding_version_id = 5 AND source_type = 'decision_paragraph' "
            "AND source_id = 2",
        )[0][0]
        != 0
    )


@pytest.mark.parametrize("changes", [{"source_type": ("decision_paragraph",)}, {"limit": 3}])
def test_part_of_the_documents_completes_and_activates_nothing(law: Path, changes: dict[str, Any]) -> None:
    report = reembed(law, **changes)
    assert (report.complete, report.active) == (False, False)
    assert 0 < report.counts["documents_embedded"] <= 6
    assert reembed(law).active


def test_activation_is_rolled_back_and_stays_so(law: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reembed(law)
    reembed(law, version_id=6)
    assert active(law) == {1, 6}
    assert lines(capsys, "rollback", "--db", law, "--version-id", 6) == [
        "version 6 is inactive; version 5 is active again"
    ]
    assert active(law) == {1, 5}
    assert not reembed(law, version_id=6).active  # a nightly run does not undo what a person did
    assert active(law) == {1, 5}
    lines(capsys, "activate", "--db", law, "--version-id", 6)
    assert active(law) == {1, 6}


def test_versions_are_listed_compared_deleted_and_collected(law: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reembed(law)
    reembed(law, version_id=6, commit_interval=5)
    reembed(law, version_id=7)
    listed = lines(capsys, "versions", "--db", law)
    assert [line.split()[0] for line in listed if not line.startswith("      ")] == ["1", "5", "6", "7"]
    assert any("active, complete" in line for line in listed)
    compared = lines(capsys, "compare", "--db", law, "--version-id", 1, "--other", 7)
    assert compared[0].split() == ["version", "1", "version", "7"]
    assert compared[-1].split()[-2:] == ["0", "21"]  # 24 documents, three of which version 1 holds too
    with pytest.raises(ConfigError, match="is active"):
        command.main(["delete", "--db", str(law), "--version-id", "7"], {})
    assert lines(capsys, "gc", "--db", law, "--keep", 1)[0].startswith("version 5 is deleted")
    assert tiny_law.content(law, 5) == []
    assert tiny_law.rows(law, "SELECT count(*) FROM embeddings WHERE chunk_id NOT IN (SELECT id FROM text_chunks)") == [
        (0,)
    ]
    assert len(tiny_law.content(law, 6)) == len(tiny_law.content(law, 7)) > 24


def test_the_index_is_migrated_after_a_backup_and_can_be_put_back(
    law: Path, capsys: pytest.CaptureFixture[str], driver: str
) -> None:
    report = reembed(law)
    assert report.backup is not None
    assert (
        tiny_law.rows(report.backup, "SELECT sql FROM sqlite_master WHERE name = 'ux_text_chunks'")[0][0]
        == tiny_law.rows(
            tiny_law.make(law.with_name("fresh.db")), "SELECT sql FROM sqlite_master WHERE name = 'ux_text_chunks'"
        )[0][0]
    )
    assert tiny_law.rows(report.backup, "PRAGMA integrity_check") == [("ok",)]
    assert reembed(law).backup is None
    with pytest.raises(ConfigError, match="more than one version"):
        command.main(["restore-index", "--db", str(law)], {})
    lines(capsys, "rollback", "--db", law, "--version-id", 5)
    lines(capsys, "delete", "--db", law, "--version-id", 5)
    assert lines(capsys, "restore-index", "--db", law) == ["The unique index is the original one again"]
    assert tiny_law.rows(law, "SELECT count(*) FROM pragma_index_info('ux_text_chunks')") == [(3,)]
    assert len(tiny_law.rows(law, "SELECT * FROM text_chunks")) == 3


def test_replacing_all_versions_keeps_the_old_index_and_one_version(law: Path) -> None:
    report = reembed(law, replace_all_versions=True)
    assert report.backup is None
    assert tiny_law.rows(law, "SELECT count(*) FROM pragma_index_info('ux_text_chunks')") == [(3,)]
    assert tiny_law.rows(law, "SELECT DISTINCT embedding_version_id FROM text_chunks") == [(5,)]
    assert tiny_law.rows(law, "SELECT count(*) FROM embeddings WHERE version_id = 1") == [(0,)]


def test_replacing_a_document_leaves_the_same_id_of_another_type_alone(law: Path) -> None:
    """A first version of the old program deleted by type IN (...) AND id IN (...)."""
    reembed(law, replace_all_versions=True)
    before = tiny_law.rows(
        law,
        "SELECT id FROM text_chunks WHERE NOT (source_type = 'statute_article' AND source_id = 1 OR source_type = "
        "'case_paragraph' AND source_id = 2) ORDER BY 1",
    )
    tiny_law.change(law, "UPDATE statute_articles SET text = text || ' 다만, 그러하지 아니하다.' WHERE id = 1")
    tiny_law.change(law, "UPDATE case_paragraphs SET text = text || ' 끝.' WHERE case_id = 2")
    assert reembed(law, replace_all_versions=True).counts["documents_embedded"] == 2
    assert (
        tiny_law.rows(
            law,
            "SELECT id FROM text_chunks WHERE NOT (source_type = 'statute_article' AND source_id = 1 OR source_type = "
            "'case_paragraph' AND source_id = 2) ORDER BY 1",
        )
        == before
    )


def test_the_bits_depend_neither_on_the_commit_interval_nor_on_a_pause(law: Path, tmp_path: Path) -> None:
    other = tiny_law.make(tmp_path / "other.db")
    reembed(law)
    reembed(other, commit_interval=1, limit=None, source_type=("statute_article", "case_paragraph"))
    reembed(other, commit_interval=50)
    assert [row[1:] for row in tiny_law.content(law, 5)] == [row[1:] for row in tiny_law.content(other, 5)]


def test_another_model_never_gets_into_an_active_version(law: Path) -> None:
    reembed(law)
    before = tiny_law.content(law, 5)
    with pytest.raises(ConfigError, match=r"version 5 .* active, .* name a new --version-id"):
        reembed(law, tiny_law.HashingModel(revision="2"))
    with pytest.raises(ConfigError, match="version 1 is active and was made by legacy-model with 8 dimensions"):
        reembed(law, version_id=1, chunking_strategy="standard")
    with pytest.raises(ConfigError, match="has strategy dynamic, asked for is hybrid"):
        reembed(law, chunking_strategy="hybrid")
    assert tiny_law.content(law, 5) == before


def test_another_revision_embeds_an_inactive_version_again_and_another_dimension_does_not(law: Path) -> None:
    reembed(law, activate=False)
    report = reembed(law, tiny_law.HashingModel(revision="2"), activate=False)
    assert report.counts["documents_embedded"] == 24
    before = tiny_law.content(law, 5)
    with pytest.raises(ConfigError, match=r"vectors of 24 dimensions, the version holds 16"):
        reembed(law, tiny_law.HashingModel(revision="3", dim=24), activate=False)
    assert tiny_law.content(law, 5) == before


def test_without_a_number_the_active_version_of_the_strategy_is_meant(law: Path) -> None:
    assert reembed(law, version_id=None).version_id == 2
    assert tiny_law.rows(law, "SELECT version_name FROM embedding_versions WHERE id = 2") == [("v1.0.0-dynamic",)]
    assert reembed(law, version_id=None).counts["documents_embedded"] == 0


@dataclass(frozen=True)
class Precise(tiny_law.HashingEncoder):
    """An encoder that takes its time, and is off by a known angle."""

    seconds: float = 0.0
    off: float = 0.0

    def encode(self, rows: Any) -> Any:
        time.sleep(self.seconds)
        found = super().encode(rows)
        turned = found + self.off * np.roll(found, 1, axis=1)
        return (turned / np.linalg.norm(turned, axis=1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class Precisions(tiny_law.HashingModel):
    """float32 takes 100 ms a batch, bfloat16 40 and is nearly right, int8 none and is far off."""

    def open(self, precision: str) -> tiny_law.HashingEncoder:
        return {"float32": Precise(seconds=0.1), "bfloat16": Precise(seconds=0.04, off=0.01), "int8": Precise(off=0.5)}[
            precision
        ]


@pytest.mark.parametrize(("min_cosine", "precision"), [(0.995, "bfloat16"), (0.5, "int8"), (1.0, "float32")])
def test_a_precision_is_taken_when_it_is_faster_and_close_and_stays_the_versions(
    law: Path, min_cosine: float, precision: str
) -> None:
    reembed(law, Precisions(), precision="auto", min_cosine=min_cosine)
    with Database.open(law) as db:
        made = versions.get(db, 5).made
    assert made["precision"] == precision
    assert precision == "float32" or min_cosine <= made["min_cosine"] < 1
    tiny_law.change(law, "UPDATE statute_articles SET text = text || ' 다만, 그러하지 아니하다.' WHERE id = 2")
    assert reembed(law, Precisions()).counts["documents_embedded"] == 1  # without a flag: as the version was made
    with Database.open(law) as db:
        assert versions.get(db, 5).made == {**made, "complete": True}
    with pytest.raises(ConfigError, match=f"made with precision {precision}"):
        reembed(law, Precisions(), precision="int8" if precision != "int8" else "float32")


def test_int8_is_refused_where_a_sample_is_too_far_from_float32(law: Path) -> None:
    with pytest.raises(ConfigError, match=r"--precision int8 is refused for hashing: the least cosine .* --min_cosine"):
        reembed(law, Precisions(), precision="int8")
    assert active(law) == {1}
    assert reembed(law, Precisions(), precision="int8", min_cosine=0.5).complete


def test_bfloat16_without_the_instructions_is_refused_and_said_where_a_version_is_bound_to_it(
    law: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reembed(law)
    monkeypatch.setattr(resources, "instruction_sets", lambda: {"avx2"})
    with Database.open(law) as db:
        version = versions.get(db, 5)
    with pytest.raises(ConfigError, match=r"without instructions for it \(avx2\)"):
        making._check_bfloat16(None, {})
    making._check_bfloat16(version, {"precision": "bfloat16"})
    assert "Version 5 was made in bfloat16 and goes on in it" in caplog.text


def test_a_plan_writes_nothing_and_loads_nothing(law: Path, calls: Path) -> None:
    before = law.read_bytes()
    said = plan(
        ReembedConfig(db=str(law), version_id=5, chunking_strategy="dynamic", dry_run=True),
        model=tiny_law.HashingModel(),
        environ={},
    )
    assert "would be registered" in said[0]
    assert "6 to embed" in said[2]
    assert law.read_bytes() == before
    assert not calls.exists()


def test_vectors_kept_as_float16_are_half_as_large_and_found_all_the_same(law: Path) -> None:
    reembed(law, vector_dtype="float16")
    reembed(law, version_id=6)
    assert tiny_law.rows(law, "SELECT DISTINCT length(vector) FROM embeddings WHERE version_id = 5") == [(32,)]
    with Database.open(law) as db:
        queries = next(search.pages(db, 6))[1][:4]
        near = search.brute_force(db, 5, queries, k=5)
        exact = search.brute_force(db, 6, queries, k=5)
    assert all(abs(one[0] - other[0]) < 1e-3 for a, b in zip(near, exact) for one, other in zip(a, b))
    with pytest.raises(ConfigError, match="made with vector_dtype float16"):
        reembed(law, vector_dtype="float32")


def test_an_index_that_finds_what_brute_force_finds_is_built_before_activation(law: Path) -> None:
    pytest.importorskip("faiss")
    reembed(law, faiss="flat")
    with Database.open(law) as db:
        noted = versions.get(db, 5).made["faiss"]
        queries = next(search.pages(db, 5))[1][::7]
        exact = search.brute_force(db, 5, queries)
        indexed = search.search_index(law, 5, noted, queries)
    assert [[chunk for _, chunk in row] for row in indexed] == [[chunk for _, chunk in row] for row in exact]
    tiny_law.change(law, "UPDATE statute_articles SET text = text || ' 다만, 그러하지 아니하다.' WHERE id = 2")
    reembed(law)
    with Database.open(law) as db:
        assert "faiss" not in versions.get(db, 5).made  # stale: search goes through the vectors until it is built again


def test_an_index_that_misses_is_refused_and_nothing_is_activated(law: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    honest, reads = search.pages, []

    def other_vectors_at_first(db: Database, version_id: int, source_types: Any = ()) -> Iterator[Any]:
        """What the index is built from is not what brute force reads."""
        reads.append(version_id)
        for ids, vectors in honest(db, version_id):
            yield ids, vectors[:, ::-1] if len(reads) == 1 else vectors

    reembed(law, activate=False)
    monkeypatch.setattr(search, "pages", other_vectors_at_first)
    with pytest.raises(DamagedError, match=r"finds .* of what brute force finds"):
        reembed(law, faiss="flat")
    assert active(law) == {1}
    assert not search.index_path(law, 5).exists()


# --- what is no law database, and what cannot be written --------------------------------------------------------------


def test_what_is_no_law_database_is_one_line(tmp_path: Path, driver: str) -> None:
    nothing, text, empty, part = (tmp_path / name for name in ("no.db", "text.db", "empty.db", "part.db"))
    text.write_text("이것은 데이터베이스가 아니다. " * 200)
    tiny_law.change(empty, "CREATE TABLE x(y)")
    tiny_law.make(part)
    tiny_law.change(part, "DROP TABLE interpretation_paragraphs")
    for path, said in (
        (nothing, "no such database file"),
        (text, "is not an SQLite database"),
        (empty, "is not a law database"),
        (part, "no table interpretation_paragraphs"),
    ):
        with pytest.raises(SourceError, match=said):
            reembed(path)


def test_a_locked_database_is_one_line(law: Path, monkeypatch: pytest.MonkeyPatch, driver: str) -> None:
    """Held by another process: file locks do not keep two SQLite libraries of one process apart."""
    monkeypatch.setattr(databases, "BUSY_SECONDS", 0)
    hold = (
        f"import sqlite3, sys; db = sqlite3.connect({str(law)!r}, isolation_level=None); db.execute('BEGIN "
        f"EXCLUSIVE'); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StorageError, match="locked"):
        reembed(law)
    holder.communicate("", timeout=30)
    assert reembed(law).complete


@pytest.mark.skipif(os.geteuid() != 0, reason="permissions bind this user already")
def test_a_file_that_may_not_be_written_is_one_line() -> None:
    """As a user without rights, outside of pytest's own directory, which that user cannot even enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        law = tiny_law.make(Path(folder) / "law.db")
        law.chmod(0o444)
        before = law.read_bytes()
        program = (
            f"import os, sys; sys.path.insert(0, {str(tiny_law.ROOT / 'tests')!r}); import tiny_law, pathlib, "
            f"moai.reembedding.build; os.setuid(65534); "
            f"sys.exit(tiny_law.main(tiny_law.small(pathlib.Path({str(law)!r}))))"
        )
        failed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert failed.returncode == 74, failed.stderr
        assert "read-only" in failed.stderr.splitlines()[-1]
        assert "Traceback" not in failed.stderr
        assert law.read_bytes() == before


def test_what_no_run_could_do_is_refused_before_anything(law: Path) -> None:
    before = law.read_bytes()
    for changes, said in (
        ({"doc_batch_size": 0}, "doc_batch_size = 0"),
        ({"query_type": "general", "chunking_strategy": "standard"}, "belongs to"),
        ({"source_type": ("law",)}, "source_type = 'law'"),
        ({"min_cosine": 2.0}, "min_cosine"),
    ):
        with pytest.raises(MoaiError, match=said):
            reembed(law, **changes)
    assert law.read_bytes() == before


def test_the_wal_reset_bug_is_known_by_version() -> None:
    has = [(3, 40, 1), (3, 51, 2), (3, 50, 6), (3, 45, 0)]
    has_not = [(3, 51, 3), (3, 50, 7), (3, 44, 6), (3, 54, 1), (3, 6, 9)]
    assert [version for version in has + has_not if databases.wal_reset_bug(version)] == has


def test_the_writer_is_tuned_journal_first_and_foreign_keys_on(law: Path) -> None:
    from moai.reembedding.options import GIB, pragmas
    from moai.reembedding.schema import tune

    with Database.open(law, writable=True) as db:
        tune(db, pragmas(16 * GIB))
        names = ("journal_mode", "foreign_keys", "cache_size", "mmap_size", "synchronous", "temp_store")
        assert [db.value(f"PRAGMA {name}") for name in names] == ["wal", 1, -256_000, 512 * 2**20, 1, 2]
