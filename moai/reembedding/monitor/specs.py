"""What this machine is for re-embedding, and the flags that fit it. Sizes follow what this process may use, not what
the host has.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moai.core import resources
from moai.core.config import option, resolve
from moai.reembedding.database import apsw, sqlite_version, wal_reset_bug
from moai.reembedding.options import GIB, cuda_bytes, embedding_batch_size, pragmas


@dataclass(frozen=True, kw_only=True)
class SpecsConfig:
    """Looking at the machine."""

    db: str = option("data/lawfirm_v2.db", "the law database, for the free space beside it")


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    config = resolve([SpecsConfig], argv, environ, prog="check_system_specs.py", description=__doc__ or "")[SpecsConfig]
    machine = resources.detect(Path(config.db).parent, environ=environ)
    for line in lines(machine, cuda_bytes("auto") if machine.gpus else None):
        print(line)
    return 0


def recommended(machine: resources.Machine, gpu_bytes: int | None) -> dict[str, int]:
    memory = machine.memory_bytes.value / GIB
    documents = 500 if memory > 16 else 300 if memory > 8 else 100
    return {
        "doc-batch-size": documents,
        "embedding-batch-size": embedding_batch_size(machine.memory_bytes.value, cuda_bytes=gpu_bytes).value,
        "commit-interval": 5 if memory > 4 else 2,
    }


def lines(machine: resources.Machine, gpu_bytes: int | None) -> Iterator[str]:
    yield f"CPUs       {machine.cpus.value} ({machine.cpus.reason})"
    yield (
        f"memory     {machine.memory_bytes.value / GIB:.1f} of {machine.total_memory_bytes / GIB:.1f} GiB "
        f"({machine.memory_bytes.reason})"
    )
    yield f"GPUs       {machine.gpus}" + (f", the first with {gpu_bytes / GIB:.1f} GiB" if gpu_bytes else "")
    yield f"disk       {machine.disk_free_bytes / GIB:.1f} GiB free beside the database"
    version = ".".join(map(str, sqlite_version()))
    bug = "; it has the WAL-reset bug: pip install apsw brings a newer one" if wal_reset_bug(sqlite_version()) else ""
    yield f"SQLite     {version} ({'apsw' if apsw else 'standard library'}){bug}"
    yield "PRAGMA     " + ", ".join(f"{name} {value}" for name, value in pragmas(machine.memory_bytes.value).items())
    flags = [word for name, value in recommended(machine, gpu_bytes).items() for word in (f"--{name}", str(value))]
    yield f"use        {shlex.join(flags)}"
