"""What the benchmarks measure on: the given files repeated to a size, and tokenizers of the common shapes trained on
them.

    python benchmarks/corpus.py FILES... --tokenizers DIR [--vocab_size 32768] [--wordpiece vocab.txt]

writes DIR/gpt2, DIR/llama3, DIR/qwen2, DIR/wordpiece (from the given vocabulary) and DIR/unigram, each a directory with
a tokenizer.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# The regular expressions of the three models' published tokenizer.json files.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SAMPLE_BYTES = 24_000_000
EOS, BOS = "<|endoftext|>", "<|begin_of_text|>"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizers", type=Path, required=True, metavar="DIR")
    parser.add_argument("--vocab_size", type=int, default=32_768)
    parser.add_argument("--wordpiece", type=Path, metavar="VOCAB.TXT")
    given = parser.parse_args()
    make_tokenizers(given.files, given.tokenizers, given.vocab_size, given.wordpiece)
    return 0


def repeat(files: list[Path], megabytes: int, target: Path) -> Path:
    """`megabytes` of the files' lines, shuffled once, then copy after copy, each numbered, so that no two shards are
    equal.
    """
    lines = [line for path in files for line in path.read_bytes().splitlines(keepends=True)]
    random.Random(0).shuffle(lines)
    left = megabytes * 10**6
    with open(target, "wb") as out:
        for copy in itertools.count():
            for line in lines:
                if left <= 0:
                    return target
                left -= out.write(line.replace(b"{", b'{"copy":%d,' % copy, 1))
    raise AssertionError


def sample(files: list[Path], size: int = SAMPLE_BYTES) -> Iterator[str]:
    """Texts from all of the files, evenly, about `size` bytes."""
    total = sum(path.stat().st_size for path in files)
    every = max(1, total // size)
    for path in files:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines):
                if number % every == 0:
                    yield json.loads(line)["text"]


def make_tokenizers(files: list[Path], folder: Path, vocab_size: int, wordpiece: Path | None) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = [EOS, BOS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(pattern: str) -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])

    shapes = {
        "gpt2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "llama3": (None, split(LLAMA3)),
        "qwen2": (normalizers.NFC(), split(QWEN2)),
    }
    for name, (normalizer, pre_tokenizer) in shapes.items():
        tokenizer = Tokenizer(models.BPE())
        if normalizer:
            tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(sample(files), trainer)
        _save(tokenizer, folder / name, EOS)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        sample(files, SAMPLE_BYTES // 3),
        trainers.UnigramTrainer(
            vocab_size=16_384, special_tokens=[*special, "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    _save(tokenizer, folder / "unigram", EOS)
    if wordpiece:
        pieces = wordpiece.read_text(encoding="utf-8").splitlines()
        tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
        tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        ids = {name: tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")}
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
        _save(tokenizer, folder / "wordpiece", "[SEP]")


def _save(tokenizer: object, folder: Path, eos: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))  # type: ignore[attr-defined]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos})
    )
    print(folder, flush=True)


if __name__ == "__main__":
    sys.exit(main())
