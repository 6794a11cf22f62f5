"""What a folder means: the split, the configuration and the files that `datasets.load_dataset` would take, and a word
about the rest.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pytest

from moai.core.errors import SourceError
from moai.sources.discover import Input, discover, named_as_splits

README = """---
license: mit
configs:
- config_name: ko
  default: true
  data_files:
  - {split: train, path: ko/tr*.jsonl}
  - {split: validation, path: ko/v.jsonl}
- config_name: wiki
  data_dir: wiki
---
words
"""
DIRECTORY = """---
configs:
- config_name: default
  data_files: "data/*.jsonl"
---
"""
LAYOUTS = {
    "files": ["data/train.jsonl", "data/validation.jsonl", "data/test.jsonl"],
    "folders": ["train/a.jsonl", "train/deep/b.jsonl", "dev/a.jsonl", "test_set/c.jsonl"],
    "folders before files": ["train/a.jsonl", "test.jsonl", "x/train-1.jsonl"],
    "sharded": ["data/train_sft-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl", "data/more.jsonl"],
    "numbered": ["my-train-0.jsonl", "my-train-1.jsonl", "my_eval_0.jsonl", "trainer.jsonl", "latest.jsonl"],
    "some of no split": ["train.jsonl", "web.jsonl"],
    "no split": ["ko.jsonl", "deep/en.jsonl", "contest.jsonl", "Train.jsonl"],
    "a folder within": ["pretraining data/valid/a.jsonl", "x-training/b.jsonl"],
    "readme": ["ko/train.jsonl", "ko/tr2.jsonl", "ko/v.jsonl", "wiki/a.jsonl", "loose.jsonl", "README.md"],
    "readme of one": ["data/a.jsonl", "data/test.jsonl", "loose.jsonl", "README.md"],
}


def made(folder: Path, names: list[str], readme: str = README) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(readme if name == "README.md" else json.dumps({"text": name}) + "\n")
    return folder


def read(inputs: list[Input]) -> list[str]:
    return [
        json.loads(line)["text"]
        for given in inputs
        for file in given.files
        for line in Path(file.path).read_text().splitlines()
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_gives_what_load_dataset_gives_and_says_the_rest(
    tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = LAYOUTS[layout]
    folder = made(tmp_path / "corpus", names, DIRECTORY if layout == "readme of one" else README)
    theirs = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "hf"))
    caplog.set_level(logging.WARNING, "moai")
    given = discover(str(folder))
    assert sorted(read(given)) == sorted(theirs["train"]["text"])
    for split in theirs:
        assert sorted(read(discover(f"{folder}@{split}"))) == sorted(theirs[split]["text"])
    left = [name for names in given[0].left_out.values() for name in names]
    assert len(read(given)) < len(names) - ("README.md" in names) or not left
    if left:
        assert f"{folder}: not read: " in caplog.messages[0]
        assert any(name in caplog.messages[0] for name in left)
    else:
        assert not caplog.messages


def test_configurations_of_a_folder_are_named_behind_a_colon(tmp_path: Path) -> None:
    folder = made(tmp_path / "corpus", LAYOUTS["readme"])
    assert read(discover(f"{folder}:wiki")) == ["wiki/a.jsonl"]
    assert read(discover(str(folder), "wiki")) == ["wiki/a.jsonl"]
    (given,) = discover(f"{folder}:ko@validation")
    assert read([given]) == ["ko/v.jsonl"]
    assert given.left_out == {"split train": ("ko/tr2.jsonl", "ko/train.jsonl"), "configurations": ("wiki",)}


@pytest.mark.parametrize(
    ("names", "spec", "message"),
    [
        (["web.jsonl", "test.jsonl"], "", "holds the splits test and 1 files of none; name one, as in"),
        (["train.jsonl", "test.jsonl"], "@dev", "holds the splits train, test; name one, as in"),
        (["web.jsonl"], "@dev", "has no split 'dev': no file or folder in it is named like one"),
        (["web.jsonl"], ":ko", "`datasets` does not find its data"),
        (LAYOUTS["readme"], ":en", "BuilderConfig 'en' not found"),
        (["README.txt", "dataset_infos.json"], "", "no readable file in this directory"),
        (["a.jsonl"], "/a.jsonl@train", "a.jsonl is a file, which has no splits or configurations"),
    ],
)
def test_what_a_folder_does_not_tell_is_asked(tmp_path: Path, names: list[str], spec: str, message: str) -> None:
    with pytest.raises(SourceError) as failed:
        discover(f"{made(tmp_path / 'corpus', names)}{spec}")
    assert message in str(failed.value)
    assert "corpus" in str(failed.value)


def test_datasets_saved_below_a_folder_are_read_as_what_they_are(tmp_path: Path) -> None:
    folder = made(tmp_path / "corpus", ["web.jsonl", "deep/state.json", "deep/more.jsonl"])
    one, other = (datasets.Dataset.from_dict({"text": [text]}) for text in ("saved", "held"))
    datasets.DatasetDict({"train": one, "test": other}).save_to_disk(str(folder / "deep" / "dict"))
    other.save_to_disk(str(folder / "single"))
    arrow, lines = discover(str(folder))
    files = [f"{Path(file.name).parent}" for file in arrow.files]
    assert files == ["deep/dict/train", "single"]
    for split in ("train", "test"):  # saved one by one, under the names of splits
        (one if split == "train" else other).save_to_disk(str(tmp_path / "splits" / split))
    (given,) = discover(str(tmp_path / "splits"))
    assert [file.name for file in given.files] == ["train/data-00000-of-00001.arrow"]
    assert given.left_out == {"split test": ("test/*.arrow",)}
    (given,) = discover(f"{tmp_path / 'splits'}@test")
    assert [file.name for file in given.files] == ["test/data-00000-of-00001.arrow"]
    assert read([lines]) == ["deep/more.jsonl", "web.jsonl"]
    assert arrow.left_out == {"split test": ("deep/dict/test",), "not data": ("deep/state.json",)}


STRAYS = [
    *("LICENSE.txt", "LICENSE-APACHE.txt", "requirements.txt", "dev-requirements.txt", "README.txt", "robots.txt"),
    *("CMakeLists.txt", "NOTICE.txt", "sha256sums.txt", "vocab.txt", "dataset_infos.json", "dataset_info.json"),
    *("model.safetensors.index.json", "package.json", "tsconfig.json", "tokenizer_config.json", "state.json"),
    "id2label.json",
]


@pytest.mark.parametrize("kind", ["", "/**/*"])
def test_what_speaks_of_the_data_is_left_out_with_a_word(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(tmp_path / "corpus", ["data.jsonl", "deep/licenses.jsonl", *STRAYS])
    (given,) = discover(f"{folder}{kind}")
    assert read([given]) == ["data.jsonl", "deep/licenses.jsonl"]
    assert sorted(given.left_out["not data"]) == sorted(STRAYS)
    assert "not data: 18 (" in caplog.text
    (alone,) = discover(str(folder / "LICENSE.txt"))  # what is named itself is read
    assert alone.files[0].name == "LICENSE.txt"


def test_a_little_of_another_kind_is_no_data_and_a_little_more_is_asked_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(tmp_path / "corpus", ["notes.txt", "other.json"])
    (folder / "data.jsonl").write_text((json.dumps({"text": "x" * 100}) + "\n") * 100)
    (given,) = discover(str(folder))
    assert given.name == "corpus"
    assert given.left_out == {"not data": ("other.json", "notes.txt")}
    (folder / "notes.txt").write_text("x" * 1000)
    assert [given.kind.name for given in discover(str(folder))] == ["lines", "txt"]
    assert "reads also what is of another kind than most of it: notes.txt" in caplog.text
    made(folder, [f"{n}.txt" for n in range(6)])  # many are data, however small
    assert sorted(given.kind.name for given in discover(str(folder))) == ["lines", "txt"]


def test_what_is_there_and_not_read_is_said_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = made(tmp_path / "corpus", ["data.jsonl", "c.jsonl.part", "rows/state.json", "rows/dataset_info.json"])
    made(folder, ["rows/manifest.json", "rows/tokenizer.json", "rows/quarantine.jsonl", "notes.md"])
    for name in ("empty.jsonl", "nothing.parquet"):
        (folder / name).touch()
    (given,) = discover(str(folder))
    assert read([given]) == ["data.jsonl"]
    assert given.left_out == {
        "prepared rows, for --prepared": ("rows",),
        "empty": ("empty.jsonl", "nothing.parquet"),
    }
    assert given.passed_over == ("c.jsonl.part", "notes.md")
    assert "empty: 2 (empty.jsonl, nothing.parquet)" in caplog.text
    assert "1 unfinished downloads are not read: c.jsonl.part" in caplog.text


def test_a_link_to_nothing_is_data_that_is_missing(tmp_path: Path) -> None:
    folder = made(tmp_path / "corpus", ["data.jsonl"])
    (folder / "more.jsonl").symlink_to("../.git/annex/objects/ab/cd")
    for spec in (folder, folder / "*.jsonl"):
        with pytest.raises(SourceError, match=r"more.jsonl: a link to .* which is not there; fetch .*git annex get"):
            discover(str(spec))


def test_a_pattern_takes_all_and_says_which_splits_are_among_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(tmp_path / "corpus", ["train.jsonl", "test.jsonl"])
    (given,) = discover(f"{folder}/*.jsonl")
    assert read([given]) == ["test.jsonl", "train.jsonl"]
    assert "train: train.jsonl; test: test.jsonl" in caplog.text
    both = [str(folder / name) for name in ("train.jsonl", "test.jsonl")]  # as a shell writes the pattern
    assert "(train: train.jsonl; test: test.jsonl)" in str(named_as_splits(both))
    made(tmp_path, ["a/web.jsonl", "a/train.jsonl", "test/a.jsonl", "test/b.jsonl"])
    for names in (["a/web.jsonl", "a/train.jsonl"], ["test/a.jsonl", "test/b.jsonl"], ["a/web.jsonl", "user/test"]):
        assert named_as_splits([str(tmp_path / name) for name in names]) is None
    assert "(test: test/*)" in str(named_as_splits([tmp_path / "a", tmp_path / "test"]))
