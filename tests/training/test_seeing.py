"""What a run shows while it trains and afterwards: the live line, history.jsonl, training.html, and evaluation in the
middle of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch

from moai.cli import main as moai
from moai.core.config import resolve
from moai.core.distributed import ranks
from moai.core.pages import bars
from moai.prepared.manifest import Prepared
from moai.prepared.rows import PackedRows
from moai.pretraining.options import DataConfig
from moai.tokenizers.load import load_file
from moai.training import page
from moai.training.arguments import TrainConfig
from moai.training.callback import Clock, clock_text, mix_text
from moai.training.data import PackedCollator
from moai.training.evaluate import HeldOut, evaluate, log_figures
from moai.training.history import History, read
from moai.training.order import Order, sources_of
from moai.training.page import render
from moai.training.token_bytes import TokenBytes

ROOT = Path(__file__).parents[2]
SOURCES = ("web", "wiki", "<code>")
FLAGS = [
    "--batch_size",
    "2",
    "--gradient_accumulation_steps",
    "2",
    "--num_epochs",
    "3",
    "--learning_rate",
    "1e-2",
    "--warmup_steps",
    "0",
    "--use_cpu",
    "--logging_steps",
    "2",
    "--save_steps",
    "4",
    "--dataloader_num_workers",
    "0",
]
STEPS = 9
"""3 epochs of 26 rows, 8 at a step of 2 ranks."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny_run.write_tokenizer(folder / "tokenizer")
    tiny_run.write_model_config(folder)
    tiny_run.write_prepared(folder / "prepared", folder / "tokenizer", sources=SOURCES)
    tiny_run.write_prepared(folder / "held_out", folder / "tokenizer", rows=13, seed=5, sources=SOURCES)
    return folder


RANK = """
import os, sys
from pathlib import Path
sys.path[:0] = ["tests", "tests/training"]
import tiny_run
from test_seeing import train_here
from moai.training.logs import start_logging
start_logging(Path(sys.argv[2]), int(os.environ["RANK"]))
train_here(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:], environ=os.environ)
os._exit(0)
"""


