"""Training that is killed, stopped or out of disk: what is left, what is said, and that the next run goes on as if
nothing had been.

Ranks are real processes that run train.py's `main`, forked from a server that has loaded torch already; torchrun is the
real one.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from moai.core.distributed import start_token

ROOT = Path(__file__).parents[2]
STEPS, SAVED = 6, 2
SERVER = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def a_server_of_its_own() -> Iterator[None]:
    """One that earlier tests started has loaded what preparing needs, and refuses what only training does."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    SERVER.set_forkserver_preload(["torch", "transformers.trainer", "datasets", "moai.training.trainer", "train"])
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def rank_main(argv: list[str], environ: Mapping[str, str], said: Path, file_limit: int | None) -> None:
    """In a forked process: the environment, standard error and failpoints that a process of its own would have had."""
    os.environ.update(environ)
    with open(said, "w") as file:
        os.dup2(file.fileno(), 2)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    import train
    from moai.core import failpoints

    failpoints._armed = failpoints.Armed.of(os.environ)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    train.end(train.main(argv, os.environ))


@dataclass
class Place:
    """One tokenizer, model, cache and data for all runs of this file; each run has its own folder."""

    folder: Path

    def flags(self, output: Path, ranks: int, *more: Any) -> list[str]:
        given = [
            "--dataset",
            self.folder / "texts.jsonl",
            "--tokenizer_path",
            self.folder / "tokenizer",
            "--model_config",
            self.folder / "model.json",
            "--seq_len",
            48,
            "--packing",
            "bfd",
            "--cache_dir",
            self.folder / "cache",
            "--num_proc",
            1,
            "--output_dir",
            output,
            "--batch_size",
            2,
            "--gradient_accumulation_steps",
            4 // ranks,
            "--max_steps",
            STEPS,
            "--warmup_steps",
            0,
            "--learning_rate",
            "1e-2",
            "--logging_steps",
            1,
            "--save_steps",
            SAVED,
            "--save_total_limit",
            2,
            "--dataloader_num_workers",
            0,
            "--use_cpu",
            "true",
            *more,
        ]
        return [str(word) for word in given]

    def launch(
        self,
        output: Path,
        *more: Any,
        ranks: int = 1,
        failpoint: str = "",
        file_limit: int | None = None,
        **environ: str,
    ) -> Launch:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        folder = output.parent / f"run{len(list(output.parent.glob('run*')))}"
        (folder / "points").mkdir(parents=True)
        group = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            **armed(folder / "points", failpoint),
            **environ,
        }
        launch = Launch(output, folder)
        for rank in range(ranks):
            where = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = SERVER.Process(
                target=rank_main, args=(self.flags(output, ranks, *more), where, folder / f"rank{rank}", file_limit)
            )
            process.start()
            launch.processes.append(process)
        return launch

    def torchrun(
        self, output: Path, *more: Any, options: tuple[str, ...] = (), failpoint: str = ""
    ) -> subprocess.Popen[str]:
        (output.parent / "points").mkdir()
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            *options,
            str(ROOT / "train.py"),
        ]
        return subprocess.Popen(
            [*command, *self.flags(output, 2, *more)],
            env={**os.environ, **armed(output.parent / "points", failpoint)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


def armed(folder: Path, failpoint: str) -> dict[str, str]:
    return {"MOAI_TESTING": "1", "MOAI_FAILPOINT_DIR": str(folder), "MOAI_FAILPOINT": failpoint}


@dataclass
class Launch:
    output: Path
    folder: Path
    processes: list[Any] = field(default_factory=list)

    def wait(self, seconds: float = 600) -> list[int]:
        """Exit codes; a rank that does not end in time is killed and its code is -9."""
        for process in self.processes:
            process.join(seconds)
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def said(self, rank: int = 0) -> str:
        return (self.folder / f"rank{rank}").read_text()

    def words(self, rank: int = 0) -> list[str]:
        """Its last words: lines that are not of the log, nor of the table of settings there."""
        return [line for line in self.said(rank).splitlines() if not re.match(r"\d\d:\d\d:\d\d |  ", line)]

    def paused(self, place: str) -> int:
        """The rank that waits at `place`."""
        return [process.pid for process in self.processes].index(
            wait_for(self.folder / "points" / place, lambda: all(p.is_alive() for p in self.processes))
        )

    def go(self) -> None:
        (self.folder / "points" / "go").touch()


def wait_for(file: Path, alive: Callable[[], bool]) -> int:
    """The pid that `file` names, once it does."""
    while not (file.exists() and file.read_text()):
        assert alive(), f"ended before {file.name}"
        time.sleep(0.02)
    return int(file.read_text())


def ended(process: subprocess.Popen[str]) -> str:
    """What torchrun and its ranks wrote on standard error."""
    try:
        return process.communicate(timeout=600)[1]
    except subprocess.TimeoutExpired:
        process.terminate()  # it takes its ranks along
        raise


@dataclass(frozen=True)
class Course:
    """What a run computed: losses and trained tokens of every step, and the bytes of the model."""

    steps: list[tuple[int, float, int]]
    weights: bytes

    @classmethod
    def of(cls, output: Path) -> Course:
        history = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
        steps = [(entry["step"], entry["loss"], entry["tokens_seen"]) for entry in history if "loss" in entry]
        return cls(steps, (output / "final_model" / "model.safetensors").read_bytes())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    tiny_run.write_tokenizer(folder / "tokenizer")
    tiny_run.write_model_config(folder)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"{n} " * 12}) + "\n" for n in range(40)))
    return Place(folder)


