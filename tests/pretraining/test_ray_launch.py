"""A private Ray over the nodes of a launch: the same bytes, and nothing of it stays, whatever is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import crashes
import psutil
import pytest

from moai.core.distributed import Ranks
from moai.core.errors import ConfigError
from moai.engine.ray.cluster import Joining, _interface, _towards
from moai.pretraining.assembly import joining
from moai.pretraining.options import DataConfig

ROOT = crashes.ROOT
MARK = "MOAI_TEST_PLACE"
GONE_SECONDS = 20.0


@dataclass
class Launch:
    """Plain ranks, one a node, in one shared folder."""

    data: Path
    cache: Path
    nodes: int = 2

    def command(self) -> list[str]:
        flags = crashes.command(self.data, self.cache, "serial")
        return [*flags[: flags.index("--num_proc")], "--executor", "ray", "--cache_scope", "shared"]

    def start(self, **more: str) -> list[subprocess.Popen[str]]:
        world = {"WORLD_SIZE": str(self.nodes), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        own = {"MASTER_ADDR": "127.0.0.1", "MOAI_LAUNCH_ID": os.urandom(8).hex(), MARK: str(self.cache)}
        ranks = []
        for rank in range(self.nodes):
            here = {**os.environ, **world, **own, **more, "RANK": str(rank), "SLURM_CPUS_PER_TASK": "1"}
            with self.said(rank).open("w") as out:
                ranks.append(
                    subprocess.Popen(
                        self.command(), cwd=ROOT, env=here, stdout=out, stderr=subprocess.STDOUT, text=True
                    )
                )
        return ranks

    def said(self, rank: int) -> Path:
        return self.cache.with_name(f"rank{rank}")

    def finish(self, ranks: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
        codes = [rank.wait(240) for rank in ranks]
        return codes, "".join(self.said(rank).read_text() for rank in range(self.nodes))

    def living(self) -> list[psutil.Process]:
        """Whatever it started and did not end."""
        found = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get(MARK) == str(self.cache)
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def check_gone(self) -> None:
        end = time.monotonic() + GONE_SECONDS
        while left := self.living():
            assert time.monotonic() < end, [" ".join(process.cmdline())[:80] for process in left]
            time.sleep(0.2)


@contextmanager
def ending(launch: Launch) -> Iterator[None]:
    try:
        yield
    finally:
        for process in launch.living():
            process.kill()


def test_a_launch_of_two_nodes_prepares_on_both_and_leaves_nothing(
    tmp_path: Path, corpus: Path, undisturbed: dict[str, str]
) -> None:
    launch = Launch(corpus, tmp_path / "cache")
    points = tmp_path / "points"
    points.mkdir()
    with ending(launch):
        # The work waits for the second node, which would else come too late for so little.
        waits = {"MOAI_TESTING": "1", "MOAI_FAILPOINT_DIR": str(points), "MOAI_FAILPOINT": "driver.finished=pause"}
        ranks = launch.start(**waits)
        while ranks[1].poll() is None and "This node helps to prepare" not in launch.said(1).read_text():
            time.sleep(0.1)
        (points / "go").touch()
        codes, said = launch.finish(ranks)
        assert codes == [0, 0], said
        assert "This node helps to prepare, in the private Ray at 127.0.0.1:" in said
        launch.check_gone()
    assert crashes.content(launch.cache) == undisturbed
    assert not [path.name for path in (launch.cache / "launches").iterdir() if path.suffix != ".json"]
    codes, said = launch.finish(launch.start())  # what is prepared starts no Ray
    assert codes == [0, 0], said
    assert "A private Ray" not in said


def victim(launch: Launch, whom: str) -> psutil.Process | None:
    names = {"worker": "spawn_main", "ray's": "ray::", "raylet": "raylet/raylet", "head": "gcs_server",
             "node": "moai.engine.ray.node", "rank": "moai prepare"}  # fmt: skip
    found = [one for one in launch.living() if names[whom] in " ".join(one.cmdline())]
    return random.choice(found) if found else None


@pytest.mark.long
@pytest.mark.parametrize("number", range(50))
def test_whatever_is_killed_the_bytes_are_the_same_after_one_restart_at_most(
    tmp_path: Path, corpus: Path, undisturbed: dict[str, str], number: int, record: Callable[..., None]
) -> None:
    random.seed(number)
    whom = ("worker", "ray's", "raylet", "head", "node", "rank")[number % 6]
    launch = Launch(corpus, tmp_path / "cache")
    with ending(launch):
        ranks = launch.start()
        end, killed = time.monotonic() + 60, None
        while not killed and any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            time.sleep(random.random())
            if (
                (launch.cache / "shards").is_dir() and any((launch.cache / "shards").iterdir())
            ) or random.random() < 0.1:
                killed = victim(launch, whom)
        if killed:
            killed.kill()
        codes, said = launch.finish(ranks)
        launch.check_gone()
        if any(codes):
            assert killed, said
            assert "Traceback" not in said, said
            codes, said = launch.finish(launch.start())
            assert not any(codes), said
            launch.check_gone()
    assert crashes.content(launch.cache) == undisturbed
    record("a worker, a process of Ray, a node, the head or a rank of a launch on Ray is killed", 1, "same bytes")


@pytest.mark.long
def test_a_stop_ends_all_of_it_within_five_seconds(tmp_path: Path, corpus: Path) -> None:
    launch = Launch(corpus, tmp_path / "cache", nodes=1)
    with ending(launch):
        [rank] = launch.start()
        while not any("raylet/raylet" in " ".join(one.cmdline()) for one in launch.living()):
            time.sleep(0.1)
        began = time.monotonic()
        rank.send_signal(signal.SIGTERM)
        [code], said = launch.finish([rank])
        launch.check_gone()
        assert time.monotonic() - began < 5, said
    assert code == 143, said


def test_nodes_without_a_shared_cache_are_refused(tmp_path: Path) -> None:
    config = DataConfig(executor="ray", cache_scope="node")
    with (
        pytest.raises(ConfigError, match=r"^--executor ray on 2 nodes: .* is each node's own; name a --cache_dir"),
        joining(config, tmp_path, Ranks(world_size=2), {}),
    ):
        pass


def test_a_node_that_cannot_join_only_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Joining(os.environ) as own:
        own.heed({"line": "starting"})
        own.heed({"join": {"address": "127.0.0.1:1", "token_file": str(tmp_path / "none")}})
    assert caplog.text.count("This node does not help to prepare") == 1


def test_ray_listens_where_the_launch_does() -> None:
    assert _interface({"MASTER_ADDR": "127.0.0.1"}) == "127.0.0.1"
    assert _towards("127.0.0.1:80") == "127.0.0.1"
    assert _interface({"MASTER_ADDR": "no such host.invalid"})
