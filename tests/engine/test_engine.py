"""The engine on every executor: order, reuse, errors. What becomes of workers that end is in test_workers.py."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from moai.cache.ledger import Ledger
from moai.core.errors import SourceError
from moai.core.files import publish_file
from moai.engine.executor import Executor, Processes
from moai.engine.pipeline import Meter, Pipeline, Raw, Receipt, Sealed, Shard, advance, count, run_shard, shard_key
from moai.engine.run import Done, run


@dataclass(frozen=True)
class Numbers:
    """Shards of ten numbers each: small enough to check by hand."""

    shard_count: int
    name: str = "train"

    def shards(self) -> Iterator[Shard]:
        for number in range(self.shard_count):
            yield Shard(f"{self.name}:{number:05d}", (number,), "", 10)

    def digest(self, shard: Shard) -> Raw:
        meter = Meter()
        meter.begin_segment()
        meter.update(str(shard.segments).encode())
        return meter.raw()

    def read(self, shard: Shard, meter: Meter) -> Iterator[pa.RecordBatch]:
        meter.begin_segment()
        meter.update(str(shard.segments).encode())
        for first in range(0, 10, 4):
            yield pa.record_batch(
                {"n": pa.array(range(shard.segments[0] * 10 + first, shard.segments[0] * 10 + min(10, first + 4)))}
            )

    def remember(self, shard: Shard, raw: Raw) -> None:
        pass


@dataclass(frozen=True)
class Square:
    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            count("seen", batch.num_rows)
            advance(batch.num_rows)
            yield pa.record_batch({"n": pa.array([n * n for n in batch["n"].to_pylist()])})


@dataclass(frozen=True)
class OnNumber:
    """Something happens when this number comes by, once: `mark` remembers that it did."""

    number: int
    what: str
    mark: Path

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if self.number in batch["n"].to_pylist() and not self.mark.exists():
                self.mark.touch()
                if self.what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.what == "hang":
                    time.sleep(600)
                if self.what == "wrong input":
                    raise SourceError(f"number {self.number} is not wanted")
                raise ZeroDivisionError("a defect")
            yield batch


@dataclass(frozen=True)
class JsonFiles:
    """The smallest sink that keeps the contract."""

    cache: Path

    def committed(self, key: str) -> Receipt | None:
        path = self.cache / "shards" / f"{key}.json"
        if not path.exists():
            return None
        return Receipt.from_json(
            {name: value for name, value in json.loads(path.read_bytes()).items() if name != "self_digest"}
        )

    def write(self, shard: Shard, batches: Iterator[pa.RecordBatch], seal: Callable[[], Sealed]) -> Receipt:
        numbers = [n for batch in batches for n in batch["n"].to_pylist()]
        sealed = seal()
        staged = self.cache / f"{sealed.shard_key}.staged"
        staged.write_text(json.dumps(numbers))
        publish_file(staged, self.cache / "shards" / f"{sealed.shard_key}.arrow")
        receipt = Receipt(sealed.shard_key, sealed.transform_key, sealed.raw, sealed.counts, len(numbers), 0, "")
        Ledger(self.cache).commit(receipt)
        return receipt


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    return tmp_path


def pipeline(cache: Path, *transforms: Any, shards: int = 5, name: str = "train") -> Pipeline:
    return Pipeline(
        source=Numbers(shards, name), transforms=(*transforms, Square()), sink=JsonFiles(cache), transform_key="square"
    )


def run_all(pipelines: list[Pipeline], executor: Executor) -> list[list[Done]]:
    return run(pipelines, executor, on_documents=lambda n: None, on_shard=lambda done: None)


def numbers(cache: Path, done: list[Done]) -> list[int]:
    return [n for d in done for n in json.loads((cache / "shards" / f"{d.receipt.shard_key}.arrow").read_text())]


def test_results_come_in_shard_order_with_their_counts(executor: Executor, cache: Path) -> None:
    first, second = run_all([pipeline(cache), pipeline(cache, name="more", shards=7)], executor)
    assert numbers(cache, first) == [n * n for n in range(50)]
    assert numbers(cache, second) == [n * n for n in range(70)]
    assert [d.shard.id for d in first] == [f"train:{n:05d}" for n in range(5)]
    assert all(d.receipt.counts == {"seen": 10} for d in first + second)


def test_a_second_run_works_on_nothing(executor: Executor, cache: Path) -> None:
    run_all([pipeline(cache)], executor)
    [again] = run_all([pipeline(cache, OnNumber(7, "crash", cache / "mark"))], executor)
    assert [d.reused for d in again] == [True] * 5
    assert not (cache / "mark").exists()


def test_documents_are_reported_while_they_pass(executor: Executor, cache: Path) -> None:
    seen: list[int] = []
    run([pipeline(cache)], executor, on_documents=seen.append, on_shard=lambda done: None)
    assert sum(seen) == 50


@pytest.mark.parametrize("what", ["kill", "hang"])
def test_a_shard_whose_worker_ends_is_worked_on_again(cache: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    [done] = run_all([pipeline(cache, OnNumber(33, what, cache / "mark"))], Processes(num_proc=2, stall_seconds=2))
    assert numbers(cache, done) == [n * n for n in range(50)]
    assert all(d.receipt.counts == {"seen": 10} for d in done)
    [said] = [
        r.message
        for r in caplog.records
        if "train:00003" in r.message and "worker" in r.message and "from now on" not in r.message
    ]
    assert re.search(
        f"{'was killed by SIGKILL .from outside.*' if what == 'kill' else 'got nothing done in [23] s and was stopped'}"
        " at records 1 to 4 of the shard",
        said,
    )


def test_a_persons_mistake_in_a_worker_arrives_as_itself(executor: Executor, cache: Path) -> None:
    with pytest.raises(SourceError, match=r"^number 12 is not wanted$"):
        run_all([pipeline(cache, OnNumber(12, "wrong input", cache / "mark"))], executor)


def test_a_defect_in_a_worker_arrives_with_shard_and_traceback(cache: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)train:00001: ZeroDivisionError: a defect.*In the worker:.*Traceback"):
        run_all([pipeline(cache, OnNumber(12, "crash", cache / "mark"))], Processes(num_proc=2))


def test_shards_are_taken_no_faster_than_workers_finish(cache: Path) -> None:
    taken: list[int] = []

    @dataclass(frozen=True)
    class Counted(Numbers):
        def shards(self) -> Iterator[Shard]:
            for shard in super().shards():
                taken.append(len(done))
                yield shard

    done: list[Done] = []
    counted = Pipeline(source=Counted(30), transforms=(Square(),), sink=JsonFiles(cache), transform_key="square")
    # Workers get plain numbers: the counting source stays with the driver, which alone asks for shards.
    sent = [Pipeline(source=Numbers(30), transforms=(Square(),), sink=JsonFiles(cache), transform_key="square")]
    executor = Processes(num_proc=2)

    class Sending:
        def map(self, pipelines: Any, orders: Any, on_documents: Any) -> Any:
            return executor.map(sent, orders, on_documents)

    run([counted], Sending(), on_documents=lambda n: None, on_shard=done.append)
    assert len(taken) == 30
    assert all(number - finished <= 4 for number, finished in enumerate(taken))  # two workers: two in work, two ready


def test_workers_are_replaced_after_their_share_of_shards(cache: Path) -> None:
    sent = Pipeline(source=Numbers(6), transforms=(NamePid(),), sink=JsonFiles(cache), transform_key="pid")
    [done] = run_all([sent], Processes(num_proc=1, shards_per_worker=2))
    pids = [name for d in done for name in d.receipt.counts]
    assert len(set(pids)) == 3


@dataclass(frozen=True)
class NamePid:
    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        count(f"pid.{os.getpid()}")
        yield from batches


def test_a_shards_key_covers_content_cuts_and_transform() -> None:
    def raw(*segments: bytes) -> Raw:
        meter = Meter()
        for segment in segments:
            meter.begin_segment()
            meter.update(segment)
        return meter.raw()

    keys = {
        shard_key(raw(b"ab", b"c"), "t"),
        shard_key(raw(b"a", b"bc"), "t"),
        shard_key(raw(b"abc"), "t"),
        shard_key(raw(b"abc"), "u"),
        shard_key(raw(b"abd"), "t"),
    }
    assert len(keys) == 5
    assert raw(b"abc") == raw(b"abc")


def test_a_receipt_without_its_data_does_not_count(cache: Path) -> None:
    made = pipeline(cache)
    shard = next(iter(made.source.shards()))
    receipt, reused = run_shard(made, shard)
    assert not reused
    ledger = Ledger(cache)
    assert ledger.receipt(receipt.shard_key) is None  # JsonFiles says 0 bytes, the file has more
    path = cache / "shards" / f"{receipt.shard_key}.json"
    path.write_bytes(path.read_bytes()[:-5])
    assert ledger.receipt(receipt.shard_key) is None
