"""A prepared directory is enough: saved under a name, with its tokenizer and both sides of the split; trained on where
nothing else is.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_run

from moai.core.config import resolve
from moai.core.errors import ConfigError, DamagedError
from moai.core.files import digest_json
from moai.prepared.manifest import MANIFEST, Prepared, read_manifest, write_manifest
from moai.prepared.rows import PackedRows
from moai.prepared.verify import verify
from moai.pretraining.options import DataConfig, SaveConfig
from moai.pretraining.repair import repair
from moai.pretraining.saving import prepare_and_save
from moai.training import prepared_data
from moai.training.arguments import TrainConfig
from moai.training.checkpoints import numbered
from moai.training.evaluate import HeldOut
from moai.training.order import sources_of

TEXTS = [f"{number} " + "words that fill a document " * (number % 5 + 1) for number in range(120)]

ROOT = Path(__file__).parents[2]
SaveIt = Callable[..., Prepared]
RunIt = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def save(tmp_path: Path, tokenizer_dir: Path, corpus: Path) -> SaveIt:
    """`save("name", **options)`: prepare the corpus and save it under that name."""

    def run(name: str, *, overwrite: bool = False, **options: Any) -> Prepared:
        given = {
            "dataset": (str(corpus),),
            "tokenizer_path": str(tokenizer_dir),
            "seq_len": 32,
            "packing": "bfd_split",
            "shard_bytes": 4000,
            "num_proc": 0,
        }
        config = DataConfig(cache_dir=str(tmp_path / "cache"), **{**given, **options})
        return prepare_and_save(config, SaveConfig(save_to=str(tmp_path / name), overwrite=overwrite))

    return run


def all_ok(directory: Path) -> bool:
    checks = list(verify(directory))
    return len(checks) > 5 and all(check.ok for check in checks)


def seal(directory: Path, manifest: dict[str, Any]) -> None:
    (directory / MANIFEST).unlink()
    write_manifest(directory, manifest["content"], manifest["run"], manifest["held_out"])


def test_both_sides_stand_in_one_directory_that_needs_no_cache(
    save: SaveIt, tmp_path: Path, tokenizer_dir: Path
) -> None:
    prepared = save("ready", eval_ratio=0.2)
    assert prepared.path == tmp_path / "ready"
    shutil.rmtree(tmp_path / "cache")
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(prepared.path, moved)
    opened = Prepared.open(moved)
    assert opened.held_out is not None
    assert opened.content["documents"] + opened.held_out.content["documents"] == len(TEXTS)
    assert opened.held_out.content["documents"] > 5
    for side in (opened, opened.held_out):
        assert datasets.load_from_disk(str(side.path)).num_rows == side.content["rows"]
        assert (side.path / "tokenizer_config.json").read_bytes() == (
            tokenizer_dir / "tokenizer_config.json"
        ).read_bytes()
    assert not (opened.held_out.path / MANIFEST).exists(), "one manifest answers for both"
    assert Prepared.open(moved / "held_out").content_digest == opened.held_out.content_digest
    assert all_ok(moved)
    assert all_ok(moved / "held_out")


def test_the_training_side_is_the_same_content_as_in_the_cache(save: SaveIt, tmp_path: Path) -> None:
    saved = save("ready", eval_ratio=0.2)
    in_cache = {Prepared.open(path).content_digest for path in (tmp_path / "cache" / "datasets").iterdir()}
    assert saved.held_out is not None
    assert in_cache == {saved.content_digest, saved.held_out.content_digest}
    assert {path.stat().st_nlink for path in saved.path.glob("data-*.arrow")} == {3}, (
        "of the shard, of the cache's directory, and of this one"
    )


def test_the_same_content_is_fine_and_another_is_refused_unless_overwritten(
    save: SaveIt, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = save("ready")
    before = os.stat(first.path).st_ino
    with caplog.at_level("INFO"):
        save("ready")
    assert "The same content is there already" in caplog.text
    assert os.stat(first.path).st_ino == before
    with pytest.raises(ConfigError, match=r"--save_to .*ready: holds other content .*--overwrite"):
        save("ready", seq_len=64)
    assert Prepared.open(first.path).content_digest == first.content_digest
    save("both", eval_ratio=0.2)
    with pytest.raises(ConfigError, match="and a held-out side"):
        save("both")
    second = save("ready", seq_len=64, overwrite=True)
    assert (second.path, second.content["seq_len"]) == (first.path, 64)
    assert all_ok(second.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "cache", "raw.jsonl", "ready"], (
        "nothing is left beside it"
    )


def flags(folder: Path, corpus: Path, tokenizer: Path, seq_len: int) -> list[object]:
    """Of the corpus as `save` prepares it, with a held-out side."""
    own = ["--dataset", corpus, "--tokenizer_path", tokenizer, "--cache_dir", folder / "cache", "--seq_len", seq_len]
    return [*own, "--packing", "bfd_split", "--shard_bytes", 4000, "--eval_ratio", 0.2, "--num_proc", 0]


@pytest.mark.parametrize(("at", "left"), [("save.manifest:1", "old"), ("save.placed:1", "new")])
def test_a_kill_leaves_the_old_directory_or_the_new_one_and_the_next_run_mends_the_rest(
    save: SaveIt,
    tmp_path: Path,
    corpus: Path,
    tokenizer_dir: Path,
    start_moai: RunIt,
    run_moai: RunIt,
    at: str,
    left: str,
) -> None:
    old = save("ready").content_digest
    words = ["prepare", *flags(tmp_path, corpus, tokenizer_dir, 64), "--save_to", tmp_path / "ready", "--overwrite"]
    (tmp_path / "points").mkdir()
    armed = {"MOAI_FAILPOINT_DIR": str(tmp_path / "points"), "MOAI_FAILPOINT": f"{at}=kill"}
    assert start_moai(*words, env={"MOAI_TESTING": "1", **armed}).returncode == -signal.SIGKILL
    assert (Prepared.open(tmp_path / "ready").content_digest == old) is (left == "old")
    assert run_moai(*words).returncode == 0
    assert Prepared.open(tmp_path / "ready").content["seq_len"] == 64
    assert [path.name for path in tmp_path.glob(".*")] == [], "nothing is left beside it"


def test_what_is_no_prepared_directory_is_never_replaced(save: SaveIt, tmp_path: Path) -> None:
    (tmp_path / "ready").mkdir()
    (tmp_path / "ready" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is there and is no prepared directory"):
        save("ready", overwrite=True)
    assert (tmp_path / "ready" / "thesis.txt").exists()
    assert not (tmp_path / "cache").exists(), "refused before any work"
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("one\n")
    with pytest.raises(ConfigError, match="lies inside the data"):
        save("data/ready", dataset=(str(data),))
    with pytest.raises(ConfigError, match="save_to is not"):
        SaveConfig(overwrite=True)


def test_a_changed_tokenizer_configuration_is_another_directory_of_the_same_shards(
    save: SaveIt, tmp_path: Path, tokenizer_dir: Path
) -> None:
    own = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, own)
    first = save("one", tokenizer_path=str(own))
    changed = {**json.loads((own / "tokenizer_config.json").read_text()), "chat_template": "{{ messages }}"}
    (own / "tokenizer_config.json").write_text(json.dumps(changed))
    second = save("two", tokenizer_path=str(own))
    assert json.loads((second.path / "tokenizer_config.json").read_text()) == changed
    assert second.content_digest != first.content_digest
    assert second.content["shards"] == first.content["shards"]
    assert second.manifest["run"]["shards_made"] == 0
    assert len(list((tmp_path / "cache" / "datasets").iterdir())) == 2


def test_damage_on_either_side_is_named_and_repaired(save: SaveIt, tmp_path: Path, tokenizer_dir: Path) -> None:
    saved = save("ready", eval_ratio=0.2)
    shutil.rmtree(tmp_path / "cache")
    lost = [
        saved.path / "tokenizer_config.json",
        next((saved.path / "held_out").glob("data-*")),
        saved.path / "held_out" / "tokenizer.json",
    ]
    whole = [path.read_bytes() for path in lost]
    for path in lost:
        path.unlink()
    with pytest.raises(DamagedError):
        Prepared.open(saved.path)
    with pytest.raises(DamagedError, match="--tokenizer_path"):
        list(repair(saved.path))
    assert list(repair(saved.path, tokenizer_path=str(tokenizer_dir)))[-1].startswith("whole")
    assert [path.read_bytes() for path in lost] == whole
    assert all_ok(saved.path)
    changed = saved.path / "held_out" / "tokenizer_config.json"
    changed.write_bytes(changed.read_bytes().replace(b"e", b"f", 1))
    assert [check.name for check in verify(saved.path) if not check.ok] == ["held out: hashes"]
    (saved.path / "held_out" / "more").write_text("")
    assert "held out: files" in [check.name for check in verify(saved.path) if not check.ok]


def test_the_held_out_side_of_a_forged_manifest_is_refused(save: SaveIt) -> None:
    saved = save("ready", eval_ratio=0.2)
    changes: list[tuple[Callable[[Any], Any], str]] = [
        (lambda side: side["content"].update(seq_len=64), "another digest than it says"),
        (lambda side: side["content"]["files"][0].update(file="../raw.jsonl"), "not a plain name"),
        (lambda side: side["content"]["files"][0].update(file="held_out/x"), "not a plain name"),
        (lambda side: side.pop("content"), "content is absent"),
    ]
    for change, message in changes:
        manifest = json.loads(json.dumps(saved.manifest))
        change(manifest["held_out"])
        if message == "not a plain name":
            manifest["held_out"]["content_digest"] = digest_json(manifest["held_out"]["content"])
        seal(saved.path, manifest)
        with pytest.raises(DamagedError, match=message):
            Prepared.open(saved.path)


def test_a_held_out_side_that_is_a_link_or_nothing_is_refused(save: SaveIt, tmp_path: Path) -> None:
    saved = save("ready", eval_ratio=0.2)
    os.rename(saved.path / "held_out", tmp_path / "away")
    with pytest.raises(DamagedError, match="No such file"):
        Prepared.open(saved.path)
    (saved.path / "held_out").symlink_to(tmp_path / "away")
    with pytest.raises(DamagedError, match="a symbolic link, not a directory"):
        Prepared.open(saved.path)
    manifest = read_manifest(saved.path)
    manifest["held_out"] = "yes"
    seal(saved.path, manifest)
    with pytest.raises(DamagedError, match="no object"):
        Prepared.open(saved.path)


# --- train.py --prepared ----------------------------------------------------------------------------------------------


def train(tmp_path: Path, out: str, *words: object, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
    """train.py as a person starts it, in an empty folder; `kill_at` kills it before it saves that step."""
    here = tmp_path / "machine"
    here.mkdir(exist_ok=True)
    tiny_run.write_model_config(here, vocab_size=8192)
    steady = "--learning_rate 1e-3 --warmup_steps 0 --lr_scheduler_type constant --logging_steps 1 --save_steps 2"
    flags = [*steady.split(), "--use_cpu", "true", "--dataloader_num_workers", 0]
    places = ["--model_config", here / "model.json", "--output_dir", here / out]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(here)}
    if kill_at:
        (here / "points").mkdir()
        environ |= {
            "MOAI_TESTING": "1",
            "MOAI_FAILPOINT_DIR": str(here / "points"),
            "MOAI_FAILPOINT": f"checkpoint.record:{kill_at}=kill",
        }
    command = [sys.executable, str(ROOT / "train.py"), *map(str, [*flags, *places, *words])]
    return subprocess.run(command, cwd=here, env=environ, capture_output=True, text=True, timeout=600)


def losses(tmp_path: Path, out: str) -> dict[int, float]:
    newest = numbered(tmp_path / "machine" / out)[0]
    return {
        entry["step"]: entry["loss"]
        for entry in json.loads((newest / "trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    }


def test_training_where_nothing_else_is_killed_and_resumed_otherwise_loses_nothing_against_raw_data(
    save: SaveIt, tmp_path: Path, corpus: Path, tokenizer_dir: Path
) -> None:
    """The same rows a step are cut otherwise before the kill; into ranks tests/training/test_elastic.py cuts them."""
    saved = save("ready", eval_ratio=0.2)
    raw = flags(tmp_path, corpus, tokenizer_dir, 32)
    six = ["--max_steps", 6, "--gradient_accumulation_steps", 1]
    done = train(tmp_path, "raw", *raw, *six, "--batch_size", 4)
    assert done.returncode == 0, done.stderr[-3000:]
    moved = tmp_path / "machine" / "data"
    shutil.copytree(saved.path, moved)
    corpus.unlink()
    for place in (saved.path, tmp_path / "cache"):
        shutil.rmtree(place)
    halves = ["--max_steps", 6, "--gradient_accumulation_steps", 2, "--batch_size", 2]
    killed = train(tmp_path, "out", "--prepared", moved, *halves, kill_at=2)
    assert killed.returncode != 0
    done = train(tmp_path, "out", "--prepared", moved, *six, "--batch_size", 4, "--resume_from_checkpoint")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Resuming from" in done.stderr
    expected, found = losses(tmp_path, "raw"), losses(tmp_path, "out")
    assert sorted(found) == sorted(expected) == [1, 2, 3, 4, 5, 6]
    assert max(abs(found[step] - expected[step]) for step in expected) < 1e-4
    assert not (tmp_path / "cache").exists()
    assert not list((tmp_path / "machine").glob("**/datasets")), "no cache was made"
    assert (tmp_path / "machine" / "out" / "final_model" / "tokenizer_config.json").exists()
    evaluated = [json.loads(line) for line in (tmp_path / "machine" / "out" / "history.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in evaluated), "held_out/ is evaluated"


@pytest.mark.long
def test_a_run_begun_on_raw_data_goes_on_from_the_directory_and_back(
    save: SaveIt, tmp_path: Path, corpus: Path, tokenizer_dir: Path
) -> None:
    saved = save("ready", eval_ratio=0.2)
    raw = flags(tmp_path, corpus, tokenizer_dir, 32)
    for out, first, second in (("one", raw, ["--prepared", saved.path]), ("two", ["--prepared", saved.path], raw)):
        for steps, data, more in ((2, first, []), (4, second, ["--resume_from_checkpoint"])):
            done = train(
                tmp_path, out, *data, "--max_steps", steps, "--gradient_accumulation_steps", 1, "--batch_size", 4, *more
            )
            assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path, "one") == losses(tmp_path, "two")
    assert sorted(losses(tmp_path, "one")) == [1, 2, 3, 4]


def test_the_commands_say_where_it_is_and_refuse_in_one_line(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, run_moai: RunIt
) -> None:
    made = run_moai("prepare", *flags(tmp_path, corpus, tokenizer_dir, 32), "--save_to", tmp_path / "ready")
    assert made.stdout.splitlines()[-1] == str(tmp_path / "ready"), made.stderr
    assert f", in {tmp_path / 'ready' / 'held_out'}" in made.stdout
    for words, code, said in (
        ((tmp_path / "ready", "--seq_len", "64"), 2, f"seq_len = 64 (flag): {tmp_path / 'ready'} was prepared with 32"),
        ((tmp_path,), 65, str(tmp_path)),
    ):
        refused = run_moai("train", "--model_config", "m.json", "--output_dir", tmp_path / "out", "--prepared", *words)
        assert (refused.returncode, len(refused.stderr.splitlines())) == (code, 1), refused.stderr
        assert said in refused.stderr


def asked(*words: object) -> tuple[TrainConfig, DataConfig, Mapping[str, str]]:
    resolved = resolve([TrainConfig, DataConfig], list(map(str, words)), {}, prog="train.py")
    return resolved[TrainConfig], resolved[DataConfig], resolved.origins


def settings_of(*words: object) -> DataConfig:
    config, data, origins = asked(*words)
    return prepared_data.settings(prepared_data.open_all(config.prepared), data, origins, config)


def test_a_flag_that_says_otherwise_is_refused_with_both_values(save: SaveIt, tmp_path: Path) -> None:
    other = tiny_run.write_tokenizer(tmp_path / "other")
    saved = save("ready")
    for flag, message in (
        ("--seq_len 64", r"seq_len = 64 \(flag\): .*ready was prepared with 32; leave seq_len away"),
        ("--packing none", "packing = none .* prepared with bfd_split"),
        ("--eos_token <x>", "eos_token = <x>"),
        ("--dataset data/other", r"dataset = data/other \(flag\): .* prepared with .*raw.jsonl"),
        (f"--tokenizer_path {other}", "tokenizer_path = .*other .* prepared with the tokenizer "),
        ("--mode sft", "mode = sft: .* prepared with data_format text"),
    ):
        with pytest.raises(ConfigError, match=message) as refused:
            settings_of("--prepared", saved.path, *flag.split())
        assert "\n" not in str(refused.value)


def test_flags_that_say_the_same_or_what_is_not_here_any_more_are_fine(
    save: SaveIt, tmp_path: Path, tokenizer_dir: Path
) -> None:
    saved = save("ready", eval_ratio=0.2)
    same = ["--seq_len", 32, "--packing", "bfd_split", "--eval_ratio", 0.2, "--shard_bytes", 4000]
    gone = ["--dataset", "elsewhere/raw.jsonl", "--tokenizer_path", "tokenizers/gone"]
    for words in (
        [],
        same,
        gone,
        [*same, "--tokenizer_path", tokenizer_dir],
        ["--eos_token", saved.content["tokenizer"]["eos_token"]],
    ):
        data = settings_of("--prepared", saved.path, *words)
        assert (data.seq_len, data.packing, data.tokenizer_path) == (32, "bfd_split", str(saved.path))


def test_one_yaml_file_serves_the_machine_that_prepares_and_the_one_that_trains(save: SaveIt, tmp_path: Path) -> None:
    saved = save("ready", eval_ratio=0.2)
    lines = [
        "dataset: corpora/raw.jsonl",
        "tokenizer_path: tokenizers/mine",
        "packing: bfd_split",
        "shard_bytes: 4000",
        "eval_ratio: 0.2",
        "save_to: ready",
    ]
    yaml = tmp_path / "run.yaml"
    for seq_len in (32, 48):
        yaml.write_text("\n".join([*lines, f"seq_len: {seq_len}"]))
        resolved = resolve(
            [TrainConfig, DataConfig],
            ["--config", str(yaml), "--prepared", str(saved.path)],
            {},
            prog="train.py",
            others=[SaveConfig],
        )
        opened = prepared_data.open_all(resolved[TrainConfig].prepared)
        given = (opened, resolved[DataConfig], resolved.origins, resolved[TrainConfig])
        if seq_len == 32:
            assert prepared_data.settings(*given).dataset == (str(saved.path),)
        else:
            with pytest.raises(ConfigError, match=r"seq_len = 48 \(file .*run.yaml\): .* prepared with 32"):
                prepared_data.settings(*given)


def test_conversations_are_trained_on_with_the_template_of_their_directory(save: SaveIt, tmp_path: Path) -> None:
    chats = tmp_path / "chat.jsonl"
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": f"ok {text}"}] for text in TEXTS[:20]]
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    template = ROOT / "configs" / "chat_template_demo.jinja"
    saved = save(
        "chat", dataset=(str(chats),), data_format="chat", packing="bfd", seq_len=128, chat_template=str(template)
    )
    data = settings_of("--prepared", saved.path, "--mode", "sft", "--chat_template", template).of_mode("sft").require()
    assert (data.data_format, data.seq_len) == ("chat", 128)
    with pytest.raises(ConfigError, match=r"mode = pretrain: .* prepared with data_format chat; --mode sft"):
        settings_of("--prepared", saved.path)
    (tmp_path / "other.jinja").write_text("{{ messages }}")
    with pytest.raises(ConfigError, match=r"chat_template = .*other.jinja .* another template"):
        settings_of("--prepared", saved.path, "--mode", "sft", "--chat_template", tmp_path / "other.jinja")
    with pytest.raises(ConfigError, match="do not go together: data_format chat there, text here"):
        prepared_data.open_all([str(saved.path), str(save("text", seq_len=128).path)])


def test_several_directories_are_one_with_sources_told_apart(save: SaveIt, tmp_path: Path) -> None:
    other = tmp_path / "code.jsonl"
    other.write_text("".join(json.dumps({"text": f"def f{number}(): return {number}"}) + "\n" for number in range(50)))
    one, two, three = (
        save("one", eval_ratio=0.2),
        save("two", packing="bfd", eval_ratio=0.2),
        save("three", dataset=(str(other),), num_proc=0),
    )
    joined = prepared_data.joined(prepared_data.open_all([str(side.path) for side in (one, two, three)]))
    assert [source["name"] for source in joined.content["sources"]] == ["one/raw.jsonl", "two/raw.jsonl", "code.jsonl"]
    assert [source.name for source in sources_of(joined.content["shards"])] == [
        "one/raw.jsonl",
        "two/raw.jsonl",
        "code.jsonl",
    ]
    rows, parts = PackedRows.of(joined), [PackedRows.of(side) for side in (one, two, three)]
    assert len(rows) == sum(map(len, parts)) == joined.content["rows"]
    assert [rows[index].input_ids.tolist() for index in (0, len(parts[0]), len(rows) - 1)] == [
        part[index].input_ids.tolist() for part, index in zip(parts, (0, 0, len(parts[2]) - 1))
    ]
    assert joined.held_out is not None
    assert set(HeldOut.of(joined.held_out).sources) == {"one/raw.jsonl", "two/raw.jsonl"}
    with pytest.raises(
        ConfigError,
        match=r"mixture names 'raw', which is none of the sources: one/raw.jsonl, two/raw.jsonl, code.jsonl",
    ):
        prepared_data.check_mixture(asked("--mixture", "raw=1")[0], [joined])


def test_directories_that_do_not_go_together_are_refused(save: SaveIt, tmp_path: Path) -> None:
    one, longer = save("one"), save("longer", seq_len=64)
    with pytest.raises(ConfigError, match=r"one and .*longer do not go together: seq_len 32 there, 64 here"):
        prepared_data.open_all([str(one.path), str(longer.path)])
    with pytest.raises(ConfigError, match="is named twice"):
        prepared_data.open_all([str(one.path), str(one.path)])
    (tmp_path / "again").mkdir()
    shutil.copytree(one.path, tmp_path / "again" / "one")
    with pytest.raises(ConfigError, match=r"2 sources are called one/raw.jsonl; rename one"):
        prepared_data.joined(prepared_data.open_all([str(one.path), str(tmp_path / "again" / "one")]))
    with pytest.raises(DamagedError, match=r"no manifest.json.*; raw data is named by --dataset$"):
        prepared_data.open_all([str(tmp_path)])
    with pytest.raises(DamagedError, match=r"absent: no such directory$"):
        prepared_data.open_all([str(tmp_path / "absent")])


def test_a_prepared_directory_given_as_data_is_recognized(save: SaveIt) -> None:
    saved = save("ready")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"ready: is a prepared directory, .*--prepared .*ready"):
            save("more", dataset=(str(saved.path),))
        (saved.path / MANIFEST).write_text("cut")
