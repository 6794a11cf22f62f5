"""final_model/ is the old one or the new one, at every moment and after every kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
from tiny_training import train_here

from moai.core import failpoints, files
from moai.core.errors import ConfigError
from moai.training.checkpoints import weights_problem
from moai.training.final_model import point, put, staging

PUT = "import sys; from pathlib import Path; from moai.training.final_model import put; put(*map(Path, sys.argv[1:]))"


def written(staged: Path, text: str) -> Path:
    """A model of two files, each saying `text`."""
    (staged / "part").mkdir(parents=True)
    for name in ("config", "part/weights"):
        (staged / name).write_text(text)
    return staged


def texts(model: Path) -> list[str]:
    return [(model / name).read_text() for name in ("config", "part/weights")]


def test_whoever_looks_finds_a_model_while_another_takes_its_place(tmp_path: Path) -> None:
    place, looks, gone, ended = tmp_path / "final_model", 0, 0, threading.Event()
    put(written(staging(place), "0"), place)

    def look() -> None:
        nonlocal looks, gone
        while not ended.is_set():
            looks += 1
            gone += not os.path.exists(place / "config")

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(1, 200):
        put(written(staging(place), str(number)), place)
    ended.set()
    thread.join()
    assert (gone, texts(place)) == (0, ["199", "199"])
    assert looks > 200
    assert [path.name for path in tmp_path.iterdir()] == ["final_model"]


@pytest.mark.parametrize(("at", "left"), [("final_model.rename", "old"), ("final_model.placed", "new")])
@pytest.mark.parametrize("is_link", [False, True], ids=["directory", "link"])
def test_a_kill_leaves_the_old_model_or_the_new_one(tmp_path: Path, at: str, left: str, is_link: bool) -> None:
    place = tmp_path / "final_model"
    put(written(staging(place), "old"), place)
    if is_link:  # a person moved the model to another disk
        place.rename(tmp_path / "elsewhere")
        place.symlink_to("elsewhere")
    written(staging(place), "new")
    (tmp_path / "points").mkdir()
    environ = {
        **os.environ,
        "MOAI_TESTING": "1",
        "MOAI_FAILPOINT_DIR": str(tmp_path / "points"),
        "MOAI_FAILPOINT": f"{at}=kill",
    }
    killed = subprocess.run([sys.executable, "-c", PUT, staging(place, writes=False), place], env=environ, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert texts(place) == [left, left]
    put(written(staging(place), "next"), place)
    assert texts(place) == ["next", "next"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["final_model", "points", *["elsewhere"] * is_link]
    )
    if is_link:
        assert texts(tmp_path / "elsewhere") == ["old", "old"]


def test_where_names_cannot_be_exchanged_the_old_model_is_set_aside_and_a_crash_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    place = tmp_path / "final_model"
    put(written(staging(place), "old"), place)
    put(written(staging(place), "new"), place)
    assert texts(place) == ["new", "new"]
    (tmp_path / "points").mkdir()
    with monkeypatch.context() as crash:
        crash.setattr(failpoints, "_armed", failpoints.Armed(tmp_path / "points", ("final_model.aside", 1), "raise"))
        with pytest.raises(OSError):
            put(written(staging(place), "newest"), place)
    assert (texts(tmp_path / ".final_model.before"), texts(staging(place, writes=False))) == (
        ["new"] * 2,
        ["newest"] * 2,
    )
    put(written(staging(place), "again"), place)
    assert texts(place) == ["again", "again"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final_model", "points"]


def test_a_link_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = tmp_path / "name"
    for target in ("one", "two", "two"):
        point(name, target)
        assert os.readlink(name) == target
    with monkeypatch.context() as crash:
        crash.setattr(Path, "replace", lambda *_: pytest.fail("a crash"))
        with pytest.raises(pytest.fail.Exception):
            point(name, "three")
    assert os.readlink(name) == "two"
    point(name, "three")
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_a_model_without_its_checkpoints_is_not_written_over(tmp_path: Path, train_py: Callable[..., str]) -> None:
    output = train_here(tmp_path, "--max_steps", "1", "--dataloader_num_workers", "0")
    assert weights_problem(output / "final_model") is None
    shutil.rmtree(output / "checkpoint-1")
    words = [
        "--output_dir",
        str(output),
        "--model_config",
        str(tmp_path / "model.json"),
        "--tokenizer_path",
        str(tiny_run.write_tokenizer(tmp_path / "tokenizer")),
    ]
    for more in ([], ["--sequential"]):
        with pytest.raises(
            ConfigError, match="holds a final_model already, and no checkpoint to go on from; move it away"
        ):
            train_py(*words, "--dataset", str(tmp_path), *more)
