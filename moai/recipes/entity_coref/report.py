"""report.html: the corpus on one self-contained page, made from the manifest and the samples themselves; the same corpus gives the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Protocol

from moai.transforms.coref_samples import IGNORED

_BARS = 24
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #69707d; --paper: #fdfdfc; --line: #d9dce1; --bar: #4878a8; --lost: #b9bec7; --antecedent: #bfe3c4; --mask: #ffd9a0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #9aa1ad; --paper: #17191d; --line: #343840; --bar: #6f9fd0; --lost: #50555f; --antecedent: #23572c; --mask: #74501a; } }
body { font: 15px/1.6 system-ui, "Noto Sans KR", "Apple SD Gothic Neo", "Malgun Gothic", sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); } small, .soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; } td, th { padding: .15rem .5rem .15rem 0; text-align: left; font-weight: normal; } th { color: var(--soft); }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; width: 1%; } td.name { white-space: nowrap; width: 1%; }
.bar { height: .9rem; background: var(--bar); min-width: 1px; } .lost { background: var(--lost); }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2.5rem; } @media (max-width: 45rem) { .columns { grid-template-columns: 1fr; } }
article { border-left: 3px solid var(--line); padding-left: .9rem; margin: 1.3rem 0; } article p { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { color: inherit; background: var(--antecedent); padding: 0 .15em; border-radius: 3px; } mark.mask { background: var(--mask); font-weight: 600; } .widened { border-bottom: 2px dotted; }
"""


class Decoder(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


def render(content: Mapping[str, Any], samples: Iterable[Mapping[str, Any]], decoder: Decoder, lengths: Counter[int], distances: Counter[int]) -> str:
    """The page. `decoder` turns ids to text; `samples` are rows of the corpus."""
    config, entities = content["config"], content["entities"]
    shown = [_sample(number, sample, decoder) for number, sample in enumerate(samples, start=1)]
    name = f"entity_coref_v2_{content['seq_len']}"
    parts = [
        f"<h1>{name}</h1><p class=soft>{content['rows']:,} samples ({content['split']['train']:,} train, {content['split']['validation']:,} validation) from "
        f"{content['documents']:,} documents, {entities['unique']:,} names, at most {config['max_entity_freq']:,} samples of one ({config['cap_policy']}). "
        f"Mode {config['mode']}; {content['widened']:,} masks hold more than the name. Kiwi {content['kiwi']['kiwipiepy']}, {content['kiwi']['model_type']}.</p>",
        "<h2>Documents, rule by rule</h2>", _funnel(content["funnel"]),
        "<h2>Later mentions of repeated names</h2>", _funnel(content["mentions"]),
        "<div class=columns><div><h2>Tokens of a sample</h2>", _histogram(lengths), "</div><div><h2>Characters from antecedent to mask</h2>", _histogram(distances), "</div></div>",
        "<div class=columns><div><h2>Names before the cap</h2>", _ranking(entities["top_before"]), "</div><div><h2>Names after the cap</h2>", _ranking(entities["top"]), "</div></div>",
        f"<h2>{len(shown)} samples</h2><p class=soft>The <mark>antecedent</mark> stays, <mark class=mask>this</mark> is masked and asked for; dotted where the mask holds more than the name.</p>", *shown,
    ]  # fmt: skip
    return (
        f"<!doctype html><html lang=ko><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{name}</title><style>{_STYLE}</style>\n"
        + "\n".join(parts)
        + "\n</html>\n"
    )


def pieces(sample: Mapping[str, Any], decoder: Decoder) -> tuple[str, str, str, str, str]:
    """A sample's text before, in and behind the antecedent, in and behind the mask, where labels stand for what is masked.

    Each is what decoding adds to the text so far, since a piece alone would be decoded as the beginning of one.
    """
    ids = [label if label != IGNORED else token for token, label in zip(sample["input_ids"], sample["labels"])]
    masked = [place for place, label in enumerate(sample["labels"]) if label != IGNORED]
    cuts = [sample["antecedent_begin"], sample["antecedent_end"], *((masked[0], masked[-1] + 1) if masked else ()), len(ids)]
    texts, before = [], ""
    for cut in cuts:
        until = decoder.decode(ids[:cut])
        texts.append(until[len(before) :])
        before = until
    return (texts[0], texts[1], texts[2], texts[3], texts[4]) if masked else (texts[0], texts[1], texts[2], "", "")


def _sample(number: int, sample: Mapping[str, Any], decoder: Decoder) -> str:
    before, antecedent, between, mask, behind = (escape(text) for text in pieces(sample, decoder))
    widened = "" if sample["span_exact"] else " widened"
    return (
        f"<article><small>{number} · {escape(sample['target'])} · {sample['distance']:,} characters · {len(sample['input_ids']):,} tokens · {escape(sample['source'])} "
        f"{escape(sample['doc_id'])} · {sample['split']}</small><p>{before}<mark>{antecedent}</mark>{between}<mark class='mask{widened}'>{mask}</mark>{behind}</p></article>"
    )


def _funnel(steps: Sequence[Sequence[Any]]) -> str:
    """Rows of (name, number, what): `lost` at this step, or what is `left`."""
    most = max((number for _, number, _ in steps), default=0)
    return _table((name, number, number / max(1, most), "lost" if what == "lost" else "") for name, number, what in steps)


def _histogram(counts: Counter[int]) -> str:
    if not counts:
        return "<p class=soft>none</p>"
    low, high = min(counts), max(counts) + 1
    width = max(1, -(-(high - low) // _BARS))
    bins = Counter(dict.fromkeys(range(low, high, width), 0))
    for value, number in counts.items():
        bins[low + (value - low) // width * width] += number
    most = max(bins.values())
    return _table((f"{start:,}" if width == 1 else f"{start:,} – {start + width - 1:,}", number, number / most, "") for start, number in sorted(bins.items()))


def _ranking(names: Sequence[Sequence[Any]]) -> str:
    most = max((number for _, number in names), default=1)
    return _table((name, number, number / most, "") for name, number in names)


def _table(rows: Iterable[tuple[str, int, float, str]]) -> str:
    lines = (
        f"<tr><td class=name>{escape(name)}</td><td class=number>{number:,}</td><td><div class='bar {style}' style='width:{share:.2%}'></div></td></tr>"
        for name, number, share, style in rows
    )
    return f"<table>{''.join(lines)}</table>"
