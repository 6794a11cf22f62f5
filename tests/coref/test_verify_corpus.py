"""`verify`, `repair` and `gc` over an entity-coref corpus: what `moai entity-coref` publishes, found damaged, named,
and made again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from collecting import age
from collecting import gc as collected
from coref_corpus import contents, news, wordpiece
from hypothesis import given, settings
from hypothesis import strategies as st

from moai import coref as entity_coref
from moai.core.errors import DamagedError
from moai.core.files import digest_file
from moai.coref.options import CorefConfig
from moai.prepared.manifest import MANIFEST, Prepared, read_manifest, write_manifest
from moai.prepared.verify import verify
from moai.pretraining.repair import repair

RunIt = Callable[..., "subprocess.CompletedProcess[str]"]

OPTIONS: dict[str, Any] = {
    "seq_len": 512,
    "shard_bytes": 6000,
    "token_chunk_size": 60,
    "max_entity_freq": 9,
    "max_bad_ratio": 1.0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a file with one record that is none, a model)"""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"id": f"doc-{seed}", "text": news(seed)}, ensure_ascii=False) for seed in range(16)]
    (folder / "news.jsonl").write_text("\n".join([*lines, '{"text": broken']) + "\n")
    return folder / "news.jsonl", wordpiece(folder / "wp")


