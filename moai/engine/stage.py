"""Global steps: pipelines, and a pure `reduce` from their finished shards to a decision, of which the next stage's
pipelines are made.

    read = Stage(pipelines=lambda _: [candidates], reduce=lambda _, done: choose(done), watch=...)
    made = Stage(pipelines=lambda chosen: [samples(chosen)], reduce=lambda chosen, done: (chosen, done), watch=...)
    chosen, done = run_stages((read, made), executor)

A stage keeps no state of its own. It resumes because finished shards have receipts, and `reduce` sees nothing but these
and the files they speak of, so it decides the same again. A reduce that is too large for one process is a stage too:
its sources are the shards of the stage before, and what is left to reduce is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from moai.core.failpoints import failpoint
from moai.engine.executor import Executor
from moai.engine.pipeline import Pipeline
from moai.engine.run import Done, run

Before = TypeVar("Before")
After = TypeVar("After")
Results = list[list[Done]]
"""The finished shards of each pipeline, in the order of its source."""


class Watch(Protocol):
    """Who hears how far a stage is. What it raises ends the run; finished shards stay."""

    def on_documents(self, number: int) -> None:
        """So many documents more were worked on."""

    def on_shard(self, done: Done) -> None:
        """A shard was finished or found finished, in any order."""

    def close(self, results: Results) -> None:
        """All shards are finished; the decision comes next."""


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[Before, After]):
    """`Before` is what the stage before decided, `After` what this one decides."""

    pipelines: Callable[[Before], Sequence[Pipeline]]
    reduce: Callable[[Before, Results], After]
    watch: Callable[[Before, Sequence[Pipeline]], Watch]


def run_stages(stages: Sequence[Stage[Any, Any]], executor: Executor, given: Any = None) -> Any:
    """Run one stage after the other. Returns the last decision; `given` is what the first stage is made of. Raises what
    a shard raised.
    """
    for stage in stages:
        pipelines = stage.pipelines(given)
        watch = stage.watch(given, pipelines)
        results = run(pipelines, executor, on_documents=watch.on_documents, on_shard=watch.on_shard)
        watch.close(results)
        given = stage.reduce(given, results)
        failpoint("stage.decided")
    return given
