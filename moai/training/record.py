"""moai_data.json: what a checkpoint was trained on, and the digest of every file in it. Written last, and sealed.

    Record(content_digest=..., ...).save(checkpoint, files)        # once every rank has written its files
    Record.load(checkpoint).damage(checkpoint)                     # "optimizer.pt is damaged: ..." or None

A checkpoint without digests, of a moai that did not take them yet, has a record of the same fields and no seal.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from moai.core.files import sealed, unsealed, write_atomic
from moai.core.fsops import kind_of, open_regular, read_regular

logger = logging.getLogger(__name__)

RECORD = "moai_data.json"
MOST_BYTES = 1 << 30
"""Of a JSON file in a checkpoint: trainer_state.json holds a line for every step that was logged."""
_TYPES = {"content_digest": str, "order": dict, "files": dict}
_LEAST = {"rows": 1, "world_size": 1, "rows_per_step": 1, "position": 0, "tokens_seen": 0}
_BLOCK_BYTES = 1 << 18
"""Stays in the processor's cache: 8 GB/s from the page cache, where blocks of 4 MB gave 1.5."""
_PIECE_BYTES, _THREADS = 1 << 26, 4
_OF_A_RANK = re.compile(r"(?:rng_state|zero_pp_rank)_(\d+)")

Files = Mapping[str, list[Any]]
"""Path inside the checkpoint -> [bytes, xxh3_128]; see `_digest`."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a checkpoint was trained on: the data, its order, and how far in it.

    order        what decides the order beside the data: its version, seed and window, and the mixture as `asked` for
                 and as resolved to `shares`
    position     rows of that order that were trained on, over all ranks and since the run began
    tokens_seen  trained tokens, likewise
    files        the digests; none in a checkpoint of a moai that took none
    """

    content_digest: str
    rows: int
    order: dict[str, Any]
    world_size: int
    rows_per_step: int
    position: int = 0
    tokens_seen: int = 0
    files: Files = field(default_factory=dict)

    def save(self, checkpoint: Path, files: Files) -> None:
        write_atomic(checkpoint / RECORD, sealed(asdict(replace(self, files=files))))

    @classmethod
    def load(cls, checkpoint: Path) -> Record:
        """Raises OSError, ValueError, LookupError, TypeError or RecursionError when it is absent or not a record."""
        data = read_regular(checkpoint / RECORD, MOST_BYTES)
        found = json.loads(data)
        names = {one.name for one in fields(cls)}
        if found.keys() != names - {"files"}:
            found = unsealed(data)
        values = {name: found[name] for name in names & found.keys()}
        for name, value in values.items():
            kind: Any = _TYPES.get(name, int)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError("not a record of moai")
            if name in _LEAST and value < _LEAST[name]:
                raise ValueError(f"{name} is {value}")
        return cls(**values)

    def damage(self, checkpoint: Path, *, read: bool) -> str | None:
        """What differs from the digests: kinds and sizes, and every byte if it is to `read` them."""
        gigabytes = sum(size for size, _ in self.files.values()) / 1e9
        if read and gigabytes > 1:
            logger.info("%s: reading %.1f GB to compare them with their digests", checkpoint, gigabytes)
        for name, (size, digest) in self.files.items():
            try:
                found = os.lstat(checkpoint / name)
                if not stat.S_ISREG(found.st_mode):
                    return f"{name} is {kind_of(found.st_mode)}"
                if found.st_size != size:
                    return f"{name} has {found.st_size:,} bytes, {size:,} were saved"
                if read and _digest(checkpoint / name) != [size, digest]:
                    return f"{name} is damaged: its bytes are not those that were saved"
            except FileNotFoundError:
                return f"{name} is missing"
            except (OSError, ValueError) as error:
                return f"{name} cannot be read ({getattr(error, 'strerror', None) or error})"
        return None


def digests(checkpoint: Path, rank: int) -> Files:
    """Of the files that this rank wrote, read back from the page cache: those named for it, and for rank 0 all others
    too. Raises OSError.
    """
    names = [path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    return {name: _digest(checkpoint / name) for name in names if name != RECORD and _writer(name) == rank}


def _writer(name: str) -> int:
    found = _OF_A_RANK.search(name)
    return int(found[1]) if found else 0


def _digest(path: Path) -> list[Any]:
    """Size and digest: of a file of several pieces that of the pieces' digests, which threads take side by side."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        with ThreadPoolExecutor(_THREADS) as threads:
            pieces = list(threads.map(partial(_piece, file.fileno()), range(0, max(1, size), _PIECE_BYTES)))
    return [size, (pieces[0] if len(pieces) == 1 else xxhash.xxh3_128(b"".join(pieces)).digest()).hex()]


def _piece(descriptor: int, start: int) -> bytes:
    digest, block, at = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK_BYTES)), start
    while count := os.preadv(descriptor, [block[: start + _PIECE_BYTES - at]], at):
        digest.update(block[:count])
        at += count
    return digest.digest()
