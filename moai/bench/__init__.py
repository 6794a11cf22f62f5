"""What preparing costs here: the real pipeline on a slice of the data, then the least that any pipeline must do.

    python -m moai bench --dataset DATA --tokenizer_path DIR [prepare's other flags] [--seconds 10] [--gigabytes 1000]

The slice is whole shards from all over the files, drawn until half of the time is over, prepared into a cache that is
removed. The limit reads, parses and tokenizes the same ranges, from the page cache, in as many processes and threads.
Start-up is outside of both rates.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moai.bench.limit import Bare, ceiling, unit
from moai.bench.report import Lap, Report
from moai.bench.watch import lap_of, watched
from moai.cache.ledger import Ledger
from moai.core.config import option
from moai.core.distributed import ranks
from moai.core.errors import BackendDisagrees, ConfigError, SourceError
from moai.core.files import nearest_existing, storage_errors
from moai.core.stopping import stoppable
from moai.engine.executor import Executor, Order
from moai.engine.pipeline import Receipt, Shard
from moai.pretraining.assembly import Request, Stream, executor_of, pipeline, request, sample, streams
from moai.pretraining.options import DataConfig
from moai.pretraining.recipe import CALLER, machine_plan
from moai.pretraining.tokenizer_backend import Chosen, Wrong, choose, distrusted
from moai.sources.local import LocalSource

PLACES = 16
"""The files of an input are begun at up to this many places, so that a slice holds something of each kind of file."""
_PLACE_SHARDS = 4
"""A place has about this many shards at least: each one cuts a shard of small files short."""
_FOREVER = 10**9


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measurement: how long, and what to reckon from it."""

    seconds: float = option(
        10.0, "how long to measure, about: half of it prepares, the rest is for the limit; a begun shard is finished"
    )
    gigabytes: float = option(1000.0, "also say how long this many GB of such data would take")

    def __post_init__(self) -> None:
        for name in ("seconds", "gigabytes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} = {getattr(self, name)}: must be above 0")


def measure(
    config: DataConfig, bench: BenchConfig, origins: Mapping[str, str] = CALLER, environ: Mapping[str, str] = os.environ
) -> Report:
    """Raises what prepare would raise, and Interrupted; leaves nothing behind."""
    started = time.monotonic() - _process_age()
    if config.executor == "ray":
        raise ConfigError("executor = ray: what is measured are the processes of one machine; leave it away")
    wanted = request(config.require())
    chosen = machine_plan(wanted, origins, ranks(environ), environ)
    workers, threads = chosen.num_proc.value, chosen.threads.value if chosen.num_proc.value else None
    leaves_nothing = stoppable("a measurement leaves nothing behind")
    with storage_errors(wanted.cache), leaves_nothing, _cache_beside(wanted.cache) as cache:
        here = replace(wanted, cache=cache, config=replace(wanted.config, cache_dir=str(cache)))
        # As prepare's, but that this module is loaded too, and that no worker is replaced.
        executor = executor_of(here, chosen, ["moai.bench"], shards_per_worker=_FOREVER)
        executor.start()
        inputs = streams(here, cache / "attempts", chosen.batch_bytes.value)
        backend = executor.call(
            choose, here.config, here.tokenizer, distrusted(wanted.cache), sample(inputs), chosen.threads.value
        )
        draw = _Draw(inputs, least=max(1, workers), seconds=bench.seconds / 2)
        try:
            done = _run(here, inputs, backend, executor, draw)
        except BackendDisagrees as error:
            backend = backend.without(Wrong(backend.backend.made_by(), str(error)))
            draw = replace(draw, exhausted=False)
            done = _run(here, inputs, backend, executor, draw)
        laps = tuple(lap_of(shard, receipt) for (_, shard), receipt in done)
        if not sum(lap.counts["tokens.rows"] for lap in laps):
            names = ", ".join(given.spec for given in wanted.inputs)
            raise SourceError(f"{names}: no document is left of what was read; nothing to measure")
        units = [
            (unit(inputs[which], shard, backend.backend), sum(receipt.raw.bytes)) for (which, shard), receipt in done
        ]
        limit = tuple(ceiling(backend.backend, units, processes=max(1, workers), threads=threads, warmed=executor))
    return Report(
        backend=backend,
        workers=chosen.num_proc,
        warnings=chosen.warnings,
        config=config,
        laps=laps,
        limit=limit,
        bare=all(isinstance(work, Bare) for work, _ in units),
        startup_seconds=min(lap.stretch.began for lap in laps) - started,
        total_bytes=_total_bytes(wanted, laps, draw.exhausted),
        whole=draw.exhausted,
        gigabytes=bench.gigabytes,
    )