def train_here(place: Path, output: Path, *more: str, environ: Any = None, held_out: bool = True) -> Any:
    from moai.training.stages import Stage
    from moai.training.trainer import train

    words = [
        *FLAGS,
        "--output_dir",
        str(output),
        "--model_config",
        str(place / "model.json"),
        "--tokenizer_path",
        str(place / "tokenizer"),
        *more,
    ]
    resolved = resolve([TrainConfig, DataConfig], words, {}, prog="test")
    stage = Stage(resolved[TrainConfig], resolved[DataConfig], tiny_run.open_prepared(place / "prepared"))
    if held_out:
        stage = replace(stage, held_out=tiny_run.open_prepared(place / "held_out"))
    output.mkdir(parents=True, exist_ok=True)
    return train(resolved[TrainConfig], [stage], resolved.origins, environ=environ or {})[0]


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """Two gloo ranks, interrupted by nobody."""
    script = place / "rank.py"
    script.write_text(RANK)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        place,
        place / "run",
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("DATASET_", "MOAI_"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (place / "console").write_text(done.stderr)
    return place / "run"


# -- the live line


def test_the_live_line_says_speed_wait_memory_time_and_where_the_rows_come_from(run: Path, place: Path) -> None:
    lines = re.findall(
        r"step (\d+)/9  loss (\S+)  lr (\S+)  norm (\S+)  ([\d,]+) tokens/s  wait (\S+)%  (\S+) GB  \d+:\d\d left  "
        r"(.*)",
        (place / "console").read_text(),
    )
    assert [int(line[0]) for line in lines] == [1, 2, 4, 6, 8, 9]
    assert all(float(line[6]) > 0.1 and 0 <= float(line[5]) <= 100 for line in lines)
    shares = [dict(re.findall(r"(\S+) (\d+)%", line[7])) for line in lines]
    assert set(shares[-1]) == set(SOURCES)
    assert abs(sum(map(int, shares[-1].values())) - 100) <= 1
    assert "held out: loss" in (place / "console").read_text()


def test_a_slow_loader_is_seen_as_waiting_and_a_fast_one_is_not(
    run: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a row takes 0.1 s, so that 4 rows a step wait for 0.4 s, whatever else a step costs."""
    fast = PackedRows.__getitem__

    def slow(rows: PackedRows, index: int) -> Any:
        time.sleep(0.1)
        return fast(rows, index)

    monkeypatch.setattr(PackedRows, "__getitem__", slow)
    train_here(place, tmp_path / "slow", "--max_steps", "4", held_out=False)
    waits = waited(tmp_path / "slow")
    assert min(waits) > 0.8 * 0.97, waits
    assert min(waited(run)) < 0.8


def waited(run: Path) -> list[float]:
    """Seconds of waiting in the two steps before each line but the first."""
    training = [entry for entry in read(run / "history.jsonl") if entry["kind"] == "train"]
    spans = [(now["tokens"] - before["tokens"]) / now["tokens_per_second"] for before, now in pairwise(training[1:])]
    return [entry["data_wait"] * span for entry, span in zip(training[2:], spans)]


def test_the_clock_counts_only_the_time_until_a_batch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("moai.training.callback.time", SimpleNamespace(monotonic=lambda: now[0]))

    def batches() -> Iterator[int]:
        for number in range(3):
            now[0] += 3.0
            yield number

    clock = Clock(0)
    for _ in clock.waiting(batches()):
        now[0] += 5.0
    assert clock.waited == 9.0
    with clock.paused():
        now[0] += 10.0
    figures = clock.tick(1000, clock.waited)
    assert figures["data_wait"] == 9 / 24
    assert clock.waited == 0.0


def test_shares_and_times_as_text() -> None:
    assert mix_text({"a": 10}, {"a": 5.0}) == ""
    assert mix_text({"a": 1, "b": 3}, {"a": 100.0, "b": 100.0}) == "  b 75% a 25%"
    assert mix_text(dict.fromkeys("abcdef", 1), dict.fromkeys("abcdef", 1.0)).endswith("+2")
    assert [clock_text(seconds) for seconds in (65, 3725)] == ["1:05", "1:02:05"]


def test_memory_does_not_grow_with_the_epochs(prepare: Callable[..., Prepared], tmp_path: Path) -> None:
    """A fresh process reads all rows ten times; what it holds of its own is measured after each."""
    lines = [json.dumps({"text": f"The story of document number {number}. " * 20}) for number in range(1500)]
    (tmp_path / "en.jsonl").write_text("\n".join(lines))
    prepared = prepare(tmp_path / "en.jsonl", seq_len=128, packing="bfd_split", shard_bytes=100_000)
    script = (
        "import json, pathlib, sys; sys.path.insert(0, 'benchmarks'); from loader import epochs; "
        "print(json.dumps(epochs(pathlib.Path(sys.argv[1]), 10)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, prepared.path],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    own = [megabytes for megabytes, _ in json.loads(done.stdout)]
    assert len(own) == 10
    assert own[-1] - own[0] < 3.0, own


# -- history.jsonl


def test_every_line_has_the_figures_and_rows_of_each_source_are_the_orders(run: Path, place: Path) -> None:
    entries = read(run / "history.jsonl")
    assert [entry["kind"] for entry in entries].count("start") == 1
    training = [entry for entry in entries if entry["kind"] == "train"]
    assert [entry["step"] for entry in training] == [1, 2, 4, 6, 8, 9]
    order = Order(sources_of(tiny_run.open_prepared(place / "prepared").content["shards"]), 42)
    firsts = [source.first for source in order.sources]
    for entry in training:
        assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "data_wait", "memory_gb", "time"} <= set(
            entry
        )
        assert entry["position"] == entry["step"] * 8
        rows = order.rows_at(np.arange(entry["position"]))
        counted = np.bincount(np.searchsorted(firsts, rows, "right") - 1, minlength=len(firsts)).tolist()
        assert entry["consumed"] == dict(zip(SOURCES, counted))
    state = json.loads((run / "checkpoint-9" / "trainer_state.json").read_text())
    assert training[-1]["tokens"] == [entry for entry in state["log_history"] if "loss" in entry][-1]["tokens_seen"]


def test_evaluations_come_with_each_checkpoint_and_at_the_end(run: Path) -> None:
    held_out = [entry for entry in read(run / "history.jsonl") if entry["kind"] == "eval"]
    assert [entry["step"] for entry in held_out] == [4, 8, STEPS]
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"]
    assert {f"eval_{name}_bits_per_byte" for name in SOURCES} <= set(held_out[0])
    state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry] == [held_out[0]["eval_loss"]]


def test_two_ranks_measure_what_one_measures(run: Path, place: Path) -> None:
    """Seven batches of three sources, which do not go evenly between two."""
    from transformers import AutoModelForCausalLM

    held_out = HeldOut.of(tiny_run.open_prepared(place / "held_out"))
    assert len(held_out.batches(2)) % 2 > 0
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint-4")
    bytes_of = TokenBytes(load_file(place / "tokenizer" / "tokenizer.json"))
    alone = log_figures(
        evaluate(model, held_out, PackedCollator(pad_id=0), bytes_of, ranks({}), batch_size=2, device="cpu")
    )
    logged = next(entry for entry in read(run / "history.jsonl") if entry["kind"] == "eval" and entry["step"] == 4)
    assert len(alone) == 3 * 4
    assert alone == pytest.approx({name: logged[name] for name in alone}, rel=1e-5)


def test_evaluation_leaves_training_as_it_was(place: Path, tmp_path: Path) -> None:
    """The same weights with and without, at other steps too."""
    from safetensors.torch import load_file

    train_here(place, tmp_path / "without", "--max_steps", "3", held_out=False)
    train_here(place, tmp_path / "with", "--max_steps", "3", "--eval_steps", "1", "--eval_rows", "2")
    without, with_it = (
        load_file(tmp_path / name / "final_model" / "model.safetensors") for name in ("without", "with")
    )
    assert all(torch.equal(without[name], with_it[name]) for name in without)
    assert [entry["step"] for entry in read(tmp_path / "with" / "history.jsonl") if entry["kind"] == "eval"] == [
        1,
        2,
        3,
    ]


def test_a_resumed_run_goes_on_in_its_history_and_drops_what_came_of_nothing(
    run: Path, place: Path, tmp_path: Path
) -> None:
    """Steps 5 to 9 are logged already, the last line is cut: from checkpoint 4 on they come again, each once."""
    shutil.copytree(run / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    whole = (run / "history.jsonl").read_bytes()
    (tmp_path / "run" / "history.jsonl").write_bytes(whole[:-20])
    train_here(place, tmp_path / "run", "--resume_from_checkpoint", "auto", "--gradient_accumulation_steps", "4")
    entries, before = read(tmp_path / "run" / "history.jsonl"), read(run / "history.jsonl")
    assert [(entry["kind"], entry["step"]) for entry in entries] == [
        ("start", 0),
        ("train", 1),
        ("train", 2),
        ("train", 4),
        ("eval", 4),
        ("start", 4),
        ("train", 6),
        ("train", 8),
        ("eval", 8),
        ("train", 9),
        ("eval", 9),
    ]
    assert entries[:5] == before[:5]
    for name in ("loss", "learning_rate", "tokens", "position"):
        now, then = ([entry[name] for entry in lines if entry["kind"] == "train"] for lines in (entries, before))
        assert now == pytest.approx(then, rel=1e-3)
    assert entries[-2]["consumed"] == before[-2]["consumed"]
    page = (tmp_path / "run" / "training.html").read_text()
    assert "resumed after step 4" in page
    assert page.count("class=mark") >= 5


def test_a_run_without_its_history_has_the_trainers(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    log = [
        {"step": 2, "loss": 3.0, "tokens_seen": 20},
        {"step": 4, "eval_loss": 2.0},
        {"step": 6, "loss": 1.0, "tokens_seen": 60},
    ]
    history.begin(4, log, {"steps": 8})
    assert [(entry["kind"], entry["step"]) for entry in read(history.path)] == [("train", 2), ("eval", 4), ("start", 4)]


def test_a_directory_that_cannot_be_written_costs_the_history_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history = History(tmp_path / "absent" / "history.jsonl")
    history.begin(0, [], {})
    history.add({"kind": "train", "step": 1})
    assert [record.message for record in caplog.records] == [
        f"{history.path}: No such file or directory; lines will be missing there, training goes on"
    ]


# -- training.html


class Page(HTMLParser):
    """What a page loads, and whether its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.figures = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.figures += tag == "figure"
        self.loads += [
            f"{name}={value}" for name, value in attributes if name in ("src", "href", "srcset", "data", "action")
        ]
        self.loads += [tag] if tag in ("script", "link", "iframe", "img") else []
        if tag not in ("meta", "html", "line", "polyline", "circle", "polygon"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "html":
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)


def test_the_page_loads_nothing_and_draws_all_there_is(run: Path) -> None:
    text = (run / "training.html").read_text()
    page = Page(text)
    assert (page.loads, page.open) == ([], [])
    assert page.figures == 8
    assert not re.search(r"https?:|url\(|@import|<code>", text)
    assert "&lt;code&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert "nan" not in text.lower()


def test_a_curve_is_where_its_numbers_are() -> None:
    """By hand: from 0 to 10 across 500 of 560 points, from 0 to 4 up 182 of 210."""
    svg = page.lines(
        "x",
        [page.Curve("a", [(0, 0.0), (5, 1.0), (10, 4.0)]), page.Curve("b", [(5, float("nan")), (6, 2.0)])],
        marks=[5, 99],
    )
    first, second = re.findall(r"<polyline points='([^']*)'", svg)
    assert first == "50.0,190.0 300.0,144.5 550.0,8.0"
    assert second == "350.0,99.0"
    assert svg.count("class=mark") == 1


def test_many_points_keep_every_spike() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[77_777] = (77_777.0, 9.0)
    svg = page.lines("x", [page.Curve("a", points)])
    drawn = re.findall(r"<polyline points='([^']*)'", svg)[0].split()
    assert len(drawn) < 700
    assert min(float(point.split(",")[1]) for point in drawn) == 8.0


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 10, [0, 2, 4, 6, 8, 10]), (2.9, 8.9, [4, 6, 8]), (0, 3e-4, [0, 1e-4, 2e-4, 3e-4])]
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert page.ticks(low, high, 5) == pytest.approx(expected)


