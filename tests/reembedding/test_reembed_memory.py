"""What a run holds does not grow with the database. In a process of its own, so that nothing else's memory is
measured.
"""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_law

PEAK = """
import sys, threading
import tiny_law
from moai.reembedding.build import build
from moai.reembedding.options import ReembedConfig

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
config = ReembedConfig(db=sys.argv[1], version_id=5, doc_batch_size=50, embedding_batch_size=64, commit_interval=2)
build(config, model=tiny_law.HashingModel(), environ={})
done.set()
watcher.join()
print(peak * 1024)
"""


def peak_bytes(path: Path, articles: int) -> int:
    tiny_law.make(path, documents=1)
    text = tiny_law.sentence(1, 1600)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executemany(
            "INSERT INTO statute_articles(id, statute_id, text) VALUES(?, 1, ?)",
            [(n, f"{text} {n}") for n in range(100, 100 + articles)],
        )
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        cwd=tiny_law.ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_database(tmp_path: Path) -> None:
    small, large = tmp_path / "small.db", tmp_path / "large.db"
    least, most = peak_bytes(small, 300), peak_bytes(large, 3000)
    grown = large.stat().st_size - small.stat().st_size
    assert grown > 25e6
    assert most - least < grown / 4


def test_device_batches_have_few_shapes(minilm: str) -> None:
    """What runs below torch keeps a program for each of them. None is wider than the model reads."""
    from moai.reembedding.embed import TokenBudget, encode_all
    from moai.reembedding.encoders import SentenceModel

    encoder = SentenceModel.find(minilm).open("float32")
    encoder.tokens.max_tokens = 93
    shapes: set[tuple[int, int]] = set()
    encoder._transformer.register_forward_pre_hook(
        lambda _, features: shapes.add(tuple(features[0]["input_ids"].shape))
    )
    encode_all(encoder, [[101, *[1000] * (length - 2), 102] for length in range(2, 94)], TokenBudget(600))
    assert {width for _, width in shapes} <= {*range(8, 93, 8), 93}
    assert 93 in {width for _, width in shapes}
    assert len(shapes) <= 13


@pytest.mark.long
def test_batches_of_any_number_of_rows_leave_nothing_behind(minilm: str) -> None:
    """The last batch of a call has the rows that are left. In a process of its own, since a library reads its setting
    once.
    """
    done = subprocess.run(
        [sys.executable, "-c", SHAPES, minilm], cwd=tiny_law.ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 25e6  # 64 MB where the library keeps a program for each number of rows, else 4


SHAPES = """
import sys
from moai.reembedding.embed import TokenBudget, encode_all
from moai.reembedding.encoders import SentenceModel

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

encoder = SentenceModel.find(sys.argv[1]).open("bfloat16")
for rows in range(48, 0, -1):
    encode_all(encoder, [[101] * 8] * rows, TokenBudget())
    if rows == 40:
        before = anonymous()
print((anonymous() - before) * 1024)
"""
