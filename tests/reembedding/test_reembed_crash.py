"""kill -9 at every place that a re-embedding passes: old embeddings stay, the rerun ends with the bits of an
undisturbed run.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny_law

PROGRAM = (sys.executable, str(tiny_law.ROOT / "tests" / "tiny_law.py"))
OLD = (
    "SELECT c.*, e.* FROM text_chunks c JOIN embeddings e ON e.chunk_id = c.id WHERE c.embedding_version_id = 1 "
    "ORDER BY c.id"
)


def run(
    db: Path, *flags: str, points: Path | None = None, at: str = "", calls: Path | None = None
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **({"CALLS": str(calls)} if calls else {})}
    if points is not None:
        points.mkdir(exist_ok=True)
        env |= {"MOAI_TESTING": "1", "MOAI_FAILPOINT_DIR": str(points), "MOAI_FAILPOINT": at}
    return subprocess.run([*PROGRAM, str(db), *flags], env=env, capture_output=True, text=True, timeout=600)


Undisturbed = tuple[Path, Path, dict[str, int]]
"""(database before, database after, how often each place was passed)."""


def without_kill(before: Path, folder: Path) -> Undisturbed:
    after, points = folder / "after.db", folder / "points"
    shutil.copy(before, after)
    done = run(after, points=points)
    assert done.returncode == 0, done.stderr
    passed = Counter(path.name.rpartition(".")[0] for path in points.iterdir())
    # A heartbeat comes when a slow machine gives it time: not in every run, and it writes a sample too.
    timeless = {name: count for name, count in passed.items() if not name.startswith("reembed.beat")}
    return before, after, {**timeless, "reembed.sample": timeless["reembed.run_row"]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A version built from nothing."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return without_kill(tiny_law.make(folder / "before.db"), folder)


@pytest.fixture(scope="module")
def edited(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The same version brought up to date after documents were edited: old chunks are deleted."""
    folder = tmp_path_factory.mktemp("edited")
    before = folder / "before.db"
    shutil.copy(undisturbed[1], before)
    tiny_law.change(
        before, "UPDATE case_paragraphs SET text = text || ? WHERE para_index = 1", (tiny_law.sentence(77, 300),)
    )
    tiny_law.change(before, "DELETE FROM statute_articles WHERE id = 2")
    return without_kill(before, folder)


def check_kill(undisturbed: Undisturbed, folder: Path, at: str) -> None:
    before, after, _ = undisturbed
    db = folder / "law.db"
    shutil.copy(before, db)
    killed = run(db, points=folder / "points", at=f"{at}=kill")
    assert killed.returncode == -signal.SIGKILL, (at, killed.stderr)
    assert tiny_law.rows(db, "PRAGMA integrity_check") == [("ok",)]
    assert tiny_law.rows(db, "PRAGMA foreign_key_check") == []
    assert tiny_law.rows(db, OLD) == tiny_law.rows(before, OLD)
    assert tiny_law.rows(
        db, "SELECT id FROM embedding_versions WHERE chunking_strategy = 'standard' AND is_active"
    ) == [(1,)]
    if "reembed_receipts" in {row[0] for row in tiny_law.rows(db, "SELECT name FROM sqlite_master")}:
        halves = (
            "SELECT count(*) FROM reembed_receipts r WHERE chunks <> (SELECT count(*) FROM text_chunks c JOIN "
            "embeddings ON chunk_id = c.id WHERE c.source_type = r.source_type AND c.source_id = r.source_id AND "
            "embedding_version_id = 5)"
        )
        assert tiny_law.rows(db, halves) == [(0,)]
        strangers = (
            "SELECT count(*) FROM text_chunks c WHERE embedding_version_id = 5 AND NOT EXISTS (SELECT 1 FROM "
            "reembed_receipts r WHERE r.source_type = c.source_type AND r.source_id = c.source_id)"
        )
        assert tiny_law.rows(db, strangers) == [(0,)]
    again = run(db)
    assert again.returncode == 0, again.stderr
    assert tiny_law.content(db, 5) == tiny_law.content(after, 5)
    assert tiny_law.rows(db, OLD) == tiny_law.rows(before, OLD)
    assert tiny_law.rows(db, "SELECT is_active FROM embedding_versions WHERE id = 5") == [(1,)]


FEW = ("reembed.register.commit:1", "reembed.insert_embedding:9", "reembed.set_active:1")


@pytest.mark.parametrize("at", FEW)
def test_a_kill_between_two_statements_loses_nothing(undisturbed: Undisturbed, tmp_path: Path, at: str) -> None:
    check_kill(undisturbed, tmp_path, at)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("which", ["undisturbed", "edited"])
