"""Tokenizer backends: texts -> one flat array of ids and the offsets into it.

    tokenizers   the reference, which decides: always there, knows every tokenizer.json
    fastokens    BPE, some thirty times as fast; refuses what it does not know, so `auto` takes it where it loads

fastokens is believed after `first_difference` found none on a probe, and is looked after while it works
(transforms.tokenize). Figures: benchmarks/backends.py.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from moai.core.errors import BackendRefused, TokenizerError
from moai.tokenizers.load import TokenizerSpec, load_file, read_file

Ids = npt.NDArray[np.unsignedinteger[Any]]
Offsets = npt.NDArray[np.int64]


_MONGOLIAN_SEPARATOR = "\u180e"
"""White space until Unicode 6.3, and still so to the Split of fastokens 0.3.5."""


@dataclass(frozen=True, kw_only=True)
class Backend(ABC):
    """One tokenizer.json through one library. What that loads is kept once a process, so that it can be there before a
    worker is forked.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    spec: TokenizerSpec
    split_special_tokens: bool = False
    threads: int | None = None
    """Threads of one call; None leaves that to the library."""

    @staticmethod
    @abstractmethod
    def open(path: Path, digest: str, split_special_tokens: bool) -> Any:
        """What the library calls a tokenizer. Raises whatever it raises where it does not take this one."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        """Ids of all texts one after another, of dtype `spec.dtype`, and len(texts) + 1 offsets into them. No template
        tokens are added. Raises BackendRefused for the whole batch where the library takes one of its texts not, or
        fails on it: a pattern that gives up is a panic.
        """

    def identity(self) -> dict[str, Any]:
        """What of it changes ids: not which library, since all are held equal."""
        return {**self.spec.identity(), "split_special_tokens": self.split_special_tokens}

    def made_by(self) -> dict[str, str]:
        """For receipts: which backend, in which version, for which tokenizer.json."""
        return {"tokenizer": self.name, "version": version(self.package), "tokenizer_sha256": self.spec.digest[:16]}

    def load(self) -> None:
        """Load it now rather than with the first batch. Raises BackendRefused where the library does not take this
        tokenizer.
        """
        assert self._tokenizer is not None

    @property
    def _tokenizer(self) -> Any:
        return _loaded(self.name, self.spec.path, self.spec.digest, self.split_special_tokens)


@dataclass(frozen=True, kw_only=True)
class Reference(Backend):
    """The backend that decides: `tokenizers`, with its own threads (RAYON_NUM_THREADS)."""

    name = "tokenizers"
    package = "tokenizers"

    @staticmethod
    def open(path: Path, digest: str, split_special_tokens: bool) -> Any:
        tokenizer = load_file(path, digest)
        # Blocks for truncation and padding in tokenizer.json serve inference; here they would lose or invent tokens.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            # BPE dropout is for training a model: with it the same text would give other ids each time.
            tokenizer.model.dropout = None
        tokenizer.encode_special_tokens = split_special_tokens
        return tokenizer

    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        with _refusals(f"{self.name} fails on one of {len(texts):,} texts"):
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return self._flat([encoding.ids for encoding in encodings])

    def encode_with_offsets(self, texts: Sequence[str]) -> tuple[Ids, Offsets, npt.NDArray[np.int64]]:
        """As `encode_batch`, and where each id's text begins and ends in its document: (ids, 2), in characters.

        No fast backend gives these; the reference takes them on its own threads. Raises as `encode_batch`.
        """
        with _refusals(f"{self.name} fails on one of {len(texts):,} texts"):
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        ids, offsets = self._flat([encoding.ids for encoding in encodings])
        spans = np.empty((len(ids), 2), np.int64)
        for start, end, encoding in zip(offsets, offsets[1:], encodings):
            spans[start:end] = np.fromiter(
                itertools.chain.from_iterable(encoding.offsets), np.int64, 2 * (end - start)
            ).reshape(-1, 2)
        return ids, offsets, spans

    def special_tokens(self) -> list[str]:
        """As they may stand in a text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return [added[index].content for index in sorted(added)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _flat(self, rows: list[list[int]]) -> tuple[Ids, Offsets]:
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = np.empty(offsets[-1], self.spec.dtype)
        for start, end, row in zip(offsets, offsets[1:], rows):
            flat[start:end] = row
        return flat, offsets


@dataclass(frozen=True, kw_only=True)
class Fastokens(Backend):
    """BPE without the reference's threads and objects. It may refuse texts, but shall not take one for another."""

    name = "fastokens"
    package = "fastokens"

    @staticmethod
    def open(path: Path, digest: str, split_special_tokens: bool) -> Any:
        from fastokens._native import Tokenizer

        return Tokenizer.from_json_str(_plain_json(path, digest))

    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        if any(not text.isascii() and _MONGOLIAN_SEPARATOR in text for text in texts):
            raise BackendRefused(f"{self.name} takes U+180E for white space, which the reference does not")
        if not texts:
            return np.empty(0, self.spec.dtype), np.zeros(1, np.int64)
        with _refusals(f"{self.name} does not take one of {len(texts):,} texts"):
            tokenizer = self._tokenizer
            if self.threads == 1:
                _stay_in_this_thread(tokenizer)
            split = {"add_special_tokens": False, "split_special_tokens": self.split_special_tokens}
            ids, offsets = tokenizer.encode_batch_flat(list(texts), **split)
        flat = np.frombuffer(ids, np.uint32).astype(self.spec.dtype, copy=False)
        return flat, np.frombuffer(offsets, np.uint64).astype(np.int64, copy=False)


BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in (Reference, Fastokens)}
AUTOMATIC = "fastokens"
"""The one that `auto` tries: in every test so far it was equal or refused, loudly."""


