"""The tokenizer: a fast one or a refusal with the remedy; EOS and BOS where they belong; nothing truncated, padded,
drawn by lot.
"""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moai.core.errors import SlowTokenizerError, TokenizerError
from moai.prepared.manifest import Prepared
from moai.tokenizers.backends import Reference, _loaded
from moai.tokenizers.load import load_tokenizer
from moai.transforms.tokenize import add_ends

PrepareIt = Callable[..., Prepared]


@pytest.fixture
def own(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A copy of the shipped tokenizer that a test may damage."""
    return Path(shutil.copytree(tokenizer_dir, tmp_path / "tokenizer"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object], file: str = "tokenizer.json") -> None:
    value = json.loads((folder / file).read_text(encoding="utf-8"))
    change(value)
    (folder / file).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def encode(folder: Path, *texts: str, **options: Any) -> list[list[int]]:
    ids, offsets = Reference(spec=load_tokenizer(str(folder)), **options).encode_batch(texts)
    return [ids[start:end].tolist() for start, end in itertools.pairwise(offsets)]


# ---- refused, with the remedy


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.model", "spiece.model"])
def test_a_slow_tokenizer_is_refused_with_the_command_that_converts_it(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("[UNK]\n")
    with pytest.raises(
        SlowTokenizerError,
        match=rf"no tokenizer\.json, only the slow tokenizer's {file}; convert it: python scripts/train_tokenizer\.py "
        rf"--convert",
    ):
        load_tokenizer(str(tmp_path))


def test_the_command_line_refuses_a_slow_tokenizer_in_one_line(
    tmp_path: Path, run_moai: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n")
    ended = run_moai(
        "prepare", "--dataset", "data/demo", "--tokenizer_path", tmp_path, "--cache_dir", tmp_path / "cache"
    )
    assert ended.returncode == 2
    assert "train_tokenizer.py --convert" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "not readable as a fast tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("[1, 2]"), "not readable as a fast tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe{}"), "not readable as a fast tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b""), "not readable as a fast tokenizer"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "no tokenizer at all; name the directory that holds tokenizer.json",
        ),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "names no eos_token.*set --eos_token"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("not JSON"),
            "names no eos_token.*set --eos_token",
        ),
        (
            lambda folder: edit(folder, lambda v: v.update(eos_token="<absent>"), "tokenizer_config.json"),
            "'<absent>' is not in the vocabulary.*set --eos_token",
        ),
        (
            lambda folder: edit(folder, lambda v: (v["model"].update(vocab={}, merges=[]), v.update(added_tokens=[]))),
            "vocabulary is empty",
        ),
        (
            lambda folder: shutil.rmtree(folder),
            "no such tokenizer directory; make it: python scripts/train_tokenizer.py",
        ),
    ],
    ids=[
        "cut",
        "list",
        "not UTF-8",
        "empty",
        "absent",
        "no config",
        "broken config",
        "EOS not in it",
        "no vocabulary",
        "no directory",
    ],
)
def test_what_cannot_serve_is_refused_and_says_why(own: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(own)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(str(own))


def test_a_file_that_is_no_tokenizer_json_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"\0")
    with pytest.raises(SlowTokenizerError, match=r"not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "spiece.model"))


def test_repository_code_is_never_looked_at(own: Path) -> None:
    """`auto_map` asks other loaders to run code of the repository, or to ask on the terminal whether they may."""
    edit(
        own,
        lambda v: v.update(auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil"),
        "tokenizer_config.json",
    )
    (own / "evil.py").write_text("raise SystemExit('ran')")
    assert load_tokenizer(str(own)).eos_token == "<|endoftext|>"


# ---- EOS and BOS


def test_eos_comes_from_the_configuration_the_map_or_the_flag(own: Path) -> None:
    assert load_tokenizer(str(own)).eos_token == "<|endoftext|>"
    other = next(
        token
        for token in ("<pad>", "!", "a")
        if token in json.loads((own / "tokenizer.json").read_text())["model"]["vocab"]
    )
    assert load_tokenizer(str(own), eos_token=other).eos_token == other
    (own / "tokenizer_config.json").write_text("{}")
    (own / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    assert load_tokenizer(str(own)).eos_token == "<|endoftext|>"
    with pytest.raises(TokenizerError, match="--add_bos needs a bos_token of the vocabulary, found None"):
        load_tokenizer(str(own), need_bos=True)


def test_every_document_begins_with_bos_if_wanted_and_ends_with_eos(
    own: Path, tmp_path: Path, prepare: PrepareIt, tokenizer_dir: Path
) -> None:
    spec = load_tokenizer(str(own), need_bos=True)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one"}\n{"text": "two words"}\n')
    with_bos = prepare(data, tokenizer_path=str(own), add_bos=True)
    counts = with_bos.content["token_counts"]
    assert (counts["bos"], counts["eos"]) == (2, 2)
    import datasets

    rows = datasets.load_from_disk(str(with_bos.path))["input_ids"]
    assert [row[0] for row in rows] == [spec.bos_id] * 2
    assert [row[-1] for row in rows] == [spec.eos_id] * 2
    without = prepare(data, tokenizer_path=str(own))
    assert without.content["token_counts"].get("bos", 0) == 0
    assert without.path != with_bos.path


@pytest.mark.parametrize("bos", [None, 8])
def test_ends_stand_around_every_document_and_nowhere_else(bos: int | None) -> None:
    documents = [[1, 2, 3], [], [4]]
    offsets = np.array([0, 3, 3, 4])
    ids, grown = add_ends(np.array([1, 2, 3, 4], np.uint32), offsets, bos, 9)
    start = [] if bos is None else [bos]
    expected = [start + document + [9] for document in documents]
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(grown)] == expected
    assert ids.dtype == np.uint32
    none, zero = add_ends(np.empty(0, np.uint32), np.zeros(1, np.int64), bos, 9)
    assert (none.tolist(), zero.tolist()) == ([], [0])


# ---- special tokens in text


def test_special_tokens_in_text_are_read_as_such_and_counted_or_split_on_demand(
    tmp_path: Path, prepare: PrepareIt, tokenizer_dir: Path
) -> None:
    text = "before<|endoftext|>after"
    spec = load_tokenizer(str(tokenizer_dir))
    (as_special,) = encode(tokenizer_dir, text)
    (as_text,) = encode(tokenizer_dir, text, split_special_tokens=True)
    assert as_special.count(spec.eos_id) == 1
    assert spec.eos_id not in as_text
    assert Reference(spec=spec).decode(as_text) == text
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "plain"}) + "\n")
    read, split = prepare(data), prepare(data, split_special_tokens=True)
    assert read.content["token_counts"]["special_in_text"] == 1
    assert split.content["token_counts"].get("special_in_text", 0) == 0
    assert read.path != split.path


# ---- what serves inference or training of models, and would change ids here


def test_truncation_and_padding_of_tokenizer_json_are_switched_off(own: Path, tokenizer_dir: Path) -> None:
    texts = ("a much longer text than five tokens could hold, surely", "b")
    edit(
        own,
        lambda v: v.update(
            truncation={"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
            padding={
                "strategy": {"Fixed": 16},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<pad>",
            },
        ),
    )
    assert encode(own, *texts) == encode(tokenizer_dir, *texts)


def test_no_template_tokens_are_added_but_our_own(own: Path, tokenizer_dir: Path) -> None:
    eos = load_tokenizer(str(own)).eos_id
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [eos], "tokens": ["<|endoftext|>"]}}
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    edit(
        own,
        lambda v: v.update(
            post_processor={"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
        ),
    )
    assert encode(own, "text") == encode(tokenizer_dir, "text")


def test_dropout_of_merges_is_switched_off(own: Path, tokenizer_dir: Path) -> None:
    """BPE dropout in tokenizer.json would give other ids on every run, under one key."""
    edit(own, lambda v: v["model"].update(dropout=0.5))
    text = "The same text gives the same tokens, 같은 글은 같은 토큰이 된다. " * 20
    assert encode(own, text) == encode(own, text) == encode(tokenizer_dir, text)


# ---- identity


def test_ids_and_offsets_are_those_of_the_library(tokenizer_dir: Path) -> None:
    from tokenizers import Tokenizer

    texts = ["", "one", "가나다 라마바", "tab\t\n\0 end", "👩‍👩‍👧‍👦 é e\u0301", "x" * 5000]
    plain = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    assert encode(tokenizer_dir, *texts) == [plain.encode(text, add_special_tokens=False).ids for text in texts]
    backend = Reference(spec=load_tokenizer(str(tokenizer_dir)))
    assert [backend.decode(ids) for ids in encode(tokenizer_dir, *texts)] == texts


def test_a_worker_loads_the_very_bytes_that_were_named(own: Path) -> None:
    backend = Reference(spec=load_tokenizer(str(own)))
    backend.encode_batch(["load it"])
    assert len(pickle.dumps(backend)) < 2000  # what it loaded stays in its process
    copy = pickle.loads(pickle.dumps(backend))
    _loaded.cache_clear()  # as in a worker that comes later
    edit(own, lambda v: v.update(version="1.1"))
    with pytest.raises(TokenizerError, match="changed while it was in use"):
        copy.encode_batch(["text"])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_get_the_narrowest_type_that_holds_them(tokenizer_dir: Path, vocab_size: int, dtype: type) -> None:
    assert replace(load_tokenizer(str(tokenizer_dir)), vocab_size=vocab_size).dtype == dtype


def test_added_tokens_count_for_the_vocabulary(own: Path) -> None:
    before = load_tokenizer(str(own))
    edit(
        own,
        lambda v: v["added_tokens"].append({**v["added_tokens"][0], "id": before.vocab_size, "content": "<|extra|>"}),
    )
    after = load_tokenizer(str(own))
    assert after.vocab_size == before.vocab_size + 1
    assert encode(own, "<|extra|>") == [[before.vocab_size]]
    assert after.digest != before.digest
