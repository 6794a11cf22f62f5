"""Workers that really die, hang and run out of memory; drivers that are really killed; memory that runs short."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_engine import JsonFiles, Numbers, Square, numbers, run_all

from moai.core.errors import WorkerDied
from moai.core.files import stamp
from moai.engine.executor import Executor, Processes, Serial
from moai.engine.pipeline import Care, Pipeline, Shard, shard_key
from moai.engine.processes import retries as deaths
from moai.engine.processes import worker
from moai.engine.processes.memory import Reading, Room, oom_kills, read
from moai.pretraining import recipe as pretraining
from moai.pretraining.options import DataConfig

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tokenizers" / "demo"
BACKTRACKS = ("a" * 60 + "b", r"(a+)+$")
"""Keeps `re` busy for longer than anybody waits, and the interpreter's lock with it."""


class Panic(BaseException):
    pass


def harm(how: str) -> None:
    match how:
        case "killed" | "killed by signal 11":
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSEGV)
        case "exits":
            os._exit(3)
        case "kills the forkserver":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(1)
        case "gives up":
            raise Panic("as a library in Rust does")
        case "hangs for good":
            mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
            lock(mutex), lock(mutex)
        case "aborts":
            os.abort()
        case "hangs":
            re.match(BACKTRACKS[1], BACKTRACKS[0])
        case "eats memory":
            resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
            eaten = []
            while True:
                eaten.append(bytearray(64 << 20))
        case "is large and hangs":
            eaten = [bytearray(os.urandom(1)) * (300 << 20)]
            re.match(BACKTRACKS[1], BACKTRACKS[0])


@dataclass(frozen=True)
class Poison:
    """Numbers (or records that hold the word) that end the worker, `times` times each. `seen` tells of every time."""

    poison: tuple[int, ...]
    how: str
    seen: Path
    times: int = 1000

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in set(self.poison) & set(batch["n"].to_pylist()):
                if len(list(self.seen.glob(f"{number}.*"))) < self.times:
                    (self.seen / f"{number}.{batch.num_rows}.{uuid.uuid4().hex}").touch()
                    harm(self.how)
            yield batch


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "seen").mkdir()
    return tmp_path


@dataclass(frozen=True)
class Keeping(JsonFiles):
    """The sink of test_engine, which also keeps what was set aside."""

    def write(self, shard: Any, batches: Any, seal: Any) -> Any:
        def sealed() -> Any:
            found = seal()
            (self.cache / f"{shard.id}.bad").write_text(json.dumps(found.quarantine))
            return found

        return super().write(shard, batches, sealed)


def made(cache: Path, *transforms: Any, shards: int = 5) -> Pipeline:
    return Pipeline(
        source=Numbers(shards), transforms=(*transforms, Square()), sink=Keeping(cache), transform_key="square"
    )


def squares(*without: int) -> list[int]:
    return [n * n for n in range(50) if n not in without]


def seen(cache: Path) -> list[tuple[int, int]]:
    """(number, rows of its batch) each time a worker ended."""
    return sorted(
        (int(number), int(rows)) for number, rows, _ in (p.name.split(".") for p in (cache / "seen").iterdir())
    )


@pytest.mark.parametrize(
    ("how", "reason", "detail"),
    [
        ("killed", "worker_died", "SIGKILL"),
        ("killed by signal 11", "worker_died", "SIGSEGV"),
        ("exits", "worker_died", "exit code 3"),
        ("eats memory", "worker_died", "MemoryError"),
        ("hangs", "hung", "hung"),
    ],
)
def test_a_poison_document_is_set_aside_and_the_rest_goes_through(
    cache: Path, how: str, reason: str, detail: str
) -> None:
    [done] = run_all(
        [made(cache, Poison((25,), how, cache / "seen"))],
        Processes(num_proc=2, stall_seconds=2 if how == "hangs" else 60),
    )
    assert numbers(cache, done) == squares(25)
    lone = 4 if how == "killed" else 2  # nobody counts who was killed from outside, so it might have been chance
    assert seen(cache) == [(25, 1)] * lone + [(25, 4)]  # alone, before that in its batch; nobody else was disturbed
    assert [d.receipt.counts for d in done] == [
        {"quarantined": 1, f"quarantined.{reason}": 1, "read": 1, "seen": 9} if n == 2 else {"seen": 10}
        for n in range(5)
    ]
    [entry] = json.loads((cache / "train:00002.bad").read_text())
    assert entry == {"reason": reason, "detail": detail, "segment": 0, "line": 5, "offset": None, "sample": "{'n': 25}"}


