"""One run a dataset, each from the weights of the last; and documents held out of training, evaluated by source."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run

from moai.core import failpoints
from moai.core.config import resolve
from moai.core.distributed import Ranks
from moai.core.errors import ConfigError, SourceError, StorageError
from moai.prepared.manifest import Prepared
from moai.prepared.rows import PackedRows
from moai.pretraining.options import DataConfig
from moai.pretraining.recipe import prepare
from moai.training import process_group as group
from moai.training.arguments import TrainConfig
from moai.training.stages import check_places, stages_of

ROOT = Path(__file__).parents[2]


def documents(name: str, number: int) -> list[str]:
    return [f"{name} document {index} says {'abcdefgh'[index % 8] * (5 + index % 11)}" for index in range(number)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    tiny_run.write_tokenizer(folder / "tokenizer")
    tiny_run.write_model_config(folder)
    for name in ("first", "second"):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in documents(name, 120))
        )
    return folder


def command(place: Path, out: Path, *more: str) -> list[str]:
    return [
        str(ROOT / "train.py"),
        "--dataset",
        str(place / "first.jsonl"),
        str(place / "second.jsonl"),
        "--tokenizer_path",
        str(place / "tokenizer"),
        "--model_config",
        str(place / "model.json"),
        "--output_dir",
        str(out),
        "--cache_dir",
        str(place / "cache"),
        "--seq_len",
        "48",
        "--packing",
        "bfd_split",
        "--batch_size",
        "2",
        "--gradient_accumulation_steps",
        "1",
        "--learning_rate",
        "5e-3",
        "--warmup_steps",
        "4",
        "--stage_warmup_steps",
        "2",
        "--logging_steps",
        "1",
        "--use_cpu",
        "true",
        "--dataloader_num_workers",
        "0",
        "--sequential",
        "--eval_ratio",
        "0.2",
        "--num_epochs",
        "1",
        "--num_proc",
        "0",
        *more,
    ]


def start(words: list[str], *, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = (
        [sys.executable]
        if ranks == 1
        else [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)]
    )
    return subprocess.run(
        [*launcher, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """Two ranks, two stages."""
    done = start(command(place, place / "out"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    (place / "stderr").write_text(done.stderr)
    (place / "stdout").write_text(done.stdout)
    return place / "out"


def prepared_of(file: Path, place: Path, *, held_out: bool, eval_ratio: float = 0.2) -> Prepared:
    data = DataConfig(
        dataset=(str(file),),
        tokenizer_path=str(place / "tokenizer"),
        cache_dir=str(place / "cache"),
        seq_len=48,
        num_proc=0,
        eval_ratio=eval_ratio,
        held_out=held_out,
    )
    return prepare(data, origins={})


def summary(stage: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((stage / "summary.json").read_text())
    return found


def learning_rates(stage: Path) -> list[float]:
    newest = max(stage.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [
        entry["learning_rate"]
        for entry in json.loads((newest / "trainer_state.json").read_text())["log_history"]
        if "learning_rate" in entry
    ]


def test_a_stage_begins_with_the_weights_of_the_last(run: Path) -> None:
    first, second = summary(run / "stage_0"), summary(run / "stage_1")
    assert second["loss_first"] < first["loss_first"] - 0.5  # type: ignore[operator]
    assert first["content_digest"] != second["content_digest"]
    assert (run / "stage_1" / "final_model" / "model.safetensors").read_bytes() != (
        run / "stage_0" / "final_model" / "model.safetensors"
    ).read_bytes()


def test_each_stage_warms_up_in_its_own_time(run: Path) -> None:
    assert learning_rates(run / "stage_0").index(5e-3) == 4
    assert learning_rates(run / "stage_1").index(5e-3) == 2


def test_every_model_has_the_names_that_people_look_for(run: Path, place: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert (run / "stage_0" / "checkpoint").resolve() == (run / "stage_0" / "final_model").resolve()
    assert (run / "final_model").resolve() == (run / "stage_1" / "final_model").resolve()
    named = (
        next(line for line in (place / "stdout").read_text().splitlines() if line.startswith("Beside it"))
        .removeprefix("Beside it")
        .split(", ")
    )
    assert all(Path(name.strip()).exists() for name in named[:-1]), named
    assert not Path(os.readlink(run / "final_model")).is_absolute(), "the run can be moved"
    AutoModelForCausalLM.from_pretrained(run / "final_model")


def test_the_page_and_the_card_of_a_stage_name_its_run(run: Path) -> None:
    assert "<title>out, stage_1: training</title>" in (run / "stage_1" / "training.html").read_text()
    assert (run / "final_model" / "README.md").read_text().startswith("# out, stage_1\n")


def test_held_out_documents_are_evaluated_and_never_trained_on(run: Path, place: Path) -> None:
    for stage, source in (("stage_0", "first"), ("stage_1", "second")):
        newest = max((run / stage).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        logged = [
            entry
            for entry in json.loads((newest / "trainer_state.json").read_text())["log_history"]
            if "eval_loss" in entry
        ]
        assert logged
        assert logged[-1]["eval_bits_per_byte"] < 8
        assert source in (run / stage / "history.jsonl").read_text()
    texts = []
    for held_out in (False, True):
        prepared = prepared_of(place / "first.jsonl", place, held_out=held_out)
        assert prepared.content["records"]["read"] == 120
        texts.append({bytes(row.input_ids[:-1].astype("uint8")) for row in PackedRows.of(prepared)})
    trained, held = texts
    assert len(trained) + len(held) == 120
    assert not trained & held
    assert 10 <= len(held) <= 40, "about a fifth"


def test_equal_documents_are_on_one_side(place: Path, tmp_path: Path) -> None:
    (tmp_path / "twice.jsonl").write_text((place / "first.jsonl").read_text() * 3)
    kept = [
        prepared_of(tmp_path / "twice.jsonl", place, held_out=held_out).content["documents"]
        for held_out in (False, True)
    ]
    assert sum(kept) == 360
    assert all(number % 3 == 0 for number in kept)


def test_nothing_held_out_is_said(place: Path) -> None:
    with pytest.raises(
        SourceError, match=r"no document is left .* 120 split.not_held_out; nothing is held out: raise --eval_ratio"
    ):
        prepared_of(place / "first.jsonl", place, eval_ratio=1e-9, held_out=True)


def test_finished_stages_are_not_repeated(
    run: Path, place: Path, train_py: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash in the second stage, one just before its model is in its place and one just after it, and then nothing is
    left to do.
    """
    copy = place / "crashed"
    shutil.copytree(run, copy, symlinks=True)
    shutil.rmtree(copy / "stage_1" / "final_model")
    (copy / "final_model").unlink()
    (copy / "final_model").symlink_to("stage_0/final_model")
    before = (copy / "stage_0" / "summary.json").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"holds a run already \(newest: stage_1\)"):
        train_py(*command(place, copy)[1:])
    resume = command(place, copy, "--resume_from_checkpoint")[1:]
    for at, is_there in (("final_model.rename", False), ("final_model.placed", True)):
        with monkeypatch.context() as crash:
            crash.setattr(failpoints, "_armed", failpoints.Armed(crash_folder(place, at), (at, 1), "raise"))
            with pytest.raises(StorageError, match=f"failpoint {at}, so it is not complete"):
                train_py(*resume)
        assert os.readlink(copy / "final_model") == "stage_0/final_model", (
            "the model before keeps its name until there is another"
        )
        assert (copy / "stage_1" / "final_model").exists() == is_there
        assert (copy / "final_model" / "model.safetensors").exists()
    assert f"All 2 stages are finished: {copy / 'final_model'}" in train_py(*resume)
    assert os.readlink(copy / "final_model") == "stage_1/final_model", (
        "a model that is in its place gets its other names"
    )
    assert (copy / "stage_0" / "summary.json").stat().st_mtime_ns == before
    assert (copy / "final_model" / "model.safetensors").read_bytes() == (
        run / "final_model" / "model.safetensors"
    ).read_bytes()
    group.leave(Ranks(world_size=2))  # as its ranks do: no group was made


