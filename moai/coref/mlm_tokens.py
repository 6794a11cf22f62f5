"""A tokenizer as masked language models need it: its mask, its padding, and what it puts around every text.

The ends ([CLS] and [SEP], <s> and </s>, or nothing) are read off the tokenizer itself, by encoding a letter with and
without them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moai.core.errors import TokenizerError
from moai.tokenizers.backends import Reference
from moai.tokenizers.load import TokenizerSpec, files_beside, find_tokenizer, load_file, load_tokenizer

_MASKS = ("[MASK]", "<mask>")
_PADS = ("[PAD]", "<pad>")
NAMES = (
    "한국은행", "서울", "부산", "인천", "대구", "광주", "제주도", "대한민국",
    "이순신", "김대중", "삼성전자", "현대자동차",
)  # fmt: skip
"""What every tokenizer for Korean can spell."""


@dataclass(frozen=True, kw_only=True)
class MlmTokenizer:
    """`spec` is what encodes; `prefix` and `suffix` stand around every text; `unknown_id` is None where every text has
    its tokens.
    """

    spec: TokenizerSpec
    mask_token: str
    mask_id: int
    pad_id: int
    unknown_id: int | None
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @property
    def reference(self) -> Reference:
        """A document that holds the characters [MASK] or [SEP] is read as plain text: no document can bring masks of
        its own.
        """
        return Reference(spec=self.spec, split_special_tokens=True)

    def room(self, seq_len: int) -> int:
        """Tokens of text in a row of `seq_len`."""
        return seq_len - len(self.prefix) - len(self.suffix)

    def files(self, seq_len: int) -> dict[str, bytes]:
        """tokenizer.json and its configuration, whole enough for AutoTokenizer: what stood beside it, and the roles of
        special tokens that it does not name.
        """
        file = Path(self.spec.path)
        beside = files_beside(file)
        config = json.loads(beside.get("tokenizer_config.json", b"{}"))
        ids = {"mask_token": self.mask_id, "pad_token": self.pad_id, "unk_token": self.unknown_id}
        if len(self.prefix) == len(self.suffix) == 1:
            ids |= {"cls_token": self.prefix[0], "sep_token": self.suffix[0]}
        roles = {role: self.reference.decode([number]) for role, number in ids.items() if number is not None}
        usual = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
        whole = {**usual, **config, "model_max_length": seq_len}
        spelled = json.dumps(whole, indent=2, ensure_ascii=False, sort_keys=True).encode()
        return {**beside, "tokenizer.json": file.read_bytes(), "tokenizer_config.json": spelled}

    def identity(self) -> dict[str, Any]:
        return {
            **self.spec.identity(),
            "mask_id": self.mask_id,
            "pad_id": self.pad_id,
            "prefix": list(self.prefix),
            "suffix": list(self.suffix),
        }


def load_mlm_tokenizer(path: str, mask_token: str | None = None) -> MlmTokenizer:
    """From a directory, a tokenizer.json or a Hub name. Raises TokenizerError where it has no mask."""
    file = find_tokenizer(path)
    tokenizer = load_file(file)
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    masks = dict.fromkeys([mask_token] if mask_token else [*_named(file, "mask_token"), *_MASKS])
    mask = next((token for token in masks if token in vocabulary), None)
    if mask is None:
        which = f"{' and '.join(map(repr, masks))} {'are' if len(masks) > 1 else 'is'}"
        raise TokenizerError(f"{file}: {which} not in the vocabulary; set --mask-token TOKEN, one of it")
    # The mask stands where other recipes have the end of a document: the one token that must be in the vocabulary.
    spec = load_tokenizer(str(file), eos_token=mask)
    unknown = getattr(tokenizer.model, "unk_token", None)
    bare, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    begin = next(at for at in range(len(whole) + 1) if whole[at : at + len(bare)] == bare)
    return MlmTokenizer(
        spec=spec,
        mask_token=mask,
        mask_id=vocabulary[mask],
        pad_id=next((vocabulary[pad] for pad in [*_named(file, "pad_token"), *_PADS] if pad in vocabulary), 0),
        unknown_id=vocabulary.get(unknown) if unknown else None,
        prefix=tuple(whole[:begin]),
        suffix=tuple(whole[begin + len(bare) :]),
    )


def check_spells_names(tokenizer: MlmTokenizer) -> None:
    """Raises TokenizerError where common Korean names become the unknown token: every mention would be passed over."""
    if tokenizer.unknown_id is None:
        return
    ids, offsets = tokenizer.reference.encode_batch(NAMES)
    unknown = np.add.reduceat(ids == tokenizer.unknown_id, offsets[:-1])
    if lost := [name for name, number in zip(NAMES, unknown) if number]:
        raise TokenizerError(
            f"{tokenizer.spec.path}: {len(lost)} of {len(NAMES)} common Korean names become the unknown token "
            f"({', '.join(lost[:3])}): its vocabulary has no Hangul, or its normalizer takes syllables apart (an "
            f"uncased conversion does); convert the vocabulary anew: python scripts/train_tokenizer.py --convert DIR "
            f"--output_dir NEW_DIR"
        )


def _named(file: Path, name: str) -> list[str]:
    """A special token as the configuration beside tokenizer.json names it, if it does."""
    try:
        value = json.loads(file.with_name("tokenizer_config.json").read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError):
        return []
    value = value.get("content") if isinstance(value, dict) else value
    return [value] if isinstance(value, str) else []