@pytest.mark.parametrize("how", ["killed", "kills the forkserver"])
def test_whom_somebody_kills_from_outside_loses_no_document(cache: Path, how: str) -> None:
    """Three times while the same record is in work, twice of them alone; or what all workers are forked from."""
    [done] = run_all([made(cache, Poison((25,), how, cache / "seen", times=3))], Processes(num_proc=2))
    assert numbers(cache, done) == squares()
    assert len(seen(cache)) == 3


def die_once(mark: Path, how: str) -> str:
    if not mark.exists():
        mark.touch()
        harm(how)
    return "an answer"


@pytest.mark.parametrize("how", ["killed", "kills the forkserver"])
def test_a_helper_that_dies_is_asked_again(cache: Path, how: str) -> None:
    assert Processes(num_proc=1).call(die_once, cache / "mark", how) == "an answer"
    with pytest.raises(WorkerDied, match=r"a process died in test_workers.harm, with exit code -9, 3 times"):
        Processes(num_proc=1).call(harm, "killed")


def test_workers_start_under_a_long_tmpdir(cache: Path) -> None:
    """A socket's path has 107 bytes at most."""
    place = cache / ("long" * 30)
    place.mkdir()
    driver, living = start_driver(cache, "()", TMPDIR=str(place))
    assert driver.wait(60) == 0
    assert wait_until(lambda: not living(), 10)


def test_what_a_machine_could_not_take_has_a_key_of_its_own(cache: Path) -> None:
    [ill] = run_all([made(cache, Poison((25,), "killed", cache / "seen"))], Processes(num_proc=1))
    [well] = run_all([made(cache)], Processes(num_proc=1))
    assert numbers(cache, well) == squares()
    assert [d.reused for d in well] == [True, True, False, True, True]
    assert [a.receipt.shard_key == b.receipt.shard_key for a, b in zip(ill, well)] == [True, True, False, True, True]
    assert ill[2].receipt.shard_key == shard_key(ill[2].receipt.raw, "square", [("worker_died", 0, 5)])
    assert numbers(cache, ill) == squares(25)  # still there, and still what it was


