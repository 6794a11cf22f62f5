"""Drive a pipeline: shards without a receipt go to an executor, receipts come back in shard order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moai.engine.executor import Executor
from moai.engine.pipeline import Pipeline, Receipt, Shard, shard_key


@dataclass(frozen=True)
class Done:
    """One shard of the result."""

    shard: Shard
    receipt: Receipt
    reused: bool


def run(pipeline: Pipeline, executor: Executor, *, on_documents: Callable[[int], None], on_shard: Callable[[Done], None]) -> list[Done]:
    """All shards of the pipeline's source, in the source's order. `on_shard` hears of each as it finishes, in any order.

    Raises what a shard raised. What was committed before stays committed, so that running again goes on from there.
    """
    order: list[str] = []
    done: dict[str, Done] = {}

    def finish(shard: Shard, receipt: Receipt, reused: bool) -> None:
        done[shard.id] = Done(shard, receipt, reused)
        pipeline.source.remember(shard, receipt.raw)
        on_shard(done[shard.id])

    def unfinished() -> Iterator[Shard]:
        for shard in pipeline.source.shards():
            assert shard.id not in done, f"two shards are called {shard.id}"
            order.append(shard.id)
            receipt = pipeline.sink.committed(shard_key(shard.raw, pipeline.transform_key)) if shard.raw else None
            if receipt:
                finish(shard, receipt, True)
            else:
                yield shard

    for finished in executor.map(pipeline, unfinished(), on_documents):
        finish(*finished)
    return [done[shard_id] for shard_id in order]
