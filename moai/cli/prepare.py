"""Commands over raw data: what would be done, doing it, why it is another key, how fast it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moai.cli import Call
from moai.cli.show import show
from moai.core.without_pandas import numpy_without_threads
from moai.pretraining.options import DataConfig, SaveConfig
from moai.training.arguments import TrainConfig

if TYPE_CHECKING:
    from moai.prepared.manifest import Prepared

ONE_FILE = (DataConfig, SaveConfig, TrainConfig)
"""One YAML file serves preparation, saving and training."""


def prepare(call: Call) -> int:
    resolved = call.settings(DataConfig, SaveConfig, others=ONE_FILE)
    numpy_without_threads()
    from moai.pretraining.saving import prepare_and_save  # not for --help, which is there at once

    prepared = prepare_and_save(resolved[DataConfig], resolved[SaveConfig], origins=resolved.origins)
    saving = resolved[SaveConfig]
    there = []
    if saving.publish:
        from moai.prepared.stored import url_of

        there = [f"published    {url_of(prepared, saving.publish)}"]
    return show([*_summary(prepared), *there, prepared.path])


def plan(call: Call) -> int:
    resolved = call.settings(DataConfig, others=ONE_FILE)
    from moai.pretraining.plan import describe

    return show(describe(resolved[DataConfig], resolved.origins))


def quality(call: Call) -> int:
    from moai.core.stopping import stoppable
    from moai.pretraining.quality import QualityConfig, judge

    resolved = call.settings(DataConfig, QualityConfig, others=ONE_FILE)
    with stoppable("what was measured is kept, run again to go on"):
        return show(judge(resolved[DataConfig], resolved[QualityConfig], resolved.origins))


def explain(call: Call) -> int:
    from moai.pretraining.explain import ExplainConfig
    from moai.pretraining.explain import explain as lines

    resolved = call.settings(DataConfig, ExplainConfig, others=ONE_FILE)
    return show(lines(resolved[DataConfig], resolved[ExplainConfig].against))


def bench(call: Call) -> int:
    from moai.bench import BenchConfig, measure

    resolved = call.settings(DataConfig, BenchConfig, others=ONE_FILE)
    return show(measure(resolved[DataConfig], resolved[BenchConfig], resolved.origins).lines())


def _summary(prepared: Prepared) -> Iterator[str]:
    content = prepared.content
    records, tokens = content["records"], content["token_counts"]
    kept = "held out" if content["config"].get("held_out") else "kept"
    yield (
        f"documents    {records['read']:,} read = {records['kept']:,} {kept} + {records['filtered']:,} filtered + "
        f"{records['quarantined']:,} quarantined"
    )
    ends = tokens["eos"] + tokens.get("bos", 0)
    yield (
        f"tokens       {tokens['text']:,} of text + {ends:,} ends = {tokens['rows']:,} in rows + "
        f"{tokens.get('dropped', 0):,} dropped"
        + (f"; {special:,} special ones stood in the text" if (special := tokens.get("special_in_text")) else "")
    )
    if chat := content.get("chat"):
        counts = chat["counts"]
        yield (
            f"learned      {tokens.get('trained', 0):,} tokens of {counts['examples']:,} examples, "
            f"{counts['turns'] - counts.get('turns_unverified', 0):,} of {counts['turns']:,} turns; "
            f"left out: {counts.get('turns_unverified', 0):,} turns that could not be verified, "
            f"{counts.get('too_long', 0):,} examples too long, {counts.get('untrained', 0):,} with nothing to learn"
        )
    yield (
        f"rows         {content['rows']:,} of {content['seq_len']}, fill rate {content['fill_rate']:.4f}, "
        f"{prepared.columns[0].type}, {content['packing']}"
    )
    if side := prepared.held_out:
        yield f"held out     {side.content['documents']:,} documents, {side.content['rows']:,} rows, in {side.path}"
    yield f"content      {prepared.content_digest}"
