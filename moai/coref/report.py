"""report.html: the corpus on one self-contained page, made from the manifest and the samples themselves; the same
corpus gives the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from moai.core.pages import bars, page
from moai.coref.samples import IGNORED
from moai.tokenizers.backends import Reference

_BARS = 24
_STYLE = """
:root { --antecedent: #bfe3c4; --mask: #ffd9a0; }
@media (prefers-color-scheme: dark) { :root { --antecedent: #23572c; --mask: #74501a; } }
article { border-left: 3px solid var(--line); padding-left: .9rem; margin: 1.3rem 0; }
article p { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { color: inherit; background: var(--antecedent); padding: 0 .15em; border-radius: 3px; }
mark.mask { background: var(--mask); font-weight: 600; } .widened { border-bottom: 2px dotted; }
"""


def render(
    content: Mapping[str, Any],
    samples: Iterable[Mapping[str, Any]],
    decoder: Reference,
    lengths: Counter[int],
    distances: Counter[int],
) -> str:
    """The page. `decoder` turns ids to text; `samples` are rows of the corpus."""
    config, entities = content["config"], content["entities"]
    shown = [_sample(number, sample, decoder) for number, sample in enumerate(samples, start=1)]
    name = f"entity_coref_v2_{content['seq_len']}"
    parts = [
        f"<h1>{name}</h1><p class=soft>{content['rows']:,} samples ({content['split']['train']:,} train, "
        f"{content['split']['validation']:,} validation) from "
        f"{content['documents']:,} documents, {entities['unique']:,} names, at most {config['max_entity_freq']:,} "
        f"samples of one ({config['cap_policy']}). "
        f"Mode {config['mode']}; {content['widened']:,} masks hold more than the name. Kiwi "
        f"{content['kiwi']['kiwipiepy']}, {content['kiwi']['model_type']}.</p>",
        "<h2>Documents, rule by rule</h2>",
        _funnel(content["funnel"]),
        "<h2>Later mentions of repeated names</h2>",
        _funnel(content["mentions"]),
        "<div class=columns><div><h2>Tokens of a sample</h2>",
        _histogram(lengths),
        "</div><div><h2>Characters from antecedent to mask</h2>",
        _histogram(distances),
        "</div></div>",
        "<div class=columns><div><h2>Names before the cap</h2>",
        _ranking(entities["top_before"]),
        "</div><div><h2>Names after the cap</h2>",
        _ranking(entities["top"]),
        "</div></div>",
        f"<h2>{len(shown)} samples</h2><p class=soft>The <mark>antecedent</mark> stays, <mark class=mask>this</mark> "
        f"is masked and asked for; dotted where the mask holds more than the name.</p>",
        *shown,
    ]
    return page(name, parts, style=_STYLE, lang="ko")


def pieces(sample: Mapping[str, Any], decoder: Reference) -> tuple[str, str, str, str, str]:
    """A sample's text before, in and behind the antecedent, in and behind the mask, where labels stand for what is
    masked.

    Each is what decoding adds to the text so far, since a piece alone would be decoded as the beginning of one.
    """
    ids = [label if label != IGNORED else token for token, label in zip(sample["input_ids"], sample["labels"])]
    masked = [place for place, label in enumerate(sample["labels"]) if label != IGNORED]
    cuts = [
        sample["antecedent_begin"],
        sample["antecedent_end"],
        *((masked[0], masked[-1] + 1) if masked else ()),
        len(ids),
    ]
    texts, before = [], ""
    for cut in cuts:
        until = decoder.decode(ids[:cut])
        texts.append(until[len(before) :])
        before = until
    return (texts[0], texts[1], texts[2], texts[3], texts[4]) if masked else (texts[0], texts[1], texts[2], "", "")


def _sample(number: int, sample: Mapping[str, Any], decoder: Reference) -> str:
    before, antecedent, between, mask, behind = (escape(text) for text in pieces(sample, decoder))
    style = " class=mask" if sample["span_exact"] else " class='mask widened'"
    return (
        f"<article><small>{number} · {escape(sample['target'])} · {sample['distance']:,} characters · "
        f"{len(sample['input_ids']):,} tokens · {escape(sample['source'])} "
        f"{escape(sample['doc_id'])} · "
        f"{sample['split']}</small>"
        f"<p>{before}{_marked(antecedent)}{between}{_marked(mask, style)}{behind}</p></article>"
    )


def _marked(text: str, attributes: str = "") -> str:
    """The blanks that decoding puts before a word stay outside."""
    word = text.lstrip()
    return f"{text[: len(text) - len(word)]}<mark{attributes}>{word}</mark>"


def _funnel(steps: Sequence[Sequence[Any]]) -> str:
    """Rows of (name, number, what): `lost` at this step, or what is `left`."""
    most = max((number for _, number, _ in steps), default=0)
    return bars((name, number, number / max(1, most), "lost" if what == "lost" else "") for name, number, what in steps)


def _histogram(counts: Counter[int]) -> str:
    if not counts:
        return "<p class=soft>none</p>"
    low, high = min(counts), max(counts) + 1
    width = max(1, -(-(high - low) // _BARS))
    bins = Counter(dict.fromkeys(range(low, high, width), 0))
    for value, number in counts.items():
        bins[low + (value - low) // width * width] += number
    most = max(bins.values())
    return bars(
        (f"{start:,}" if width == 1 else f"{start:,} – {start + width - 1:,}", number, number / most, "")
        for start, number in sorted(bins.items())
    )


def _ranking(names: Sequence[Sequence[Any]]) -> str:
    most = max((number for _, number in names), default=1)
    return bars((name, number, number / most, "") for name, number in names)
