"""How far a version is: totals, documents and chunks of each type, and the state of the newest run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from moai.reembedding.monitor.state import State, bar, is_paused, show
from moai.reembedding.runs import clock


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    return show(lines, argv, environ, "monitor_re_embedding_progress.py", __doc__ or "")


def lines(state: State) -> Iterator[str]:
    yield f"Version {state.version_id} at {state.at.isoformat(timespec='seconds')}"
    yield (
        f"documents  {state.done:,} of {state.total:,} ({state.share:.1%}), {state.skipped:,} of them recorded without "
        f"chunks; {state.chunks:,} chunks"
    )
    for name, of in state.by_type.items():
        per_document = f"{of.chunks / of.done:.2f}" if of.done else "-"
        yield (
            f"{name:25} {of.total:>8,} total {of.done:>8,} done {of.chunks:>9,} chunks {per_document:>7} chunks/doc  "
            f"{bar(of.done / of.total if of.total else 1.0)}"
        )
    yield f"run        {_run(state)}"


def _run(state: State) -> str:
    if not state.run:
        return f"none of moai; python -m moai reembed versions says what is in version {state.version_id}"
    word = state.run["state"]
    if is_paused(state):
        word = "paused"
    elif word == "running" and not state.is_running:
        word = "died"
    said = f"{state.run['id']} {word}, started {state.run['started_at']}, heartbeat {state.run['heartbeat_at']}"
    if state.is_running and state.pace:
        said += f", {state.pace.chunks:,.1f} chunks/s, about {clock(state.eta_seconds)} left"
    return f"{said} ({state.run['message']})" if state.run.get("message") else said
