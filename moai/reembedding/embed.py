"""Give every chunk its vector: batches by length under a token budget, halved where memory does not suffice.

    Embed(encoder=encoder, vector_dtype="float32")     # RecordBatch of chunks -> with a column `vector`

The order of work inside a batch depends on that batch alone (longest first, ties by position), so the same batch gives
the same bits before a crash and after it.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.core.errors import Interrupted, MoaiError
from moai.core.files import digest_json
from moai.reembedding.chunk import SCHEMA as CHUNKS
from moai.reembedding.chunk import Tokens

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
VECTOR_DTYPES = ("float32", "float16")

SCHEMA = pa.schema(
    [
        *(column for column in CHUNKS if column.name != "ids"),
        *(pa.field("token_count", pa.int32()), pa.field("dim", pa.int32()), pa.field("vector", pa.binary())),
    ]
)
"""As the chunks', with the number of their tokens, and the vector's dimensions and little-endian bytes."""


class Encoder(Protocol):
    """A loaded embedding model."""

    @property
    def dim(self) -> int: ...
    @property
    def tokens(self) -> Tokens: ...
    @property
    def batch_tokens(self) -> int:
        """Tokens of a device batch that this device takes well, padding included."""
        ...

    @property
    def lanes(self) -> int:
        """Device batches that are encoded at a time, each in a thread of its own."""
        ...

    def encode(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """(n, dim), of length 1 each, for one device batch of token ids. Raises OutOfMemory."""
        ...


class Model(Protocol):
    """A model that is not loaded yet."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str:
        """Another one when any of its files is another one."""
        ...

    def open(self, precision: str) -> Encoder:
        """Load it. `precision` is float32, bfloat16 or int8."""
        ...


Lengths = TypeVar("Lengths", int, npt.NDArray[np.int64])
PAD_TO = 8
"""Tokens. Libraries under torch keep a program for every shape of a batch: of any length, these took hundreds of MB."""


