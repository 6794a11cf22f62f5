"""What a preparation would do, without doing it: `python -m moai plan` with prepare's flags."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from moai.core import resources
from moai.core.distributed import ranks
from moai.core.files import free_bytes
from moai.pretraining.assembly import Request, request, sound_inputs
from moai.pretraining.measuring import signals_of
from moai.pretraining.options import DataConfig
from moai.pretraining.recipe import CALLER, find_prepared, machine_plan, why_missed
from moai.sources.discover import documents_in, many_small_texts, some

_GB = 10**9


def describe(
    config: DataConfig, origins: Mapping[str, str] = CALLER, environ: Mapping[str, str] = os.environ
) -> Iterator[str]:
    """Lines: key, hit or miss and why, shards, disk and memory. Reads no data but the tokenizer, and writes nothing."""
    wanted = request(config.require())
    chosen = machine_plan(wanted, origins, ranks(environ), environ)
    files = sum(len(given.files) for given in wanted.inputs)
    yield f"plan key     {wanted.key}"
    found = find_prepared(wanted)
    if found:
        yield f"cache        hit: {found.path}"
        yield (
            f"             {found.content['documents']:,} documents, {found.content['tokens']:,} tokens, "
            f"{found.content['rows']:,} rows; nothing to do"
        )
        return
    yield f"cache        miss: {why_missed(wanted)}"
    sound_inputs(wanted)
    if config.eval_ratio:
        side = f"{config.eval_ratio:.2%} of the documents, by the hash of their text"
        yield f"held out     {side}: " + ("this plan" if config.held_out else "in a pass of its own (--held_out)")
    for given, entry in zip(wanted.inputs, wanted.entries):
        kind = given.kind.having(txt_document=entry.applied_to(config).txt_document)
        given = replace(given, kind=kind)
        yield (
            f"input        {given.name}: {len(given.files)} {kind.name} files, {given.nominal_bytes:,} bytes"
            + (f", {documents_in(given)}" if kind.plain else "")
        )
        for why, names in given.left_out.items():
            yield f"not read     {given.name}: {why}: {len(names)} ({some(names)})"
        if given.passed_over:
            yield f"passed over  {given.name}: {len(given.passed_over)} ({some(given.passed_over)})"
        if warning := many_small_texts(given):
            yield f"             {warning}"
    if config.judges:
        yield f"judging      a pass of its own measures {', '.join(one.name for one in signals_of(config))}"
        yield "             only what the cache lacks; another Map or --pii mask changes the text: all behind it again"
    shards = _shards(wanted)
    yield f"shards       about {shards:,} of {config.shard_bytes:,} bytes ({files} files)"
    if shards > 20_000:
        yield (
            f"             that is many: --shard_bytes {_larger(wanted):,} would make about "
            f"{wanted.text_bytes // _larger(wanted):,} (another key)"
        )
    itemsize = np.dtype(wanted.tokenizer.dtype).itemsize
    need = wanted.text_bytes * itemsize / 3
    yield (
        f"disk         about {need / _GB:.2f} GB at {itemsize} bytes a token; {free_bytes(wanted.cache) / _GB:.1f} "
        f"GB free in {wanted.cache}"
    )
    workers, each = chosen.num_proc.value, resources.worker_bytes(config.shard_bytes) / _GB
    yield (
        f"memory       about {each:.1f} GB a task of Ray"
        if config.executor == "ray"
        else f"memory       about {max(1, workers) * each:.1f} GB for {max(1, workers)} workers"
    )
    for line in (*resources.lines(chosen), *chosen.warnings):
        yield f"             {line}"


def _shards(wanted: Request) -> int:
    return sum(
        max(1, -(-sum(f.stamp.size * (4 if f.compression else 1) for f in given.files) // wanted.config.shard_bytes))
        for given in wanted.inputs
    )


def _larger(wanted: Request) -> int:
    """The next power of two times the present size that keeps to 20,000 shards."""
    size = wanted.config.shard_bytes
    while wanted.text_bytes // size > 20_000:
        size *= 2
    return size
