"""scripts/train_tokenizer.py: what it learns, that it is exact and the same every time, and what it converts."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from moai.core.errors import TokenizerError, TooManyBadRecords
from moai.tokenizers.convert import convert, sentencepiece_as_fast
from moai.tokenizers.train import SPECIAL_TOKENS, Documents, TokenizerConfig, main, train

REPO = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(REPO / "scripts/train_tokenizer.py")]
BERT_VOCABULARY = REPO.parent / "shared/data/tokenizers/bert_multilingual_cased_vocab.txt"
NEXT = str(REPO / "data/demo_next")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer") / "small"
    subprocess.run(
        [*SCRIPT, "--dataset", NEXT, "--vocab_size", "1000", "--output_dir", str(place)], check=True, cwd="/"
    )
    return place


def test_shipped_tokenizer_is_what_the_command_makes(tmp_path: Path) -> None:
    assert (
        main(["--dataset", str(REPO / "data/demo"), "--vocab_size", "8192", "--output_dir", str(tmp_path / "demo")])
        == 0
    )
    assert files(tmp_path / "demo") == files(REPO / "tokenizers/demo")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:4\n",
            "1 of 2 files hold no data: b.jsonl is a Git LFS",
        ),
        ('{"text": "cut', "nothing could be read of 1 of 2 files: "),
    ],
)
def test_a_file_of_which_nothing_is_read_ends_the_training(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n' * 20)
    (tmp_path / "b.jsonl").write_text(text)
    with pytest.raises(TooManyBadRecords, match=said):
        list(Documents(TokenizerConfig(dataset=(str(tmp_path),), output_dir=str(tmp_path / "out"))))


def test_same_bytes_on_one_thread(small: Path, tmp_path: Path) -> None:
    command = [*SCRIPT, "--dataset", NEXT, "--vocab-size", "1000", "--output-dir", str(tmp_path / "again")]
    subprocess.run(command, check=True, env={**os.environ, "RAYON_NUM_THREADS": "1"})
    assert files(tmp_path / "again") == files(small)


def test_transformers_loads_it_fast_with_its_special_tokens(small: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(small))
    assert tokenizer.is_fast
    assert len(tokenizer) == 1000
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(7))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 4)
    text = " 한글과  English\n\tif x:  # 12345 漢字🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_knows_how_conversations_are_written(small: Path) -> None:
    from transformers import AutoTokenizer

    said = [{"role": "user", "content": "수도는?"}, {"role": "assistant", "content": "서울"}]
    assert AutoTokenizer.from_pretrained(str(small)).apply_chat_template(said, tokenize=False) == (
        "<|im_start|>user\n수도는?<|im_end|>\n<|im_start|>assistant\n서울<|im_end|>\n"
    )


@given(st.text())
@example("한글 자모 ㅋㅋ 각\u11a8 e\u0301\u0000\r\n\u2028 \u00a0")
@example("<|endoftext|><s> <|im_start|>")
@example("don't 1234567 ..//\n\n  x")
def test_every_text_round_trips(shipped: Tokenizer, text: str) -> None:
    assert shipped.decode(shipped.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return Tokenizer.from_file(str(REPO / "tokenizers/demo/tokenizer.json"))


def test_pieces_keep_to_words_and_to_three_digits(shipped: Tokenizer) -> None:
    """The split that Llama 3 uses, checked on pieces rather than on the expression."""
    pieces = [text for text, _ in shipped.pre_tokenizer.pre_tokenize_str("don't 1234567 total+=x;\n  y 헌법재판소")]
    assert pieces == ["don", "'t", "Ġ", "123", "456", "7", "Ġtotal", "+=", "x", ";Ċ", "Ġ", "Ġy", pieces[-1]]
    assert len(pieces[-1]) == 1 + 3 * len("헌법재판소")  # a space and the bytes of one Korean word


DOCUMENTS = ["가나다 가나다\n둘째 줄", "same words, same words", "x = 1\n\n\n", "끝"]


def written_as(kind: str, folder: Path) -> Path:
    lines = "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(DOCUMENTS)).encode()
    path = folder / f"documents.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS}), path)
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    else:
        path.write_bytes(
            {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.ZstdCompressor().compress}[kind](lines)
        )
    return path


def documents(*paths: Path, **options: Any) -> Documents:
    return Documents(TokenizerConfig(dataset=tuple(map(str, paths)), output_dir="unused", **options))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "jsonl.gz", "json", "parquet"])
def test_documents_are_the_same_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    assert list(documents(written_as(kind, tmp_path))) == DOCUMENTS


def test_txt_is_a_document_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("eins\n\nzwei\n")
    assert list(documents(tmp_path / "a.txt")) == ["eins", "zwei"]


def test_bad_records_are_passed_over_counted_and_above_a_share_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"text": "good good good"}\n{"text": 3}\n{"text": "\xff"}\n[1]\n{"text"\n')
    assert main(["--dataset", str(path), "--vocab_size", "300", "--output_dir", str(tmp_path / "some")]) == 0
    assert f"4 bad records passed over (the first: {path}, line 2" in capsys.readouterr().out
    path.write_text('{"text": "good"}\n' + "[1]\n" * 11)
    assert main(["--dataset", str(path), "--vocab_size", "300", "--output_dir", str(tmp_path / "many")]) == 65
    assert "11 of 12 records are bad" in capsys.readouterr().err
    assert not (tmp_path / "many").exists()


class Counted(str):
    """A text that says how many of its kind are alive."""

    alive, most = 0, 0

    def __new__(cls, text: str) -> Counted:
        cls.alive += 1
        cls.most = max(cls.most, cls.alive)
        return super().__new__(cls, text)

    def __del__(self) -> None:
        Counted.alive -= 1


def test_documents_are_not_held() -> None:
    number = 20_000
    tokenizer = train((Counted(f"word{n % 7} words, {n}") for n in range(number)), vocab_size=300)
    assert tokenizer.get_vocab_size() == 300
    assert 0 < Counted.most < number / 10


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--dataset", "absent.jsonl", "--output_dir", "new"], 66, "absent.jsonl: no such file"),
        (["--dataset", "empty.txt", "--output_dir", "new"], 66, "empty.txt: the file is empty"),
        (["--dataset", "blank.txt", "--output_dir", "new"], 66, "blank.txt: no text in 0 records"),
        (
            ["--dataset", NEXT, "--vocab_size", "299", "--output_dir", "new"],
            2,
            "vocab_size = 299: must be at least 300",
        ),
        (["--dataset", NEXT, "--min_frequency", "0", "--output_dir", "new"], 2, "min_frequency = 0"),
        (["--dataset", NEXT, "--output_dir", "full"], 2, "full: is not empty; name another one or add --overwrite"),
        (["--dataset", NEXT, "--output_dir", "empty.txt"], 2, "empty.txt: is a file; name a directory"),
        (["--dataset", NEXT, "--text_column", "body", "--output_dir", "new"], 66, "body"),
        (["--dataset", NEXT], 2, "set --output_dir DIR"),
        (["--output_dir", "new"], 2, "(--dataset FILE...) or what to convert (--convert DIR)"),
        (["--convert", "full", "--output_dir", "new"], 2, "full: has a tokenizer.json, so it is fast already"),
        (["--convert", "absent", "--output_dir", "new"], 2, "absent: no such directory"),
        (["--convert", "other", "--output_dir", "new"], 2, "rename it to vocab.txt"),
        (["--convert", "broken", "--output_dir", "new"], 2, "spiece.model: not a SentencePiece model"),
    ],
)
def test_wrong_inputs_are_one_line(
    words: list[str],
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text("\n \n")
    for folder, name, content in (
        ("full", "tokenizer.json", (REPO / "tokenizers/demo/tokenizer.json").read_text(encoding="utf-8")),
        ("other", "my_vocab.txt", "a\n"),
        ("broken", "spiece.model", "nonsense"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
    assert main(words) == code
    said = capsys.readouterr().err
    assert says in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_overwrite_replaces_a_tokenizer(small: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    assert main(["--dataset", NEXT, "--vocab_size", "300", "--output_dir", str(place)]) == 0
    assert main(["--dataset", NEXT, "--vocab_size", "1000", "--output_dir", str(place), "--overwrite"]) == 0
    assert files(place) == files(small)


def loaded(place: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(place))
    assert tokenizer.is_fast
    assert (place / "tokenizer.json").exists()
    return tokenizer


def test_a_bare_wordpiece_vocabulary_becomes_fast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Seoul", "seoul", "##ite", "##s"]) + "\n"
    )
    assert main(["--convert", str(slow), "--output_dir", str(tmp_path / "fast")]) == 0
    assert "lower-casing off (the vocabulary has capitals)" in capsys.readouterr().out
    assert loaded(tmp_path / "fast")("Seoulites seoul", add_special_tokens=False)["input_ids"] == [5, 7, 8, 6]


@pytest.mark.skipif(not BERT_VOCABULARY.exists(), reason="the multilingual vocabulary is not beside this checkout")
def test_a_real_vocabulary_of_119_547_pieces_becomes_fast(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.txt").write_bytes(BERT_VOCABULARY.read_bytes())
    assert main(["--convert", str(slow), "--output_dir", str(tmp_path / "fast")]) == 0
    tokenizer = loaded(tmp_path / "fast")
    assert len(tokenizer) == 119_547
    assert tokenizer.tokenize("안녕하세요 Hello World") == ["안", "##녕", "##하", "##세", "##요", "Hello", "World"]


@pytest.mark.parametrize("config", ['{"model_type": "bert"}', '{"model_type": "deberta-v2"}'])
@pytest.mark.parametrize(
    ("pieces", "tokens", "said"),
    [
        (
            ["한국은행", "Seoul", "##은"],
            ["한국은행", "##은", "Seoul"],
            "lower-casing off (the vocabulary has capitals)",
        ),
        (
            ["한국은행", "seoul", "##은"],
            ["한국은행", "##은", "seoul"],
            "accents kept (it has some, or Hangul syllables)",
        ),
        (["seoul", "##s", "a"], ["[UNK]", "seoul"], "accents taken away (it has none)"),
    ],
)
def test_a_configuration_beside_the_vocabulary_does_not_decide_the_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, pieces: list[str], tokens: list[str], said: str
) -> None:
    """config.json names a class whose default lower-cases and takes Hangul apart, or one that reads no vocab.txt."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]) + "\n")
    (slow / "config.json").write_text(config)
    assert main(["--convert", str(slow), "--output_dir", str(tmp_path / "fast")]) == 0
    assert said in capsys.readouterr().out
    assert loaded(tmp_path / "fast").tokenize("한국은행은 Seoul") == tokens


