"""Which threads torch uses here, what the environment says, and a short measurement: is all of what this process may
use faster than half of it?
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moai.core import resources
from moai.core.config import option, resolve

_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "RAYON_NUM_THREADS",
)
_SIZE, _ROUNDS = 768, 3


@dataclass(frozen=True, kw_only=True)
class ThreadsConfig:
    """Looking at threads."""

    measure: bool = option(True, "multiply matrices of a transformer's size for a second or two")


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    config = resolve([ThreadsConfig], argv, environ, prog="check_pytorch_threads.py", description=__doc__ or "")[
        ThreadsConfig
    ]
    for line in lines(config, resources.detect(Path.cwd(), environ=environ), environ):
        print(line)
    return 0


def lines(config: ThreadsConfig, machine: resources.Machine, environ: Mapping[str, str]) -> Iterator[str]:
    import torch

    cpus = machine.cpus.value
    yield f"CPUs       {cpus} ({machine.cpus.reason}); the host shows {os.cpu_count()}"
    yield (
        f"torch      {torch.__version__}, {torch.get_num_threads()} threads inside an operation, "
        f"{torch.get_num_interop_threads()} between operations; {torch.backends.cpu.get_cpu_capability()}"
    )
    yield (
        "variables  " + ", ".join(f"{name}={environ[name]}" for name in _VARIABLES if name in environ)
        if any(name in environ for name in _VARIABLES)
        else "variables  none of " + ", ".join(_VARIABLES)
    )
    yield f"re-embedding uses OMP_NUM_THREADS where it is set, else {cpus}"
    if config.measure:
        speeds = {threads: _gigaflops(threads) for threads in sorted({1, max(1, cpus // 2), cpus})}
        yield "measured   " + ", ".join(
            f"{threads} thread{'s' if threads > 1 else ''}: {speed:.0f} GFLOP/s" for threads, speed in speeds.items()
        )
        best = max(speeds, key=lambda threads: speeds[threads])
        yield f"verdict    {best} is fastest" + (
            "" if best == cpus else f": export OMP_NUM_THREADS={best}, for hyper-threads or neighbours share these CPUs"
        )


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
