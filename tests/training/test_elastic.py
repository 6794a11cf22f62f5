"""A run that is stopped or killed and resumed with other ranks, batches and accumulation trains on exactly the rows
that were left.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import elastic_run
import numpy as np
import pytest

from moai.training.mixture import Mixture, MixtureFlags
from moai.training.order import Order, sources_of

ROOT = Path(__file__).parents[2]
EPOCHS = 2.5
END = int(EPOCHS * elastic_run.ROWS)
MIXTURE = [
    "--mixture",
    "ko=2",
    "en=1",
    "code=1",
    "--mixture_by",
    "examples",
    "--mixture_stages",
    "0.5:ko=1,en=1,code=3",
]


class Cell(NamedTuple):
    world: int
    batch: int
    accumulation: int

    @property
    def rows(self) -> int:
        """In one step."""
        return self.world * self.batch * self.accumulation


CELLS = [Cell(*cell) for cell in itertools.product((1, 2, 3), (1, 2, 4), (1, 2))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return elastic_run.write_place(tmp_path_factory.mktemp("elastic"))


@pytest.fixture
def folder(place: Path, tmp_path: Path) -> Path:
    return place_in(tmp_path, place)


def place_in(folder: Path, place: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("prepared", "tokenizer", "model.json"):
        (folder / name).symlink_to(place / name)
    return folder


def session(
    folder: Path, number: int, cell: Cell, *flags: str, ending: str = "-", accelerate: bool = False
) -> subprocess.CompletedProcess[str]:
    scripts = Path(sys.executable).parent
    launcher = [sys.executable]
    if accelerate:
        launcher = [
            f"{scripts}/accelerate",
            "launch",
            "--multi_gpu",
            "--same_network",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--num_machines",
            "1",
            "--gpu_ids",
            "all",
            "--num_processes",
            str(cell.world),
            "--main_process_port",
            "0",
        ]
    elif cell.world > 1:
        launcher = [f"{scripts}/torchrun", "--standalone", "--nproc_per_node", str(cell.world)]
    command = [
        *launcher,
        str(ROOT / "tests" / "elastic_run.py"),
        str(folder),
        ending,
        "--output_dir",
        str(folder / "out"),
        "--batch_size",
        str(cell.batch),
        "--gradient_accumulation_steps",
        str(cell.accumulation),
        "--num_epochs",
        str(EPOCHS),
        "--learning_rate",
        "1e-3",
        "--lr_scheduler_type",
        "constant",
        "--warmup_steps",
        "0",
        "--logging_steps",
        "1",
        "--use_cpu",
        "true",
        "--dataloader_num_workers",
        "0",
        *flags,
    ]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "SESSION": str(number), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def consumed(folder: Path, number: int, cell: Cell, *, up_to: int | None = None) -> list[int]:
    """The rows of a session in the order of the steps: the ranks take turns, batch by batch."""
    steps: dict[int, list[list[list[int]]]] = defaultdict(lambda: [[] for _ in range(cell.world)])
    for rank in range(cell.world):
        for line in (folder / f"consumed-{number}-{rank}.jsonl").read_text().splitlines():
            step, rows = json.loads(line)
            if up_to is None or step <= up_to:
                steps[step][rank].append(rows)
    return [row for step in sorted(steps) for turn in zip(*steps[step], strict=True) for rows in turn for row in rows]


def expected(folder: Path, flags: list[str]) -> list[int]:
    """The order of the run, from the function alone."""
    sources = sources_of(json.loads((folder / "prepared" / "manifest.json").read_text())["content"]["shards"])
    mixture = None
    if flags:
        wish = MixtureFlags.parse(
            mixture=("ko=2", "en=1", "code=1"),
            stages=("0.5:ko=1,en=1,code=3",),
            epochs=(),
            by="examples",
            temperature=1.0,
        )
        assert wish is not None
        mixture = Mixture.of(wish.resolve(sources, END), 42)
    return Order(sources, 42, mixture=mixture).rows_at(np.arange(END)).tolist()


def losses(folder: Path) -> dict[int, float]:
    newest = max((folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return {
        entry["step"]: entry["loss"]
        for entry in json.loads((newest / "trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    }


def checkpoint_of(folder: Path) -> tuple[int, dict[str, Any]]:
    """Step and record of the newest checkpoint."""
    newest = max((folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return int(newest.name.rpartition("-")[2]), json.loads((newest / "moai_data.json").read_text())


def run_chain(
    folder: Path,
    cells: list[Cell],
    positions: list[int],
    *,
    kills: Sequence[bool],
    flags: list[str] = MIXTURE,
    accelerate: bool = False,
) -> list[int]:
    """Sessions one after the other, all but the last stopped or killed near a position; returns what they trained
    on.
    """
    rows: list[int] = []
    first, first_position = 0, 0
    for number, cell in enumerate(cells):
        last = number == len(cells) - 1
        kill = not last and kills[number]
        ends_at = first + max(1, round(([*positions, 0][number] - first_position) / cell.rows))
        ending = (
            "-" if last else f"{'kill' if kill else 'stop'}:{ends_at + kill}"
        )  # killed in the middle of a step, after the save of the one before
        resume = ["--resume_from_checkpoint"] if number else []
        done = session(
            folder,
            number,
            cell,
            *flags,
            *resume,
            *(["--save_steps", str(ends_at)] if kill else []),
            ending=ending,
            accelerate=accelerate and cell.world > 1,
        )
        assert (done.returncode == 0) == last, done.stderr[-3000:]
        first, record = checkpoint_of(folder)
        assert last or first == ends_at, done.stderr[-3000:]
        rows += consumed(folder, number, cell, up_to=first)
        first_position = record["position"]
        assert first_position == len(rows)
    assert END - len(rows) < cells[-1].rows, "only what makes no whole step is left"
    return rows


def test_three_ranks_go_on_where_one_was_stopped_and_one_where_they_were_killed(folder: Path) -> None:
    """In the middle of the first and of the second epoch, with another --save_steps each. What was killed repeats what
    it had not saved.
    """
    cells = [Cell(1, 4, 1), Cell(3, 1, 2), Cell(1, 2, 1)]
    rows = run_chain(folder, cells, [16, 48], kills=[False, True])
    assert rows == expected(folder, MIXTURE)[: len(rows)]


@pytest.mark.long
def test_a_killed_run_without_a_mixture_has_every_row_once_an_epoch(folder: Path) -> None:
    cells = [Cell(2, 2, 1), Cell(1, 2, 2)]
    rows = run_chain(folder, cells, [12], kills=[True], flags=[])
    assert rows == expected(folder, [])[: len(rows)]
    assert sorted(rows[:33]) == list(range(33)), "an epoch of all rows, once each"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mixture", "ko=1"], "mixture is ['ko=2', 'en=1', 'code=1'] there, ['ko=1'] here"),
        ([*MIXTURE, "--seed", "1"], "seed is 42 there, 1 here"),
        ([*MIXTURE, "--shuffle_window", "2"], "window is 0 there, 2 here"),
    ],
)
@pytest.mark.long
def test_another_order_is_refused_with_the_difference(folder: Path, flags: list[str], message: str) -> None:
    assert session(folder, 0, Cell(1, 4, 1), *MIXTURE, "--max_steps", "2").returncode == 0
    refused = session(folder, 1, Cell(1, 4, 1), *flags, "--max_steps", "4", "--resume_from_checkpoint")
    assert refused.returncode != 0
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.long
@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
@pytest.mark.parametrize(("epoch", "position"), [(1, 16), (2, 50)])
def test_the_grid(
    place: Path, tmp_path: Path, epoch: int, position: int, kill: bool, record: Callable[..., None]
) -> None:
    """Every cell ends in the middle of an epoch, and another goes on, each of them once."""
    for number, cell in enumerate(CELLS):
        other = CELLS[(number * 5 + epoch + 3 * kill) % len(CELLS)]
        folder = place_in(tmp_path / str(number), place)
        rows = run_chain(folder, [cell, other], [position], kills=[kill], accelerate=cell.world > 1 and cell.batch == 4)
        assert rows == expected(folder, MIXTURE)[: len(rows)], (cell, other)
    ended = "SIGKILL" if kill else "SIGTERM"
    record(
        f"training ended by {ended} in epoch {epoch}, resumed with other ranks, batch and accumulation",
        len(CELLS),
        "consumed rows are the order, none twice or missing",
    )


@pytest.mark.long
def test_loss_curves_of_equal_global_batches_are_equal(
    place: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    """Up to rounding: the same sums in another order."""
    curves: dict[int, list[dict[int, float]]] = defaultdict(list)
    for number, cell in enumerate(CELLS):
        folder = place_in(tmp_path / str(number), place)
        assert session(folder, 0, cell, *MIXTURE, "--max_steps", "8").returncode == 0
        curves[cell.rows].append(losses(folder))
    spread = {
        rows: max((abs(one[step] - found[0][step]) for one in found[1:] for step in one), default=0.0)
        for rows, found in curves.items()
    }
    assert max(spread.values()) < 1e-4, spread
    record(
        "training with the same rows a step, cut otherwise",
        len(CELLS),
        f"losses differ by {max(spread.values()):.1e} at most in 8 steps",
    )
