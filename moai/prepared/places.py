"""Where the segments of finished shards lie in their files.

A receipt places records within their segment, since that is all that its content knows; the way from there to the file
is summed up here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from moai.core.files import canonical_json
from moai.engine.run import Done
from moai.sources.discover import Input


class OfInput(Protocol):
    """One input on its way, as a recipe knows it."""

    @property
    def given(self) -> Input: ...
    @property
    def identity(self) -> Mapping[str, Any]: ...


S = TypeVar("S", bound=OfInput, covariant=True)


@dataclass(frozen=True)
class Place:
    """The beginning of a segment: its file, and the lines (rows in columnar files) and bytes of the file before it."""

    file: str
    lines: int
    bytes: int


@dataclass(frozen=True)
class Processed(Generic[S]):
    """One input and its finished shards, in order."""

    stream: S
    done: list[Done]

    @property
    def given(self) -> Input:
        return self.stream.given

    def places(self) -> Iterator[tuple[Done, list[Place]]]:
        """Each shard with the places of its segments. What is not files has one place, the source itself."""
        lines, offsets = Counter[str](), Counter[str]()
        name = self.given.name
        for done in self.done:
            places = []
            for segment, size, records in zip(done.shard.segments, done.receipt.raw.bytes, done.receipt.raw.lines):
                file = segment.file.name if hasattr(segment, "file") else name
                places.append(Place(file, lines[file], offsets[file]))
                lines[file] += records
                offsets[file] += size
            yield done, places


def sources_listing(parts: Sequence[Processed[Any]]) -> bytes:
    """sources.json: of every source its files by their names within it, and of every shard the segments, as [file,
    bytes before, records before].

    With a documents file it leads from a row to the record it was made of. It holds no path and no stamp.
    """
    listing = []
    for part in parts:
        files: dict[str, int] = {}
        shards = [
            [[files.setdefault(place.file, len(files)), place.bytes, place.lines] for place in places]
            for _, places in part.places()
        ]
        reading = part.stream.reading
        listing.append(
            {
                "name": reading.given.name,
                "settings": reading.entry.settings(),
                "read": [name for name in reading.columns if name not in part.stream.not_read],
                "not_read": list(part.stream.not_read),
                "files": list(files),
                "shards": shards,
            }
        )
    return canonical_json(listing)