@pytest.fixture(scope="module")
def whole(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one rank that nothing disturbed: `out`, and `run0` of its launch."""
    folder = tmp_path_factory.mktemp("one")
    finished(place, folder / "out", ranks=1)
    return folder


@pytest.fixture(scope="module")
def undisturbed(whole: Path) -> Course:
    return Course.of(whole / "out")


@pytest.fixture(scope="module")
def undisturbed_pair(place: Place, undisturbed: Course, tmp_path_factory: pytest.TempPathFactory) -> Course:
    return finished(place, tmp_path_factory.mktemp("two") / "out", ranks=2)


def finished(place: Place, output: Path, ranks: int, *more: Any) -> Course:
    launch = place.launch(output, *more, ranks=ranks)
    assert launch.wait() == [0] * ranks, launch.said()
    course = Course.of(output)
    assert [step for step, _, _ in course.steps] == list(range(1, STEPS + 1))
    return course


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("checkpoint-*"))


# -- killed


PLACES = {
    "step.end:3": 2,
    "checkpoint.model:2": 2,
    "checkpoint.record:2": 2,
    "checkpoint.optimizer:2": 2,
    "checkpoint.random:2": 2,
    "checkpoint.state:2": 2,
    "checkpoint.complete:2": 4,
    "checkpoint.rotate:1": 6,
    "final_model.rename:1": 6,
    "final_model.placed:1": 6,
}
SAMPLE = ("checkpoint.state:2", "final_model.rename:1")


@pytest.mark.parametrize("at", [at if at in SAMPLE else pytest.param(at, marks=pytest.mark.long) for at in PLACES])
def test_a_kill_while_it_saves_costs_the_steps_since_the_last_checkpoint_and_nothing_else(
    place: Place, undisturbed: Course, tmp_path: Path, at: str
) -> None:
    killed = place.launch(tmp_path / "out", failpoint=f"{at}=kill")
    assert killed.wait() == [-signal.SIGKILL]
    broken = [name for name in checkpoints(tmp_path / "out") if int(name.rpartition("-")[2]) > PLACES[at]]
    again = place.launch(tmp_path / "out", "--resume_from_checkpoint")
    assert again.wait() == [0], again.said()
    assert f"Resuming from {tmp_path}/out/checkpoint-{PLACES[at]}" in again.said()
    assert again.said().count("is incomplete (") == len(broken)
    assert [name for name in checkpoints(tmp_path / "out") if name.endswith(".incomplete")] == [
        f"{name}.incomplete" for name in broken
    ]
    assert bool(broken) == (
        at in ("checkpoint.record:2", "checkpoint.optimizer:2", "checkpoint.random:2", "checkpoint.state:2")
    )
    assert Course.of(tmp_path / "out") == undisturbed


def test_every_place_where_saving_can_be_killed_is_tested_above(whole: Path) -> None:
    passed = {path.name.rpartition(".")[0] for path in (whole / "run0" / "points").iterdir()}
    assert {name for name in passed if name.startswith(("checkpoint.", "final_model.", "step."))} == {
        at.partition(":")[0] for at in PLACES
    }


def test_a_kill_of_a_run_that_went_on_for_longer_leaves_the_model_it_had(
    place: Place, whole: Path, undisturbed: Course, tmp_path: Path
) -> None:
    shutil.copytree(whole / "out", tmp_path / "out")
    model = tmp_path / "out" / "final_model" / "model.safetensors"
    longer = ("--resume_from_checkpoint", "--max_steps", STEPS + 2)
    killed = place.launch(tmp_path / "out", *longer, failpoint="final_model.rename:1=kill")
    assert killed.wait() == [-signal.SIGKILL]
    assert model.read_bytes() == undisturbed.weights
    assert place.launch(tmp_path / "out", *longer).wait() == [0]
    assert model.read_bytes() != undisturbed.weights


def test_torchrun_that_restarts_its_ranks_goes_on_from_the_newest_complete_checkpoint(
    place: Place, undisturbed_pair: Course, tmp_path: Path
) -> None:
    """A rank is killed with checkpoint 4 half-written; the same command, without a word about resuming, is what
    torchrun repeats.
    """
    with place.torchrun(
        tmp_path / "out", options=("--max-restarts", "1"), failpoint="checkpoint.state:2=kill"
    ) as process:
        said = ended(process)
    assert process.returncode == 0, said
    assert "checkpoint-4 is incomplete" in said
    assert said.count(f"Resuming from {tmp_path}/out/checkpoint-2") == 1
    assert "Traceback" not in said
    assert Course.of(tmp_path / "out") == undisturbed_pair


# -- stopped


def test_sigterm_to_torchrun_saves_the_step_in_all_ranks(
    place: Place, undisturbed_pair: Course, tmp_path: Path
) -> None:
    """With processes that read rows: torchrun signals them too, and the last step needs them."""
    with place.torchrun(tmp_path / "out", "--dataloader_num_workers", 1, failpoint="step.end:6=pause") as process:
        wait_for(tmp_path / "points" / "step.end.6", lambda: process.poll() is None)
        process.send_signal(signal.SIGTERM)
        (tmp_path / "points" / "go").touch()
        said = ended(process)
    words = [line for line in said.splitlines() if line.startswith("train.py:")]
    step = max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "out").glob("checkpoint-*"))
    assert step in (3, 4), "the ranks may go on before the agent has passed the signal on"
    assert words == [
        f"train.py: interrupted: stopped by SIGTERM, with {tmp_path}/out/checkpoint-{step} saved at step {step}; "
        f"--resume_from_checkpoint auto goes on from it"
    ]
    assert said.count("Traceback") == said.count("SignalException: Process") == 1, said  # torchrun's own
    assert checkpoints(tmp_path / "out") == ["checkpoint-2", f"checkpoint-{step}"]
    assert finished(place, tmp_path / "out", 2, "--resume_from_checkpoint") == undisturbed_pair


ON_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def drained(terminal: int) -> bool:
    """What was written is read, since nobody can write to a full terminal."""
    with contextlib.suppress(OSError):  # no more there, or the other side is closed
        while os.read(terminal, 1 << 16):
            pass
    return True


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"), marks=pytest.mark.long),
        (),
    ],
    ids=["torchrun", "python"],
)
def test_a_terminal_that_is_closed_saves_the_step(
    place: Place, undisturbed: Course, undisturbed_pair: Course, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    """A real one, hung up: nothing that is said afterwards can be written anywhere, and the readers of rows hear the
    signal, too.
    """
    (tmp_path / "points").mkdir()
    ours, theirs = os.openpty()
    ranks = 2 if launcher else 1
    command = [
        sys.executable,
        *launcher,
        str(ROOT / "train.py"),
        *place.flags(tmp_path / "out", ranks, "--dataloader_num_workers", 1),
    ]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **armed(tmp_path / "points", f"step.end:{3 * ranks}=pause")}
    with subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, *command],
        env=environ,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        os.set_blocking(ours, False)
        wait_for(tmp_path / "points" / f"step.end.{3 * ranks}", lambda: drained(ours) and process.poll() is None)
        os.close(ours)
        (tmp_path / "points" / "go").touch()
    assert process.returncode == (1 if launcher else 129)
    step = max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "out").glob("checkpoint-*"))
    assert step in (3, 4)
    log = (tmp_path / "out" / "logs" / "rank0.log").read_text()
    assert f"stopped by SIGHUP, with {tmp_path}/out/checkpoint-{step} saved at step {step}" in log
    assert (
        finished(place, tmp_path / "out", ranks, "--resume_from_checkpoint").steps
        == (undisturbed_pair if launcher else undisturbed).steps
    )


@pytest.mark.parametrize(("at", "by"), [("step.end:3", signal.SIGTERM), ("checkpoint.model:1", signal.SIGHUP)])
def test_a_rank_told_alone_takes_all_others_along(
    place: Place, undisturbed: Course, tmp_path: Path, at: str, by: signal.Signals
) -> None:
    launch = place.launch(tmp_path / "out", ranks=2, failpoint=f"{at}=pause")
    told = launch.paused(at.replace(":", "."))
    os.kill(launch.processes[told].pid, by)
    os.kill(launch.processes[told].pid, by)  # by the launcher, for the same reason
    launch.go()
    assert launch.wait() == [128 + by, 128 + by], launch.said()
    assert launch.words() == [
        f"train.py: interrupted: stopped by {by.name}, with {tmp_path}/out/checkpoint-2 saved at step 2; "
        f"--resume_from_checkpoint auto goes on from it"
    ]
    assert launch.words(1) == []
    assert checkpoints(tmp_path / "out") == ["checkpoint-2"]


def test_a_second_sigterm_ends_a_rank_that_waits_for_another_and_the_other_ends_with_one_line(
    place: Place, undisturbed: Course, tmp_path: Path
) -> None:
    """The rank that is told waits inside a collective, where Python handles no signal."""
    launch = place.launch(tmp_path / "out", ranks=2, failpoint="step.end:5=pause")
    paused = launch.paused("step.end.5")
    wait_for(launch.folder / "points" / "step.end.6", lambda: True)
    waiting = launch.processes[1 - paused]
    first = time.monotonic()
    while waiting.exitcode is None:
        os.kill(waiting.pid, signal.SIGTERM)
        waiting.join(0.1)
    assert time.monotonic() - first > 2.0
    launch.go()
    codes = launch.wait()
    assert (codes[1 - paused], codes[paused]) == (143, 1)
    assert launch.words(1 - paused) == ["stopped at once by a second SIGTERM; the newest complete checkpoint is kept"]
    assert len(launch.words(paused)) == 1
    assert re.match(r"train.py: error: a rank ended or hung in the middle of training", launch.words(paused)[0])
    assert checkpoints(tmp_path / "out") == ["checkpoint-2"]


WAITS_FOR_ONE_THAT_IS_GONE = """
import os, signal, subprocess, time
from moai.core.distributed import owner, start_token
from moai.training.stop import Word
other = subprocess.Popen(["sleep", "60"])
one, two = owner(), owner() | {"pid": other.pid, "start_token": start_token(other.pid)}
with Word().heard([one, two]):
    os.kill(os.getpid(), signal.SIGTERM)
    print("told", flush=True)
    other.kill()
    other.wait()
    time.sleep(60)
"""


def test_a_rank_that_is_told_ends_when_another_is_gone_since_no_step_can_end() -> None:
    """Whatever a collective does that lacks a rank: on an accelerator it may wait for the rest of its half hour."""
    done = subprocess.run(
        [sys.executable, "-c", WAITS_FOR_ONE_THAT_IS_GONE], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout) == (143, "told\n"), done.stderr
    assert (
        done.stderr
        == "stopped by SIGTERM, and without a last checkpoint: rank 1 is gone; the newest complete one is kept\n"
    )


def test_a_second_run_in_the_same_place_is_refused_while_the_first_is_at_work(
    place: Place, undisturbed: Course, tmp_path: Path
) -> None:
    first = place.launch(tmp_path / "out", failpoint="step.end:1=pause")
    first.paused("step.end.1")
    second = place.launch(tmp_path / "out", ranks=2)
    assert second.wait() == [2, 2]
    at_work = rf"a run is at work there \(pid {first.processes[0].pid} on .*, since [-0-9]+ [:0-9]+ UTC\); wait"
    assert re.match(rf"train.py: error: --output_dir {tmp_path}/out: {at_work}", second.words()[0])
    assert (len(second.words()), second.words(1)) == (1, [])
    first.go()
    assert first.wait() == [0]
    assert Course.of(tmp_path / "out") == undisturbed


def test_ctrl_c_in_one_rank_is_one_line_and_ends_the_others(place: Place, undisturbed: Course, tmp_path: Path) -> None:
    launch = place.launch(tmp_path / "out", ranks=2, failpoint="step.end:3=pause")
    paused = launch.paused("step.end.3")
    os.kill(launch.processes[paused].pid, signal.SIGINT)
    codes = launch.wait()
    assert (codes[paused], codes[1 - paused]) == (130, 1)
    assert launch.words(paused) == [
        "train.py: interrupted: stopped by SIGINT; finished shards and checkpoints are kept, --resume_from_checkpoint "
        "auto goes on from the newest"
    ]
    assert len(launch.words(1 - paused)) == 1
    assert "a rank ended or hung" in launch.words(1 - paused)[0]


def test_a_launcher_that_is_killed_takes_its_ranks_along(place: Place, tmp_path: Path) -> None:
    """By SIGKILL, of which it can tell nobody; its ranks are in the midst of a long training."""
    with place.torchrun(tmp_path / "out", "--max_steps", 100_000, "--save_steps", 100_000) as process:
        ranks = {wait_for(tmp_path / "points" / f"step.end.{n}", lambda: process.poll() is None) for n in range(1, 9)}
        process.kill()
        killed = time.monotonic()
        said = ended(process)  # once no rank holds its end of the pipe
    assert time.monotonic() - killed < 20, "a second, on a machine that is not busy"
    assert len(ranks) == 2
    lines = [line for line in said.splitlines() if "because its launcher" in line]
    assert sorted(line.partition(",")[0] for line in lines) == ["[Rank 0] ended", "[Rank 1] ended"]
    assert "Traceback" not in said
    assert all(start_token(rank) is None for rank in ranks)


# -- out of disk


@pytest.mark.parametrize(
    ("limit", "reason"),
    [pytest.param(90_000, "File too large", marks=pytest.mark.long), (150_000, "torch could not write all of it")],
)
def test_a_file_that_cannot_grow_is_one_line_whoever_writes_it(
    place: Place, undisturbed: Course, tmp_path: Path, limit: int, reason: str
) -> None:
    """The weights by safetensors, the optimizer by torch."""
    launch = place.launch(tmp_path / "out", file_limit=limit)
    assert launch.wait() == [74]
    assert len(launch.words()) == 1
    assert launch.words()[0].startswith(f"train.py: error: {tmp_path}/out/checkpoint-2: {reason}")
    assert checkpoints(tmp_path / "out") == []


@pytest.mark.parametrize("at", [pytest.param("checkpoint.optimizer:2", marks=pytest.mark.long), "checkpoint.random:3"])
def test_a_full_disk_in_one_rank_ends_all_with_one_line_and_the_next_run_goes_on(
    place: Place, undisturbed_pair: Course, tmp_path: Path, at: str
) -> None:
    launch = place.launch(tmp_path / "out", ranks=2, failpoint=f"{at}=enospc")
    assert launch.wait() == [74, 74]
    assert launch.words() == [
        f"train.py: error: {tmp_path}/out/checkpoint-4: No space left on device, so it is not complete; "
        "free space there (a lower --save_total_limit keeps fewer), then go on from checkpoint-2 by "
        "--resume_from_checkpoint auto"
    ]
    assert launch.words(1) == []
    assert checkpoints(tmp_path / "out") == ["checkpoint-2"]
    assert finished(place, tmp_path / "out", 2, "--resume_from_checkpoint") == undisturbed_pair
