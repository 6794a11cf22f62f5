"""Ray as an executor: poison as under processes, and what a cluster loses besides: its processes, its nodes, itself."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from test_engine import numbers, run_all
from test_workers import Poison, made, seen, squares

from moai.core.distributed import start_token
from moai.core.errors import ConfigError, WorkerDied
from moai.engine.executor import Cluster, Ray
from moai.engine.ray import executor as on_ray_module
from moai.engine.ray.cluster import Node, _token
from moai.engine.ray.remote import Setup, _check
from moai.pretraining.options import DataConfig
from moai.pretraining.tokenizer_backend import Proof
from moai.tokenizers.backends import Reference
from moai.tokenizers.load import load_tokenizer

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tokenizers" / "demo"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "seen").mkdir()
    return tmp_path


@dataclass(frozen=True)
class Slow:
    """A moment for each batch, and a file for each shard that is begun, holding the pid it is begun in."""

    folder: Path

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            (self.folder / f"{batch['n'][0].as_py()}.{os.getpid()}").touch()
            time.sleep(0.2)
            yield batch


def begun(folder: Path) -> list[int]:
    return [int(path.suffix[1:]) for path in folder.iterdir()]


def wait_for(what: Callable[[], Any], seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
    return found


@pytest.mark.parametrize(
    ("how", "reason", "detail"),
    [("killed by signal 11", "worker_died", "SIGSEGV"), ("hangs", "hung", "hung")],
)
def test_a_poison_document_is_set_aside_as_under_processes(
    cache: Path, on_ray: Ray, how: str, reason: str, detail: str
) -> None:
    [done] = run_all(
        [made(cache, Poison((25,), how, cache / "seen"))], replace(on_ray, stall_seconds=1 if how == "hangs" else 60)
    )
    assert numbers(cache, done) == squares(25)
    assert seen(cache) == [(25, 1), (25, 1), (25, 4)]
    [entry] = json.loads((cache / "train:00002.bad").read_text())
    assert entry == {"reason": reason, "detail": detail, "segment": 0, "line": 5, "offset": None, "sample": "{'n': 25}"}


def test_a_lost_process_of_rays_is_no_death_of_the_shard(
    cache: Path, on_ray: Ray, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it had begun ends with it."""

    orphans = []

    def kill() -> None:
        for _ in range(2):
            known = set(begun(cache / "seen"))
            worker = wait_for(lambda known=known: set(begun(cache / "seen")) - known).pop()
            psutil.Process(worker).parent().kill()
            orphans.append(worker)

    killer = threading.Thread(target=kill)
    killer.start()
    [done] = run_all([made(cache, Slow(cache / "seen"), shards=4)], replace(on_ray, num_proc=1))
    killer.join()
    assert numbers(cache, done) == squares()[:40]
    assert caplog.text.count("Ray lost its process or its node") == 2
    assert "worked on again" not in caplog.text
    assert "Ray" not in capfd.readouterr().out
    wait_for(lambda: not any(start_token(pid) for pid in orphans), 10)


def test_a_lost_node_costs_only_what_was_in_flight(cache: Path, on_ray: Ray) -> None:
    second = Node.begin(
        ip="127.0.0.1",
        address=on_ray.cluster._address,
        token=_token(),
        environ={**os.environ, "SLURM_CPUS_PER_TASK": "2"},
    )
    try:
        second.ready()
        wait_for(lambda: on_ray.cluster.cpus() == 4)
        below = lambda pid: second.process.pid in [one.pid for one in psutil.Process(pid).parents()]  # noqa: E731

        def kill() -> None:
            wait_for(lambda: any(psutil.pid_exists(pid) and below(pid) for pid in begun(cache / "seen")))
            second.end()

        killer = threading.Thread(target=kill)
        killer.start()
        [done] = run_all([made(cache, Slow(cache / "seen"), shards=8)], replace(on_ray, num_proc=None))
        killer.join()
    finally:
        second.end()
    assert numbers(cache, done) == [n * n for n in range(80)]
    firsts = [path.stem for path in (cache / "seen").iterdir() if int(path.stem) % 10 == 0]
    assert 8 < len(firsts) <= 8 + 2  # two were in flight there
    assert not second.folder.exists()


def test_a_cluster_that_never_keeps_a_process_ends_the_run(
    cache: Path, on_ray: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray_module, "_MOST_LOST", 1)
    with pytest.raises(WorkerDied, match=r"^train:00000: Ray lost 2 tasks in a row \("):
        run_all([made(cache, KillsRay(), shards=1)], on_ray)


@dataclass(frozen=True)
class KillsRay:
    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(10)
        yield from batches


def test_a_part_that_nodes_cannot_import_is_named(
    cache: Path, on_ray: Ray, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "own_part.py").write_text("class Own:\n    def __call__(self, batches): yield from batches\n")
    monkeypatch.syspath_prepend(folder)
    import own_part

    pipeline = made(cache, own_part.Own())
    sys.path.remove(str(folder))
    with pytest.raises(
        ConfigError, match=r"cannot load a part: No module named 'own_part'; its module must be installed"
    ):
        run_all([pipeline], on_ray)


def test_a_node_that_is_no_place_for_the_run_says_why(tmp_path: Path) -> None:
    setup = Setup(
        key="", load="", threads=1, stall_seconds=1, shards_per_worker=1, path=(), seen=tmp_path / "ray-1.seen"
    )
    with pytest.raises(ConfigError, match=r"does not see what the driver wrote there; --executor ray needs storage"):
        _check(setup)
    with pytest.raises(ConfigError, match=r"the driver 0\.0: install one version on every node"):
        _check(replace(setup, version="0.0"))


@dataclass(frozen=True, kw_only=True)
class Wrong(Reference):
    def encode_batch(self, texts: Any) -> Any:
        ids, offsets = super().encode_batch(texts)
        return ids ^ 1, offsets

    name = "wrong"


def test_the_backend_is_proven_on_every_machine() -> None:
    spec = load_tokenizer(str(TOKENIZER))
    reference = Reference(spec=spec)
    version = reference.made_by()["version"]
    Proof(reference, reference, version, "elsewhere")()
    with pytest.raises(ConfigError, match="elsewhere has 0: install one version on every node"):
        Proof(reference, reference, "0", "elsewhere")()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "RAY_ADDRESS=127.0.0.1:1: nobody answers there within 5 s"),
        ("ray://head:10001", "RAY_ADDRESS=ray://head:10001: Ray Client cannot run this"),
    ],
)
def test_a_wrong_address_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, said: str) -> None:
    monkeypatch.setattr("moai.engine.ray.cluster._is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=re.escape(said)):
        Cluster(shared=tmp_path, environ={"RAY_ADDRESS": address}).connect()


def test_no_tasks_at_a_time_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_proc = 0 with executor = ray"):
        DataConfig(executor="ray", num_proc=0)