@given(
    parts=st.integers(1, 9),
    first=st.integers(0, 30),
    records=st.integers(0, 30),
    singly=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    out=st.sets(st.integers(0, 60), max_size=3),
)
def test_pieces_cover_a_batch_once_and_in_order(
    parts: int, first: int, records: int, singly: tuple[int, int], out: set[int]
) -> None:
    care = Care(parts=parts, singly=range(*singly), left_out=tuple((n, "", "") for n in out))
    pieces = list(care.pieces(first, records))
    assert [n for start, end in pieces for n in range(start, end)] == list(range(records))
    assert all(end - start == 1 for start, end in pieces if {*range(first + start, first + end)} & {*care.singly, *out})
    assert all(0 < end - start <= -(-records // parts) for start, end in pieces)


def test_two_poison_documents_of_one_shard_are_both_found(cache: Path) -> None:
    [done] = run_all([made(cache, Poison((24, 27), "exits", cache / "seen"))], Processes(num_proc=2))
    assert numbers(cache, done) == squares(24, 27)
    assert done[2].receipt.counts["quarantined.worker_died"] == 2


def test_too_many_poison_documents_are_the_machines_doing(cache: Path) -> None:
    poison = tuple(range(5, 50, 10))
    with pytest.raises(
        WorkerDied,
        match=rf"ended with exit code 3 at record 6 of the shard.*document number {deaths.MOST_LEFT_OUT + 1} in this "
        rf"run.*this machine",
    ):
        run_all([made(cache, Poison(poison, "exits", cache / "seen"))], Processes(num_proc=1))
    assert len(seen(cache)) == 3 * (deaths.MOST_LEFT_OUT + 1)


def test_deaths_that_lead_to_no_document_cost_no_data(cache: Path) -> None:
    """As where memory runs out somewhere in a shard: here on 21, then on 28."""
    wandering = (Poison((21,), "aborts", cache / "seen", times=1), Poison((28,), "aborts", cache / "seen"))
    with pytest.raises(
        WorkerDied,
        match=r"train:00002: worker \d+ was killed by SIGABRT.* at record 9 of .*lead to no document.*fewer "
        r"--num_proc.*run again to go on",
    ):
        run_all([made(cache, *wandering)], Processes(num_proc=1))
    [done] = run_all([made(cache)], Processes(num_proc=1))
    assert [d.reused for d in done] == [True, True, False, False, False]
    assert numbers(cache, done) == squares()


@pytest.mark.parametrize("kind", [Serial(), Processes(num_proc=2)])
def test_what_a_library_gives_up_on_is_set_aside_by_every_executor(cache: Path, kind: Executor) -> None:
    [done] = run_all([made(cache, Poison((25,), "gives up", cache / "seen"))], kind)
    assert numbers(cache, done) == squares(25)
    assert seen(cache) == [(25, 1), (25, 1), (25, 4)]
    [entry] = json.loads((cache / "train:00002.bad").read_text())
    assert (entry["reason"], entry["detail"]) == ("worker_died", "Panic")


@pytest.mark.parametrize(("how", "code"), [("hangs", 0), ("hangs for good", 70)])
def test_what_hangs_in_one_process_is_set_aside_or_ends_it(cache: Path, how: str, code: int) -> None:
    """With 70, where nothing can interrupt it."""
    poison = f"(Poison((25,), {how!r}, Path({str(cache / 'seen')!r})),)"
    driver, _ = start_driver(cache, poison, executor="Serial(stall_seconds=2)")
    assert driver.wait(60) == code
    if code == 0:
        [entry] = json.loads((cache / "train:00002.bad").read_text())
        assert (entry["reason"], entry["line"]) == ("hung", 5)


@dataclass(frozen=True)
class DiesOnArrival:
    how: str = "exits"
    here: int = field(default_factory=os.getpid)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if os.getpid() != state["here"]:
            harm(state["how"])

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return batches


def test_workers_that_die_before_they_work_end_the_run(cache: Path) -> None:
    with pytest.raises(WorkerDied, match=r"ended with exit code 3 at its start.*last in a row"):
        run_all([made(cache, DiesOnArrival())], Processes(num_proc=2))


@dataclass(frozen=True)
class BadOrders(Numbers):
    """Shards from the third on never reach a worker whole."""

    def shards(self) -> Iterator[Shard]:
        for shard in super().shards():
            yield replace(shard, segments=(*shard.segments, DiesOnArrival())) if shard.segments[0] >= 2 else shard


def test_a_worker_that_dies_between_two_shards_is_not_taken_to_be_at_the_last_one(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = Pipeline(source=BadOrders(4), transforms=(Square(),), sink=Keeping(cache), transform_key="square")
    with pytest.raises(
        WorkerDied,
        match=r"train:00002: .* exit code 3 while it read on behind 0 records.*deaths of this shard",
    ):
        run_all([bad], Processes(num_proc=1))
    assert ["while it read on behind 0 records" in r.message for r in caplog.records] == [True]


@dataclass(frozen=True)
class Diary:
    """When each shard was in work, and by whom."""

    folder: Path

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        began = time.monotonic_ns()
        for batch in batches:
            self.write(began, batch["n"][0].as_py() // 10)
            yield batch
            self.write(began, batch["n"][0].as_py() // 10)

    def write(self, began: int, shard: int) -> None:
        (self.folder / f"{shard}.{began}.{os.getpid()}").write_text(str(time.monotonic_ns()))


@dataclass(frozen=True)
class Together:
    """Nobody goes on before two workers are there."""

    folder: Path

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        (self.folder / str(os.getpid())).touch()
        assert wait_until(lambda: len(list(self.folder.iterdir())) >= 2)
        yield from batches


def diary(folder: Path) -> list[tuple[int, int, int, int]]:
    """(shard, began, last seen at work, pid)"""
    return sorted(
        (*map(int, p.name.split(".")[:2]), int(p.read_text()), int(p.name.split(".")[2])) for p in folder.iterdir()
    )


def test_a_shard_that_died_for_memory_has_the_machine_to_itself_and_then_there_is_one_worker_fewer(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (cache / "diary").mkdir()
    (cache / "two").mkdir()
    transforms = (Together(cache / "two"), Diary(cache / "diary"), Poison((15,), "killed", cache / "seen", times=1))
    [done] = run_all([made(cache, *transforms, shards=40)], Processes(num_proc=2))
    assert numbers(cache, done) == [n * n for n in range(400)]
    entries = diary(cache / "diary")
    [(_, _, died, _), (_, began, ended, _)] = [entry for entry in entries if entry[0] == 1]
    assert died < began
    assert not [entry for entry in entries if entry[0] != 1 and entry[1] < ended and began < entry[2]]
    later = {pid for _, start, _, pid in entries if start > ended}
    assert len(later) == 1
    assert len(list((cache / "two").iterdir())) > 2  # not vacuous: two had been at work before
    assert [r.message for r in caplog.records if "from now on" in r.message] == [
        "At most 1 at work from now on: train:00001 killed its worker beside others, and none when it was alone"
    ]


def test_a_workers_peak_memory_is_named(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_all(
        [made(cache, Poison((25,), "is large and hangs", cache / "seen", times=1))],
        Processes(num_proc=1, stall_seconds=3),
    )
    [held] = [
        int(found[1].replace(",", ""))
        for r in caplog.records
        if (found := re.search(r"train:00002: .* having held ([0-9,]+) MB or more", r.message))
    ]
    assert 310 < held < 1000


def test_only_time_in_which_the_driver_could_look_counts_as_standing_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slept, a process group that was stopped: the workers had no chance either."""
    clock = [0.0]
    monkeypatch.setattr(worker.time, "monotonic", lambda: clock[0])
    watched = worker.Worker(SimpleNamespace(pid=os.getpid()), None, worker.Beacon([0] * 5))  # type: ignore[arg-type]
    for clock[0] in (1.0, 2.0, 90_000.0):
        watched.news(150.0)
    assert watched.still_seconds == 152.0
    watched.beacon.work_on(7, 1)
    watched.news(150.0)
    assert watched.still_seconds == 0.0


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_workers import Poison, Processes, Serial, Stuck, made, run_all
if __name__ == "__main__":
    run_all([made(Path({cache!r}), *{transforms}, shards=6)], {executor})
"""


@dataclass(frozen=True)
class Stuck:
    """Says that it is there, and is in a call then that lets no other thread of its process run."""

    folder: Path

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        (self.folder / f"{os.getpid()}").touch()
        harm("hangs")
        yield from batches


def start_driver(
    cache: Path, transforms: str, *, executor: str = "Processes(num_proc=2)", **env: str
) -> tuple[subprocess.Popen[bytes], Callable[[], list[int]]]:
    """A driver, and who lives of it and its children: they all have its mark in their environment."""
    script = cache / "driver.py"
    here = str(Path(__file__).parent)
    script.write_text(DRIVER.format(here=here, cache=str(cache), transforms=transforms, executor=executor))
    mark = f"MARK={uuid.uuid4().hex}"
    driver = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={**os.environ, **env, "MARK": mark.partition("=")[2]},
        stderr=subprocess.DEVNULL,
    )

    def living() -> list[int]:
        return [
            int(p.name)
            for p in Path("/proc").iterdir()
            if p.name.isdigit() and mark.encode() in environment(p) and running(int(p.name))
        ]

    return driver, living


def environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(true: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_workers_and_forkserver_end_with_their_driver_however_it_ends(cache: Path, ending: signal.Signals) -> None:
    driver, living = start_driver(cache, f"(Stuck(Path({str(cache / 'seen')!r})),)")
    try:
        assert wait_until(lambda: len(list((cache / "seen").iterdir())) == 2)
        assert (
            len(living()) >= 4
        )  # driver, forkserver and two workers; a process that tracks resources may be there, too
    finally:
        driver.send_signal(ending)
        driver.wait()
    assert wait_until(lambda: not living(), 10), living()


@pytest.mark.parametrize(
    "place",
    [
        *("driver.worker:2", "driver.finished:6"),
        *(
            pytest.param(place, marks=pytest.mark.long)
            for place in ("driver.worker:1", "driver.order:1", "driver.order:4", "driver.finished:1")
        ),
    ],
)
def test_nobody_is_left_of_a_driver_that_is_killed_anywhere(cache: Path, place: str) -> None:
    env = {"MOAI_TESTING": "1", "MOAI_FAILPOINT_DIR": str(cache / "seen"), "MOAI_FAILPOINT": f"{place}=kill"}
    driver, living = start_driver(cache, "()", **env)
    assert driver.wait(60) == -signal.SIGKILL
    assert wait_until(lambda: not living(), 10), living()
    [done] = run_all([made(cache, shards=6)], Processes(num_proc=2))
    assert numbers(cache, done) == [n * n for n in range(60)]


@pytest.mark.parametrize(
    ("place", "action"), [("worker.start:1", "kill"), ("worker.shard:3", "exit"), ("worker.receipt:2", "kill")]
)
def test_one_death_anywhere_in_a_workers_life_changes_nothing(cache: Path, place: str, action: str) -> None:
    env = {"MOAI_TESTING": "1", "MOAI_FAILPOINT_DIR": str(cache / "seen"), "MOAI_FAILPOINT": f"{place}={action}"}
    driver, _ = start_driver(cache, "()", **env)
    assert driver.wait(60) == 0
    assert (cache / "seen" / place.replace(":", ".")).exists()  # it really was there
    [done] = run_all([made(cache, shards=6)], Processes(num_proc=1))
    assert [d.reused for d in done] == [True] * 6
    assert numbers(cache, done) == [n * n for n in range(60)]


MEMINFO = "MemTotal: 64000000 kB\nMemAvailable: {} kB\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = {
    "proc/self/cgroup": "4:memory:/a/b\n",
    "proc/self/mountinfo": "30 25 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
}
V2 = {"proc/self/cgroup": "0::/a/b\n", "proc/self/mountinfo": "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"}


@pytest.mark.parametrize(
    ("files", "left", "waiting", "short"),
    [
        ({"proc/meminfo": MEMINFO.format(32_000_000)}, "32.77 of 65.54 GB left (MemAvailable)", 0.0, False),
        ({"proc/meminfo": MEMINFO.format(3_000_000)}, "3.07 of 65.54 GB left (MemAvailable)", 0.0, True),
        (
            {
                "proc/meminfo": MEMINFO.format(32_000_000),
                "proc/pressure/memory": "some avg10=35.50 avg60=1 avg300=0 total=9\n",
            },
            "32.77 of 65.54 GB left (MemAvailable), processes waited for it 36 % of the last 10 s",
            35.5,
            True,
        ),
        (
            {
                **V2,
                "proc/meminfo": MEMINFO.format(32_000_000),
                "sys/fs/cgroup/a/memory.max": "4000000000\n",
                "sys/fs/cgroup/a/memory.current": "3900000000\n",
                "sys/fs/cgroup/a/memory.stat": "inactive_file 100000000\nactive_file 50000000\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.pressure": "some avg10=2.00 avg60=1 avg300=0 total=9\n",
                "proc/pressure/memory": "some avg10=99.00 avg60=1 avg300=0 total=9\n",
            },
            "0.25 of 4.00 GB left (cgroup v2), processes waited for it 2 % of the last 10 s",
            2.0,
            True,
        ),
        (
            {
                **V2,
                "proc/meminfo": MEMINFO.format(32_000_000),
                "sys/fs/cgroup/a/memory.max": "4000000000\n",
                "sys/fs/cgroup/a/memory.current": "3900000000\n",
                "sys/fs/cgroup/a/memory.stat": "inactive_file 900000000\nactive_file 500000000\n",
            },
            "1.50 of 4.00 GB left (cgroup v2)",
            0.0,
            False,
        ),
        (
            {
                **V1,
                "proc/meminfo": MEMINFO.format(32_000_000),
                "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "4000000000\n",
                "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": "3900000000\n",
                "sys/fs/cgroup/memory/a/b/memory.stat": "total_inactive_file 1000\ntotal_active_file 0\n",
            },
            "0.10 of 4.00 GB left (cgroup v1)",
            0.0,
            True,
        ),
        (
            {
                **V1,
                "proc/meminfo": MEMINFO.format(32_000_000),
                "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
            },
            "32.77 of 65.54 GB left (MemAvailable)",
            0.0,
            False,
        ),
    ],
    ids=["host", "host short", "host waits", "v2 short", "v2 full of page cache", "v1 short", "v1 without a limit"],
)
def test_pressure_is_read_where_the_kernel_keeps_it(
    tmp_path: Path, files: dict[str, str], left: str, waiting: float, short: bool
) -> None:
    reading = read(machine(tmp_path, files))
    assert (str(reading), reading.waiting_percent, reading.is_short()) == (left, waiting, short)


def test_kills_for_memory_are_counted_where_the_kernel_counts_them(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) == 0
    assert oom_kills(machine(tmp_path, {"proc/vmstat": "oom_kill 7\n"})) == 7
    assert oom_kills(machine(tmp_path, {**V2, "sys/fs/cgroup/a/b/memory.events": "oom 9\noom_kill 3\n"})) == 3
    assert (
        oom_kills(machine(tmp_path, {**V1, "sys/fs/cgroup/memory/a/b/memory.oom_control": "under_oom 0\noom_kill 2\n"}))
        == 2
    )


def test_short_memory_holds_workers_back_then_retires_them_and_is_over_only_with_some_to_spare(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def reading(free: float) -> Reading:
        return Reading(free_bytes=int(free * 1e9), of_bytes=10**10, limit="a test", waiting_percent=0.0)

    room = Room(workers=3, root=machine(tmp_path, {"proc/meminfo": MEMINFO.format(60_000_000)}))
    assert [room.for_one_more(busy) for busy in (0, 1, 2, 3)] == [True, True, True, False]
    room.heed(reading(0.9), 100.0)
    assert [room.for_one_more(busy) for busy in (0, 1, 2)] == [True, False, False]  # one goes on
    room.heed(reading(1.2), 105.0)
    assert not room.for_one_more(1)  # more than the tenth at which it began, but not by much
    room.heed(reading(1.6), 106.0)
    assert room.for_one_more(2)
    for second in (110.0, 119.0, 120.0, 130.0, 140.0, 150.0):
        room.heed(reading(0.5), second)
    assert room.workers == 1
    room.heed(reading(9), 160.0)
    assert [room.for_one_more(busy) for busy in (0, 1)] == [True, False]
    said = [r.message for r in caplog.records]
    assert [
        bool(re.match(pattern, line))
        for pattern, line in zip(
            ("Memory is short", "At most 2 at work from now on: memory has been short for 10 s", "At most 1"), said
        )
    ] == [True] * 3
    assert len(said) == 3


@pytest.mark.parametrize(("available", "workers"), [(60_000_000, 2), (1_000_000, 1)], ids=["plenty", "short"])
def test_where_memory_is_short_one_worker_does_it_all(cache: Path, available: int, workers: int) -> None:
    (cache / "diary").mkdir()
    root = machine(cache / "root", {"proc/meminfo": MEMINFO.format(available)})
    (cache / "two").mkdir()
    together = (Together(cache / "two"),) if workers == 2 else ()
    [done] = run_all([made(cache, *together, Diary(cache / "diary"), shards=40)], Processes(num_proc=2, root=root))
    assert numbers(cache, done) == [n * n for n in range(400)]
    assert len({pid for *_, pid in diary(cache / "diary")}) == workers


@dataclass(frozen=True)
class PoisonRecords:
    """As in Poison, for the records of a file."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if any(b"poison" in record for record in batch["record"].to_pylist()):
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def test_prepare_goes_around_a_poison_document_names_it_and_says_so_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lines(poison: str) -> str:
        texts = [json.dumps({"text": f"document {n} says {'word ' * (n % 40)}"}) for n in range(3000)]
        texts[1234] = poison
        return "\n".join(texts) + "\n"

    def prepare(name: str, poison: str, **changes: Any) -> Any:
        file = tmp_path / name / "data.jsonl"
        if not file.exists():
            file.parent.mkdir()
            file.write_text(lines(poison))
            while stamp(file).is_racy():  # what was written just now is not trusted to be the same later
                time.sleep(0.1)
        given = {
            "tokenizer_path": str(TOKENIZER),
            "seq_len": 128,
            "packing": "bfd_split",
            "shard_bytes": 40_000,
            "num_proc": 2,
            **changes,
        }
        return pretraining.prepare(
            DataConfig(dataset=(str(file),), cache_dir=str(tmp_path / f"{name}-cache"), **given),
            origins={"num_proc": "flag"},
        )

    def shards(prepared: Any) -> list[bytes]:
        return [path.read_bytes() for path in sorted(prepared.path.glob("data-*.arrow"))]

    expected = prepare("broken", '{"text": "poiso')  # the same bytes, but what is wrong with them is in the file
    healthy = pretraining.pipeline
    with monkeypatch.context() as patched:
        patched.setattr(pretraining, "pipeline", lambda *given: poisoned(healthy(*given)))
        found = prepare("poison", '{"text":"poison"}'[:15].ljust(15))
    assert len(shards(expected)) > 2
    assert shards(found) == shards(expected)
    assert found.content["quarantined"] == {"worker_died": 1}
    assert found.content["records"] == expected.content["records"]
    [entry] = map(json.loads, (found.path / "quarantine.jsonl").read_text().splitlines())
    [other] = map(json.loads, (expected.path / "quarantine.jsonl").read_text().splitlines())
    assert (entry["reason"], entry["detail"]) == ("worker_died", "SIGKILL")
    assert {k: entry[k] for k in ("file", "line", "offset", "segment") if k in entry} == {
        k: other[k] for k in ("file", "line", "offset", "segment") if k in other
    }
    assert any("data.jsonl line 1235 is left out: its worker died (SIGKILL)" in r.message for r in caplog.records)
    caplog.clear()
    assert prepare("poison", "").path == found.path
    assert any("--rehash tries them again" in r.message for r in caplog.records)
    whole = prepare("poison", "", rehash=True)
    assert whole.path != found.path
    assert whole.content["quarantined"] != {"worker_died": 1}


def poisoned(pipeline: Pipeline) -> Pipeline:
    return replace(pipeline, transforms=(PoisonRecords(), *pipeline.transforms))
