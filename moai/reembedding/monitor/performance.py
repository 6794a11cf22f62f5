"""How fast a version is built: seconds a document, documents an hour, what is left, a verdict, and where the time
goes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from moai.reembedding.monitor.state import State, bar, show
from moai.reembedding.runs import STAGES, clock

_VERDICTS = ((5.0, "very fast"), (15.0, "fast"), (30.0, "normal"), (float("inf"), "slow"))
"""Seconds a document below which the old program said so."""

_JUDGED_SECONDS = 10.0


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    return show(lines, argv, environ, "check_re_embedding_performance.py", __doc__ or "")


def verdict(seconds_per_document: float) -> str:
    return next(word for below, word in _VERDICTS if seconds_per_document < below)


def lines(state: State) -> Iterator[str]:
    yield f"{bar(state.share, 50)} {state.share:.1%}"
    yield (
        f"processed  {state.done:,} of {state.total:,} documents, {state.total - state.done:,} left; "
        f"{state.chunks:,} chunks"
    )
    if not state.run:
        return
    yield f"started    {state.run['started_at']} (UTC)"
    seconds = {stage: float(state.run[f"seconds_{stage}"]) for stage in STAGES}
    said = ", ".join(f"{stage} {took:.1f}" for stage, took in seconds.items())
    worked = seconds["load"] + seconds["encode"] + seconds["wait"]
    yield f"seconds    {said}; {worked:.1f} in the encoder's thread"
    if state.pace is None or state.pace.documents <= 0:
        yield "speed      not known yet: nothing was embedded"
        return
    each = 1 / state.pace.documents
    yield (
        f"speed      {each:.3f} s a document, {3600 * state.pace.documents:,.0f} documents an hour, "
        f"{state.pace.chunks:,.1f} chunks/s over {clock(state.pace.seconds)} of work: {verdict(each)}"
    )
    yield f"left       {state.left:,} documents, about {clock(state.eta_seconds)}"
    wait, encode = seconds["wait"] - seconds["load"], seconds["encode"]
    if encode > _JUDGED_SECONDS and wait > 0.2 * encode:
        yield (f"advice     the encoder waited {wait:.0f} s for chunks: a larger --doc-batch-size, or a faster disk")
    if verdict(each) == "slow":
        yield (
            "advice     --precision auto computes in bfloat16 or int8 where that stays close to float32; python "
            "scripts/check_pytorch_threads.py shows whether all cores work"
        )
