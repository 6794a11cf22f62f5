"""Tokenizers in five shapes, trained on the shipped corpus, and variants of their tokenizer.json: right, wrong and
refused ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moai.sources.streams import open_blocks

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from corpus import BOS, EOS, LLAMA3, QWEN2  # noqa: E402

Shape = Callable[[str], Path]


def demo_documents() -> list[str]:
    files = sorted((ROOT / "data" / "demo").glob("*.jsonl.zst"))
    return [
        json.loads(line)["text"]
        for file in files
        for line in b"".join(open_blocks(str(file), "zst", 1 << 20)).splitlines()
    ]


def train(name: str, documents: Sequence[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=[EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model, normalizer, pre_tokenizer, decoder, trainer, chars = (
        models.BPE(),
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
        bpe,
        1500,
    )
    if name in ("llama3", "qwen2"):
        pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3 if name == "llama3" else QWEN2), "isolated"), byte_level]
        )
        normalizer = normalizers.NFC() if name == "qwen2" else None
    elif name == "wordpiece":
        model, normalizer, pre_tokenizer = (
            models.WordPiece(unk_token="[UNK]"),
            normalizers.BertNormalizer(lowercase=False),
            pre_tokenizers.BertPreTokenizer(),
        )
        trainer = trainers.WordPieceTrainer(
            vocab_size=6000, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
        )
        decoder = decoders.WordPiece()
    elif name in ("unigram", "llama2"):
        model, normalizer, pre_tokenizer, decoder, chars = (
            models.Unigram(),
            normalizers.NFKC(),
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
            200,
        )
        trainer = trainers.UnigramTrainer(
            vocab_size=3000,
            special_tokens=[EOS, BOS, "<unk>"],
            unk_token="<unk>",
            n_sub_iterations=1,
            show_progress=False,
        )
    if name == "llama2":
        model, normalizer, chars = models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True), None, 1500
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=["<unk>", EOS, BOS, *bytes_], show_progress=False)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoder
    tokenizer.train_from_iterator((text[:chars] for text in documents), trainer)
    if name == "wordpiece":
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def added(*tokens: str, **flags: bool) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        for number, content in enumerate(tokens, max(value["model"]["vocab"].values()) + 1):
            plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            value["added_tokens"].append({"id": number, "content": content, **plain, **flags})

    return change


def bos_template(value: dict[str, Any]) -> None:
    value["model"]["ignore_merges"] = True
    single = [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": {BOS: {"id": BOS, "ids": [1], "tokens": [BOS]}},
    }


def cut_and_padded(value: dict[str, Any]) -> None:
    value["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    value["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": EOS,
    }


def before(pre_tokenizer: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda value: value.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [pre_tokenizer, value["pre_tokenizer"]]}
    )


def normalizer(*types: str) -> Callable[[dict[str, Any]], None]:
    return lambda value: value.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": name} for name in types]}
        if types[1:]
        else {"type": types[0]}
    )


def prefix_space_after_split(value: dict[str, Any]) -> None:
    """Every piece begins with a space, so that ids show where pieces begin."""
    value["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True


def sentencepiece(value: dict[str, Any]) -> None:
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    value.update(pre_tokenizer=None, normalizer={"type": "Sequence", "normalizers": steps})
    value["added_tokens"] = value["added_tokens"][:3]


SHAPES = ("gpt2", "llama3", "qwen2")
VARIANTS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "demo": ("", lambda value: None),  # the shipped one
    "ignore_merges, BOS template": ("llama3", bos_template),
    "truncation and padding": ("gpt2", cut_and_padded),
    "dropout": ("llama3", lambda value: value["model"].update(dropout=0.5)),
    "added lstrip": ("qwen2", added("<x>", "xyz", lstrip=True)),
    "added rstrip": ("qwen2", added("<x>", "xyz", rstrip=True)),
    "added single_word": ("qwen2", added("<x>", "xyz", single_word=True)),
    "added normalized": ("qwen2", added("<\u00e9>", "\uac01!", normalized=True)),
    "added not special": ("llama3", added("<x>", "xyz", special=False)),
    "added white space": ("llama3", added("\n\n\n", rstrip=True)),
    "add_prefix_space": ("gpt2", lambda value: value["pre_tokenizer"].update(add_prefix_space=True)),
    "add_prefix_space after Split": ("llama3", prefix_space_after_split),
    "Digits": ("gpt2", before({"type": "Digits", "individual_digits": True})),
    "Lowercase": ("gpt2", normalizer("Lowercase")),
    "NFC, Lowercase": ("llama3", normalizer("NFC", "Lowercase")),
}
"""Tokenizers that fastokens takes."""
WRONG: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "added white space, both": ("llama3", added("\n\n\n", lstrip=True, rstrip=True)),
    "added twice": ("llama3", added("the", special=False)),
    "no pre-tokenizer": ("gpt2", lambda value: value.update(pre_tokenizer=None)),
}
"""Tokenizers that fastokens loads, and gives other ids with, in silence."""
REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "Punctuation": ("gpt2", before({"type": "Punctuation", "behavior": "Contiguous"})),
    "NFKC": ("gpt2", normalizer("NFKC")),
    "NFD": ("gpt2", normalizer("NFD")),
    "StripAccents": ("gpt2", normalizer("StripAccents")),
    "sentencepiece BPE": ("llama2", sentencepiece),
}
