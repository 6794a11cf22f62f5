"""Names that a recognizer found: a file of spans instead of rules.

    {"id": "doc-7", "spans": [[0, 4, "OG"], [31, 34, "PS"]]}

A line a document, characters of its text, begin and end as in Python; the label becomes the sample's kind. A document
is looked up by its id (or, where it has none, by the xxh3_128 of its text, as the corpus calls it) in an index of 16
bytes a line; the lines stay on the disk.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from moai.core.errors import ConfigError
from moai.core.files import digest_file
from moai.coref.names import Morpheme, Name
from moai.engine.part import UNKEYED


@dataclass(frozen=True, kw_only=True)
class GivenNames:
    """The finder. A document that the file does not name has no names."""

    digest: str
    path: str = field(metadata=UNKEYED)

    @classmethod
    def open(cls, path: str) -> GivenNames:
        """Raises ConfigError where the file cannot be read, or a line is none of its form."""
        try:
            found = cls(digest=digest_file(Path(path)), path=str(Path(path).absolute()))
        except OSError as error:
            raise ConfigError(f"--entities {path}: {error.strerror}") from error
        _index(found.path, found.digest)
        return found

    def names(self, text: str, morphemes: Sequence[Morpheme], document_id: str = "") -> list[Name]:
        """In the order of the text; of two that overlap, the one that begins first, or is longer."""
        hashes, offsets = _index(self.path, self.digest)
        wanted = xxhash.xxh3_64_intdigest(document_id.encode())
        at = int(np.searchsorted(hashes, wanted))
        if at == len(hashes) or hashes[at] != wanted:
            return []
        with open(self.path, "rb") as file:
            file.seek(int(offsets[at]))
            row = orjson.loads(file.readline())
        spans = sorted((begin, -end, label) for begin, end, label in row["spans"] if 0 <= begin < end <= len(text))
        found: list[Name] = []
        for begin, less, label in spans:
            if not found or found[-1].end <= begin:
                found.append(Name(begin, -less, str(label)))
        return found


@functools.lru_cache(maxsize=1)
def _index(path: str, digest: str) -> tuple[Any, Any]:
    """(hashes of ids, sorted; where their lines begin)."""
    hashes, offsets, at = [], [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = orjson.loads(line)
                name, spans = str(row["id"]), row["spans"]
                if any(type(begin) is not int or type(end) is not int for begin, end, _ in spans):
                    raise ValueError("a place is no integer")
            except (ValueError, LookupError, TypeError) as error:
                raise ConfigError(
                    f"--entities {path} line {number}: expected "
                    f'{{"id": ..., "spans": [[begin, end, label], ...]}} ({error})'
                ) from error
            hashes.append(xxhash.xxh3_64_intdigest(name.encode()))
            offsets.append(at)
            at += len(line)
    order = np.argsort(np.array(hashes, np.uint64), kind="stable")
    return np.array(hashes, np.uint64)[order], np.array(offsets, np.int64)[order]
