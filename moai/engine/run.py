"""Drive pipelines: shards without a receipt go to an executor, receipts come back in shard order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from moai.engine.executor import Executor, Order
from moai.engine.pipeline import Pipeline, Receipt, Shard, shard_key


@dataclass(frozen=True)
class Done:
    """One shard of the result. `pipeline` is the index of the pipeline it came through."""

    pipeline: int
    shard: Shard
    receipt: Receipt
    reused: bool


def run(
    pipelines: Sequence[Pipeline],
    executor: Executor,
    *,
    on_documents: Callable[[int], None],
    on_shard: Callable[[Done], None],
) -> list[list[Done]]:
    """All shards of each pipeline's source, in the sources' order. One stream feeds the workers, so that none waits
    between sources.

    `on_shard` hears of each shard as it finishes, in any order. Raises what a shard raised; what was committed before
    stays committed, so that running again goes on from there.
    """
    order: list[list[str]] = [[] for _ in pipelines]
    done: dict[str, Done] = {}

    def finish(which: int, shard: Shard, receipt: Receipt, reused: bool) -> None:
        done[shard.id] = Done(which, shard, receipt, reused)
        pipelines[which].source.remember(shard, receipt.raw)
        on_shard(done[shard.id])

    def unfinished() -> Iterator[Order]:
        for which, pipeline in enumerate(pipelines):
            for shard in pipeline.source.shards():
                assert shard.id not in done, f"two shards are called {shard.id}"
                order[which].append(shard.id)
                receipt = pipeline.sink.committed(shard_key(shard.raw, pipeline.transform_key)) if shard.raw else None
                if receipt:
                    finish(which, shard, receipt, True)
                else:
                    yield which, shard

    for (which, shard), receipt, reused in executor.map(pipelines, unfinished(), on_documents):
        finish(which, shard, receipt, reused)
    return [[done[shard_id] for shard_id in ids] for ids in order]


def total(done: Iterable[Done]) -> Counter[str]:
    """The counters of these shards, summed up."""
    result: Counter[str] = Counter()
    for one in done:
        result.update(one.receipt.counts)
    return result
