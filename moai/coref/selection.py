"""The small reduce between the two pipelines: which candidates become samples.

`hash` keeps, of every name, the max_entity_freq candidates with the smallest hashes of (document, name, position): the
same ones in whatever order and by however many workers the documents were read. `first` keeps the first ones in the
order of the input, as the prior program did. Only numbers pass here, 24 bytes a candidate, and what is over the cap is
thrown out on the way: memory grows with the samples that are kept, not with the corpus.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

POLICIES = ("hash", "first")
_PRUNE_AT = 4_000_000
"""Candidates that are held before those over the cap are thrown out, some 100 MB."""

Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Selection:
    """`bits[i]` tells which candidates of shard i are picked, in file order; the counts are by entity hash."""

    bits: list[npt.NDArray[np.bool_]]
    before: dict[int, int]
    after: dict[int, int]

    @property
    def total(self) -> int:
        return sum(self.after.values())


def select(
    shards: Sequence[Path], *, cap: int, policy: str, max_samples: int | None = None, prune_at: int = _PRUNE_AT
) -> Selection:
    """Read the candidates of `shards`, in order, and pick at most `cap` of each name and `max_samples` in all."""
    pool, before, ends = _Pool(cap, prune_at), Counter[int](), [0]
    for path in shards:
        entities, ranks = read_candidates(path)
        ends.append(ends[-1] + len(ranks))
        ordinals = np.arange(*ends[-2:], dtype=np.uint64)
        pool.add(entities, ordinals if policy == "first" else ranks, ordinals)
        before.update(_counts(entities))
    entities, ranks, ordinals = pool.kept()
    if max_samples is not None and len(ranks) > max_samples:
        best = np.lexsort((ordinals, ranks))[:max_samples]
        entities, ordinals = entities[best], ordinals[best]
    bits = np.zeros(ends[-1], bool)
    bits[ordinals.astype(np.int64)] = True
    return Selection([bits[begin:end] for begin, end in itertools.pairwise(ends)], dict(before), _counts(entities))


def read_candidates(path: Path) -> tuple[Numbers, Numbers]:
    """(entity hashes, ranks) of one shard, in file order."""
    found = [(_field(candidates, "entity_hash"), _field(candidates, "rank")) for candidates in _candidates(path)]
    entities, ranks = zip(*found or [(np.empty(0, np.uint64),) * 2])
    return np.concatenate(entities), np.concatenate(ranks)


def names_of(wanted: Iterable[int], shards: Sequence[Path]) -> dict[int, str]:
    """The strings behind a few entity hashes, looked up until all are found."""
    missing, names = set(wanted), dict[int, str]()
    for candidates in (candidates for path in shards if missing for candidates in _candidates(path)):
        hashes = _field(candidates, "entity_hash")
        for index in np.flatnonzero(np.isin(hashes, np.array(sorted(missing), np.uint64))).tolist():
            names.setdefault(int(hashes[index]), candidates.field("entity")[index].as_py())
        missing -= names.keys()
    return names


@dataclass
class _Pool:
    """Candidates so far, without those that are over the cap already."""

    cap: int
    prune_at: int
    parts: list[tuple[Numbers, Numbers, Numbers]] = field(default_factory=list)
    size: int = 0

    def add(self, entities: Numbers, ranks: Numbers, ordinals: Numbers) -> None:
        self.parts.append((entities, ranks, ordinals))
        self.size += len(ranks)
        if self.size >= self.prune_at:
            kept = self.kept()
            self.parts, self.size = [kept], len(kept[0])
            self.prune_at = max(self.prune_at, 2 * self.size)  # what is kept must not be sorted again for every shard

    def kept(self) -> tuple[Numbers, Numbers, Numbers]:
        """The `cap` lowest of each entity by (rank, ordinal)."""
        if not self.parts:
            return (np.empty(0, np.uint64),) * 3
        entities, ranks, ordinals = (np.concatenate(parts) for parts in zip(*self.parts))
        order = np.lexsort((ordinals, ranks, entities))
        entities, ranks, ordinals = entities[order], ranks[order], ordinals[order]
        under = np.arange(len(entities)) - np.searchsorted(entities, entities) < self.cap
        return entities[under], ranks[under], ordinals[under]


def _candidates(path: Path) -> Iterator[pa.StructArray]:
    with pa.memory_map(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            yield batch["candidates"].flatten()


def _field(candidates: pa.StructArray, name: str) -> Any:
    return candidates.field(name).to_numpy(zero_copy_only=False)


def _counts(entities: Numbers) -> dict[int, int]:
    values, numbers = np.unique(entities, return_counts=True)
    return dict(zip(values.tolist(), numbers.tolist()))
