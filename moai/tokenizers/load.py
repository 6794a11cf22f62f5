"""Load a fast tokenizer or refuse with the remedy.

Preparation needs `tokenizer.json` and the library `tokenizers`, nothing else: no transformers, no code from a
repository. What turns texts into ids is in `moai.tokenizers.backends`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moai.core.errors import SlowTokenizerError, TokenizerError
from moai.core.hub import absent
from moai.tokenizers import declared_tokens

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""All that a tokenizer is loaded from; the first makes the ids."""
CHAT_TEMPLATES = "additional_chat_templates"
"""The folder of templates beside the default one, as `tool_use.jinja`."""
_ADDED = "added_tokens.json"
_MAKE = "make it: python scripts/train_tokenizer.py --dataset FILE --vocab_size 128000 --output_dir {}"
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
    special_ids: tuple[int, ...] = ()
    """Ids of the special tokens, which text may contain as strings."""
    wants_bos: str = ""
    """The token that the tokenizer itself puts before a text, where nothing adds one."""

    def identity(self) -> dict[str, Any]:
        """What of it changes prepared bytes. The library's version belongs to it: releases have mended
        pre-tokenizers.
        """
        return {
            "tokenizer_sha256": self.digest,
            "eos_id": self.eos_id,
            "bos_id": self.bos_id,
            "tokenizers": version("tokenizers"),
        }

    @property
    def dtype(self) -> npt.DTypeLike:
        """The narrowest unsigned integers that hold every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32


def load_tokenizer(path: str, *, eos_token: str | None = None, need_bos: bool = False) -> TokenizerSpec:
    """Find tokenizer.json under `path` (a directory, the file, or a Hub name) and resolve its EOS and BOS.

    Raises SlowTokenizerError without a tokenizer.json, TokenizerError when it is damaged, names no EOS, or lacks tokens
    that the files beside it declare.
    """
    file = find_tokenizer(path)
    tokenizer = load_file(file)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise TokenizerError(f"{file}: the vocabulary is empty")
    eos = eos_token or named_token(file, "eos_token")
    bos = named_token(file, "bos_token")
    if eos is None or eos not in vocabulary:
        found = "names no eos_token" if eos is None else f"the EOS token {eos!r} is not in the vocabulary"
        raise TokenizerError(
            f"{file.with_name('tokenizer_config.json')}: {found}; documents need an end, set --eos_token TOKEN (one of "
            f"the vocabulary)"
        )
    if need_bos and (bos is None or bos not in vocabulary):
        raise TokenizerError(
            f"{file.with_name('tokenizer_config.json')}: --add_bos needs a bos_token of the vocabulary, found {bos!r}"
        )
    if lacking := declared_tokens.lacking(file, tokenizer):
        raise TokenizerError(
            f"{file.parent}: tokens that {lacking[0].place} declares are not so in tokenizer.json "
            f"({', '.join(repr(token.content) for token in lacking[:4])}{', ...' * (len(lacking) > 4)}; "
            f"{len(lacking):,} in all), and texts would get other ids than in transformers; write them into one: "
            f"python scripts/train_tokenizer.py --convert {file.parent} --output_dir NEW_DIR"
        )
    return TokenizerSpec(
        path=str(file),
        digest=digest_of(file),
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=vocabulary[eos],
        eos_token=eos,
        bos_id=vocabulary[bos] if need_bos and bos else None,
        bos_token=bos if need_bos else None,
        special_ids=tuple(
            sorted(index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        ),
        wants_bos="" if need_bos else _wanted_bos(file, tokenizer, bos),
    )


def _wanted_bos(file: Path, tokenizer: Any, bos: str | None) -> str:
    """What stands before a text by the template in tokenizer.json, or by add_bos_token beside it."""
    try:
        first = tokenizer.encode("a").tokens[:1]
        plain = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
    except Exception:  # a text that it has no token for
        first = plain = []
    if first != plain:
        return str(first[0])
    return bos or "" if declared_tokens.read(file.with_name("tokenizer_config.json")).get("add_bos_token") else ""


def find_tokenizer(path: str) -> Path:
    """The tokenizer.json that `path` stands for. Raises SlowTokenizerError, TokenizerError."""
    if not path:
        raise TokenizerError("no tokenizer: set --tokenizer_path DIR")
    local = Path(path).expanduser()
    if local.is_file() and local.name.endswith(".json"):
        return local.absolute()
    if local.is_dir():
        if (local / "tokenizer.json").is_file():
            return (local / "tokenizer.json").absolute()
        slow = [name for name in _SLOW_FILES if (local / name).exists()]
        what = f"only the slow tokenizer's {slow[0]}" if slow else "no tokenizer at all"
        remedy = (
            f"convert it: python scripts/train_tokenizer.py --convert {path} --output_dir NEW_DIR"
            if slow
            else "name the directory that holds tokenizer.json"
        )
        raise SlowTokenizerError(f"{path}: has no tokenizer.json, {what}; {remedy}")
    if local.is_file():
        raise SlowTokenizerError(
            f"{path}: not a tokenizer.json; name that file or its directory, or convert: python "
            f"scripts/train_tokenizer.py --convert DIR --output_dir NEW_DIR"
        )
    if local.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise TokenizerError(f"{path}: no such tokenizer directory; {_MAKE.format(path)}")
    return _from_hub(path)


def load_file(file: Path, digest: str | None = None) -> Any:
    """The library's tokenizer. Raises TokenizerError when the file is damaged, or is no longer the one with
    `digest`.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(read_file(file, digest).decode("utf-8"))
    except TokenizerError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception
        raise TokenizerError(
            f"{file}: not readable as a fast tokenizer ({' '.join(str(error).split())[:160]})"
        ) from error


def files_beside(file: Path) -> dict[str, bytes]:
    """Configuration, special tokens and chat template beside a tokenizer.json, those that are there. Raises
    TokenizerError.
    """
    found = {}
    for name in FILES[1:]:
        try:
            found[name] = file.with_name(name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise TokenizerError(f"{file.with_name(name)}: not readable ({error.strerror})") from error
    return found


def digest_of(file: Path) -> str:
    """sha256, in hex: the identity of a tokenizer."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_file(file: Path, digest: str | None = None) -> bytes:
    """The bytes of a tokenizer.json. Raises TokenizerError when they are no longer those of `digest`."""
    data = file.read_bytes()
    if digest and hashlib.sha256(data).hexdigest() != digest:
        raise TokenizerError(f"{file}: changed while it was in use; run again")
    return data


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*FILES, _ADDED, f"{CHAT_TEMPLATES}/*.jinja"]))
    except Exception as error:
        if (
            "/" in name and Path(name).parent.is_dir()
        ):  # `tokenizers/moai` beside `tokenizers/demo` is meant as a place here
            raise TokenizerError(
                f"{name}: no such tokenizer directory, nor one of the Hub; {_MAKE.format(name)}"
            ) from error
        raise TokenizerError(absent(name, error)) from error
    if not (folder / "tokenizer.json").is_file():
        raise SlowTokenizerError(
            f"{name}: the Hub repository has no tokenizer.json; download it and convert it: python "
            f"scripts/train_tokenizer.py --convert DIR --output_dir NEW_DIR"
        )
    return folder / "tokenizer.json"


def named_token(file: Path, name: str) -> str | None:
    """A special token as the configuration beside tokenizer.json names it."""
    for config in ("tokenizer_config.json", "special_tokens_map.json"):
        value = declared_tokens.read(file.with_name(config)).get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and value:
            return value
    return None
