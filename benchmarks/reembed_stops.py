"""Random stops and kills of a run with a real model, a writer and a reader beside it: nothing lost, the same bits.

    python benchmarks/reembed_stops.py --model DIR --stops 100

Half are SIGTERM, half SIGKILL, at a random moment. Before each, the reader sees the old version whole; at the end the
version is compared with one that was made undisturbed. The moments come from a seed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import tiny_law  # noqa: E402

SCRIPT = HERE.parent / "scripts" / "migrations" / "re_embed_existing_data_optimized.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--stops", type=int, default=100)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--longest", type=float, default=12.0)
    given = parser.parse_args()
    chance, took, ended = random.Random(0), [], 0
    with tempfile.TemporaryDirectory() as folder:
        before = tiny_law.make(Path(folder) / "before.db", documents=given.documents)
        after, law = Path(folder) / "after.db", Path(folder) / "law.db"
        shutil.copy(before, after)
        shutil.copy(before, law)
        subprocess.run(command(given, after), check=True, capture_output=True)
        wanted = [row[:17] + row[20:] for row in tiny_law.content(after, 5)]
        over, errors, writes = threading.Event(), [], [0]
        threads = [threading.Thread(target=beside, args=(law, over, errors, writes))]
        for thread in threads:
            thread.start()
        for number in range(given.stops):
            if not number % 10:  # from the beginning again
                shutil.rmtree(Path(folder) / "old", ignore_errors=True)
                if number:
                    finish(given, law, wanted)
                    tiny_law.change(law, "UPDATE embedding_versions SET is_active = 0 WHERE id = 5")
                    tiny_law.change(law, "DELETE FROM reembed_receipts")
                    tiny_law.change(law, "DELETE FROM embeddings WHERE version_id = 5")
                    tiny_law.change(law, "DELETE FROM text_chunks WHERE embedding_version_id = 5")
            sent = chance.choice([signal.SIGTERM, signal.SIGKILL])
            process = subprocess.Popen(command(given, law), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            try:
                process.wait(timeout=chance.uniform(0.5, given.longest))
                ended += 1
            except subprocess.TimeoutExpired:
                began = time.monotonic()
                process.send_signal(sent)
                process.wait(timeout=60)
                if sent == signal.SIGTERM:
                    took.append(time.monotonic() - began)
            assert tiny_law.rows(law, "PRAGMA quick_check") == [("ok",)]
        finish(given, law, wanted)
        over.set()
        for thread in threads:
            thread.join()
    print(
        f"{given.stops} stops ({len(took)} by SIGTERM, {ended} runs were over): longest end {max(took):.2f} s, "
        f"median {sorted(took)[len(took) // 2]:.2f} s; {writes[0]:,} writes and reads beside, {len(errors)} errors; "
        f"the same {len(wanted):,} chunks and vectors"
    )


def command(given: argparse.Namespace, path: Path) -> list[str]:
    flags = "--version-id 5 --chunking-strategy dynamic --doc-batch-size 20 --commit-interval 2 --no_backup"
    return [sys.executable, str(SCRIPT), "--db", str(path), "--model", given.model, *flags.split()]


def finish(given: argparse.Namespace, law: Path, wanted: list[tuple[object, ...]]) -> None:
    subprocess.run(command(given, law), check=True, capture_output=True)
    found = [row[:17] + row[20:] for row in tiny_law.content(law, 5)]
    # Ids go on where a version was emptied and made again: everything else is the same, vectors to the bit.
    assert [row[1:] for row in found] == [row[1:] for row in wanted]


def beside(law: Path, over: threading.Event, errors: list[str], writes: list[int]) -> None:
    """A web application: it writes to a table of its own and reads the serving version."""
    with sqlite3.connect(law, timeout=30, isolation_level=None) as db:
        db.execute("CREATE TABLE IF NOT EXISTS visits(id INTEGER PRIMARY KEY, at REAL)")
        while not over.is_set():
            try:
                db.execute("INSERT INTO visits(at) VALUES(?)", (time.time(),))
                if db.execute("SELECT count(*) FROM text_chunks WHERE embedding_version_id = 1").fetchone() != (3,):
                    errors.append("the old version is not whole")
                writes[0] += 1
            except sqlite3.Error as error:
                errors.append(str(error))
            time.sleep(0.05)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
