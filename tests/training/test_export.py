"""Megatron's indexed dataset, read back by its own reader's rules: every document whole, in order, with its end."""

from __future__ import annotations

import json
import os
import signal
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from moai.cli import main
from moai.core.errors import DamagedError, StorageError
from moai.prepared.export import to_megatron
from moai.transforms.pack import unpack

DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}


def read_megatron(prefix: Path) -> tuple[list[list[int]], np.dtype[Any]]:
    """The documents, as Megatron's IndexedDataset finds them: by the tables of the index alone, to the last byte."""
    index, tokens = (prefix.with_name(prefix.name + suffix).read_bytes() for suffix in (".idx", ".bin"))
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, entries = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    dtype, at = np.dtype(DTYPES[code]), 34
    tables = []
    for kind, count in (("<i4", sequences), ("<i8", sequences), ("<i8", entries)):
        tables.append(np.frombuffer(index, kind, count, at))
        at += tables[-1].nbytes
    assert at == len(index)
    lengths, pointers, document_indices = tables
    assert document_indices[0] == 0
    assert document_indices[-1] == len(lengths)
    assert pointers[-1] + lengths[-1] * dtype.itemsize == len(tokens)
    places = zip(lengths.tolist(), pointers.tolist())
    sequences = [np.frombuffer(tokens, dtype, length, pointer) for length, pointer in places]
    bounds = zip(document_indices.tolist(), document_indices[1:].tolist())
    return [np.concatenate(sequences[first:last]).tolist() for first, last in bounds], dtype


