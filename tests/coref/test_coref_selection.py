"""The cap over the corpus: exact for every name, the same whatever the order, `first` by the input's order, max_samples
to the unit.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from moai.coref.candidates import CANDIDATE, SCHEMA, entity_hash
from moai.coref.selection import difficulty, names_of, select

NAMES = ["서울", "부산", "인천", "독일", "이순신"]


def corpus(seed: int = 0, documents: int = 60) -> list[tuple[str, list[tuple[str, int]]]]:
    """(document, its candidates as (name, rank)); some ranks are equal."""
    choose = random.Random(seed)
    return [
        (f"d{number}", [(choose.choice(NAMES), choose.randrange(90)) for _ in range(choose.randrange(6))])
        for number in range(documents)
    ]


def write(folder: Path, documents: list[tuple[str, list[tuple[str, int]]]], per_file: int) -> list[Path]:
    folder.mkdir(parents=True)
    paths = []
    for first in range(0, len(documents), per_file):
        rows = [
            {
                "doc_id": name,
                "cluster": 0,
                "source": "s",
                "input_ids": [1],
                "candidates": [
                    {
                        **EMPTY,
                        "entity": entity,
                        "entity_hash": entity_hash(entity),
                        "rank": rank,
                        "span_exact": True,
                    }
                    for entity, rank in found
                ],
            }
            for name, found in documents[first : first + per_file]
        ]
        paths.append(folder / f"{first:03d}.arrow")
        with pa.OSFile(str(paths[-1]), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    return paths


EMPTY = {
    **dict.fromkeys((CANDIDATE.field(index).name for index in range(CANDIDATE.num_fields)), 0),
    **dict.fromkeys(("kind", "nearest", "frequent"), ""),
    "coref_pos": 100,
    "hidden": [],
    "mask": {"begin": 0, "end": 1, "name": [1], "before": [], "behind": []},
}


def picked(documents: list[tuple[str, list[tuple[str, int]]]], bits: list[list[bool]]) -> Counter[tuple[str, str, int]]:
    flat = [(name, entity, rank) for name, found in documents for entity, rank in found]
    every = [bit for part in bits for bit in part]
    assert len(flat) == len(every)
    return Counter(one for one, bit in zip(flat, every) if bit)


@pytest.mark.parametrize("prune_at", [1, 17, 10**6])
@pytest.mark.parametrize("cap", [1, 3, 1000])
def test_the_cap_is_exact_and_keeps_the_lowest_ranks(tmp_path: Path, cap: int, prune_at: int) -> None:
    documents = corpus()
    chosen = select(write(tmp_path / "a", documents, 7), cap=cap, policy="hash", prune_at=prune_at)
    ranks: dict[str, list[int]] = {}
    for _, found in documents:
        for entity, rank in found:
            ranks.setdefault(entity, []).append(rank)
    found = picked(documents, [bits.tolist() for bits in chosen.bits])
    for entity, every in ranks.items():
        assert sorted(rank for _, name, rank in found.elements() if name == entity) == sorted(every)[:cap]
        assert chosen.after[entity_hash(entity)] == min(cap, len(every))
        assert chosen.before[entity_hash(entity)] == len(every)
    assert chosen.total == found.total()


def test_order_and_files_do_not_matter_to_the_hash_and_do_to_first(tmp_path: Path) -> None:
    documents = [
        (name, [(entity, 1000 * index + place) for place, (entity, _) in enumerate(found)])
        for index, (name, found) in enumerate(corpus())
    ]  # no ties
    shuffled = random.Random(1).sample(documents, len(documents))
    for policy, same in (("hash", True), ("first", False)):
        results = []
        for number, (order, per_file) in enumerate(((documents, 7), (shuffled, 11))):
            chosen = select(write(tmp_path / f"{policy}{number}", order, per_file), cap=4, policy=policy)
            results.append(picked(order, [bits.tolist() for bits in chosen.bits]))
        assert results[0].total() == results[1].total() > 0
        assert (results[0] == results[1]) is same


def test_first_is_first(tmp_path: Path) -> None:
    documents = corpus()
    chosen = select(write(tmp_path / "a", documents, 7), cap=2, policy="first", prune_at=5)
    seen: Counter[str] = Counter()
    expected = []
    for _, found in documents:
        for entity, _ in found:
            seen[entity] += 1
            expected.append(seen[entity] <= 2)
    assert [bit for bits in chosen.bits for bit in bits.tolist()] == expected


@pytest.mark.parametrize("policy", ["hash", "first"])
def test_max_samples_is_exact(tmp_path: Path, policy: str) -> None:
    paths = write(tmp_path / "a", corpus(), 7)
    every = select(paths, cap=9, policy=policy).total
    assert every > 20
    for wanted in (1, 20, every, every + 1):
        chosen = select(paths, cap=9, policy=policy, max_samples=wanted)
        assert chosen.total == sum(bits.sum() for bits in chosen.bits) == min(wanted, every)


def test_names_come_back_from_their_hashes_and_nothing_gives_nothing(tmp_path: Path) -> None:
    paths = write(tmp_path / "a", corpus(), 7)
    assert names_of([entity_hash("서울"), entity_hash("이순신")], paths) == {
        entity_hash("서울"): "서울",
        entity_hash("이순신"): "이순신",
    }
    assert select([], cap=1, policy="hash").total == 0
    assert select(write(tmp_path / "b", [("d", [])], 1), cap=1, policy="hash").total == 0


# --- difficulty, common names, the split ------------------------------------------------------------------------------


def test_difficulty_is_the_mean_of_distance_competitors_and_rarity() -> None:
    assert difficulty(np.array([10, 2000]), np.array([0, 0]), np.array([1.0, 1.0])).tolist() == [0, 33]
    assert difficulty(np.array([10, 10]), np.array([4, 12]), np.array([1.0, 1.0])).tolist() == [17, 25]  # 4/8, 12/16
    rare = difficulty(np.array([10] * 4), np.array([0] * 4), np.array([1 / 2, 1 / 3, 1 / 1024, 1e-9])).tolist()
    assert rare == [3, 3, 33, 33]  # whole bits of 10
    assert difficulty(np.array([5000]), np.array([10**6]), np.array([1e-9])).tolist() == [100]


def test_common_names_and_easy_candidates_are_passed_over_and_counted(tmp_path: Path) -> None:
    documents = [(f"d{number}", [("미국", number)] + [(f"이름{number}", 7)] * (number % 2)) for number in range(60)]
    paths = write(tmp_path / "a", documents, 7)
    chosen = select(paths, cap=9, policy="hash", max_name_share=0.5)
    assert chosen.lost == {"common": 60, "easy": 0, "cap": 0}
    assert chosen.total == 30
    assert select(paths[:2], cap=99, policy="hash", max_name_share=0.5).lost["common"] == 0  # of 14 documents
    easy = select(paths, cap=9, policy="hash", min_difficulty=0.2)
    assert (easy.lost["easy"], easy.total) == (60, 30)  # what stands in every document
    assert easy.difficulties[0].tolist() == [31] * 3  # (0.43 + 0 + 0.5) / 3
    assert sum(easy.lost.values()) + easy.total == 90


def test_the_hardest_of_a_name_stay_and_the_split_is_by_cluster(tmp_path: Path) -> None:
    documents = [(f"d{number}", [("서울", 10**18 * number)]) for number in range(8)]
    [path] = write(tmp_path / "a", documents, 99)
    with pa.memory_map(str(path)) as file:
        rows = pa.ipc.open_stream(file).read_all().to_pylist()
    for number, row in enumerate(rows):
        row["candidates"][0]["coref_pos"] = 20 + 100 * number
        row["cluster"] = 2**63 if number % 2 else 2**61
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    chosen = select([path], cap=3, policy="hardest", validation_ratio=0.25)
    assert chosen.bits[0].tolist() == [False] * 5 + [True] * 3
    assert chosen.difficulties[0].tolist() == sorted(chosen.difficulties[0].tolist())
    assert chosen.validation[0].tolist() == [True, False] * 4