def _total_bytes(wanted: Request, laps: Sequence[Lap], whole: bool) -> float:
    """Of all data, decompressed. Where its size on disk does not say, it grows by as much as the slice did."""
    read = sum(lap.stretch.bytes for lap in laps)
    if whole:
        return read
    if not any(file.compression or given.kind.columnar for given in wanted.inputs for file in given.files):
        return wanted.nominal_bytes
    return max(read, wanted.nominal_bytes * read / sum(lap.nominal_bytes for lap in laps))


@dataclass
class _Draw:
    """Shards of all inputs, each input and each place in it as far along as the others, until the time is over."""

    inputs: Sequence[Stream]
    least: int
    """Shards to draw whatever the time, one a worker."""
    seconds: float
    exhausted: bool = False

    def __iter__(self) -> Iterator[Order]:
        began = time.monotonic()
        places = [
            _Place(which, part.shards(), part.nominal_bytes)
            for which, stream in enumerate(self.inputs)
            for part in _parts(stream)
        ]
        drawn = 0
        while places:
            if drawn >= self.least and time.monotonic() - began > self.seconds:
                return
            place = min(places, key=lambda place: place.bytes / place.of_bytes)
            if (shard := next(place.shards, None)) is None:
                places.remove(place)
                continue
            place.bytes += shard.nominal_bytes
            drawn += 1
            yield place.stream, shard
        self.exhausted = True


@dataclass
class _Place:
    stream: int
    shards: Iterator[Shard]
    of_bytes: int
    bytes: int = 0


def _run(
    wanted: Request, inputs: Sequence[Stream], backend: Chosen, executor: Executor, draw: _Draw
) -> list[tuple[Order, Receipt]]:
    """Each drawn shard and its receipt. A finished shard's file is removed at once, so the disk does not fill."""
    pipelines = [watched(pipeline(wanted, stream, backend, wanted.cache / "attempts")) for stream in inputs]
    done = []
    with contextlib.closing(executor.map(pipelines, iter(draw), lambda _: None)) as finished:  # type: ignore[type-var]
        for order, receipt, _ in finished:
            done.append((order, receipt))
            Ledger(wanted.cache).shard(receipt.shard_key).unlink(missing_ok=True)
    return done


def _parts(stream: Stream) -> Iterator[LocalSource]:
    """The source as several, each of a run of its files."""
    source = stream.source
    if not isinstance(source, LocalSource):
        raise ConfigError(f"{stream.given.name}: is no files; bench measures files")
    files = source.files
    places = min(PLACES, len(files), max(1, source.nominal_bytes // (_PLACE_SHARDS * source.shard_bytes)))
    step = -(-len(files) // places)
    return (replace(source, files=files[at : at + step]) for at in range(0, len(files), step))


@contextlib.contextmanager
def _cache_beside(cache: Path) -> Iterator[Path]:
    """A cache for a while, on the disk of the real one: beside it, or in it where it has a disk of its own."""
    own, above = nearest_existing(cache), nearest_existing(cache.parent)
    place = above if own.stat().st_dev == above.stat().st_dev and os.access(above, os.W_OK) else own
    with tempfile.TemporaryDirectory(prefix=".moai-bench-", dir=place, ignore_cleanup_errors=True) as folder:
        for name in ("shards", "attempts"):
            (Path(folder) / name).mkdir()
        yield Path(folder)


def _process_age() -> float:
    """Seconds since this process began, as far as the kernel says; 0 where it does not."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
