"""Which checkpoint a run goes on from: every way a checkpoint can be broken, on one that a real run wrote."""

import json
import logging
import random
import shutil
from dataclasses import replace

import pytest
from damages import DAMAGES, without_digests
from tiny_training import train_here

from moai.core.errors import ConfigError, StorageError
from moai.training import checkpoints
from moai.training.checkpoints import check_place, choose, newest_complete, problem
from moai.training.record import Record

SAVING_TWICE = ("--max_steps", "4", "--save_steps", "2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 steps in this process, with checkpoints 2 and 4."""
    return train_here(tmp_path_factory.mktemp("run"), *SAVING_TWICE)


@pytest.fixture
def output(finished, tmp_path):
    """A copy to break."""
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(finished / name, tmp_path / name)
    shutil.copy(finished / "history.jsonl", tmp_path)
    return tmp_path


@pytest.fixture
def old(output):
    """The same as a moai left it that took no digests."""
    for name in ("checkpoint-2", "checkpoint-4"):
        without_digests(output / name)
    return output


def record_of(output, name="checkpoint-4"):
    return Record.load(output / name)


def test_a_real_checkpoint_is_complete_and_says_what_it_was_trained_on(output):
    assert problem(output / "checkpoint-4") is None
    assert newest_complete(output) == output / "checkpoint-4"
    record = record_of(output)
    assert len(record.content_digest) == 64
    assert (record.rows, record.rows_per_step, record.position, record.order["seed"], record.world_size) == (
        26,
        2,
        8,
        42,
        1,
    )
    assert record.tokens_seen > Record.load(output / "checkpoint-2").tokens_seen > 0


NEEDED = (
    "trainer_state.json",
    "moai_data.json",
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("kind", ["deleted", "emptied", "cut", "a directory", "a FIFO", "a link to itself"])
def test_without_digests_each_file_is_there_and_has_its_end(old, name, kind, caplog):
    DAMAGES[kind](old / "checkpoint-4" / name, random.Random(0))
    assert name in (problem(old / "checkpoint-4") or "")
    assert newest_complete(old) == old / "checkpoint-2"
    assert choose("auto", old, record_of(old, "checkpoint-2")) == old / "checkpoint-2"
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2
    assert "checkpoint-4 is incomplete" in warnings[0]
    assert "checkpoint-2: no digests were taken" in warnings[1]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"position": -5}, "moai_data.json is damaged (position is -5)"),
        ({"position": 6}, "moai_data.json says position 6, history.jsonl at step 4 8"),
        ({"tokens_seen": 7}, "moai_data.json says tokens 7, history.jsonl at step 4 "),
        ({"rows_per_step": 0}, "moai_data.json is damaged (rows_per_step is 0)"),
        ({"rows": True}, "moai_data.json is damaged (not a record of moai)"),
    ],
)
def test_a_place_in_the_data_that_cannot_be_is_no_place_to_go_on_from(output, changes, line):
    without_digests(output / "checkpoint-4", **changes)
    assert str(problem(output / "checkpoint-4", read=True)).startswith(line)
    assert choose("auto", output, record_of(output, "checkpoint-2")) == output / "checkpoint-2"


def test_a_sentinel_of_a_save_on_sigterm_counts(output):
    (output / "checkpoint-4" / "checkpoint-is-incomplete.txt").write_text("in progress")
    assert newest_complete(output) == output / "checkpoint-2"


def test_the_random_state_of_every_rank_counts(output):
    checkpoint = output / "checkpoint-4"
    state = (checkpoint / "rng_state.pth").read_bytes()
    without_digests(checkpoint, world_size=3)
    for rank in (0, 1):
        (checkpoint / f"rng_state_{rank}.pth").write_bytes(state)
    assert "rng_state_2.pth is missing" in str(problem(checkpoint))
    (checkpoint / "rng_state_2.pth").write_bytes(state)
    assert problem(checkpoint) is None


def test_a_state_of_another_step_or_shape_counts(old):
    state = old / "checkpoint-4" / "trainer_state.json"
    shutil.copyfile(old / "checkpoint-2" / "trainer_state.json", state)
    assert problem(old / "checkpoint-4") == "trainer_state.json is of step 2"
    for other in ('{"global_step": 4}', '{"global_step": 4, "log_history": [3]}', "[" * 100_000, "[4]", '"4"', "4"):
        state.write_text(other)
        assert str(problem(old / "checkpoint-4")).startswith("trainer_state.json is damaged ("), other


def test_weights_in_shards_are_checked_shard_by_shard(old):
    checkpoint = old / "checkpoint-4"
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    shutil.move(checkpoint / "model.safetensors", checkpoint / first)
    shutil.copyfile(checkpoint / first, checkpoint / second)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": first, "b": second}}))
    assert problem(checkpoint) is None
    with open(checkpoint / second, "ab") as file:
        file.write(b"x")
    assert second in str(problem(checkpoint))
    (checkpoint / second).unlink()
    assert f"{second} is missing" in str(problem(checkpoint))


def test_numbers_are_compared_as_numbers_and_other_names_are_left_alone(output):
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-10")
    without_digests(output / "checkpoint-10")
    state = json.loads((output / "checkpoint-10" / "trainer_state.json").read_text())
    (output / "checkpoint-10" / "trainer_state.json").write_text(json.dumps(state | {"global_step": 10}))
    (output / "checkpoint-99.incomplete").mkdir()
    (output / "checkpoint-best").mkdir()
    assert newest_complete(output) == output / "checkpoint-10"
    checkpoints.rotate(output, 2)
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoint-10",
        "checkpoint-4",
        "checkpoint-99.incomplete",
        "checkpoint-best",
        "history.jsonl",
    ]


