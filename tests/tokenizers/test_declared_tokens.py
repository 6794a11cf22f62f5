"""What the files beside tokenizer.json say, and what a text says that has it already: heard, or refused with the way
out; and a tokenizer that fails on a text.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moai.core.errors import TokenizerError, TooManyBadRecords
from moai.prepared.manifest import Prepared
from moai.tokenizers.backends import Reference
from moai.tokenizers.convert import convert
from moai.tokenizers.load import load_tokenizer

PrepareIt = Callable[..., Prepared]
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
SEP = {"content": "<|sep|>", **FLAGS}
DECLARED: dict[str, dict[str, Any]] = {
    "added_tokens.json and a list": {
        ADDED: {"<|sep|>": 8192, "<|turn|>": 8193},
        CONFIG: {"additional_special_tokens": ["<|sep|>", "<|turn|>"]},
    },
    "added_tokens.json alone": {ADDED: {"<|sep|>": 8192}},
    "special_tokens_map.json": {MAP: {"additional_special_tokens": ["<|sep|>", "<|turn|>"]}},
    "extra_special_tokens, a list": {CONFIG: {"extra_special_tokens": ["<|sep|>"]}},
    "extra_special_tokens, by name": {CONFIG: {"extra_special_tokens": {"image_token": "<|sep|>"}}},
    "a token of the model's own": {CONFIG: {"image_token": "<|sep|>"}},
    "added_tokens_decoder": {CONFIG: {"added_tokens_decoder": {"8192": SEP}}},
    "a named token": {CONFIG: {"pad_token": "<|sep|>"}},
    "a word of the vocabulary": {CONFIG: {"bos_token": "y"}},
    "other flags": {
        CONFIG: {"added_tokens_decoder": {"4": {**SEP, "content": "<|endoftext|>", "lstrip": True, "rstrip": True}}}
    },
}
TEXT = "x<|sep|>y <|turn|> z <|endoftext|> y"


@pytest.fixture
def own(tokenizer_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer_dir, tmp_path / "tokenizer"))


def declare(folder: Path, files: dict[str, Any]) -> None:
    for name, said in files.items():
        before = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**before, **said}))


def encode(folder: Path, *texts: str) -> list[list[int]]:
    ids, offsets = Reference(spec=load_tokenizer(str(folder))).encode_batch(texts)
    return [ids[start:end].tolist() for start, end in itertools.pairwise(offsets)]


@pytest.mark.parametrize("name", DECLARED)
def test_tokens_declared_beside_tokenizer_json_are_refused_and_the_way_out_gives_transformers_ids(
    own: Path, tmp_path: Path, name: str
) -> None:
    from transformers import AutoTokenizer

    plain = encode(own, TEXT)
    declare(own, DECLARED[name])
    theirs = AutoTokenizer.from_pretrained(str(own))([TEXT], add_special_tokens=False)["input_ids"]
    assert theirs != plain, "not vacuous: what is declared changes ids"
    way_out = rf"are not so in tokenizer\.json .*--convert {own} --output_dir NEW_DIR"
    with pytest.raises(TokenizerError, match=way_out) as refused:
        load_tokenizer(str(own))
    assert "\n" not in str(refused.value)
    convert(own, tmp_path / "new")
    assert encode(tmp_path / "new", TEXT) == theirs
    with pytest.raises(TokenizerError, match="is fast already"):
        convert(tmp_path / "new", tmp_path / "newer")


def test_what_tokenizer_json_has_may_be_declared_as_often_as_one_likes(own: Path) -> None:
    """And what transformers 5 does not read beside `added_tokens_decoder`, moai does not ask for."""
    plain = encode(own, TEXT)
    special = {"4": {**SEP, "content": "<|endoftext|>"}}
    said = {"added_tokens_decoder": special, "additional_special_tokens": ["<|endoftext|>", "<s>"], "hf_token": None}
    declare(own, {CONFIG: said, ADDED: {"<|old|>": 9000}, MAP: {"eos_token": {**SEP, "content": "<|older|>"}}})
    assert encode(own, TEXT) == plain


def bos_template(folder: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(value))


@pytest.mark.parametrize("asks", [bos_template, lambda folder: declare(folder, {CONFIG: {"add_bos_token": True}})])
def test_a_tokenizer_that_asks_for_bos_is_heard(
    own: Path, tmp_path: Path, prepare: PrepareIt, caplog: pytest.LogCaptureFixture, asks: Callable[[Path], None]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')

    def said(**flags: Any) -> list[str]:
        caplog.clear()
        prepare(tmp_path / "a.jsonl", tokenizer_path=str(own), **flags)
        return [line for line in caplog.messages if "puts <s> before a text" in line]

    assert said() == []
    asks(own)
    assert len(said()) == 1
    assert "--add_bos" in said()[0]
    assert said(add_bos=True) == []


def test_ends_that_a_text_has_already_are_counted_and_said(
    tmp_path: Path, prepare: PrepareIt, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["ends.<|endoftext|>", "<s>begins", "<s>both<|endoftext|>", "in <s> the <|endoftext|> middle", "none"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for add_bos, expected in ((False, {"eos_twice": 2}), (True, {"eos_twice": 2, "bos_twice": 2})):
        for _ in range(2):  # prepared, and found prepared
            caplog.clear()
            counts = prepare(tmp_path / "a.jsonl", add_bos=add_bos).content["token_counts"]
            said = [line for line in caplog.messages if "have it twice now" in line]
            assert len(said) == len(expected)
            assert "2 of 5 documents end with the EOS token already" in said[-1]
        assert {name: number for name, number in counts.items() if "twice" in name} == expected
        assert counts["text"] + counts["eos"] + counts.get("bos", 0) == counts["rows"]


def gives_up(folder: Path, pattern: str = r"(?:(?:a|a)+b)|.") -> None:
    """A pre-tokenizer whose pattern Onig gives up on in a long run of a's: the library panics."""
    value = json.loads((folder / "tokenizer.json").read_text())
    value["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
    (folder / "tokenizer.json").write_text(json.dumps(value))


@pytest.mark.parametrize(("data_format", "num_proc"), [("text", 0), ("text", 1), ("chat", 0)])
def test_a_text_that_the_tokenizer_fails_on_is_left_out_and_said(
    own: Path, tmp_path: Path, prepare: PrepareIt, caplog: pytest.LogCaptureFixture, num_proc: int, data_format: str
) -> None:
    gives_up(own)
    texts = ["one", "a" * 200, "two", "three"]
    records: list[Any] = [{"text": text} for text in texts]
    if data_format == "chat":
        ask = {"role": "user", "content": "q"}
        records = [{"messages": [ask, {"role": "assistant", "content": text}]} for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    template = Path(__file__).parents[2] / "configs" / "chat_template_demo.jinja"
    how: dict[str, Any] = {"chat_template": str(template)} if data_format == "chat" else {}
    prepared = prepare(tmp_path / "a.jsonl", tokenizer_path=str(own), num_proc=num_proc, data_format=data_format, **how)
    reason = "chat.tokenizer_refused" if data_format == "chat" else "tokenizer.refused"
    assert prepared.content["records"] == {"read": 4, "kept": 3, "filtered": 1, "quarantined": 0}
    assert prepared.content["filtered"] == {reason: 1}
    assert [line for line in caplog.messages if "1 documents are left out: the tokenizer fails on them" in line]
    if not num_proc:
        (tmp_path / "b.jsonl").write_text("".join(json.dumps(records[1]) + "\n" for _ in range(11)))
        with pytest.raises(TooManyBadRecords, match=r"12 of 15 documents, more than --max_bad_ratio 0\.001 allows"):
            prepare(tmp_path / "[ab].jsonl", tokenizer_path=str(own), num_proc=0, data_format=data_format, **how)
