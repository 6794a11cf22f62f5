"""A checkpoint that was whole and is not any more: the next older one is taken, with a word that names the file."""

import itertools
import json
import random
import shutil

import pytest
import xxhash
from damages import DAMAGES, mark_of, without_digests
from tiny_training import losses, train_here

from moai.core.errors import ConfigError, DamagedError
from moai.training import record as record_module
from moai.training.checkpoints import choose, problem
from moai.training.record import RECORD, Record, digests

FLAGS = ("--max_steps", "6", "--save_steps", "2")
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    RECORD,
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
)
CHANGING = ("model.safetensors", RECORD, "optimizer.pt", "scheduler.pt", "trainer_state.json")
ALIKE = {(name, "that of an older one") for name in FILES if name not in CHANGING}
"""The same bytes in every checkpoint, so no damage."""
GRID = sorted(set(itertools.product(FILES, DAMAGES)) - ALIKE)
SAMPLE = random.Random(7).sample(GRID, 12)
RESUMED = random.Random(1).sample(GRID, 12)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps that nothing disturbed."""
    return train_here(tmp_path_factory.mktemp("run"), *FLAGS, "--save_total_limit", "9")


@pytest.fixture
def output(whole, tmp_path):
    """What it had left when it was killed after its fourth step."""
    output = tmp_path / "out"
    for step in (2, 4):
        shutil.copytree(whole / f"checkpoint-{step}", output / f"checkpoint-{step}")
    lines = (whole / "history.jsonl").read_text().splitlines(keepends=True)
    (output / "history.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    return output


def damage(output, name, kind):
    DAMAGES[kind](output / "checkpoint-4" / name, random.Random(f"{name} {kind}"))


def test_every_file_has_its_digest(whole):
    record = Record.load(whole / "checkpoint-4")
    assert sorted(record.files) == sorted(set(FILES) - {RECORD})
    assert sorted(path.name for path in (whole / "checkpoint-4").iterdir()) == sorted(FILES)
    assert problem(whole / "checkpoint-4", read=True) is None


def test_a_large_file_is_digested_in_pieces_and_no_byte_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(record_module, "_BLOCK_BYTES", 300)
    data = random.Random(0).randbytes(3500)
    (tmp_path / "model.safetensors").write_bytes(data)
    pieces = b"".join(xxhash.xxh3_128(data[at : at + 1000]).digest() for at in range(0, 3500, 1000))
    assert digests(tmp_path, 0) == {"model.safetensors": [3500, xxhash.xxh3_128(pieces).hexdigest()]}


def check(output, name, kind, caplog):
    older = Record.load(output / "checkpoint-2")
    damage(output, name, kind)
    caplog.clear()
    assert choose("auto", output, older) == output / "checkpoint-2"
    assert (output / "checkpoint-4.incomplete").is_dir()
    [line] = [record.getMessage() for record in caplog.records]
    assert "\n" not in line
    # The record of another checkpoint is whole: it is the other files that are not the ones it speaks of.
    assert name in line or (name, kind) == (RECORD, "that of an older one"), line
    assert not mark_of(output / "checkpoint-4.incomplete" / name).exists()


@pytest.mark.parametrize(("name", "kind"), SAMPLE)
def test_the_next_older_one_is_taken_and_the_file_named(output, name, kind, caplog):
    check(output, name, kind, caplog)


@pytest.mark.long
def test_any_damage_of_any_file(whole, output, caplog, record):
    for name, kind in GRID:
        check(output, name, kind, caplog)
        shutil.rmtree(output / "checkpoint-4.incomplete")
        shutil.copytree(whole / "checkpoint-4", output / "checkpoint-4")
    record(
        f"one file of a checkpoint damaged, in {len(DAMAGES)} ways",
        len(GRID),
        f"all found and named, in {len(FILES)} files, and the next older checkpoint taken",
    )


def resume(output):
    return train_here(output.parent, *FLAGS, "--resume_from_checkpoint", "auto")


def check_resumed(whole, output, name, kind):
    damage(output, name, kind)
    resume(output)
    assert (output / "checkpoint-4.incomplete").is_dir()
    assert losses(output) == losses(whole)
    weights = "final_model/model.safetensors"
    assert (output / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_run_goes_on_around_the_damage_as_if_nothing_had_been(whole, output):
    check_resumed(whole, output, "optimizer.pt", "a block of zeros")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_dozen_runs_go_on_around_damage(whole, output, record):
    fresh = shutil.copytree(output, output.with_name("fresh"))
    for name, kind in RESUMED:
        shutil.rmtree(output)
        shutil.copytree(fresh, output)
        check_resumed(whole, output, name, kind)
    record(
        "a run resumed over a damaged checkpoint, each of another file or kind",
        len(RESUMED),
        "all went on from the next older one, to the bytes of the undisturbed model",
    )


@pytest.mark.parametrize(
    ("name", "kind", "line"),
    [
        ("optimizer.pt", "a pickle", "it holds other objects than tensors and numbers, which are never loaded"),
        ("rng_state.pth", "a block of zeros", "its random state cannot be loaded"),
        ("trainer_state.json", "", "its trainer_state.json cannot be loaded"),
    ],
)
def test_what_only_loading_shows_is_one_line_where_no_digests_were_taken(output, name, kind, line):
    checkpoint = output / "checkpoint-4"
    without_digests(checkpoint)
    if kind:
        damage(output, name, kind)
    else:
        state = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps(state | {"of_a_later_release": 1}))
    with pytest.raises(DamagedError, match=line) as raised:
        resume(output)
    assert str(raised.value).startswith(f"{checkpoint}: ")
    assert "auto takes the next older one" in str(raised.value)
    assert "weights_only" not in str(raised.value)
    assert not mark_of(checkpoint / name).exists()


def test_a_checkpoint_that_was_named_is_read_before_anything_is_made_of_it(output):
    damage(output, "model.safetensors", "a flipped bit")
    with pytest.raises(
        ConfigError, match=r"not a complete checkpoint \(model.safetensors is damaged: its bytes are not"
    ):
        choose(str(output / "checkpoint-4"), output, Record.load(output / "checkpoint-4"))
    assert (output / "checkpoint-4").exists()
