"""Search in one version: exactly, by reading every vector once, and through a FAISS index that is held against that.

top = brute_force(database, 5, queries, k=5)        # [[(cosine, chunk id), ...] for each query]
noted = build_index(database, 5, "flat")            # beside the database; raises where it finds something else
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moai.core.errors import ConfigError, DamagedError, SourceError, StorageError
from moai.reembedding.database import Database, Row, staged

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
Found = list[tuple[float, int]]
_PAGE = 4096
_QUERIES = 32
_TOP = 5
_TIE = 1e-5
"""Two ways to sum a product in float32 differ by less; chunks of the same text tie exactly."""
_LEAST_RECALL = {"flat": 1.0, "hnsw": 0.95}
_FACTORY = {"flat": "IDMap2,Flat", "hnsw": "IDMap2,HNSW32"}


def pages(
    database: Database, version_id: int, source_types: Sequence[str] = ()
) -> Iterator[tuple[npt.NDArray[np.int64], Vectors]]:
    """(chunk ids, vectors of length 1) in the order of the ids; of these source types, where any is named."""
    last, dim = 0, None
    of_types = f"AND source_type IN ({','.join('?' * len(source_types))}) " if source_types else ""
    sql = (
        "SELECT text_chunks.id, dim, vector FROM text_chunks JOIN embeddings ON chunk_id = text_chunks.id "
        f"WHERE embedding_version_id = ? AND text_chunks.id > ? {of_types}ORDER BY text_chunks.id LIMIT ?"
    )
    while rows := database.rows(sql, (version_id, last, *source_types, _PAGE)):
        last = rows[-1][0]
        dim = dim or rows[0][1]
        vectors = np.stack([_vector(row, dim, database.path) for row in rows])
        yield np.array([row[0] for row in rows], np.int64), _normalized(vectors)


def brute_force(
    database: Database, version_id: int, queries: Vectors, *, k: int = _TOP, source_types: Sequence[str] = ()
) -> list[Found]:
    """The k best of each query, best first; equal scores by chunk id."""
    best: list[Found] = [[] for _ in queries]
    for ids, vectors in pages(database, version_id, source_types):
        if vectors.shape[1] != queries.shape[1]:
            raise ConfigError(
                f"version {version_id} holds vectors of {vectors.shape[1]} dimensions, the query has "
                f"{queries.shape[1]}: use the version's own model"
            )
        for place, row in enumerate(queries @ vectors.T):
            top = np.argpartition(-row, min(k, len(row)) - 1)[:k]
            best[place] = heapq.nlargest(k, best[place] + [(float(row[index]), -int(ids[index])) for index in top])
    return [[(score, -negative) for score, negative in found] for found in best]


def index_path(database: Path, version_id: int) -> Path:
    return database.with_name(f"{database.name}.v{version_id}.faiss")


def build_index(database: Database, version_id: int, kind: str) -> dict[str, Any]:
    """Build, check and publish the index. Returns what is noted of it. Raises DamagedError where it misses too much."""
    faiss = _faiss()
    index: Any = None
    for ids, vectors in pages(database, version_id):
        if index is None:
            index = faiss.index_factory(vectors.shape[1], _FACTORY[kind], faiss.METRIC_INNER_PRODUCT)
        index.add_with_ids(np.ascontiguousarray(vectors), ids)
    if index is None:
        raise SourceError(f"{database.path}: version {version_id} has no embeddings to index")
    recall = _recall(index, database, version_id)
    if recall < _LEAST_RECALL[kind]:
        raise DamagedError(
            f"the {kind} index of version {version_id} finds {recall:.1%} of what brute force finds, at least "
            f"{_LEAST_RECALL[kind]:.0%} is needed; it is not used"
        )
    final = index_path(database.path, version_id)
    try:
        with staged(final, "reembed.faiss_rename") as part:
            faiss.write_index(index, str(part))
    except (OSError, RuntimeError) as error:
        raise StorageError(
            f"{final}: the index could not be written ({error}); free space there. The version is kept: run again to "
            f"index and activate it"
        ) from error
    said = "FAISS index (%s): %s vectors, recall %.3f against brute force: %s"
    logger.info(said, kind, f"{index.ntotal:,}", recall, final)
    return {"kind": kind, "vectors": int(index.ntotal), "recall": round(recall, 4), "bytes": final.stat().st_size}


def is_indexed(database: Path, version_id: int, noted: dict[str, Any], kind: str) -> bool:
    """Whether the file is there, of this kind, and as long as it was when it was written."""
    path = index_path(database, version_id)
    return noted.get("kind") == kind and path.is_file() and path.stat().st_size == noted.get("bytes")


def search_index(
    database: Path, version_id: int, noted: dict[str, Any], queries: Vectors, *, k: int = _TOP
) -> list[Found]:
    """Raises DamagedError where the file is not the index that was noted, ConfigError for queries of another model."""
    path = index_path(database, version_id)
    way_out = f"delete that file and build it again with --faiss {noted['kind']}"
    if not path.is_file():
        raise DamagedError(f"{path}: the version's index is gone; {way_out}")
    try:
        index = _faiss().read_index(str(path))
    except RuntimeError as error:
        raise DamagedError(f"{path}: not a whole FAISS index; {way_out}") from error
    if int(index.ntotal) != noted["vectors"]:
        raise DamagedError(f"{path}: {index.ntotal} vectors where the version notes {noted['vectors']}; {way_out}")
    if index.d != queries.shape[1]:
        raise ConfigError(
            f"{path} holds vectors of {index.d} dimensions, the query has {queries.shape[1]}: use the version's own "
            f"model, or {way_out}"
        )
    found = zip(*index.search(np.ascontiguousarray(queries), min(k, index.ntotal)))
    return [[(float(score), int(chunk_id)) for score, chunk_id in zip(*row) if chunk_id >= 0] for row in found]


def _recall(index: Any, database: Database, version_id: int) -> float:
    """Share of the brute-force top five that the index finds, by score: equal texts may come in any order."""
    queries = _sample(database, version_id)
    scores, _ = index.search(np.ascontiguousarray(queries), _TOP)
    hits = total = 0
    for row, exact in zip(scores, brute_force(database, version_id, queries)):
        total += len(exact)
        hits += sum(abs(float(score) - wanted) <= _TIE for score, (wanted, _) in zip(row, exact))
    return hits / max(1, total)


def _sample(database: Database, version_id: int) -> Vectors:
    """Vectors spread over the version, a little off, so that a query is not its own answer only."""
    count = int(database.value("SELECT count(*) FROM text_chunks WHERE embedding_version_id = ?", (version_id,)))
    step = max(1, count // _QUERIES)
    kept, seen = [], 0
    for ids, vectors in pages(database, version_id):
        kept += [vectors[place] for place in range((-seen) % step, len(ids), step)]
        seen += len(ids)
    queries = np.stack(kept[:_QUERIES])
    noise = np.random.default_rng(0).standard_normal(queries.shape).astype(np.float32)
    return _normalized(queries + 0.3 * _normalized(noise))


def _normalized(vectors: Vectors) -> Vectors:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)


def _vector(row: Row, dim: int, path: Path) -> Vectors:
    """`dim` is that of the version's first vector."""
    chunk_id, own, data = row
    if not isinstance(data, bytes) or own != dim or len(data) not in (2 * dim, 4 * dim):
        size = len(data) if isinstance(data, bytes) else "no"
        raise DamagedError(
            f"{path}: the vector of chunk {chunk_id} has {size} bytes and notes {own} dimensions, its version has "
            f"{dim}: delete its row of embeddings and run the build again, which embeds that document anew"
        )
    return np.frombuffer(data, "<f4" if len(data) == 4 * dim else "<f2").astype(np.float32)


def _faiss() -> Any:
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it tells at length which instruction sets it tries
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("--faiss needs the package faiss-cpu: pip install faiss-cpu") from error
    return faiss
