"""report.html: the corpus on one self-contained page, made from the manifest and the samples themselves; the same
corpus gives the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from moai.core.pages import bars, page
from moai.coref.samples import IGNORED
from moai.coref.statistics import Statistics
from moai.tokenizers.backends import Reference

_BARS = 24
LEGEND = (
    "<p class=soft>The <mark class=antecedent>antecedent</mark> stays, <mark class=mask>this</mark> is masked and "
    "asked for; dotted where the mask holds more than the name. <mark class=hidden>[MASK]</mark> hides another "
    "copy.</p>"
)
STYLE = """
:root { --antecedent: #bfe3c4; --mask: #ffd9a0; }
@media (prefers-color-scheme: dark) { :root { --antecedent: #23572c; --mask: #74501a; } }
article { border-left: 3px solid var(--line); padding-left: .9rem; margin: 1.3rem 0; }
article p { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { color: inherit; background: var(--antecedent); padding: 0 .15em; border-radius: 3px; }
mark.mask { background: var(--mask); font-weight: 600; }
mark.hidden { background: none; opacity: .5; } .widened { border-bottom: 2px dotted; }
"""


def render(
    content: Mapping[str, Any], samples: Iterable[Mapping[str, Any]], decoder: Reference, measured: Statistics
) -> str:
    """The page. `decoder` turns ids to text; `samples` are rows of the corpus."""
    config, entities, split = content["config"], content["entities"], content["split"]
    mask_id = content["tokenizer"]["mask_id"]
    articles = [shown(number, sample, decoder, mask_id) for number, sample in enumerate(samples, start=1)]
    name = f"entity_coref_v2_{content['seq_len']}"
    parts = [
        f"<h1>{name}</h1><p class=soft>{content['rows']:,} samples ({split['train']:,} train, "
        f"{split['validation']:,} validation) from {content['documents']:,} documents, {entities['unique']:,} names, "
        f"at most {config['max_entity_freq']:,} samples of one ({config['cap_policy']}). Rules {config['rules']}, mode "
        f"{config['mode']}, mask {config['mask']}; "
        f"{content['widened']:,} masks hold more than the name. Kiwi {content['kiwi']['kiwipiepy']}, "
        f"{content['kiwi']['model_type']}.</p>",
        "<h2>Documents, rule by rule</h2>",
        _funnel(content["funnel"]),
        "<h2>Later mentions of repeated names</h2>",
        _funnel(content["mentions"]),
        "<div class=columns><div><h2>Tokens of a sample</h2>",
        _histogram(measured["length"]),
        "</div><div><h2>Characters from antecedent to mask</h2>",
        _histogram(measured["distance"]),
        "</div></div>",
        "<div class=columns><div><h2>Names before the cap</h2>",
        _funnel([(*entry, "") for entry in entities["top_before"]]),
        "</div><div><h2>Names after the cap</h2>",
        _funnel([(*entry, "") for entry in entities["top"]]),
        "</div></div>",
        f"<h2>{len(articles)} samples</h2>{LEGEND}",
        *articles,
    ]
    return page(name, parts, style=STYLE, lang="ko")


ANTECEDENT, MASK, HIDDEN = "antecedent", "mask", "hidden"


def pieces(sample: Mapping[str, Any], decoder: Reference, mask_id: int) -> list[tuple[str, str]]:
    """A sample's text as (what it is, text): "", antecedent, mask, or hidden, where a copy of the name is masked and
    not asked for. Labels stand for what is asked for.

    Each is what decoding adds to the text so far, since a piece alone would be decoded as the beginning of one.
    """
    begin, end = sample["antecedent_begin"], sample["antecedent_end"]
    marks = [
        MASK if label != IGNORED else HIDDEN if token == mask_id else ANTECEDENT if begin <= place < end else ""
        for place, (token, label) in enumerate(zip(sample["input_ids"], sample["labels"]))
    ]
    ids = [token if label == IGNORED else label for token, label in zip(sample["input_ids"], sample["labels"])]
    cuts = [place for place in range(1, len(ids)) if marks[place] != marks[place - 1]]
    texts = ["", *(decoder.decode(ids[:cut]) for cut in (*cuts, len(ids)))]
    return [(marks[cut], until[len(before) :]) for cut, (before, until) in zip((0, *cuts), pairwise(texts))]


def shown(number: int, sample: Mapping[str, Any], decoder: Reference, mask_id: int) -> str:
    """One sample as an article of the page."""
    text = "".join(
        escape(text)
        if not what
        else _marked(
            escape(text), f" class={what}" if sample["span_exact"] or what != MASK else " class='mask widened'"
        )
        for what, text in pieces(sample, decoder, mask_id)
    )
    return (
        f"<article><small>{number} · {escape(sample['target'])} · {sample['distance']:,} characters · "
        f"{len(sample['input_ids']):,} tokens · difficulty {sample['difficulty']:.2f} · {escape(sample['kind'])} · "
        f"{escape(sample['source'])} {escape(sample['doc_id'])}</small><p>{text}</p></article>"
    )


def _marked(text: str, attributes: str = "") -> str:
    """The blanks that decoding puts before a word stay outside."""
    word = text.lstrip()
    return f"{text[: len(text) - len(word)]}<mark{attributes}>{word}</mark>"


def _funnel(steps: Sequence[Sequence[Any]]) -> str:
    """Rows of (name, number, what), as long as their numbers; `lost` has a colour of its own."""
    most = max((number for _, number, _ in steps), default=0) or 1
    return bars((name, number, number / most, "lost" if what == "lost" else "") for name, number, what in steps)


def _histogram(counts: Counter[int]) -> str:
    if not counts:
        return "<p class=soft>none</p>"
    low, high = min(counts), max(counts) + 1
    width = max(1, -(-(high - low) // _BARS))
    bins = dict.fromkeys(range(low, high, width), 0)
    for value, number in counts.items():
        bins[low + (value - low) // width * width] += number
    return _funnel(
        [
            (f"{start:,}" if width == 1 else f"{start:,} – {start + width - 1:,}", number, "")
            for start, number in bins.items()
        ]
    )
