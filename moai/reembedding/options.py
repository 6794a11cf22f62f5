"""Every option of re-embedding; each field is a flag, a YAML key and its documentation."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from moai.core.config import Setting, option
from moai.core.errors import ConfigError
from moai.reembedding.chunk import BY_QUERY, STRATEGIES
from moai.reembedding.embed import VECTOR_DTYPES
from moai.reembedding.encoders import BACKENDS, PRECISIONS
from moai.reembedding.kinds import KINDS

INDEXES = ("flat", "hnsw")
DEFAULT_MODEL = "snunlp/KR-SBERT-V40K-klueNLI-augSTS"
"""Of the program that the guide describes."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class ReembedConfig:
    """Re-embedding."""

    db: str = option("data/lawfirm_v2.db", "the law database")
    version_id: int | None = option(
        None,
        "version to build; registered under this number if it is not there. Default: the strategy's active version, "
        "else v1.0.0-<strategy>",
    )
    chunking_strategy: str = option("standard", "how documents are cut", choices=STRATEGIES)
    query_type: str | None = option(
        None, "sizes of `dynamic` for one kind of question instead of by document type", choices=tuple(BY_QUERY)
    )
    source_type: tuple[str, ...] = option((), "only these source types; the version is not activated then")
    limit: int | None = option(None, "embed at most so many documents; the version is not activated then")
    context: str | None = option(
        None,
        "YAML file of what stands before a chunk and how it is cited, by source type. Default: the version's, else "
        "statute and article, court and case number",
    )
    doc_batch_size: int = option(500, "documents of one look into the tables")
    embedding_batch_size: int | None = option(
        None, "chunks handed to the encoder at once; the default follows the memory of the machine or GPU"
    )
    commit_interval: int = option(5, "encoded batches in one transaction")
    commit_seconds: float = option(60.0, "what is encoded is committed after so many seconds at the latest")
    dry_run: bool = option(False, "say what would be done; write nothing, load no model")
    skip_index_optimization: bool = option(False, "create none of the indexes that speed up replacing and counting")
    replace_all_versions: bool = option(
        False, "as the old program: a document's chunks of every version are deleted when it is embedded; no way back"
    )
    backup: bool = option(True, "copy the database before its unique index is migrated")
    questions: str | None = option(
        None, "JSON lines with question, source_type and source_id of its answer: measure the version before activation"
    )
    min_recall: float | None = option(None, "activate only where so large a share of the answers is among the first 10")
    not_worse: bool = option(False, "activate only where no recall is below that of the version that serves")
    activate: bool = option(True, "make the version the active one of its strategy once it is complete")
    model: str | None = option(
        None,
        f"sentence-transformers model: a directory or a hub name. Default: the model that the version names, else "
        f"{DEFAULT_MODEL}",
        env="EMBEDDING_MODEL",
    )
    revision: str | None = option(None, "commit, branch or tag of a hub model")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    backend: str = option("torch", "library that computes", choices=BACKENDS)
    exports: str = option("~/.cache/moai/exports", "where models exported for onnx and openvino are kept")
    precision: str | None = option(
        None,
        "float32, bfloat16, int8, or auto: the fastest one that stays within min_cosine of float32. Default: the "
        "version's, else float32",
        choices=("auto", *PRECISIONS),
    )
    min_cosine: float = option(0.995, "least cosine to float32 that `--precision auto` accepts in its sample")
    vector_dtype: str | None = option(
        None, "how vectors are kept. Default: the version's, else float32", choices=VECTOR_DTYPES
    )
    sqlite_vec: bool = option(True, "keep the vectors in a sqlite-vec table too, where that package is installed")
    faiss: str | None = option(
        None,
        "build an index beside the database and check it against brute force before activation",
        choices=INDEXES,
        bare="flat",
    )

    def __post_init__(self) -> None:
        for name in ("version_id", "doc_batch_size", "embedding_batch_size", "commit_interval", "limit"):
            check_number(name, getattr(self, name))
        check_device(self.device)
        if not self.commit_seconds > 0:
            raise ConfigError(f"commit_seconds = {self.commit_seconds}: above 0")
        for name in self.source_type:
            if name not in KINDS:
                raise ConfigError(f"source_type = {name!r}: choose from {', '.join(KINDS)}")
        if self.query_type and self.chunking_strategy != "dynamic":
            raise ConfigError(
                f"query_type = {self.query_type!r} belongs to --chunking-strategy dynamic, not {self.chunking_strategy}"
            )
        if not 0 < self.min_cosine <= 1:
            raise ConfigError(f"min_cosine = {self.min_cosine}: above 0, at most 1")

    @property
    def source_types(self) -> tuple[str, ...]:
        """In the order of KINDS, so that a different order of the flag changes nothing."""
        return tuple(name for name in KINDS if not self.source_type or name in self.source_type)

    @property
    def is_whole(self) -> bool:
        return self.limit is None and self.source_types == tuple(KINDS)


def check_number(name: str, value: int | None, *, least: int = 1) -> None:
    """Raises ConfigError for a number that SQLite could not hold either."""
    if value is not None and not least <= value < 2**63:
        raise ConfigError(f"{name} = {value}: at least {least}" + (", below 2**63" if value > 0 else ""))


def check_device(device: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError(f"device = {device!r}: choose from auto, cpu, cuda, cuda:N")


def embedding_batch_size(memory_bytes: int, *, cuda_bytes: int | None) -> Setting:
    """The guide's sizes."""
    if cuda_bytes is not None:
        size = _by_memory(cuda_bytes, {8: 4096, 4: 2048, 0: 1024})
        return Setting(size, f"{cuda_bytes / GIB:.1f} GiB of GPU memory")
    size = _by_memory(memory_bytes, {16: 2048, 10: 1536, 8: 1024, 0: 512})
    return Setting(size, f"{memory_bytes / GIB:.1f} GiB of memory available")


def doc_batch_size(memory_bytes: int) -> int:
    """The upper end of the guide's table: 100-200 for 8 GB, 200-300 for 16 GB, 300-500 from 32 GB."""
    return _by_memory(memory_bytes, {32: 500, 16: 300, 8: 200, 0: 100})


def cuda_bytes(device: str) -> int | None:
    """Memory of the GPU that `device` means, without importing torch."""
    if device == "cpu":
        return None
    number = device.partition(":")[2] or "0"
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "-i", number]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return int(found) * 2**20 if found.isdigit() else None


def pragmas(memory_bytes: int) -> Mapping[str, int]:
    """Page cache in KiB (negative: SQLite's way to say KiB) and mapped bytes, by the memory this process may have."""
    cache = _by_memory(memory_bytes, {32: 512, 16: 256, 8: 128, 0: 64})
    return {"cache_size": -cache * 1000, "mmap_size": 2 * cache * 2**20}


def _by_memory(have: int, sizes: Mapping[int, int]) -> int:
    """The size of the first number of GiB that is there. 8 GB as sold are a little less than 8 GiB, hence the 5 %."""
    return next(size for least, size in sizes.items() if have >= least * GIB * 0.95)
