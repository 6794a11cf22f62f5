"""What this machine is for re-embedding, and how many threads torch should use: the scripts check_system_specs.py and
check_pytorch_threads.py. Sizes follow what this process may use.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moai.core import resources
from moai.core.config import option, resolve
from moai.core.without_pandas import with_pandas
from moai.doctor.environment import check_cores
from moai.reembedding.database import apsw, sqlite_version, wal_reset_bug
from moai.reembedding.options import GIB, cuda_bytes, doc_batch_size, embedding_batch_size, pragmas

_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS"
)  # fmt: skip
_SIZE, _ROUNDS = 768, 3


@dataclass(frozen=True, kw_only=True)
class SpecsConfig:
    """Looking at the machine."""

    db: str = option("data/lawfirm_v2.db", "the law database, for the free space beside it")


@dataclass(frozen=True, kw_only=True)
class ThreadsConfig:
    """Looking at threads."""

    measure: bool = option(True, "multiply matrices of a transformer's size for a second or two")


def specs(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    said = "What this machine is for re-embedding, and the flags that fit it."
    config = resolve([SpecsConfig], argv, environ, prog="check_system_specs.py", description=said)[SpecsConfig]
    machine = resources.detect(Path(config.db).parent, environ=environ)
    print("\n".join(specs_lines(machine, cuda_bytes("auto") if machine.gpus else None)))
    return 0


def threads(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    said = "Which threads torch uses here, and whether all of what this process may use is faster than half of it."
    config = resolve([ThreadsConfig], argv, environ, prog="check_pytorch_threads.py", description=said)[ThreadsConfig]
    for line in threads_lines(config.measure, resources.detect(Path.cwd(), environ=environ), environ):
        print(line, flush=True)
    return 0


def recommended(machine: resources.Machine, gpu_bytes: int | None) -> dict[str, int]:
    memory = machine.memory_bytes.value / GIB
    return {
        "doc-batch-size": doc_batch_size(machine.memory_bytes.value),
        "embedding-batch-size": embedding_batch_size(machine.memory_bytes.value, cuda_bytes=gpu_bytes).value,
        "commit-interval": 5 if memory > 4 else 2,
    }


def specs_lines(machine: resources.Machine, gpu_bytes: int | None) -> Iterator[str]:
    memory = machine.memory_bytes
    yield f"CPUs       {machine.cpus.value} ({machine.cpus.reason})"
    yield f"memory     {memory.value / GIB:.1f} of {machine.total_memory_bytes / GIB:.1f} GiB ({memory.reason})"
    yield f"GPUs       {machine.gpus}" + (f", the first with {gpu_bytes / GIB:.1f} GiB" if gpu_bytes else "")
    yield f"disk       {machine.disk_free_bytes / GIB:.1f} GiB free beside the database"
    version = ".".join(map(str, sqlite_version()))
    bug = "; it has the WAL-reset bug: pip install apsw brings a newer one" if wal_reset_bug(sqlite_version()) else ""
    yield f"SQLite     {version} ({'apsw' if apsw else 'standard library'}){bug}"
    yield "PRAGMA     " + ", ".join(f"{name} {value}" for name, value in pragmas(memory.value).items())
    flags = [word for name, value in recommended(machine, gpu_bytes).items() for word in (f"--{name}", str(value))]
    yield f"use        {shlex.join(flags)}"


def threads_lines(measure: bool, machine: resources.Machine, environ: Mapping[str, str]) -> Iterator[str]:
    with_pandas()  # torch looks for it
    import torch

    cpus = machine.cpus.value
    yield f"CPUs       {check_cores(machine, environ).value}"
    yield (
        f"torch      {torch.__version__}, {torch.get_num_threads()} threads inside an operation, "
        f"{torch.get_num_interop_threads()} between operations; {torch.backends.cpu.get_cpu_capability()}"
    )
    found = ", ".join(f"{name}={environ[name]}" for name in _VARIABLES if name in environ)
    yield f"variables  {found or 'none of ' + ', '.join(_VARIABLES)}"
    yield f"re-embedding uses OMP_NUM_THREADS where it is set, else {cpus}"
    if measure:
        speeds = {number: _gigaflops(number) for number in sorted({1, max(1, cpus // 2), cpus})}
        yield "measured   " + ", ".join(
            f"{number} thread{'s' if number > 1 else ''}: {speed:.0f} GFLOP/s" for number, speed in speeds.items()
        )
        best = max(speeds, key=lambda number: speeds[number])
        remedy = f": export OMP_NUM_THREADS={best}, for hyper-threads or neighbours share these CPUs"
        yield f"verdict    {best} is fastest{'' if best == cpus else remedy}"


def _gigaflops(threads: int) -> float:
    """The best of some rounds: what else runs here can only slow one down."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = torch.randn(4 * _SIZE, _SIZE), torch.randn(_SIZE, 4 * _SIZE)
        torch.mm(left, right)
        best = float("inf")
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            torch.mm(left, right)
            best = min(best, time.perf_counter() - started)
        return 2 * _SIZE * (4 * _SIZE) ** 2 / best / 1e9
    finally:
        torch.set_num_threads(before)