@pytest.mark.skipif(not BERT_VOCABULARY.exists(), reason="the multilingual vocabulary is not beside this checkout")
def test_the_real_vocabulary_beside_a_configuration_spells_korean_names(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.txt").write_bytes(BERT_VOCABULARY.read_bytes())
    (slow / "config.json").write_text('{"model_type": "bert"}')
    assert main(["--convert", str(slow), "--output_dir", str(tmp_path / "fast")]) == 0
    assert loaded(tmp_path / "fast").tokenize("한국은행") == ["한국", "##은", "##행"]


def test_a_class_that_passes_over_the_vocabulary_is_refused(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n" + "\n".join(f"##{n}" for n in range(40)))
    (slow / "tokenizer_config.json").write_text('{"tokenizer_class": "DebertaV2Tokenizer"}')
    with pytest.raises(TokenizerError, match=r"took \d of the 45 pieces of vocab.txt; it is WordPiece: set"):
        convert(slow, tmp_path / "fast")


def sentencepiece(model_type: int, pieces: list[tuple[str, float, int]]) -> Any:
    """A SentencePiece model written by hand. Kinds of piece: 1 normal, 2 unknown, 3 control, 4 user-defined."""
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    for piece, score, kind in pieces:
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = model_type
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = True
    return proto


UNIGRAM = [
    ("<unk>", 0, 2),
    ("<s>", 0, 3),
    ("</s>", 0, 3),
    ("▁", -2, 1),
    ("a", -3, 1),
    ("b", -3, 1),
    ("▁ab", -1, 1),
    ("▁서울", -1, 1),
    ("<tag>", 0, 4),
]
BPE = [
    ("<unk>", 0, 2),
    ("<s>", 0, 3),
    ("</s>", 0, 3),
    ("ab", 0, 1),
    ("▁ab", -1, 1),
    ("ba", -2, 1),
    ("▁", -3, 1),
    ("a", -4, 1),
    ("b", -5, 1),
]


@pytest.mark.parametrize(
    ("model_type", "pieces", "text", "ids", "back"),
    [
        (
            1,
            UNIGRAM,
            "  ab   서울 ",
            [6, 7],
            "ab 서울",
        ),  # outer spaces go, inner ones count once, one stands before the first word
        (1, UNIGRAM, "b<tag>a", [3, 5, 8, 3, 4], "b<tag> a"),
        (1, UNIGRAM, "a?", [3, 4, 0], "a"),
        (2, BPE, "ab aab", [4, 6, 7, 3], "ab aab"),  # ▁ab, then ▁ a ab: "▁a" is no piece
        (2, BPE, "aba", [4, 7], "aba"),  # "ab" is merged before "ba"
    ],
)
def test_sentencepiece_pieces_and_ids_are_kept(
    model_type: int, pieces: list[tuple[str, float, int]], text: str, ids: list[int], back: str
) -> None:
    tokenizer = sentencepiece_as_fast(sentencepiece(model_type, pieces))
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids
    assert tokenizer.decode(ids) == back


def test_a_bare_sentencepiece_model_becomes_fast(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "spiece.model").write_bytes(sentencepiece(1, UNIGRAM).SerializeToString())
    run = subprocess.run(
        [*SCRIPT, "--convert", str(slow), "--output_dir", str(tmp_path / "fast")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "converted spiece.model, 9 pieces" in run.stdout
    tokenizer = loaded(tmp_path / "fast")
    assert tokenizer("ab 서울", add_special_tokens=False)["input_ids"] == [6, 7]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