def test_a_kill_at_any_place_loses_nothing(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Every place, at its first and last occurrence and at some between."""
    found: Undisturbed = request.getfixturevalue(which)
    places = [
        f"{name}:{n}"
        for name, count in sorted(found[2].items())
        for n in sorted({1, 2, count // 3, count // 2, count})
        if 1 <= n <= count
    ]
    assert len(places) >= 40
    assert (
        which == "undisturbed"
        or {"reembed.delete_embeddings", "reembed.delete_chunks", "reembed.forget"} <= found[2].keys()
    )
    for number, at in enumerate(places):
        folder = tmp_path / str(number)
        folder.mkdir()
        check_kill(found, folder, at)
    print(f"{len(places)} places")


def test_edited_documents_keep_their_old_embeddings_until_the_new_ones_are_there(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    at = "reembed.insert_embedding:1"  # the old ones are deleted, in the same transaction
    db = tmp_path / "law.db"
    shutil.copy(undisturbed[1], db)
    before = tiny_law.content(db, 5)
    tiny_law.change(
        db,
        "UPDATE case_paragraphs SET text = text || ? WHERE case_id IN (1, 2) AND para_index = 1",
        (tiny_law.sentence(77, 300),),
    )
    assert run(db, points=tmp_path / "points", at=f"{at}=kill").returncode == -signal.SIGKILL
    assert tiny_law.content(db, 5) == before
    assert run(db).returncode == 0
    assert tiny_law.content(db, 5) != before


def test_a_crash_encodes_again_at_most_what_was_not_committed(undisturbed: Undisturbed, tmp_path: Path) -> None:
    db = tmp_path / "law.db"
    shutil.copy(undisturbed[0], db)
    assert run(db, points=tmp_path / "points", at="reembed.batch.committed:2=kill").returncode == -signal.SIGKILL
    committed = len(tiny_law.content(db, 5))
    calls = tmp_path / "calls"
    assert run(db, calls=calls).returncode == 0
    encoded = sum(int(line) for line in calls.read_text().split() if line != "loaded")
    assert committed > 0
    assert encoded == len(tiny_law.content(undisturbed[1], 5)) - committed


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(undisturbed: Undisturbed, tmp_path: Path) -> None:
    db = tmp_path / "law.db"
    shutil.copy(undisturbed[0], db)
    failed = run(db, points=tmp_path / "points", at="reembed.batch.commit:2=enospc")
    assert failed.returncode not in (0, -signal.SIGKILL)
    kept = tiny_law.content(db, 5)
    assert 0 < len(kept) < len(tiny_law.content(undisturbed[1], 5))
    assert tiny_law.rows(db, "SELECT state FROM reembed_runs") == [("failed",)]
    assert run(db).returncode == 0
    assert tiny_law.content(db, 5) == tiny_law.content(undisturbed[1], 5)


def test_a_real_file_size_limit_is_one_line(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a full disk: SQLite itself gets the error."""
    db = tiny_law.make(tmp_path / "law.db", documents=40)
    limit = db.stat().st_size * 2
    program = (
        f"import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.argv = {['x', str(db)]!r}; "
        f"sys.path.insert(0, {str(tiny_law.ROOT / 'tests')!r}); import tiny_law; from pathlib import Path; "
        f"sys.exit(tiny_law.main(tiny_law.small(Path({str(db)!r}))))"
    )
    failed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert failed.returncode == 74, failed.stderr
    assert "disk" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
    assert tiny_law.rows(db, "PRAGMA integrity_check") == [("ok",)]
    assert len(tiny_law.rows(db, OLD)) == 3
    assert run(db).returncode == 0
    assert tiny_law.rows(db, "SELECT is_active FROM embedding_versions WHERE id = 5") == [(1,)]


def test_a_stop_keeps_what_is_committed_and_names_the_signal(undisturbed: Undisturbed, tmp_path: Path) -> None:
    db, sent = tmp_path / "law.db", signal.SIGTERM
    shutil.copy(undisturbed[0], db)
    process = tiny_law.paused([*PROGRAM, str(db)], tmp_path / "points", "reembed.batch.begin:2")
    process.send_signal(sent)
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 128 + sent, error
    assert "Traceback" not in error
    assert tiny_law.rows(db, "SELECT state, message FROM reembed_runs") == [
        ("interrupted", f"stopped by {sent.name}; kept")
    ]
    assert run(db).returncode == 0
    assert tiny_law.content(db, 5) == tiny_law.content(undisturbed[1], 5)


def test_a_second_writer_is_told_who_the_first_is(undisturbed: Undisturbed, tmp_path: Path) -> None:
    db, points = tmp_path / "law.db", tmp_path / "points"
    shutil.copy(undisturbed[0], db)
    first = tiny_law.paused([*PROGRAM, str(db)], points, "reembed.batch.begin:1")
    second = run(db)
    assert second.returncode == 74
    assert f"pid {first.pid}" in second.stderr.splitlines()[-1]
    (points / "go").touch()
    first.communicate(timeout=600)
    assert first.returncode == 0
    assert tiny_law.content(db, 5) == tiny_law.content(undisturbed[1], 5)


def test_sqlite_itself_finds_the_undisturbed_result_whole(undisturbed: Undisturbed) -> None:
    after = undisturbed[1]
    with sqlite3.connect(after) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()
    assert sum(count for name, count in undisturbed[2].items() if name.startswith("reembed.")) > 200
    assert undisturbed[2]["reembed.batch.begin"] >= 4
    assert (
        "reembed.delete_embeddings" not in undisturbed[2]
    )  # new documents have none: without an index each would search all of them
