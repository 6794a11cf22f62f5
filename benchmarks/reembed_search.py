"""Search in many generated documents: seconds, memory, bytes of each index, recall against brute force, milliseconds.

    python benchmarks/reembed_search.py --documents 100000

The encoder hashes (dimensions 384), so what is measured is the writer, the indexes and the searches, not a model. With
`--load 1000` it reads so many times through the serving alias while versions are built, activated and rolled back.
"""

from __future__ import annotations

import argparse
import resource
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import tiny_law  # noqa: E402

from moai.core.errors import DamagedError  # noqa: E402
from moai.reembedding import command, keyword, search, vectors, versions  # noqa: E402
from moai.reembedding.build import build  # noqa: E402
from moai.reembedding.database import Database  # noqa: E402
from moai.reembedding.options import ReembedConfig  # noqa: E402

VERSION = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--load", type=int, default=0)
    parser.add_argument("--questions", type=int, default=50)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (under_load if given.load else indexes)(given, Path(folder) / "law.db")


def generated(path: Path, documents: int) -> Path:
    tiny_law.make(path, documents=2)
    with sqlite3.connect(path) as db:
        db.executemany(
            "INSERT INTO statute_articles(id, statute_id, article_no, text) VALUES(?, 1, ?, ?)",
            ((n, str(n), tiny_law.sentence(n, 200 + n % 200)) for n in range(100, 100 + documents)),
        )
    db.close()
    return path


def indexes(given: argparse.Namespace, path: Path) -> None:
    generated(path, given.documents)
    plain = path.stat().st_size
    started, cpu = time.perf_counter(), time.process_time()
    build(
        ReembedConfig(db=str(path), version_id=VERSION, chunking_strategy="dynamic", backup=False),
        model=tiny_law.HashingModel(dim=384),
        environ={},
    )
    took, used = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"build: {took:,.0f} s ({used:,.0f} s of CPU), peak {peak:,.0f} MB; {plain / 1e6:,.0f} MB before")
    with Database.open(path, writable=True) as db:
        vectors.load(db)
        sizes = dict(db.rows("SELECT name, sum(pgsize) FROM dbstat GROUP BY name"))
        for label, prefix in (("words", keyword.table(VERSION)), ("sqlite-vec", vectors.table(VERSION))):
            print(f"{label}: {sum(size for name, size in sizes.items() if str(name).startswith(prefix)) / 1e6:,.0f} MB")
        print(f"text_chunks {sizes['text_chunks'] / 1e6:,.0f} MB, embeddings {sizes['embeddings'] / 1e6:,.0f} MB")
        measured("sqlite-vec", db, given, lambda rows: [vectors.find(db, VERSION, row, k=10) for row in rows])
        measured("brute force", db, given, lambda rows: search.brute_force(db, VERSION, rows, k=10))
        texts = [tiny_law.sentence(n * 7, 40) for n in range(given.questions)]
        took_each = [seconds(lambda text=text: keyword.find(db, VERSION, text, k=10)) for text in texts]
        print(f"words: {1000 * median(took_each):.1f} ms a question", flush=True)
        for kind in ("flat", "hnsw"):
            started = time.perf_counter()
            try:
                noted = search.build_index(db, VERSION, kind)
            except DamagedError as error:  # found less than it must: such an index is never used
                print(f"FAISS {kind}: {error}", flush=True)
                continue
            said = f"FAISS {kind}: built in {time.perf_counter() - started:,.1f} s, {noted['bytes'] / 1e6:,.0f} MB"
            print(f"{said}, recall {noted['recall']:.3f}", flush=True)
            find = partial(search.search_index, path, VERSION, noted, k=10)
            measured(f"FAISS {kind}", db, given, find)


def measured(label: str, db: Database, given: argparse.Namespace, find: Callable[..., list[search.Found]]) -> None:
    queries = search._sample(db, VERSION)[: given.questions]
    exact = search.brute_force(db, VERSION, queries, k=10)
    found = find(queries)
    hits = [abs(one[0] - other[0]) <= 1e-4 for a, b in zip(found, exact) for one, other in zip(a, b)]
    one = [seconds(lambda row=row: find(row[None])) for row in queries[:10]]
    ten = [seconds(lambda: find(queries[:10])) / 10 for _ in range(5)]
    print(
        f"{label}: recall@10 {np.mean(hits):.3f} against brute force, {1000 * median(one):.1f} ms a question, "
        f"{1000 * median(ten):.1f} ms of ten at a time",
        flush=True,
    )


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def under_load(given: argparse.Namespace, path: Path) -> None:
    tiny_law.make(path, documents=given.documents)
    tiny_law.reembed(path, activate=False)
    done, seen, took, wrong = threading.Event(), set(), [], []

    def read() -> None:
        sql = "SELECT version_id, count(*), sum(vector IS NULL) FROM serving_chunks GROUP BY version_id"
        with Database.open(path) as db:  # not another SQLite library in one process
            while len(took) < given.load or not done.is_set():
                started = time.perf_counter()
                rows = db.rows(sql)
                took.append(time.perf_counter() - started)
                if len(rows) != 1 or rows[0][2]:
                    wrong.append(rows)
                seen.add(tuple(rows[0]) if rows else ())
                time.sleep(0.005)

    reader = threading.Thread(target=read)
    reader.start()
    number = 5
    while len(took) < given.load:
        for version_id in (number, number + 1):
            tiny_law.reembed(path, version_id=version_id, activate=False)
            command.main(["activate", "--db", str(path), "--version-id", str(version_id)], {})
        command.main(["rollback", "--db", str(path), "--version-id", str(number + 1)], {})
        command.main(["delete", "--db", str(path), "--version-id", str(number + 1)], {})
        number += 2
    done.set()
    reader.join()
    with Database.open(path) as db:
        built = len(versions.listing(db))
    print(
        f"{len(took):,} reads, {len(wrong)} empty or mixed; {len(seen)} states of {built} versions; median "
        f"{1000 * median(took):.1f} ms, longest {1000 * max(took):.0f} ms"
    )


if __name__ == "__main__":
    main()