def padded(tokens: Lengths) -> Lengths:
    """The length that a row of so many tokens has in a device batch."""
    return -(-tokens // PAD_TO) * PAD_TO


class OutOfMemory(Exception):
    """The device cannot hold this batch; a smaller one may fit."""


@dataclass
class TokenBudget:
    """Tokens of a device batch, padding included (None: what the encoder proposes); halved for good when memory does
    not suffice.
    """

    tokens: int | None = None

    def halve(self, rows: int, longest: int) -> None:
        """Raises MoaiError where one row is already too much."""
        if rows == 1:
            raise MoaiError(
                f"one chunk of {longest:,} tokens does not fit into this device's memory: use a smaller model, or "
                f"--device cpu"
            )
        self.tokens = max(longest, rows * longest // 2)
        said = "Out of memory with %d chunks of up to %d tokens; going on with %s tokens a batch"
        logger.warning(said, rows, longest, f"{self.tokens:,}")


class Lanes:
    """Threads that encode device batches beside each other. Daemons: a pool's threads would hold up the end of the
    process until the batch that they are in is done.
    """

    def __init__(self, number: int) -> None:
        self._asked: SimpleQueue[tuple[Future[Vectors], Callable[[], Vectors]] | None] = SimpleQueue()
        self._number = number
        for _ in range(number):
            threading.Thread(target=self._work, name="encode", daemon=True).start()

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *raised: object) -> None:
        for _ in range(self._number):
            self._asked.put(None)

    def submit(self, call: Callable[[], Vectors]) -> Future[Vectors]:
        future: Future[Vectors] = Future()
        self._asked.put((future, call))
        return future

    def _work(self) -> None:
        while asked := self._asked.get():
            future, call = asked
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del asked, future, call  # the last batch's vectors are not this thread's to keep


def encode_all(
    encoder: Encoder,
    rows: Sequence[Sequence[int]],
    budget: TokenBudget,
    *,
    stop: threading.Event | None = None,
    on_vectors: Callable[[npt.NDArray[np.int64], Vectors], None] = lambda places, vectors: None,
    known: Mapping[int, Vectors] | None = None,
) -> Vectors:
    """(n, dim) in the order of `rows`, encoded longest first: what does not fit shows at once, and neighbours hardly
    need padding. Which rows share a device batch depends on `rows` and the budget alone.

    on_vectors  told the places and vectors of each device batch that was encoded
    known       vectors by place: a device batch that is known whole is not encoded again
    """
    lengths = padded(np.array([len(row) for row in rows]))
    vectors, known = np.empty((len(rows), encoder.dim), np.float32), known or {}
    if budget.tokens is None:
        budget.tokens = encoder.batch_tokens
    waiting = np.argsort(-lengths, kind="stable")
    running: deque[tuple[Future[Vectors], npt.NDArray[np.int64]]] = deque()
    with Lanes(encoder.lanes) as lanes:
        while len(waiting) or running:
            stopped = stop is not None and stop.is_set()
            if stopped and not running:
                raise Interrupted("stopped between two batches", signal.SIGINT)
            while len(waiting) and len(running) < encoder.lanes and not stopped:
                number = max(1, budget.tokens // max(1, int(lengths[waiting[0]])))  # all are padded to the first
                chosen, waiting = waiting[:number], waiting[number:]
                if all(int(place) in known for place in chosen):
                    vectors[chosen] = np.stack([known[int(place)] for place in chosen])
                    continue
                ids = [rows[index] for index in chosen]
                running.append((lanes.submit(partial(encoder.encode, ids)), chosen))
            if not running:
                continue
            future, chosen = running.popleft()
            try:
                vectors[chosen] = future.result()
            except OutOfMemory:
                budget.halve(len(chosen), len(rows[chosen[0]]))
                vectors[chosen] = encode_all(encoder, [rows[index] for index in chosen], budget, stop=stop)
            on_vectors(chosen, vectors[chosen])
    return vectors


@dataclass(frozen=True)
class Unfinished:
    """What is encoded of a batch that is not: vectors in float32 by row, for the run that forms this batch again."""

    batch: str
    """Digest of the batch's rows."""
    vectors: Mapping[int, Vectors]


@dataclass(kw_only=True)
class Embed:
    """`batches` and `chunks` were encoded so far, for whoever watches."""

    encoder: Encoder
    budget: TokenBudget = field(default_factory=TokenBudget)
    vector_dtype: str = "float32"
    """How vectors are kept; they are computed as the encoder computes."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set from another thread: the stage ends before its next device batch."""
    kept: Unfinished | None = None
    """Of the run before, which was stopped inside a batch."""
    batches: int = 0
    chunks: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def unfinished(self) -> Unfinished | None:
        """What is encoded of the batch at work; what the run before left, until a batch is at work."""
        with self._lock:
            return self.kept and Unfinished(self.kept.batch, dict(self.kept.vectors))

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield self._embed(batch)

    def _embed(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        rows = batch["ids"].to_pylist()
        places = [place for place, row in enumerate(rows) if row is not None]
        vectors: list[bytes | None] = [None] * len(rows)
        if places:
            found = self._encoded([rows[index] for index in places])
            stored = found.astype("<f4" if self.vector_dtype == "float32" else "<f2")
            for place, vector in zip(places, stored):
                vectors[place] = vector.tobytes()
            self.batches += 1
        counts = [None if row is None else len(row) for row in rows]
        dims = [None if row is None else self.encoder.dim for row in rows]
        arrays = [batch[column.name] for column in CHUNKS if column.name != "ids"]
        arrays += [pa.array(counts, pa.int32()), pa.array(dims, pa.int32()), pa.array(vectors, pa.binary())]
        return pa.record_batch(arrays, schema=SCHEMA.with_metadata(batch.schema.metadata))

    def _encoded(self, ids: Sequence[Sequence[int]]) -> Vectors:
        batch = digest_json([self.encoder.batch_tokens, ids])
        known = dict(self.kept.vectors) if self.kept and self.kept.batch == batch else {}
        done = dict(known)
        with self._lock:
            self.kept = Unfinished(batch, done)

        def note(places: npt.NDArray[np.int64], vectors: Vectors) -> None:
            with self._lock:
                done.update(zip(places.tolist(), vectors))
                self.chunks += len(places)

        found = encode_all(self.encoder, ids, self.budget, stop=self.stop, on_vectors=note, known=known)
        with self._lock:
            self.kept = None
        return found