def rows_of(prepared: Any) -> list[list[int]]:
    from datasets import load_from_disk

    return load_from_disk(str(prepared.path))["input_ids"][:]


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Three sources: documents below and over the row of 64, one whose every document is too short, and again some."""
    rng = np.random.default_rng(3)
    made = []
    for name, words in (("a", rng.integers(8, 220, 40)), ("empty", np.ones(30, int)), ("b", rng.integers(8, 220, 40))):
        path = tmp_path / f"{name}.jsonl"
        texts = [" ".join(f"{name}{int(number)}" for number in rng.integers(0, 1000, count)) for count in words]
        path.write_text("".join(json.dumps({"text": text, "id": place}) + "\n" for place, text in enumerate(texts)))
        made.append(path)
    return made


SMALL = {"min_chars": 20, "shard_bytes": 5000}


WHOLE = {
    "wrapped": {"packing": "wrapped"},
    "bfd_split": {"packing": "bfd_split"},
    "none, split": {"packing": "none", "long_documents": "split"},
    "none": {"packing": "none", "seq_len": 4096},
}


@pytest.mark.parametrize("packing", WHOLE)
def test_megatron_reads_the_documents_whole_and_in_order(packing, corpus, prepare, tmp_path, capsys):
    prepared = prepare(*corpus, **{"seq_len": 64, **SMALL, **WHOLE[packing]})
    shards = prepared.content["shards"]
    assert sum(shard["rows"] > 0 for shard in shards) > 4
    assert any(shard["file"] is None for shard in shards)
    expected = rows_of(prepare(*corpus, packing="none", seq_len=4096, **SMALL))
    assert len(expected) == 80
    assert max(map(len, expected)) > 3 * 64
    assert main(["export", str(prepared.path), "--to", "megatron", str(tmp_path / "out")]) == 0
    found, dtype = read_megatron(tmp_path / "out")
    assert found == expected
    assert dtype == np.uint16
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out.bin", "out.idx"]
    *said, last = capsys.readouterr().out.splitlines()
    assert last == str(tmp_path / "out")
    tokens, eos = sum(map(len, expected)), prepared.content["tokenizer"]["eos_id"]
    assert said == [f"exported     80 documents, {tokens:,} tokens of uint16, EOS is {eos}"]
    assert {document[-1] for document in found} == {eos}


def test_truncated_documents_are_in_order_and_the_loss_is_said(corpus, prepare, tmp_path):
    prepared = prepare(*corpus, packing="bfd", seq_len=64, **SMALL)
    whole = rows_of(prepare(*corpus, packing="none", seq_len=4096, **SMALL))
    lost = sum(max(0, len(document) - 64) for document in whole)
    assert lost > 1000
    said = list(to_megatron(prepared.path, tmp_path / "out"))
    assert read_megatron(tmp_path / "out")[0] == [document[:64] for document in whole]
    assert said[0].startswith(f"cut short    {lost:,} tokens are absent: packing bfd dropped")


def test_ids_over_two_bytes_become_int32(prepare, tokenizer_dir, tmp_path):
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(f"<word{number}>") for number in range(60_000)])
    (tmp_path / "big").mkdir()
    tokenizer.save(str(tmp_path / "big" / "tokenizer.json"))
    (tmp_path / "big" / "tokenizer_config.json").write_bytes((tokenizer_dir / "tokenizer_config.json").read_bytes())
    (tmp_path / "few.jsonl").write_text('{"text": "one <word59999> two"}\n{"text": "three <word7>"}\n')
    prepared = prepare(tmp_path / "few.jsonl", tokenizer_path=str(tmp_path / "big"), packing="bfd_split", seq_len=16)
    list(to_megatron(prepared.path, tmp_path / "out"))
    found, dtype = read_megatron(tmp_path / "out")
    assert dtype == np.int32
    assert [tokenizer.decode(document[:-1]) for document in found] == ["one <word59999> two", "three <word7>"]
    assert max(found[0]) > 65_535


def test_an_existing_file_is_never_overwritten(corpus, prepare, tmp_path, capsys):
    prepared = prepare(*corpus, packing="wrapped", seq_len=64)
    (tmp_path / "out.idx").write_text("mine")
    assert main(["export", str(prepared.path), "--to", "megatron", str(tmp_path / "out")]) == 74
    assert f"{tmp_path / 'out.idx'}: is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*out*")] == ["out.idx"]
    assert (tmp_path / "out.idx").read_text() == "mine"


def test_a_file_that_appears_meanwhile_stays_and_nothing_else_does(corpus, prepare, tmp_path, monkeypatch):
    prepared = prepare(*corpus, packing="wrapped", seq_len=64)
    link = os.link

    def rival_first(source, target):
        if target.suffix == ".idx":
            target.write_text("a rival's")
        link(source, target)

    monkeypatch.setattr(os, "link", rival_first)
    with pytest.raises(StorageError, match=r"out\.idx: is there already"):
        list(to_megatron(prepared.path, tmp_path / "out"))
    assert [path.name for path in tmp_path.glob("*out*")] == ["out.idx"]
    assert (tmp_path / "out.idx").read_text() == "a rival's"


def test_a_stopped_export_leaves_nothing(corpus, prepare, tmp_path, monkeypatch, capsys):
    prepared = prepare(*corpus, packing="wrapped", seq_len=64, **SMALL)
    seen = []

    def stopped_at_the_third(*given):
        seen.append(sorted(path.suffix for path in tmp_path.glob(".out*")))
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return unpack(*given)

    monkeypatch.setattr("moai.prepared.export.unpack", stopped_at_the_third)
    assert main(["export", str(prepared.path), "--to", "megatron", str(tmp_path / "out")]) == 143
    assert seen == [[".tmp", ".tmp"]] * 3
    assert list(tmp_path.glob("*out*")) == []
    assert "stopped by SIGTERM; nothing was exported, run again" in capsys.readouterr().err


def test_a_place_that_is_not_there_is_one_line(corpus, prepare, tmp_path):
    prepared = prepare(*corpus, packing="wrapped", seq_len=64)
    with pytest.raises(StorageError, match=r"none/out: No such file or directory; name a place that is there"):
        list(to_megatron(prepared.path, tmp_path / "none" / "out"))


def test_conversations_are_refused_because_their_masks_would_be_lost(prepare, tmp_path, capsys):
    root = Path(__file__).parents[2]
    template = str(root / "configs" / "chat_template_demo.jinja")
    prepared = prepare(root / "data" / "demo_chat.jsonl", data_format="chat", chat_template=template)
    assert main(["export", str(prepared.path), "--to", "megatron", str(tmp_path / "out")]) == 2
    assert "holds conversations, and Megatron's files have no place for which tokens" in capsys.readouterr().err
    assert list(tmp_path.glob("*out*")) == []


def test_a_changed_bit_is_found_before_anything_is_named(corpus, prepare, tmp_path):
    prepared = prepare(*corpus, packing="wrapped", seq_len=64)
    shard = sorted(prepared.path.glob("data-*.arrow"))[-1]
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.unlink()  # a link to the cache's
    shard.write_bytes(damaged)
    with pytest.raises(DamagedError, match=rf"{shard.name}: its bytes are not those .* python -m moai repair"):
        list(to_megatron(prepared.path, tmp_path / "out"))
    assert list(tmp_path.glob("*out*")) == []
