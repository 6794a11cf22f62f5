"""How well names are found, on sentences with marked entities (KLUE-NER's format: a character and its tag a line).

    python benchmarks/coref_names.py klue_ner.tsv.zst [--examples 3]

Whole names of people (PS), places (LC) and organisations (OG) only: a name is right where it begins and ends as the
marked one does. The rules were written while looking at errors among all of these sentences: on others of the set
expect a little less.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moai.coref.korean import analyser
from moai.coref.names import LongestNames, Morpheme, SingleNames

KINDS = ("PS", "LC", "OG")
FINDERS = {
    "--rules v2": SingleNames(),
    "--rules v2 --merge-latin": SingleNames(merge_latin=True),
    "longest names": LongestNames(),
}
Sentence = tuple[str, dict[tuple[int, int], str]]


def sentences(path: Path) -> Iterator[Sentence]:
    data = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().decode()
    for block in data.split("\n\n"):
        lines = [line.partition("\t") for line in block.split("\n") if line and not line.startswith("## ")]
        spans: dict[tuple[int, int], str] = {}
        begin = None
        for place, tag in enumerate([*(tag for _, _, tag in lines), "O"]):
            if begin is not None and not tag.startswith("I-"):
                spans[begin, place] = lines[begin][2][2:]
                begin = None
            if tag.startswith("B-"):
                begin = place
        if lines:
            yield "".join(letter for letter, _, _ in lines), spans


def measure(found: Sequence[set[tuple[int, int]]], marked: Sequence[Sentence]) -> str:
    right, wanted = Counter[str](), Counter[str]()
    for names, (_, spans) in zip(found, marked, strict=True):
        for place, kind in spans.items():
            wanted[kind] += 1
            right[kind] += place in names
    hits, all_wanted = (sum(counts[kind] for kind in KINDS) for counts in (right, wanted))
    precision, recall = hits / max(1, sum(map(len, found))), hits / max(1, all_wanted)
    each = " | ".join(f"{right[kind] / max(1, wanted[kind]):.3f}" for kind in KINDS)
    return f"{precision:.3f} | {recall:.3f} | {2 * precision * recall / (precision + recall):.3f} | {each}"


def errors(found: Sequence[set[tuple[int, int]]], marked: Sequence[Sentence], examples: int) -> Iterator[str]:
    kinds: dict[str, list[str]] = {}
    for names, (text, spans) in zip(found, marked, strict=True):
        gold = {place for place, kind in spans.items() if kind in KINDS}
        for begin, end in sorted(names - gold):
            over = [(a, b) for a, b in spans if a < end and begin < b]
            kind = (
                "no entity"
                if not over
                else "marked as date, time or number, or a part of one"
                if not any(place in gold for place in over)
                else "part of a longer name"
                if any(a <= begin and end <= b for a, b in over)
                else "more than the name"
                if any(begin <= a and b <= end for a, b in over)
                else "crosses the name's end"
            )
            kinds.setdefault(f"found: {kind}", []).append(text[begin:end])
        for begin, end in sorted(gold - names):
            touched = any(a < end and begin < b for a, b in names)
            kind = "missed, something else found there" if touched else f"missed: {spans[begin, end]}"
            kinds.setdefault(kind, []).append(text[begin:end])
    for kind, listed in sorted(kinds.items(), key=lambda item: -len(item[1])):
        some = ", ".join(listed[:: max(1, len(listed) // max(1, examples))][:examples])
        yield f"| {kind} | {len(listed)} | {some} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--examples", type=int, default=6)
    given = parser.parse_args()
    marked = list(sentences(given.file))
    kiwi = analyser("cong")
    morphemes: list[Sequence[Morpheme]] = [kiwi.tokenize(text) for text, _ in marked]
    print(f"{len(marked)} sentences\n\n| finder | P | R | F1 | R of PS | LC | OG |\n|---|---|---|---|---|---|---|")
    found: list[set[tuple[int, int]]] = []
    for name, finder in FINDERS.items():
        found = [
            {(one.begin, one.end) for one in finder.names(text, tokens)}
            for (text, _), tokens in zip(marked, morphemes, strict=True)
        ]
        print(f"| {name} | {measure(found, marked)} |")
    for half, what in ((slice(0, 1000), "first thousand"), (slice(1000, None), "the others")):
        print(f"| longest names, {what} | {measure(found[half], marked[half])} |")
    print("\n| errors of the longest names | number | examples |\n|---|---|---|")
    print("\n".join(errors(found, marked, given.examples)))


if __name__ == "__main__":
    main()
