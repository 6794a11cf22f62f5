"""The small reduce between the two pipelines: which candidates become samples.

Common names go first (countries and the like: what more than `max_name_share` of the documents repeat), then the easy
candidates, then what is over the cap of a name. `hardest` keeps, of every name, the candidates that most need the text,
`hash` those with the smallest hashes of (document, name, position): the same ones in whatever order and by however many
workers the documents were read. `first` keeps the first ones in the order of the input, as the prior program did.

A candidate's difficulty, 0 to 1, is the mean of three parts, all of them figures of our own choosing:
    distance     log of the characters from antecedent to mask, 10 -> 0, 2,000 -> 1
    competitors  different names in between, n / (n + 4)
    rarity       bits of the name's share of the documents, at most 10: 1 of 1,024 -> 1; whole bits, so that a few more
                 documents change no sample

Only numbers pass here, 26 bytes a candidate, and what is over the cap is thrown out on the way: memory grows with the
samples that are kept, not with the corpus.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

POLICIES = ("hardest", "hash", "first")
_PRUNE_AT = 4_000_000
"""Candidates that are held before those over the cap are thrown out, some 130 MB."""
_COMMON = 20
"""Documents that must repeat a name before it can be a common one: of fewer, a share says nothing."""
_NEAREST, _FARTHEST, _COMPETITORS, _MOST_BITS = 10, 2000, 4, 10

Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Selection:
    """`bits[i]` tells which candidates of shard i are picked, in file order; `difficulties[i]` is of those that are, in
    hundredths; `validation[i]` tells which candidates stand in a document of that split. The counts are by entity hash.
    """

    bits: list[npt.NDArray[np.bool_]]
    difficulties: list[npt.NDArray[np.uint8]]
    validation: list[npt.NDArray[np.bool_]]
    before: dict[int, int]
    after: dict[int, int]
    lost: dict[str, int]
    """Candidates passed over as `common` names, as `easy`, and over the `cap` (--max-samples among it)."""

    @property
    def total(self) -> int:
        return sum(self.after.values())


@dataclass(frozen=True)
class Found:
    """The candidates of one shard, in file order; of its `rows` documents, how many hold each name."""

    entities: Numbers
    ranks: Numbers
    distances: npt.NDArray[np.int32]
    competitors: npt.NDArray[np.int32]
    clusters: Numbers
    documents: Counter[int]
    rows: int


def select(
    shards: Sequence[Path],
    *,
    cap: int,
    policy: str,
    max_samples: int | None = None,
    max_name_share: float = 1.0,
    min_difficulty: float = 0.0,
    validation_ratio: float = 0.0,
    prune_at: int = _PRUNE_AT,
) -> Selection:
    """Read the candidates of `shards`, in order, twice: how common each name is, then which are picked; at most `cap`
    of each name and `max_samples` in all.
    """
    before, holding, documents = Counter[int](), Counter[int](), 0
    for path in shards:
        found = read_candidates(path)
        before.update(_counts(found.entities))
        holding.update(found.documents)
        documents += found.rows
    names = np.array(sorted(holding), np.uint64)
    share = np.array([holding[name] for name in names.tolist()]) / max(1, documents)
    common = (share > max_name_share) & (share * documents >= _COMMON)
    pool, ends, lost = _Pool(cap, prune_at), [0], Counter[str]()
    validation, levels = [], []
    for path in shards:
        found = read_candidates(path)
        ends.append(ends[-1] + len(found.ranks))
        ordinals = np.arange(*ends[-2:], dtype=np.uint64)
        place = np.searchsorted(names, found.entities)
        level = difficulty(found.distances, found.competitors, share[place])
        validation.append(found.clusters < validation_ratio * 2**64)
        levels.append(level)
        easy = ~common[place] & (level < round(100 * min_difficulty))
        lost["common"] += int(common[place].sum())
        lost["easy"] += int(easy.sum())
        kept = ~common[place] & ~easy
        hardest = (100 - level).astype(np.uint64) << np.uint64(56) | found.ranks >> np.uint64(8)
        first = {"first": ordinals, "hash": found.ranks, "hardest": hardest}[policy]
        pool.add(found.entities[kept], first[kept], ordinals[kept])
    entities, ranks, ordinals = pool.kept()
    if max_samples is not None and len(ranks) > max_samples:
        best = np.lexsort((ordinals, ranks))[:max_samples]
        entities, ordinals = entities[best], ordinals[best]
    bits = np.zeros(ends[-1], bool)
    bits[ordinals.astype(np.int64)] = True
    each = [bits[begin:end] for begin, end in itertools.pairwise(ends)]
    lost["cap"] = ends[-1] - lost["common"] - lost["easy"] - len(ordinals)
    picked = [level[here] for level, here in zip(levels, each)]
    return Selection(each, picked, validation, dict(before), _counts(entities), dict(lost))


def difficulty(distances: Any, competitors: Any, share: Any) -> npt.NDArray[np.uint8]:
    """In hundredths; arguments are arrays of characters, names, and shares of the documents."""
    span = math.log(_FARTHEST / _NEAREST)
    far = np.clip(np.log(np.maximum(distances, 1) / _NEAREST) / span, 0, 1)
    crowded = competitors / (competitors + _COMPETITORS)
    rare = np.clip(np.floor(-np.log2(share)), 0, _MOST_BITS) / _MOST_BITS
    return np.asarray(np.round(100 * (far + crowded + rare) / 3), np.uint8)


def read_candidates(path: Path) -> Found:
    """Of one shard."""
    kinds = (np.uint64, np.uint64, np.int32, np.int32, np.uint64)
    parts: list[tuple[Any, ...]] = [tuple(np.empty(0, kind) for kind in kinds)]
    documents, rows = Counter[int](), 0
    for batch in _batches(path):
        candidates = batch["candidates"].flatten()
        row = np.repeat(np.arange(batch.num_rows, dtype=np.uint64), batch["candidates"].value_lengths().to_numpy())
        entities = _field(candidates, "entity_hash")
        documents.update(np.unique(np.stack((row, entities)), axis=1)[1].tolist())
        distances = _field(candidates, "coref_pos") - _field(candidates, "antecedent_pos")
        ranks, competitors = _field(candidates, "rank"), _field(candidates, "competitors")
        parts.append((entities, ranks, distances, competitors, batch["cluster"].to_numpy()[row.astype(np.int64)]))
        rows += batch.num_rows
    entities, ranks, distances, competitors, clusters = (np.concatenate(part) for part in zip(*parts))
    return Found(entities, ranks, distances, competitors, clusters, documents, rows)


def names_of(wanted: Iterable[int], shards: Sequence[Path]) -> dict[int, str]:
    """The strings behind a few entity hashes, looked up until all are found."""
    missing, names = set(wanted), dict[int, str]()
    for candidates in (batch["candidates"].flatten() for path in shards if missing for batch in _batches(path)):
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


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file:
        yield from pa.ipc.open_stream(file)


def _field(candidates: pa.StructArray, name: str) -> Any:
    return candidates.field(name).to_numpy(zero_copy_only=False)


def _counts(entities: Numbers) -> dict[int, int]:
    values, numbers = np.unique(entities, return_counts=True)
    return dict(zip(values.tolist(), numbers.tolist()))