def make(name: str, spec: TokenizerSpec, *, split_special_tokens: bool, threads: int | None = None) -> Backend:
    return BACKENDS[name](spec=spec, split_special_tokens=split_special_tokens, threads=threads)


def is_installed(name: str) -> bool:
    return find_spec(name) is not None


def warm(names: Sequence[str], path: str, digest: str, split_special_tokens: bool) -> None:
    """Load backends where workers are forked from; one that does not load is left to whoever uses it."""
    for name in names:
        with contextlib.suppress(Exception):
            _loaded(name, path, digest, split_special_tokens)


def first_difference(fast: Backend, reference: Reference, texts: Sequence[str]) -> str | None:
    """How `fast` differs from the reference on `texts`, or None. Raises BackendRefused where the reference fails."""
    wanted, wanted_offsets = reference.encode_batch(texts)
    for index, text in enumerate(texts):
        try:
            found, _ = fast.encode_batch([text])
        except BackendRefused:  # is no lie: that document goes to the reference
            continue
        expected = wanted[wanted_offsets[index] : wanted_offsets[index + 1]]
        if not np.array_equal(found, expected):
            return difference(text, found, expected)
    return None


def difference(text: str, found: Ids, expected: Ids) -> str:
    """Where two encodings of a text part, for people."""
    at = next(
        (i for i, (a, b) in enumerate(zip(found.tolist(), expected.tolist())) if a != b), min(len(found), len(expected))
    )
    return f"{text[:40]!r}: at token {at} {found[at : at + 4].tolist()} instead of {expected[at : at + 4].tolist()}"


@functools.lru_cache(maxsize=4)
def _loaded(backend: str, path: str, digest: str, split_special_tokens: bool) -> Any:
    with _refusals(f"{backend} does not take this tokenizer"):
        return BACKENDS[backend].open(Path(path), digest, split_special_tokens)


@contextlib.contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Whatever a library raises, as BackendRefused; a panic in Rust is no Exception. What concerns the process itself
    passes.
    """
    try:
        yield
    except (TokenizerError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise BackendRefused(f"{what}: {' '.join(str(error).split())[:160]}") from error


@functools.cache
def _stay_in_this_thread(tokenizer: Any) -> None:
    """Have fastokens encode where it is called. At its first batch it counts the cores it may use, and where that is
    more than one it hands every batch to a thread of its own, even with RAYON_NUM_THREADS=1: a quarter more CPU time
    and 80 MB more in a worker, measured.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        tokenizer.encode_batch_flat(["one", "core"])
    finally:
        os.sched_setaffinity(0, allowed)


def _plain_json(path: Path, digest: str) -> str:
    """tokenizer.json without what the reference switches off, and without its template: ends are added by us."""
    import orjson

    model = orjson.loads(read_file(path, digest))
    model |= {"truncation": None, "padding": None, "post_processor": None}
    if model["model"].get("dropout"):
        model["model"]["dropout"] = None
    return orjson.dumps(model).decode()
