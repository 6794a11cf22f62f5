"""Copies: which of them stays, whatever the order, the workers and the sources; what is said and written of them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from stamps import wait_until_stamps_prove

from moai.core.errors import ConfigError, DamagedError
from moai.prepared.manifest import Prepared
from moai.prepared.verify import verify
from moai.pretraining.options import DataConfig
from moai.quality.bands import HEADS
from moai.quality.duplicates import settle
from moai.quality.minhash import MinHash

needs_rensa = pytest.mark.skipif(find_spec("rensa") is None, reason="rensa is not installed")
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


def near(rng: random.Random, words: list[str], changes: int) -> list[str]:
    """The same words but for some."""
    found = list(words)
    for place in rng.sample(range(len(found)), changes):
        found[place] = f"other{rng.randrange(10**6)}"
    return found


@pytest.fixture(scope="module")
def planted() -> list[str]:
    """Texts of 120 words, with near copies of Jaccard .4 to .95 and copies of copies; exact copies and short texts."""
    rng, found = random.Random(5), list[str]()
    for number in range(60):
        words = [f"w{rng.randrange(5000)}" for _ in range(120)]
        chain = [words]
        for _ in range(number % 4):
            chain.append(near(rng, chain[-1], rng.choice((1, 2, 3, 6))))
        found += [" ".join(one) for one in chain]
        if number % 10 == 0:
            found += [" ".join(words), " ".join(words).upper()]
    found += ["two words", "Two  words", "three words here"]
    rng.shuffle(found)
    return found


def kept_by_force(texts: list[str], similarity: float, old: Sequence[str] = ()) -> list[str]:
    """All pairs, in the order of the hash; what is old is there already."""
    words = [text.lower().split() for text in (*old, *texts)]
    sets = [{tuple(one[at : at + 5]) for at in range(max(1, len(one) - 4))} for one in words]
    stays = list(range(len(old)))
    for at in sorted(range(len(texts)), key=lambda at: xxhash.xxh3_128_digest(texts[at].encode())):
        mine = sets[len(old) + at]
        if not any(len(mine & sets[one]) >= similarity * len(mine | sets[one]) for one in stays):
            stays.append(len(old) + at)
    return sorted(texts[at - len(old)] for at in stays[len(old) :])


@needs_rensa
def test_near_copies_go_exactly_as_by_comparing_all_pairs(
    planted: list[str], prepare: Make, texts: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, kept = write(tmp_path / "data.jsonl", planted), {}
    for similarity in (0.8, 0.9, 0.6):
        caplog.clear()
        caplog.clear()  # another test may have set the level before
        with caplog.at_level("INFO"):
            kept[similarity] = sorted(
                texts(prepare(path, dedup="minhash", dedup_similarity=similarity, shard_bytes=10_000))
            )
        assert kept[similarity] == kept_by_force(planted, similarity)
        assert any("Reading candidates" in line for line in caplog.messages) == (similarity != 0.9)
    assert len({len(one) for one in kept.values()}) == 3


@needs_rensa
def test_the_same_near_copies_go_for_any_order_and_workers_and_from_old_to_new(
    planted: list[str], prepare: Make, texts: Any, tmp_path: Path
) -> None:
    kept = []
    for turn, num_proc in ((0, 0), (50, 2)):
        folder = tmp_path / str(turn)
        folder.mkdir()
        turned = planted[turn:] + planted[:turn]
        for part in range(3):
            write(folder / f"{part}.jsonl", turned[part::3])
        kept.append(sorted(texts(prepare(str(folder), dedup="minhash", shard_bytes=9000, num_proc=num_proc))))
    assert kept[0] == kept[1]
    old, new = write(tmp_path / "old.jsonl", planted[:60]), write(tmp_path / "new.jsonl", planted[60:])
    entries = [{"path": old, "priority": 1, "name": "old"}, {"path": new, "name": "new"}]
    alone = sorted(texts(prepare(entries[0], dedup="minhash")))
    both = prepare(*entries, dedup="minhash")
    assert both.content["quality"]["sources"]["old"]["kept"] == len(alone)
    assert {*alone} <= {*texts(both)}


@needs_rensa
def test_a_bucket_of_many_documents_is_settled_by_those_that_stay(prepare: Make, texts: Any, tmp_path: Path) -> None:
    rng = random.Random(2)
    words = [f"w{number}" for number in range(300)]
    letters = [" ".join(near(rng, words, 1)) for _ in range(80)]
    first = min(letters, key=lambda text: xxhash.xxh3_128_digest(text.encode()))
    last = max(letters, key=lambda text: xxhash.xxh3_128_digest(text.encode()))
    many = write(tmp_path / "many.jsonl", letters)
    assert texts(prepare(many, dedup="minhash")) == [first]
    one = write(tmp_path / "one.jsonl", [last])
    entries = [{"path": many, "name": "many"}, {"path": one, "name": "one", "priority": 1}]
    assert texts(prepare(*entries, dedup="minhash")) == [last]
    # What a bucket is sorted by first may all be dropped: the others are still compared with one another.
    ordered = sorted(letters, key=lambda text: xxhash.xxh3_128_digest(text.encode()))
    short = [" ".join(text.split()[:-1]) for text in ordered[:HEADS]]
    mixed = write(tmp_path / "mixed.jsonl", short + letters[HEADS:])
    left = texts(prepare(mixed, dedup="minhash", min_chars=max(map(len, short)) + 1))
    assert len(left) == 1


@needs_rensa
def test_files_that_share_a_licence_header_and_little_else_all_stay(prepare: Make, texts: Any, tmp_path: Path) -> None:
    header = " ".join(f"licence{number}" for number in range(100))
    files = [header + " " + " ".join(f"def f{n}_{line} ( ) :" for line in range(4)) for n in range(40)]
    prepared = prepare(write(tmp_path / "code.jsonl", files), dedup="minhash")
    copies = json.loads((prepared.path / "quality.json").read_bytes())["copies"]
    assert copies["compared_pairs"] > 0  # they look alike, and their texts decide
    assert sorted(texts(prepared)) == sorted(files)


@needs_rensa
def test_near_copies_never_stand_on_both_sides_of_the_split(
    planted: list[str], prepare: Make, texts: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "data.jsonl", planted)
    whole = sorted(texts(prepare(path, dedup="minhash")))
    sides = [texts(prepare(path, dedup="minhash", eval_ratio=0.4, held_out=held_out)) for held_out in (False, True)]
    assert sorted(sides[0] + sides[1]) == whole
    assert min(map(len, sides)) > 5
    assert kept_by_force(whole, 0.8) == whole  # no two of either side are similar


@needs_rensa
def test_a_file_added_whose_copies_hit_what_is_there_packs_only_what_changes(
    planted: list[str], prepare: Make, texts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for part in range(4):
        write(folder / f"{part}.jsonl", planted[part * 30 : part * 30 + 30])
    wait_until_stamps_prove(folder)
    how = {"dedup": "minhash", "shard_bytes": 12_000}
    first = prepare(str(folder), **how)
    measured: list[int] = []
    measure = MinHash.measure

    def counting(self: MinHash, batch: pa.RecordBatch) -> dict[str, Any]:
        measured.append(batch.num_rows)
        return measure(self, batch)

    monkeypatch.setattr(MinHash, "measure", counting)
    write(folder / "4.jsonl", planted[120:])
    second = prepare(str(folder), **how)
    assert sum(measured) == len(planted[120:])
    keys = [{shard["shard_key"] for shard in one.content["shards"]} for one in (first, second)]
    gone = sorted(shard["shard_key"] for shard in first.content["shards"] if shard["shard_key"] not in keys[1])
    assert len(gone) < len(keys[0])  # those stay as they are that lose nothing to the new file
    assert sorted(texts(second)) == sorted(texts(prepare(str(folder), **how, cache_dir=str(tmp_path / "all at once"))))


@pytest.mark.parametrize("dedup", ["exact", pytest.param("minhash", marks=needs_rensa)])
def test_what_is_a_copy_of_a_prepared_directory_goes_and_its_own_documents_stay(
    dedup: str, prepare: Make, texts: Any, tmp_path: Path, planted: list[str]
) -> None:
    old, new = write(tmp_path / "old.jsonl", planted[:70]), write(tmp_path / "new.jsonl", planted[50:])
    before = prepare(old, dedup=dedup)
    (tmp_path / "old.jsonl").unlink()  # its raw data may be gone
    held = {*texts(before)}
    prepared = prepare(new, dedup=dedup, dedup_against=str(before.path), cache_dir=str(tmp_path / "other"))
    kept = texts(prepared)
    assert held.isdisjoint(kept)
    if dedup == "exact":
        assert sorted(kept) == sorted({*planted[50:]} - held)
    else:
        by_force = kept_by_force(planted[50:], 0.8, sorted(held))
        assert len({*kept} ^ {*by_force}) <= 2  # of old texts the signatures decide, which estimate
        assert len(kept) < len({*planted[50:]} - held)
    with pa.memory_map(str(prepared.path / "verdicts-00000.arrow")) as file:
        rows = pa.ipc.open_file(file).read_all().to_pylist()
    assert {row["against"] for row in rows} >= {None, True}
    again = prepare(new, dedup=dedup, dedup_against=str(prepared.path), cache_dir=str(tmp_path / "other"))
    assert again.path != prepared.path


def test_a_directory_without_what_is_needed_cannot_be_told_against(prepare: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [ONE.format(n) for n in range(20)])
    plain = prepare(path)
    with pytest.raises(ConfigError, match=r"its documents have no document_hash .*prepare it again, with the same"):
        prepare(path, dedup="exact", dedup_against=str(plain.path))
    with pytest.raises(DamagedError):
        prepare(path, dedup="exact", dedup_against=str(tmp_path))


@needs_rensa
def test_the_report_shows_clusters_and_pairs_with_what_differs(
    planted: list[str], prepare: Make, tmp_path: Path
) -> None:
    prepared = prepare(write(tmp_path / "data.jsonl", planted), dedup="minhash")
    copies = json.loads((prepared.path / "quality.json").read_bytes())["copies"]
    source = prepared.content["quality"]["sources"]["data.jsonl"]
    assert copies["same"] + copies["near"] == source["duplicates"] > 0
    assert sum(copies["similarities"]["pairs"]) == copies["compared_pairs"]
    assert sum(copies["clusters"].values()) <= source["duplicates"]
    page = (prepared.path / "quality.html").read_text()
    assert re.search(r"<del>[^<]*w\d+</del><ins>[^<]*other\d+</ins>|<del>[^<]*other\d+</del><ins>[^<]*w\d+</ins>", page)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="max_dropped is set, and neither quality nor dedup is"):
        DataConfig(max_dropped=0.5)
    with pytest.raises(ConfigError, match="dedup_against is set and dedup is not"):
        DataConfig(dedup_against="outputs/old")
    with pytest.raises(ConfigError, match=r"dedup_similarity = 0.4: must lie between 0.5 and 1"):
        DataConfig(dedup="minhash", dedup_similarity=0.4)
    with pytest.raises(ConfigError, match=r"dedup_similarity = 0.9 with dedup = exact: is for --dedup minhash"):
        DataConfig(dedup="exact", dedup_similarity=0.9)
