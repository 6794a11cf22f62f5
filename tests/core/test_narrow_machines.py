"""A machine that gives too little, or forbids: one true line, never a traceback."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_CAPBSET_DROP, _DAC_OVERRIDE, _DAC_READ_SEARCH = 24, 1, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n} " * 20}) + "\n" for n in range(60)))
    return path


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a prepared directory."""
    cache = tmp_path_factory.mktemp("made") / "cache"
    assert moai(*prepare(data, cache)).returncode == 0
    return cache


def prepare(data: Path, cache: Path, **more: Any) -> list[str]:
    given = {"dataset": data, "cache_dir": cache, "tokenizer_path": ROOT / "tokenizers" / "demo", "seq_len": 64}
    flags = {**given, "num_proc": 0, "shard_bytes": 4000, **more}
    return ["prepare", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


def moai(*words: Any, before: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moai", *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, errors="surrogateescape", timeout=120, preexec_fn=before
    )


def like_anybody() -> None:
    """What root may read and write goes by permissions, too."""
    for capability in (_DAC_OVERRIDE, _DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(_CAPBSET_DROP, capability, 0, 0, 0)


def limit(what: int, to: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(what, (to, to))


def one_line(ran: subprocess.CompletedProcess[str]) -> str:
    assert ran.returncode not in (0, 1), ran.stderr
    assert "Traceback" not in ran.stderr, ran.stderr
    [said] = [line for line in ran.stderr.splitlines() if ": error: " in line]
    return said.partition(": error: ")[2]


@pytest.mark.parametrize(
    ("before", "num_proc", "said"),
    [
        (limit(resource.RLIMIT_NOFILE, 12), 2, r"Too many open files; .* raise ulimit -n"),
        (limit(resource.RLIMIT_AS, 300_000_000), 0, r"too little memory, .*ulimit -v"),
    ],
)
def test_few_files_or_little_address_space(
    data: Path, tmp_path: Path, before: Callable[[], None], num_proc: int, said: str
) -> None:
    line = one_line(moai(*prepare(data, tmp_path / "cache", num_proc=num_proc), before=before))
    assert re.search(said, line), line


@contextmanager
def forbidden(path: Path) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(0)
    try:
        yield
    finally:
        path.chmod(before)


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        *(("prepare", folder) for folder in ("", "plans", "datasets/*/manifest.json")),
        *(("status", "launches"), ("gc", "shards"), ("verify", "datasets/*")),
    ],
)
def test_the_cache_of_somebody_else(made: Path, data: Path, folder: str, command: str) -> None:
    [published] = (made / "datasets").iterdir()
    [place] = made.glob(folder) if folder else [made]
    words = {
        "prepare": prepare(data, made),
        "status": ["status", "--cache_dir", made],
        "gc": ["gc", "--cache_dir", made, "--dry_run"],
        "verify": ["verify", published],
    }
    with forbidden(place):
        ran = moai(*words[command], before=like_anybody)
    assert "Traceback" not in ran.stderr
    if ran.returncode:
        assert "ermission" in ran.stderr + ran.stdout
        assert "remove" not in ran.stderr + ran.stdout
    assert "no launch has left a status file" not in ran.stdout


def test_inodes_that_ran_out_are_told_from_a_full_disk(data: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=25", "moai-test", place]).returncode:
        pytest.skip("no file system of one's own may be mounted here")
    try:
        said = one_line(moai(*prepare(data, place / "cache")))
    finally:
        subprocess.run(["umount", place], check=True)
    assert "no inodes are left: remove files there" in said


def test_a_path_that_is_not_utf8_is_printed_as_its_bytes(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / os.fsdecode(b"caf\xe9")
    assert [Path(moai(*prepare(data, cache)).stdout.splitlines()[-1]).parents[1] for _ in range(2)] == [cache] * 2


def test_settings_without_a_bottom_are_one_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("{" * 5000)
    assert "nested too deeply" in one_line(moai(*prepare(data, tmp_path / "cache"), "--config", tmp_path / "deep.yaml"))


def test_nothing_to_repair_needs_nothing_written(made: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(made, cache)
    for path in [cache, *cache.rglob("*")]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    ran = moai("repair", *(cache / "datasets").iterdir(), before=like_anybody)
    for path in [cache, *cache.rglob("*")]:
        path.chmod(0o700)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "nothing to repair" in ran.stdout
