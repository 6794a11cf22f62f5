"""What may become of a file, and the next to read it must see: DAMAGES[kind](path, random)."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path


class Opened:
    """Unpickled, it leaves a mark beside the file that it was in."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def mark_of(path: Path) -> Path:
    return path.with_name("unpickled")


def written(change: Callable[[bytearray, random.Random], bytes | bytearray]) -> Callable[[Path, random.Random], None]:
    def damage(path: Path, random: random.Random) -> None:
        data = path.read_bytes()
        changed = change(bytearray(data), random)
        assert changed != data
        path.write_bytes(changed)

    return damage


def replaced(put: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    def damage(path: Path, random: random.Random) -> None:
        path.unlink()
        put(path)

    return damage


def zeroed(data: bytearray, random: random.Random) -> bytearray:
    """A block of at least a tenth around a byte that was none."""
    at = random.choice([place for place, byte in enumerate(data) if byte])
    data[max(0, at - len(data) // 20) : at + len(data) // 20 + 1] = bytes(
        len(data[max(0, at - len(data) // 20) : at + len(data) // 20 + 1])
    )
    return data


def flipped(data: bytearray, random: random.Random) -> bytearray:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return data


def pickled(path: Path) -> None:
    """As torch writes it: a zip archive with a pickle in it."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps(Opened(mark_of(path)), protocol=2))
        zipped.writestr("archive/version", "3\n")
        zipped.writestr("archive/byteorder", "little")
    path.write_bytes(archive.getvalue())


def to_another(path: Path) -> None:
    """A link to a whole file elsewhere."""
    elsewhere = path.with_name(f"other-{path.name}")
    elsewhere.write_bytes(b"{}")
    path.symlink_to(elsewhere)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "deleted": replaced(lambda path: None),
    "emptied": written(lambda data, _: b""),
    "cut": written(lambda data, random: data[: random.randrange(len(data.rstrip()))]),
    "longer": written(lambda data, _: data + b"\0"),
    "a block of zeros": written(zeroed),
    "a flipped bit": written(flipped),
    "garbage": written(lambda data, random: random.randbytes(len(data))),
    "nested brackets": written(lambda data, _: b"[" * 100_000),
    "JSON of another shape": replaced(lambda path: path.write_text(json.dumps({"global_step": 4}))),
    "a pickle": replaced(pickled),
    "a directory": replaced(Path.mkdir),
    "a FIFO": replaced(os.mkfifo),
    "a link to itself": replaced(lambda path: path.symlink_to(path)),
    "a link to another file": replaced(to_another),
    "that of an older one": lambda path, _: shutil.copyfile(path.parent.with_name("checkpoint-2") / path.name, path),
}


def without_digests(checkpoint: Path, **changes: object) -> None:
    """As a moai left it that took none."""
    path = checkpoint / "moai_data.json"
    record = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({name: value for name, value in record.items() if name not in ("files", "self_digest")}))