def test_all_broken_starts_from_the_beginning_and_says_so(output, caplog):
    record = record_of(output)
    for name in ("checkpoint-2", "checkpoint-4"):
        (output / name / "model.safetensors").unlink()
    (output / "checkpoint-4.incomplete").mkdir()  # left by an earlier crash at the same step
    assert choose("auto", output, record) is None
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [
        "checkpoint-2.incomplete",
        "checkpoint-4.incomplete",
        "checkpoint-4.incomplete-2",
    ]
    assert "training starts from the beginning" in caplog.text


def test_auto_without_any_checkpoint_names_the_way(tmp_path):
    with pytest.raises(
        ConfigError, match="has no checkpoint; the same command without --resume_from_checkpoint starts the run"
    ):
        choose("auto", tmp_path, Record(content_digest="", rows=1, rows_per_step=1, world_size=1, order={"asked": {}}))


def test_a_run_that_is_finished_keeps_its_figures(finished):
    before = (finished / "summary.json").read_bytes()
    train_here(finished.parent, *SAVING_TWICE, "--resume_from_checkpoint")
    assert (finished / "summary.json").read_bytes() == before


def test_a_fresh_run_never_mixes_with_an_old_one(output):
    with pytest.raises(
        ConfigError,
        match=r"holds a run already \(newest: checkpoint-4\); go on with it by --resume_from_checkpoint auto",
    ):
        check_place(None, output)
    check_place("auto", output)


def test_a_named_checkpoint_must_be_whole(output):
    assert choose(str(output / "checkpoint-2"), output, record_of(output)) == output / "checkpoint-2"
    (output / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ConfigError, match=r"checkpoint-2: not a complete checkpoint \(optimizer.pt is missing\)"):
        check_place(str(output / "checkpoint-2"), output)
    assert (output / "checkpoint-2").exists(), "what a person named is not renamed"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("content_digest", "0" * 64, "was trained on data [0-9a-f]{64}, this run has 0{64}"),
        ("seed", 7, r"another order than this run's \(seed is 42 there, 7 here\)"),
        ("window", 3, "window is 0 there, 3 here"),
        ("version", 2, "version is 1 there, 2 here"),
        ("mixture", ["a=1"], r"mixture is not set there, \['a=1'\] here"),
    ],
)
def test_other_data_or_another_order_is_refused_with_both_values(output, field, value, message):
    record = record_of(output)
    asked = {**record.order["asked"], **({field: value} if field == "mixture" else {})}
    expected = (
        replace(record, content_digest=value)
        if field == "content_digest"
        else replace(record, order={**record.order, field: value, "asked": asked})
    )
    with pytest.raises(ConfigError, match=message):
        choose("auto", output, expected)
    recut = replace(record, world_size=2, rows_per_step=3)
    assert choose("auto", output, recut) is not None, "another number of ranks or rows a step is no other order"


@pytest.mark.parametrize(
    ("environ", "said"),
    [({}, False), ({"TORCHELASTIC_RESTART_COUNT": "0"}, False), ({"TORCHELASTIC_RESTART_COUNT": "2"}, True)],
)
def test_a_restart_is_told_by_the_launcher(environ, said):
    assert checkpoints.is_restart(environ) is said


def test_a_restart_goes_on_from_what_its_run_has_saved(output, finished, caplog):
    """Whatever the command at the start was: new, auto, or from a checkpoint that has been rotated away since."""
    for wish in (None, "auto", str(output / "checkpoint-1")):
        check_place(wish, output, restarted=True)
        assert choose(wish, output, record_of(output), restarted=True) == output / "checkpoint-4"
    (output / "checkpoint-4" / "optimizer.pt").unlink()
    (output / "checkpoint-2" / "optimizer.pt").unlink()
    named = finished / "checkpoint-2"  # in another directory: what the run began with, and all it has
    assert choose(str(named), output, Record.load(named), restarted=True) == named
    assert choose(None, output, Record.load(named), restarted=True) is None
    assert caplog.text.count("training starts from the beginning") == 1


def test_a_checkpoint_that_was_named_leaves_no_newer_one_that_a_restart_could_take(output, finished, caplog):
    assert choose(str(output / "checkpoint-2"), output, record_of(output)) == output / "checkpoint-2"
    assert sorted(path.name for path in output.glob("c*")) == ["checkpoint-2", "checkpoint-4.superseded"]
    assert "checkpoint-4 does not lead to" in caplog.text
    named = finished / "checkpoint-4"
    assert choose(str(named), output, Record.load(named)) == named
    assert sorted(path.name for path in output.glob("c*")) == ["checkpoint-2.superseded", "checkpoint-4.superseded"]
    assert sorted(path.name for path in finished.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (Exception("Error while serializing: I/O error: File too large (os error 27)"), "File too large"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 151104 vs 150992"),
            "torch could not write all of it, with [0-9.]+ GB free",
        ),
    ],
)
def test_what_a_full_disk_makes_each_library_say_is_one_error_with_the_way_out(output, error, line):
    told = rf"checkpoint-4: {line}.*, so it is not complete; free space .* go on from checkpoint-2 by"
    with pytest.raises(StorageError, match=told) as raised, checkpoints.storing(output / "checkpoint-4"):
        raise error
    assert raised.value.exit_code == 74


def test_other_errors_while_saving_keep_their_traceback(output):
    with pytest.raises(RuntimeError, match="a defect"), checkpoints.storing(output / "checkpoint-4"):
        raise RuntimeError("a defect")
