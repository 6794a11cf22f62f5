"""The encoder of a run, loaded when the first document needs it.

With `--precision auto` candidates are tried on a sample of the database. What was chosen is noted by the transaction
that writes the version's first vectors, so a run that goes on after a crash computes as the first one did.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import numpy as np

from moai.core.errors import ConfigError, MoaiError, SourceError
from moai.reembedding.chunk import Chunk, Tokens
from moai.reembedding.documents import LawDocuments
from moai.reembedding.embed import Encoder, Model, TokenBudget, Vectors, encode_all
from moai.reembedding.prefetch import Seconds

logger = logging.getLogger(__name__)

SAMPLE_DOCUMENTS = 8
"""Of each source type: the candidates of `--precision auto` are judged on these documents' chunks."""
_SAMPLE_CHUNKS = 48


@dataclass(kw_only=True)
class LoadedWhenNeeded:
    """An Encoder that loads on first use, and what was chosen then."""

    model: Model
    precision: str
    """float32, bfloat16, int8 or auto."""
    min_cosine: float
    expected_dim: int | None
    """Of the vectors that the version holds or held; None before there are any."""
    sample: Callable[[Tokens], list[list[int]]]
    is_checked: bool = True
    """Whether the version was made in this precision before; int8 is held against float32 otherwise."""
    batch_tokens_made: int | None = None
    seconds: Seconds = field(default_factory=Seconds)
    chosen: dict[str, Any] = field(default_factory=dict)
    """For the version's metadata; empty until the model is loaded."""

    @cached_property
    def encoder(self) -> Encoder:
        with self.seconds.of("load"):
            return self._load()

    def _load(self) -> Encoder:
        started = time.perf_counter()
        encoder, precision, cosine = self._open()
        if self.expected_dim not in (None, encoder.dim):
            raise ConfigError(
                f"{self.model.name} makes vectors of {encoder.dim} dimensions, the version holds {self.expected_dim}: "
                f"name a new --version-id for this model, or set the version's own"
            )
        self.chosen.update(
            dim=encoder.dim,
            precision=precision,
            min_cosine=cosine,
            batch_tokens=self.batch_tokens_made or encoder.batch_tokens,
            max_tokens=encoder.tokens.max_tokens,
        )
        said, took = "Model %s: %d dimensions, reads %d tokens, %s, loaded in %.1fs", time.perf_counter() - started
        logger.info(said, self.model.name, encoder.dim, encoder.tokens.max_tokens, precision, took)
        return encoder

    @property
    def dim(self) -> int:
        return self.encoder.dim

    @property
    def tokens(self) -> Tokens:
        return cast(Tokens, _Later(lambda: self.encoder.tokens))

    @property
    def batch_tokens(self) -> int:
        return self.batch_tokens_made or self.encoder.batch_tokens

    @property
    def lanes(self) -> int:
        return self.encoder.lanes

    def encode(self, rows: Sequence[Sequence[int]]) -> Vectors:
        return self.encoder.encode(rows)

    def _open(self) -> tuple[Encoder, str, float | None]:
        if self.precision == "int8" and not self.is_checked:
            return self._checked_int8()
        if self.precision != "auto":
            return load_encoder(self.model, self.precision), self.precision, None
        exact = load_encoder(self.model, "float32")
        rows = self.sample(exact.tokens)
        if not rows:
            return exact, "float32", None
        wanted, seconds = _timed(exact, rows)
        logger.info("precision auto: float32 takes %.2fs for %d chunks of the sample", seconds, len(rows))
        best: tuple[Encoder, str, float | None] = exact, "float32", None
        for precision in ("bfloat16", "int8"):
            try:
                encoder = load_encoder(self.model, precision)
            except ConfigError as error:
                logger.info("precision auto: no %s here: %s", precision, error)
                continue
            vectors, taken = _timed(encoder, rows)
            cosine = float(np.min(np.sum(wanted * vectors, axis=1)))
            good = cosine >= self.min_cosine and taken < seconds
            said = "precision auto: %s takes %.2fs, least cosine to float32 %.4f: %s"
            logger.info(said, precision, taken, cosine, "taken" if good else "not taken")
            if good:
                best, seconds = (encoder, precision, round(cosine, 6)), taken
        return best

    def _checked_int8(self) -> tuple[Encoder, str, float | None]:
        """Raises ConfigError where a vector of the sample is further from float32 than it may be."""
        encoder, exact = load_encoder(self.model, "int8"), load_encoder(self.model, "float32")
        rows = self.sample(exact.tokens)
        if not rows:
            return encoder, "int8", None
        wanted, found = (encode_all(one, rows, TokenBudget()) for one in (exact, encoder))
        cosine = float(np.min(np.sum(wanted * found, axis=1)))
        if cosine < self.min_cosine:
            raise ConfigError(
                f"--precision int8 is refused for {self.model.name}: the least cosine to float32 in a sample of "
                f"{len(rows)} chunks is {cosine:.3f}, below --min_cosine {self.min_cosine}: use float32, or bfloat16"
            )
        return encoder, "int8", round(cosine, 6)


def load_encoder(model: Model, precision: str) -> Encoder:
    """Raises SourceError for whatever the libraries say of files that are no model, or of an absent device."""
    try:
        return model.open(precision)
    except MoaiError:
        raise
    except Exception as error:
        logger.debug("%s could not be loaded", model.name, exc_info=True)
        said = str(error).strip().partition("\n")[0]
        raise SourceError(
            f"{model.name}: this model could not be loaded ({type(error).__name__}: {said}); check that its directory "
            f"is whole, and that --device is there"
        ) from error


class _Later:
    """What `load` gives, loaded when the first text is there."""

    def __init__(self, load: Callable[[], Tokens]) -> None:
        self._load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)


def sample_rows(documents: LawDocuments, chunk: Chunk, tokens: Tokens) -> list[list[int]]:
    """Token ids of chunks from the first documents of every source type, evenly over them."""
    cut, rows = replace(chunk, tokens=tokens, batch_tokens=lambda: sys.maxsize), []
    for source_type in documents.source_types:
        few = replace(documents, source_types=(source_type,), limit=SAMPLE_DOCUMENTS)
        rows += [row for batch in cut(few.pages()) for row in batch["ids"].to_pylist() if row is not None]
    return rows[:: max(1, -(-len(rows) // _SAMPLE_CHUNKS))]


def _timed(encoder: Encoder, rows: list[list[int]]) -> tuple[Vectors, float]:
    """After a first batch that pays for what only the first one pays for."""
    encode_all(encoder, rows[:2], TokenBudget())
    started = time.perf_counter()
    return encode_all(encoder, rows, TokenBudget()), time.perf_counter() - started