def crash_folder(place: Path, at: str) -> Path:
    (place / at).mkdir()
    return place / at


def test_a_finished_stage_of_other_data_is_refused(run: Path, place: Path, train_py: Callable[..., str]) -> None:
    first, second = (str(place / f"{name}.jsonl") for name in ("first", "second"))
    with pytest.raises(ConfigError, match="stage_0: was trained on data"):
        train_py(
            *(
                {first: second, second: first}.get(word, word)
                for word in command(place, run, "--resume_from_checkpoint")[1:]
            )
        )


def settings(*flags: str) -> tuple[TrainConfig, DataConfig]:
    resolved = resolve(
        [TrainConfig, DataConfig],
        [*flags, "--output_dir", "out", "--model_config", "m.json", "--dataset", "a", "b", "--tokenizer_path", "t"],
        {},
        prog="test",
    )
    return resolved[TrainConfig], resolved[DataConfig]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sequential --resume_from_checkpoint out/stage_0/checkpoint-3", "with --sequential only auto"),
        ("--sequential --mixture a=1", "sequential and mixture are both set"),
        ("--eval_ratio 0.1 --eval_dataset c", "eval_dataset and eval_ratio = 0.1 are both set"),
        ("--mixture a", "expected NAME=NUMBER"),
    ],
)
def test_what_does_not_go_with_stages_is_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stages_of(*settings(*flags.split()))


def test_a_name_that_is_no_source_is_refused_before_anything_is_prepared(place: Path, tmp_path: Path) -> None:
    config, data = settings("--mixture", "first=1")
    local = replace(
        data,
        dataset=(str(place / "first.jsonl"), str(place / "second.jsonl")),
        tokenizer_path=str(place / "tokenizer"),
        cache_dir=str(tmp_path),
    )
    with pytest.raises(
        ConfigError, match=r"mixture names 'first', which is none of the sources: first.jsonl, second.jsonl"
    ):
        stages_of(config, local)


def test_a_resume_without_a_stage_names_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, data = settings("--sequential", "--resume_from_checkpoint")
    with pytest.raises(ConfigError, match="has no stage with a checkpoint; the same command without it"):
        check_places(config, [own for own, _ in stages_of(config, data)])


def test_a_refused_resume_leaves_what_the_run_says_of_itself(
    run: Path, place: Path, train_py: Callable[..., str]
) -> None:
    before = (run / "settings.json").read_bytes()
    words = command(place, run, "--resume_from_checkpoint")[1:]
    words[1], words[2] = words[2], words[1]
    with pytest.raises(ConfigError, match="resume with the same --dataset in the same order"):
        train_py(*words)
    assert (run / "settings.json").read_bytes() == before