@pytest.fixture(scope="module")
def original(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(data, tmp_path_factory.mktemp("original"))


@pytest.fixture
def corpus(original: Path, tmp_path: Path) -> Path:
    """A corpus beside its cache, with the links between them."""
    subprocess.run(["cp", "-a", original.parent, tmp_path / "out"], check=True)
    return tmp_path / "out" / original.name


def made(data: tuple[Path, Path], output: Path, **changes: Any) -> Path:
    config = CorefConfig(
        input=(str(data[0]),), model=str(data[1]), output_dir=str(output), num_workers=0, **{**OPTIONS, **changes}
    )
    return entity_coref.prepare(config, origins={"num_workers": "flag"})


def failed(corpus: Path, *, full: bool = True) -> dict[str, str]:
    return {check.name: check.detail for check in verify(corpus, full=full) if not check.ok}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    with open(path, "r+b") as file:  # in place: the finished shard is the same file
        file.write(data)


def resealed(corpus: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another manifest that holds: what only a program that counts wrongly would write."""
    manifest = read_manifest(corpus, None)
    change(manifest["content"])
    (corpus / MANIFEST).unlink()
    write_manifest(corpus, manifest["content"], manifest["run"])


def test_a_whole_corpus_passes_and_the_command_says_what_it_looked_at(corpus: Path, run_moai: RunIt) -> None:
    quick, full = run_moai("verify", corpus), run_moai("verify", corpus, "--full")
    assert (quick.returncode, full.returncode) == (0, 0), full.stdout
    assert quick.stdout.splitlines()[-1] == "all 6 checks passed; --full hashes every byte"
    assert full.stdout.splitlines()[-1] == "all 10 checks passed"
    assert "quarantine.jsonl" in contents(corpus)
    assert "17 documents read, every step adds up to" in full.stdout
    assert "[MASK]" in next(line for line in full.stdout.splitlines() if "sample: " in line)


@settings(max_examples=40)
@given(data=st.data())
def test_any_flipped_bit_of_any_file_is_found(original: Path, data: st.DataObject) -> None:
    """metadata.json too, which the manifest does not list."""
    path = data.draw(st.sampled_from(sorted(path for path in original.rglob("*") if path.is_file())))
    bit = data.draw(st.integers(0, path.stat().st_size * 8 - 1))
    flip(path, bit)
    try:
        assert failed(original), f"{path.name}: bit {bit}"
    finally:
        flip(path, bit)


def test_what_is_cut_absent_or_added_is_found_by_a_quick_look(corpus: Path) -> None:
    (corpus / "extra").touch()
    assert failed(corpus, full=False) == {"files": "unknown files ['extra']"}
    (corpus / "extra").unlink()
    said = json.loads((corpus / "metadata.json").read_bytes())
    (corpus / "metadata.json").unlink()
    assert failed(corpus, full=False) == {"metadata": "metadata.json is not readable (FileNotFoundError)"}
    (corpus / "metadata.json").write_text(
        json.dumps(said)
    )  # in another spelling: of some numbers a bit may change without changing what JSON reads
    assert failed(corpus, full=False) == {"metadata": "metadata.json says something else than the manifest"}
    os.truncate(sorted(corpus.glob("*/data-*"))[-1], 100)
    assert list(failed(corpus, full=False)) == ["manifest and sizes"]


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("conservation", lambda content: content["funnel"][2].__setitem__(1, 1)),
        ("conservation", lambda content: content["mentions"][-1].__setitem__(1, 1)),
        ("split", lambda content: content.update(split={"train": content["rows"], "validation": 0})),
        ("figures", lambda content: content["length_stats"].update(max=1)),
        ("samples", lambda content: content.update(seq_len=20)),
        ("samples", lambda content: content["tokenizer"].update(mask_id=7)),
        ("metadata", lambda content: content["entities"].update(unique=1)),
    ],
)
def test_counters_that_do_not_fit_the_samples_are_found(
    corpus: Path, check: str, change: Callable[[dict[str, Any]], None]
) -> None:
    resealed(corpus, change)
    assert check in failed(corpus)


def test_a_label_without_its_mask_is_found(corpus: Path) -> None:
    """Though every hash is right."""
    [first, *_] = sorted(corpus.glob("*/data-*"))
    with pa.memory_map(str(first)) as file:
        reader = pa.ipc.open_stream(file)
        schema, rows = reader.schema, [row for batch in reader for row in batch.to_pylist()]
    at = next(index for index, label in enumerate(rows[3]["labels"]) if label != -100)
    rows[3]["input_ids"][at] = rows[3]["labels"][at]
    first.unlink()
    with pa.OSFile(str(first), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
    resealed(
        corpus, lambda content: content["shards"][0].update(bytes=first.stat().st_size, xxh3_128=digest_file(first))
    )
    assert failed(corpus)["samples"] == "1 samples whose masks, labels or places do not fit one another"


def test_repair_names_what_is_damaged_and_the_command_which_makes_the_same_bytes(
    corpus: Path, data: tuple[Path, Path], run_moai: RunIt
) -> None:
    assert list(repair(corpus)) == [f"nothing to repair: every file of {corpus} has its recorded hash"]
    whole = contents(corpus)
    damaged = sorted(corpus.glob("*/data-*"))[1]
    flip(damaged, damaged.stat().st_size * 4)
    (corpus / "metadata.json").write_text("{}")
    ended = run_moai("repair", corpus)
    assert ended.returncode == DamagedError.exit_code
    assert f"damaged or missing: {damaged.parent.name}/{damaged.name}, metadata.json" in ended.stderr
    assert str(data[0]) in ended.stderr
    command = ended.stderr.rpartition("finished work is reused: ")[2]
    corpus.rename(corpus.with_name("damaged"))
    words = [
        *shlex.split(command)[3:],
        "--input",
        data[0],
        "--model",
        data[1],
        "--num-workers",
        "0",
        "--max-bad-ratio",
        "1",
    ]
    again = run_moai(*words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == str(corpus)
    assert "샤드: 1개 새로 만듦" in again.stderr  # the damaged one was the same file in the cache
    assert contents(corpus) == whole
    assert failed(corpus) == {}


def test_flags_of_every_kind_come_back_in_that_command(corpus: Path) -> None:
    resealed(
        corpus,
        lambda content: content["config"].update(
            pronoun_filter=False, entity_tags=["NNP", "NNG"], mask_token="[M A]", mode="single"
        ),
    )
    (corpus / "train" / "state.json").unlink()
    with pytest.raises(
        DamagedError,
        match=r"--mask-token '\[M A\]' --seq-len 512 --mode single .*--pronoun-filter false --entity-tags NNP NNG",
    ):
        list(repair(corpus))


def test_what_wants_prepared_data_says_what_it_got_instead(
    corpus: Path, run_moai: RunIt, tokenizer_dir: Path, data: tuple[Path, Path]
) -> None:
    with pytest.raises(
        DamagedError,
        match="was made by python -m moai entity-coref; what is needed here is made by python -m moai prepare",
    ):
        Prepared.open(corpus)
    flags = ["--dataset", data[0], "--tokenizer_path", tokenizer_dir, "--cache_dir", corpus.parent / "cache"]
    for words in (("inspect", corpus), ("explain", *flags, "--against", corpus)):
        ended = run_moai(*words)
        assert ended.returncode == DamagedError.exit_code
        assert "was made by python -m moai entity-coref" in ended.stderr


def test_gc_leaves_what_a_corpus_links_and_takes_candidates_by_age(corpus: Path, data: tuple[Path, Path]) -> None:
    cache = corpus.parent / "cache_entity_coref"
    manifest = read_manifest(corpus, None)
    linked = {shard["shard_key"] for shard in manifest["content"]["shards"]}
    collected(cache, older_than=7)
    assert {path.stem for path in (cache / "shards").glob("*.arrow")} > linked
    age(cache / "shards", 8)
    collected(cache, older_than=7)
    assert {path.stem for path in (cache / "shards").glob("*.arrow")} == linked
    assert failed(corpus) == {}
    assert made(data, corpus.parent) == corpus
    shutil.rmtree(corpus)
    assert failed(made(data, corpus.parent)) == {}  # Kiwi works again, the samples are found
    assert read_manifest(corpus, None)["content"] == manifest["content"]