def test_shares_stack_to_the_top() -> None:
    svg = page.stacked("x", ["a", "b"], [(0, [1.0, 3.0]), (10, [3.0, 1.0])])
    low, high = re.findall(r"<polygon points='([^']*)'", svg)
    assert low == "50.0,190.0 550.0,190.0 550.0,53.5 50.0,144.5"
    assert high.endswith("550.0,8.0 50.0,8.0")


def test_nothing_has_no_bar_and_a_little_has_one() -> None:
    none, little = bars([("none", 0, 0.0, ""), ("little", 1, 1e-9, "")]).split("</tr>")[:2]
    assert ("class='bar" in none, "class='bar" in little) == (False, True)


def test_a_run_that_has_just_begun_has_a_page() -> None:
    assert "no step is logged yet" in render("new", [{"kind": "start", "step": 0, "steps": 9, "sources": {}}], {})


def test_the_command_writes_the_page_of_any_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "history.jsonl").write_bytes((run / "history.jsonl").read_bytes())
    assert moai(["training", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "step       9 of 9" in out
    assert out.splitlines()[-1] == str(tmp_path / "training.html")
    assert Page((tmp_path / "training.html").read_text()).figures == 8
    assert moai(["training", str(tmp_path / "absent")]) == 2
    assert "name the --output_dir of a training run" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "staged" / "stage_0")
    assert moai(["training", str(tmp_path / "staged")]) == 2
    assert f"name one of {tmp_path / 'staged' / 'stage_0'}" in capsys.readouterr().err


def test_a_source_has_one_colour_in_all_plots_and_lists_are_words() -> None:
    sources = {name: {"rows": 100, "tokens": 100} for name in ("ko", "en")}
    entries = [
        {"kind": "start", "step": 0, "sources": sources},
        {"kind": "train", "step": 1, "loss": 1.0, "consumed": {"ko": 1, "en": 9}},
        {
            "kind": "eval",
            "step": 1,
            "eval_ko_bits_per_byte": 1.0,
            "eval_en_bits_per_byte": 2.0,
            "eval_bits_per_byte": 1.5,
        },
    ]
    text = render("run", entries, {"dataset": {"value": ["a", "b"], "origin": "flag"}})
    assert [re.findall(rf"var\(--(c\d)\)'></i>{name} ", text) for name in ("ko", "en")] == [["c0", "c0"], ["c1", "c1"]]
    assert "<td>a, b</td>" in text
