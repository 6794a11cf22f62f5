"""Load a fast tokenizer or refuse with the remedy; turn texts into one flat array of token ids.

Preparation needs `tokenizer.json` and the library `tokenizers`, nothing else: no transformers, no code from a repository.
A backend is a class with `encode_batch(texts) -> (ids, offsets)`; `tokenizers` is the reference that any other must equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moai.errors import SlowTokenizerError, TokenizerError

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SLOW_FILES = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """What preparation needs to know of a tokenizer; small, so that workers load it themselves and check `digest`.

    digest      sha256 of the bytes of tokenizer.json
    vocab_size  highest id + 1, added tokens included
    """

    path: str
    digest: str
    vocab_size: int
    eos_id: int
    eos_token: str
    bos_id: int | None
    bos_token: str | None

    def identity(self) -> dict[str, Any]:
        """What of it changes prepared bytes. The library's version belongs to it: releases have mended pre-tokenizers."""
        return {"tokenizer_sha256": self.digest, "eos_id": self.eos_id, "bos_id": self.bos_id, "tokenizers": version("tokenizers")}

    @property
    def dtype(self) -> npt.DTypeLike:
        """The narrowest unsigned integers that hold every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The backend that decides: `tokenizers`, with its own threads (RAYON_NUM_THREADS)."""

    spec: TokenizerSpec
    split_special_tokens: bool = False

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = _load(Path(self.spec.path), self.spec.digest)
        # Blocks for truncation and padding in tokenizer.json serve inference; here they would lose or invent tokens.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None  # BPE dropout belongs to training a tokenizer's own model: the same text would give other ids each time
        tokenizer.encode_special_tokens = self.split_special_tokens
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_tokenizer"}

    def encode_batch(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Ids of all texts one after another, and len(texts) + 1 offsets into them. No template tokens are added."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        rows = [encoding.ids for encoding in encodings]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = np.empty(offsets[-1], np.uint32)
        for start, end, row in zip(offsets, offsets[1:], rows):
            flat[start:end] = row
        return flat, offsets

    @cached_property
    def special_ids(self) -> npt.NDArray[np.uint32]:
        """Ids of the special tokens, which text may contain as strings."""
        added = self._tokenizer.get_added_tokens_decoder()
        return np.array(sorted(index for index, token in added.items() if token.special), np.uint32)

    def made_by(self) -> dict[str, str]:
        return {"tokenizer": "tokenizers", "version": version("tokenizers")}

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def load_tokenizer(path: str, *, eos_token: str | None = None, need_bos: bool = False) -> TokenizerSpec:
    """Find tokenizer.json under `path` (a directory, the file, or a Hub name) and resolve its EOS and BOS.

    Raises SlowTokenizerError without a tokenizer.json, TokenizerError when it is damaged or names no EOS.
    """
    if not path:
        raise TokenizerError("no tokenizer: set --tokenizer_path DIR")
    file = _find(path)
    tokenizer = _load(file, None)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise TokenizerError(f"{file}: the vocabulary is empty")
    eos = eos_token or _named(file, "eos_token")
    bos = _named(file, "bos_token")
    if eos is None or eos not in vocabulary:
        found = "names no eos_token" if eos is None else f"the EOS token {eos!r} is not in the vocabulary"
        raise TokenizerError(f"{file.with_name('tokenizer_config.json')}: {found}; documents need an end, set --eos_token TOKEN (one of the vocabulary)")
    if need_bos and (bos is None or bos not in vocabulary):
        raise TokenizerError(f"{file.with_name('tokenizer_config.json')}: --add_bos needs a bos_token of the vocabulary, found {bos!r}")
    return TokenizerSpec(
        path=str(file), digest=hashlib.sha256(file.read_bytes()).hexdigest(), vocab_size=max(vocabulary.values()) + 1,
        eos_id=vocabulary[eos], eos_token=eos, bos_id=vocabulary[bos] if need_bos and bos else None, bos_token=bos if need_bos else None,
    )  # fmt: skip


def _find(path: str) -> Path:
    local = Path(path).expanduser()
    if local.is_file() and local.name.endswith(".json"):
        return local.absolute()
    if local.is_dir():
        if (local / "tokenizer.json").is_file():
            return (local / "tokenizer.json").absolute()
        slow = [name for name in _SLOW_FILES if (local / name).exists()]
        what = f"only the slow tokenizer's {slow[0]}" if slow else "no tokenizer at all"
        remedy = (
            f"convert it: python scripts/train_tokenizer.py --convert {path} --output_dir NEW_DIR" if slow else "name the directory that holds tokenizer.json"
        )
        raise SlowTokenizerError(f"{path}: has no tokenizer.json, {what}; {remedy}")
    if local.is_file():
        raise SlowTokenizerError(
            f"{path}: not a tokenizer.json; name that file or its directory, or convert: python scripts/train_tokenizer.py --convert DIR --output_dir NEW_DIR"
        )
    if local.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise TokenizerError(f"{path}: no such tokenizer directory (train one: python scripts/train_tokenizer.py --dataset FILE --output_dir DIR)")
    return _from_hub(path)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:
        raise TokenizerError(
            f"{name}: neither a directory here nor a model that the Hub gives ({type(error).__name__}); check the name and the network, "
            "or train one: python scripts/train_tokenizer.py --dataset FILE --output_dir DIR"
        ) from error
    if not (folder / "tokenizer.json").is_file():
        raise SlowTokenizerError(
            f"{name}: the Hub repository has no tokenizer.json; download it and convert it: python scripts/train_tokenizer.py --convert DIR --output_dir NEW_DIR"
        )
    return folder / "tokenizer.json"


def _load(file: Path, digest: str | None) -> Any:
    from tokenizers import Tokenizer

    try:
        data = file.read_bytes()
        if digest and hashlib.sha256(data).hexdigest() != digest:
            raise TokenizerError(f"{file}: changed while it was in use; run again")
        return Tokenizer.from_str(data.decode("utf-8"))
    except TokenizerError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception
        raise TokenizerError(f"{file}: not readable as a fast tokenizer ({' '.join(str(error).split())[:160]})") from error


def _named(file: Path, name: str) -> str | None:
    """A special token as the configuration beside tokenizer.json names it."""
    for config in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            value = json.loads(file.with_name(config).read_text(encoding="utf-8")).get(name)
        except (OSError, ValueError, AttributeError):
            continue
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and value:
            return value
    return None
