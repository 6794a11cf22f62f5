"""Stages on every executor: their order, the decision between them, and a run that was killed there goes on from its
receipts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_engine import JsonFiles, Numbers

from moai.core.errors import SourceError
from moai.engine.executor import Executor, Serial
from moai.engine.pipeline import Pipeline, count
from moai.engine.run import Done, total
from moai.engine.stage import Results, Stage, run_stages

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class AtLeast:
    least: int

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            kept = [n for n in batch["n"].to_pylist() if n >= self.least]
            count("kept", len(kept))
            yield pa.record_batch({"n": pa.array(kept, pa.int64())})


@dataclass
class Heard:
    """A watch that keeps what it hears, in the order it hears it."""

    said: list[Any] = field(default_factory=list)

    def on_documents(self, number: int) -> None:
        pass

    def on_shard(self, done: Done) -> None:
        self.said.append(done.reused)

    def close(self, results: Results) -> None:
        self.said.append([len(done) for done in results])


def stages(cache: Path, heard: Heard) -> tuple[Stage[None, int], Stage[int, tuple[int, list[Done]]]]:
    """Numbers 0 to 29 in three shards, and 0 to 9 in another pipeline; then those of the first that are at least the
    mean of all.
    """

    def made(name: str, shards: int, key: str, *transforms: AtLeast) -> Pipeline:
        return Pipeline(source=Numbers(shards, name), transforms=transforms, sink=JsonFiles(cache), transform_key=key)

    def mean(_: None, results: Results) -> int:
        values = [n for part in results for done in part for n in read(cache, done)]
        return sum(values) // len(values)

    return (
        Stage(pipelines=lambda _: [made("a", 3, "all"), made("b", 1, "others")], reduce=mean, watch=lambda *_: heard),
        Stage(
            pipelines=lambda least: [made("c", 3, f"at least {least}", AtLeast(least))],
            reduce=lambda least, results: (least, results[0]),
            watch=lambda *_: heard,
        ),
    )


def read(cache: Path, done: Done) -> list[int]:
    return list(json.loads((cache / "shards" / f"{done.receipt.shard_key}.arrow").read_text()))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    return tmp_path


LARGE = [[], list(range(12, 20)), list(range(20, 30))]
"""The mean is 12: (0 + ... + 29 + 0 + ... + 9) / 40."""


def test_the_second_stage_is_made_of_what_the_first_decided(executor: Executor, cache: Path) -> None:
    heard = Heard()
    mean, done = run_stages(stages(cache, heard), executor)
    assert mean == 12
    assert [read(cache, one) for one in done] == LARGE
    assert total(done)["kept"] == 18
    assert heard.said == [False] * 4 + [[3, 1]] + [False] * 3 + [
        [3]
    ]  # all of the first stage, its end, then the second


def test_a_second_run_makes_nothing_and_decides_the_same(executor: Executor, cache: Path) -> None:
    mean, done = run_stages(stages(cache, Heard()), executor)
    files = {path: path.stat().st_mtime_ns for path in (cache / "shards").iterdir()}
    heard = Heard()
    again, found = run_stages(stages(cache, heard), executor)
    assert heard.said == [True] * 4 + [[3, 1]] + [True] * 3 + [[3]]
    assert (again, [one.receipt for one in found]) == (mean, [one.receipt for one in done])
    assert {path: path.stat().st_mtime_ns for path in (cache / "shards").iterdir()} == files


@pytest.mark.parametrize("num_proc", [0, 2])
def test_killed_between_the_stages_the_next_run_goes_on_with_the_second(cache: Path, num_proc: int) -> None:
    program = (
        "import sys; from pathlib import Path; from moai.engine.executor import make_executor; from moai.engine.stage "
        "import run_stages\n"
        "from test_stages_engine import Heard, stages\n"
        f"if __name__ == '__main__': run_stages(stages(Path(sys.argv[1]), Heard()), make_executor({num_proc}))"
    )
    (cache / "points").mkdir()
    armed = {"MOAI_TESTING": "1", "MOAI_FAILPOINT_DIR": str(cache / "points"), "MOAI_FAILPOINT": "stage.decided=kill"}
    environment = {**os.environ, **armed, "PYTHONPATH": f"{Path(__file__).parent}:{ROOT}"}
    killed = subprocess.run(
        [sys.executable, "-c", program, str(cache)], env=environment, capture_output=True, text=True, timeout=100
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((cache / "shards").glob("*.json"))) == 4  # the first stage, and nothing of the second
    heard = Heard()
    _, done = run_stages(stages(cache, heard), Serial())
    assert heard.said == [True] * 4 + [[3, 1]] + [False] * 3 + [[3]]
    assert [read(cache, one) for one in done] == LARGE


def test_a_watch_ends_the_run_before_anything_is_decided(cache: Path) -> None:
    class Refuses(Heard):
        def close(self, results: Results) -> None:
            raise SourceError("too many are bad")

    def never(_: None, results: Results) -> None:
        raise AssertionError("nothing is decided about a stage that was refused")

    first, _ = stages(cache, Heard())
    with pytest.raises(SourceError, match="too many are bad"):
        run_stages([Stage(pipelines=first.pipelines, reduce=never, watch=lambda *_: Refuses())], Serial())
    assert len(list((cache / "shards").glob("*.json"))) == 4
