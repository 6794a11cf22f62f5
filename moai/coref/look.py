"""`moai coref look`: samples of a corpus drawn on their text, as lines or as a page. The same seed shows the same ones.

한국은행은 금리를 올렸다. ... 시장에서는 ⟦한국은행⟧의 결정을 ...
[한국은행] is the antecedent, ⟦한국은행⟧ is masked and asked for, ▁▁ hides another copy
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moai.core.errors import ConfigError
from moai.core.files import write_atomic
from moai.core.pages import page
from moai.coref import report
from moai.coref.mlm_tokens import load_mlm_tokenizer
from moai.coref.samples import SPLITS
from moai.coref.statistics import chosen_samples
from moai.prepared.formats import ENTITY_COREF
from moai.prepared.manifest import Prepared

_AROUND = 60
"""Characters of text shown on either side of what is marked."""


def look(directory: Path, *, samples: int, seed: int, html: Path | None = None) -> Iterator[str]:
    """Lines about `samples` samples drawn at random; with `html`, a page instead. Raises DamagedError, ConfigError."""
    if samples < 1:
        raise ConfigError(f"--samples {samples}: must be at least 1")
    prepared = Prepared.open(directory, recipe=ENTITY_COREF)
    content = prepared.content
    shards = [shard for shard in content["shards"] if shard["file"].partition("/")[0] in SPLITS]
    paths, rows = [directory / shard["file"] for shard in shards], [shard["rows"] for shard in shards]
    drawn = np.random.default_rng(seed).permutation(sum(rows))[:samples]
    found = list(chosen_samples(paths, rows, sorted(drawn.tolist())))
    decoder = load_mlm_tokenizer(str(directory), content["config"]["mask_token"]).reference
    mask_id = content["tokenizer"]["mask_id"]
    if html is None:
        for number, sample in enumerate(found, start=1):
            yield from _lines(number, sample, report.pieces(sample, decoder, mask_id))
        return
    name = f"entity_coref_v2_{content['seq_len']}"
    head = f"<h1>{name}</h1><p class=soft>{len(found)} of {content['rows']:,} samples, seed {seed}.</p>{report.LEGEND}"
    articles = [report.shown(number, sample, decoder, mask_id) for number, sample in enumerate(found, start=1)]
    whole = page(name, [head, *articles], style=report.STYLE, lang="ko")
    write_atomic(html, whole.encode("utf-8", "replace"))
    yield str(html)


def _lines(number: int, sample: dict[str, Any], pieces: list[tuple[str, str]]) -> Iterator[str]:
    yield (
        f"{number}. {sample['target']} · {sample['kind']} · {sample['distance']:,} characters · difficulty "
        f"{sample['difficulty']:.2f} · {sample['doc_id']}"
    )
    frames = {report.ANTECEDENT: "[{}]", report.MASK: "⟦{}⟧", report.HIDDEN: "▁▁"}
    shown = []
    for at, (what, text) in enumerate(pieces):
        if what:
            shown.append(" " * text.startswith(" ") + frames[what].format(text.strip()))
            continue
        near = [at > 0, at + 1 < len(pieces)]  # behind something marked, before something marked
        if len(text) > _AROUND * sum(near) + 5:
            text = f"{text[:_AROUND] if near[0] else ''} … {text[-_AROUND:] if near[1] else ''}"
        shown.append(text)
    yield "   " + "".join(shown)
