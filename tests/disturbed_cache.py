"""A small world to disturb a cache in: its input, what is right for each state of it, and where a command can be ended
by an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from moai.cache.gc.collect import GcConfig, collect
from moai.cache.ledger import Ledger
from moai.core import failpoints
from moai.core.errors import SourceError
from moai.prepared.manifest import MANIFEST, Prepared
from moai.pretraining import recipe as pretraining
from moai.pretraining.options import DataConfig
from moai.pretraining.repair import repair

TOKENIZER = str(Path(__file__).parent.parent / "tokenizers" / "demo")
CONFIGS: dict[str, dict[str, Any]] = {
    "A": {"seq_len": 64, "packing": "bfd_split"},
    "B": {"seq_len": 40, "packing": "wrapped"},
    "C": {"seq_len": 64, "packing": "none", "min_chars": 60},
}
INPUT = ("a.jsonl", "b.jsonl", "c.jsonl.zst", "d.json")
VARIANTS = ("whole", "another letter", "a line more", "a bad line", "absent")
Input = tuple[str, ...]
"""Of every file of INPUT, its variant."""


@dataclass(frozen=True)
class Reference:
    """What an undisturbed preparation gives: the directory's name, every file but the manifest, and the manifest's
    content.
    """

    name: str
    files: dict[str, bytes]
    content: dict[str, Any]


def input_bytes(name: str, variant: str) -> bytes | None:
    if variant == "absent":
        return None
    texts = [
        f"{name} {number}: the quick brown fox and 그리고 문서 {number * 7919}" + " again" * (number % 5)
        for number in range(14)
    ]
    if variant == "another letter":
        texts[9] = texts[9].replace("quick", "quiet")
    if variant == "a line more":
        texts.append("the line that came later")
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    if variant == "a bad line":
        lines.insert(5, '{"text": 5}')
    data = ("[" + ",\n".join(lines) + "]\n" if name.endswith(".json") else "\n".join(lines) + "\n").encode()
    return zstandard.compress(data) if name.endswith(".zst") else data


def config(root: Path, name: str) -> DataConfig:
    given = {
        "tokenizer_path": TOKENIZER,
        "tokenizer_backend": "tokenizers",
        "shard_bytes": 1000,
        "num_proc": 0,
        "max_bad_ratio": 1.0,
        **CONFIGS[name],
    }
    return DataConfig(dataset=(str(root / "data"),), cache_dir=str(root / "cache"), **given)


def prepare(root: Path, name: str) -> Prepared:
    return pretraining.prepare(config(root, name), origins={"num_proc": "flag"})


_references: dict[tuple[Input, str], Reference | None] = {}


def reference(state: Input, name: str) -> Reference | None:
    """None where there is nothing to prepare."""
    if (state, name) not in _references:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / "data").mkdir()
            for file, variant in zip(INPUT, state):
                if (data := input_bytes(file, variant)) is not None:
                    (root / "data" / file).write_bytes(data)
            try:
                made = prepare(root, name)
            except SourceError:
                _references[state, name] = None
            else:
                _references[state, name] = Reference(made.path.name, contents(made.path), made.content)
    return _references[state, name]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != MANIFEST}


def regular(path: Path) -> bytes | None:
    """Of a regular file, links not followed."""
    return path.read_bytes() if path.is_file() and not path.is_symlink() else None


def odd(path: Path, kind: str) -> None:
    """Put something in the place of a file that is none."""
    path.unlink()
    match kind:
        case "FIFO":
            os.mkfifo(path)
        case "directory":
            (path / "inside").mkdir(parents=True)
        case "dangling link":
            path.symlink_to("nowhere")
        case "link loop":
            path.symlink_to(path.name)
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):
                made.bind(path.name)


ODD = ("FIFO", "directory", "dangling link", "link loop", "device", "socket")


@contextlib.contextmanager
def armed(place: tuple[str, int], action: str) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        failpoints._armed = failpoints.Armed(Path(folder), place, action)
        try:
            yield
        finally:
            failpoints._armed = None


@dataclass(frozen=True)
class Records:
    """Digests of content, and keys of transforms."""

    digests: frozenset[str]
    transforms: frozenset[str]

    @classmethod
    def remembered(cls, cache: Path) -> Records:
        """What the cache has records of."""
        known = [Ledger(cache).known(path.stem) or {} for path in cache.glob("ranges/*/*.json")]
        return cls(
            frozenset(record["digest"] for record in known if "digest" in record),
            frozenset(path.stem for path in cache.glob("transforms/*.json")),
        )

    @classmethod
    def of_shards(cls, cache: Path) -> Records:
        """What finished shards were made of, and by what."""
        receipts = [receipt for path in cache.glob("shards/*.json") if (receipt := Ledger(cache).receipt(path.stem))]
        return cls(
            frozenset(receipt.raw.digest for receipt in receipts),
            frozenset(receipt.transform_key for receipt in receipts),
        )

    def within(self, other: Records) -> Records:
        return Records(self.digests & other.digests, self.transforms & other.transforms)


def places_passed() -> dict[str, list[tuple[str, int]]]:
    """Of each command, every failpoint and occurrence that it passes."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "data").mkdir()
        for file in INPUT:
            (root / "data" / file).write_bytes(input_bytes(file, "a bad line") or b"")
        return {name: list(_passed(act, root / name)) for name, act in COMMANDS.items()}


def _passed(command: Callable[[Path], object], seen: Path) -> Iterator[tuple[str, int]]:
    seen.mkdir()
    failpoints._armed = failpoints.Armed(seen)
    try:
        command(seen.parent)
    finally:
        failpoints._armed = None
    yield from sorted((path.stem, int(path.suffix[1:])) for path in seen.iterdir())


def _repair_all(root: Path) -> None:
    [made] = (root / "cache" / "datasets").iterdir()
    for path in made.glob("data-*"):
        os.truncate(path, 10)
    list(repair(made))


def _collect_all(root: Path) -> None:
    shutil.rmtree(root / "cache" / "datasets")
    list(collect(GcConfig(cache_dir=str(root / "cache"), older_than=0.0)))


COMMANDS: dict[str, Callable[[Path], object]] = {
    "prepare": lambda root: prepare(root, "A"),
    "repair": _repair_all,
    "gc": _collect_all,
}
