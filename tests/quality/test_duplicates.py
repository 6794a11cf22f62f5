"""Copies: which of them stays, whatever the order, the workers and the sources; what is said and written of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moai.core.errors import ConfigError
from moai.prepared.manifest import Prepared
from moai.prepared.verify import verify
from moai.pretraining.options import DataConfig
from moai.quality.duplicates import settle

Make = Callable[..., Prepared]
ONE = "A document of its own, number {0}, with words enough for it to be told from all others."


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[bool], list[int], dict[tuple[int, int], float]]:
    """Which are allowed, of which class each is, and which classes are similar."""
    number = draw(st.integers(0, 12))
    classes = draw(st.lists(st.integers(0, max(0, number - 1)), min_size=number, max_size=number))
    allowed = draw(st.lists(st.booleans(), min_size=number, max_size=number))
    present = sorted({*classes})
    pairs = [(one, other) for one in present for other in present if one < other]
    similar = draw(st.dictionaries(st.sampled_from(pairs), st.sampled_from((0.8, 0.9)))) if pairs else {}
    return allowed, classes, similar


@given(documents())
def test_a_document_goes_exactly_when_one_that_stays_is_like_it(
    given: tuple[list[bool], list[int], dict[tuple[int, int], float]],
) -> None:
    allowed, classes, similar = given
    pairs = [(classes.index(one), classes.index(other)) for one, other in similar]
    found = settle(
        np.array(allowed, bool),
        np.array(classes, int),
        np.array(pairs, int).reshape(-1, 2),
        np.array(list(similar.values()), float),
    )

    def likeness(one: int, other: int) -> float:
        low, high = sorted((classes[one], classes[other]))
        return 1.0 if low == high else similar.get((low, high), 0.0)

    stays: list[int] = []
    for document in range(len(classes)):
        likes = [(-likeness(document, one), one) for one in stays if likeness(document, one)]
        if allowed[document] and likes:
            assert (-found.jaccard[document], found.keeper[document]) == min(likes)
        else:
            assert found.keeper[document] == -1
            stays += [document] * allowed[document]


def test_of_a_chain_its_ends_stay() -> None:
    found = settle(np.ones(3, bool), np.arange(3), np.array([[1, 2], [0, 1]]), np.array([0.9, 0.8]))
    assert found.keeper.tolist() == [-1, 0, -1]


def test_exact_copies_go_within_and_across_sources_and_the_manifest_adds_up(
    prepare: Make, texts: Any, tmp_path: Path
) -> None:
    one = write(tmp_path / "one.jsonl", [ONE.format(n % 40) for n in range(60)])
    other = write(tmp_path / "other.jsonl", [ONE.format(n) for n in range(30, 80)])
    prepared = prepare(one, other, dedup="exact", shard_bytes=1500)
    assert sorted(texts(prepared)) == sorted(ONE.format(n) for n in range(80))
    assert prepared.content["records"] == {"read": 110, "kept": 80, "filtered": 30, "quarantined": 0}
    sources = prepared.content["quality"]["sources"]
    assert sum(source["duplicates"] for source in sources.values()) == 30
    for source in sources.values():
        gone = sum(source[name] for name in ("dropped", "duplicates", "filtered", "quarantined"))
        assert source["read"] == source["kept"] + gone
    assert all(check.ok for check in verify(prepared.path, full=True))


def test_of_each_copy_the_directory_names_what_stays_in_its_place(prepare: Make, tmp_path: Path) -> None:
    data = [ONE.format(n % 25) for n in range(60)]
    prepared = prepare(write(tmp_path / "data.jsonl", data), dedup="exact", shard_bytes=1500)
    rows, starts = [], [0]
    for number in range(len(prepared.content["shards"])):
        with pa.memory_map(str(prepared.path / f"verdicts-{number:05d}.arrow")) as file:
            rows += pa.ipc.open_file(file).read_all().to_pylist()
        starts.append(len(rows))
    assert len(starts) > 3
    assert len(rows) == 60
    keepers = {row["keeper_shard"] is None for row in rows}
    assert keepers == {True, False}
    for text, row in zip(data, rows):
        if row["keeper_shard"] is not None:
            kept = starts[row["keeper_shard"]] + row["keeper_row"]
            assert (data[kept], rows[kept]["keeper_shard"], row["jaccard"]) == (text, None, 1.0)


def test_the_source_with_the_higher_priority_keeps_its_copy(prepare: Make, tmp_path: Path) -> None:
    names = ("a", "b", "c")
    paths = {name: write(tmp_path / f"{name}.jsonl", [ONE.format(n) for n in range(20)]) for name in names}
    for first in names:
        entries = [{"path": paths[name], "name": name, "priority": int(name == first)} for name in names]
        prepared = prepare(*entries, dedup="exact")
        kept = {name: one["kept"] for name, one in prepared.content["quality"]["sources"].items()}
        assert kept == {name: 20 * (name == first) for name in names}


def test_what_a_rule_drops_takes_no_copy_away(prepare: Make, texts: Any, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", [ONE.format(n) for n in range(20)]) for name in ("a", "b")]
    profile = {"sources": {"first": {"min_chars": 1000}}}
    entries = [{"path": paths[0], "name": "first", "priority": 1}, {"path": paths[1], "name": "second"}]
    prepared = prepare(*entries, dedup="exact", quality=profile)
    sources = prepared.content["quality"]["sources"]
    assert (sources["first"]["dropped"], sources["second"]["kept"]) == (20, 20)
    filtered = prepare({**entries[0], "min_chars": 1000}, entries[1], dedup="exact")
    assert filtered.content["records"] == {"read": 40, "kept": 20, "filtered": 20, "quarantined": 0}


def test_the_same_documents_stay_for_any_order_of_files_and_number_of_workers(
    prepare: Make, texts: Any, tmp_path: Path
) -> None:
    data = [ONE.format(n % 70) for n in range(100)]
    kept = []
    for turn, num_proc in ((0, 0), (37, 2)):
        folder = tmp_path / str(turn)
        folder.mkdir()
        turned = data[turn:] + data[:turn]
        for part in range(4):
            write(folder / f"{part}.jsonl", turned[part * 25 : part * 25 + 25])
        kept.append(sorted(texts(prepare(str(folder), dedup="exact", shard_bytes=1000, num_proc=num_proc))))
    assert kept[0] == kept[1] == sorted(ONE.format(n) for n in range(70))


def test_without_dedup_no_key_and_no_byte_is_another(prepare: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [ONE.format(n) for n in range(20)])
    one, other = prepare(path), prepare(path, dedup="exact")
    assert one.path != other.path
    keys = [[shard["shard_key"] for shard in each.content["shards"]] for each in (one, other)]
    assert keys[0] == keys[1]  # nothing goes, so that the packed shards are the same
    assert "quality" not in one.content


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="max_dropped is set, and neither quality nor dedup is"):
        DataConfig(max_dropped=0.5)
