"""How fast each Signal measures, and what it finds of what was planted; beside datatrove where that has the same.

    .venv/bin/python benchmarks/quality_signals.py --data ../shared/data [--datatrove DIR] [--documents 1500]

One process, CPU seconds, the ways taking turns, medians. 10,000 evaluation items are windows of words of documents that
are not measured, shuffled so that none stands anywhere, and 100 of these are left as they are and planted.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import zstandard

from moai.quality import c4
from moai.quality.contamination import Contamination
from moai.quality.korean import KoreanWords
from moai.quality.language import NO_LANGUAGE, Language
from moai.quality.personal import KINDS, MaskPersonalData, PersonalData, places
from moai.quality.statistics import TextStatistics

ITEMS, PLANTED, ONE_IN = 10_000, 100, 10
"""Items in all, those that stand somewhere; one document in so many is given to datatrove."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with en, ko and code.jsonl.zst")
    parser.add_argument("--datatrove", type=Path, help="a folder with datatrove and what it needs")
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    texts = {name: read(given.data / f"{name}.jsonl.zst") for name in ("en", "ko", "code")}
    theirs = datatrove(given.datatrove) if given.datatrove else {}
    with tempfile.TemporaryDirectory() as folder:
        items = write_items([some[given.documents :] for some in texts.values()], Path(folder))
        contamination = Contamination(files=(items,))
        assert contamination.index.totals.any()
        print("| text | way | MB/s |\n|---|---|---:|")
        for name, some in texts.items():
            speeds(name, some[: given.documents], contamination, theirs, given.rounds)
        planted_items(texts["en"][: given.documents], items, contamination)
    for name, some in texts.items():
        found = Counter(Language().measure(batch(some))["language"])
        others = sum(found.values()) - found["ko"] - found["en"] - found[NO_LANGUAGE]
        print(f"languages of {name}: {dict(found.most_common(3))}, others {others}")
    planted_personal_data(texts["en"] + texts["ko"] + texts["code"], theirs)
    for name, some in texts.items() if theirs else ():
        same = sum(theirs["c4 equal"](text) for text in some[: given.documents])
        print(f"c4: {same:,} of {len(some[: given.documents]):,} documents of {name} decided and left as by datatrove")


def read(path: Path) -> list[str]:
    lines = zstandard.open(path, "rb").read().splitlines()
    return [text for line in lines if (text := json.loads(line)["text"]).strip()]


def batch(texts: list[str]) -> pa.RecordBatch:
    return pa.record_batch({"text": pa.array(texts, pa.large_string())})


def write_items(texts: list[list[str]], folder: Path) -> Path:
    """Those that are left as they are come from the first texts."""
    draw, path = random.Random(0), folder / "items.jsonl"
    long = [[words for text in some if len(words := text.split()) > 80] for some in texts]
    with path.open("w") as file:
        for number in range(ITEMS):
            words = draw.choice(long[number % len(long) if number >= PLANTED else 0])
            first = draw.randrange(len(words) - 70)
            window = words[first : first + 70]
            if number >= PLANTED:
                draw.shuffle(window)
            size = draw.randrange(8, 60)
            record = {"question": " ".join(window[:size]), "answer": " ".join(window[size : size + 3])}
            file.write(json.dumps(record) + "\n")
    return path


def speeds(name: str, texts: list[str], contamination: Contamination, theirs: dict[str, Any], rounds: int) -> None:
    whole = batch(texts)
    ways: dict[str, tuple[list[str], Callable[[], Any]]] = {
        f"{part.name}": (texts, lambda call=call: call(whole))
        for part, call in (
            *((one, one.measure) for one in (TextStatistics(), Language(), PersonalData(), contamination)),
            *((one, one.measure) for one in (KoreanWords(), c4.C4Statistics())),
            (MaskPersonalData(), MaskPersonalData().apply),
        )
    }
    some = texts[::ONE_IN]
    for way in ("PII", "C4"):
        if way in theirs:
            ways[f"datatrove {way}"] = some, lambda way=way: [theirs[way](text) for text in some]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for at in range(rounds + 1):
        for way, (_, run) in ways.items():
            began = time.process_time()
            run()
            if at:  # the first compiles and loads
                seconds[way].append(time.process_time() - began)
    for way, (given, _) in ways.items():
        print(f"| {name} | {way} | {sum(len(text.encode()) for text in given) / 1e6 / median(seconds[way]):.1f} |")


def planted_items(texts: list[str], path: Path, contamination: Contamination) -> None:
    """An item in the middle of a document: whole, its first half, its first fifth."""
    items = [json.loads(line) for line in path.open()][:PLANTED]
    clean = [text for text, share in zip(texts, contamination.measure(batch(texts))["contaminated_share"]) if not share]
    for part in (1.0, 0.5, 0.2):
        planted = []
        for text, item in zip(clean, items):
            words = f"{item['question']} {item['answer']}".split()
            middle = len(text) // 2
            planted.append(f"{text[:middle]} {' '.join(words[: int(part * len(words))])} {text[middle:]}")
        shares = contamination.measure(batch(planted))["contaminated_share"]
        gone = sum(share > 0.5 for share in shares)
        print(f"items planted, {part:.0%} of each: {gone} of {len(planted)} documents go")


def planted_personal_data(texts: list[str], theirs: dict[str, Any]) -> None:
    draw = random.Random(0)

    def digits(number: int) -> str:
        return "".join(draw.choices("0123456789", k=number))

    def date() -> str:
        return f"{digits(2)}{draw.randrange(1, 13):02}{draw.randrange(1, 29):02}"

    make: dict[str, Callable[[], str]] = {
        "mail": lambda: draw.choice(("kim{}@example.com", "a.lee{}@mail.go.kr", "jo_{}@a-b.co")).format(digits(3)),
        "ipv4": lambda: (
            f"{draw.choice((8, 52, 121, 211))}.{draw.randrange(256)}.{draw.randrange(256)}.{draw.randrange(1, 256)}"
        ),
        "ipv6": lambda: f"2400:cb00:{draw.randrange(1, 9999)}::{draw.randrange(1, 9999)}",
        "phone_kr": lambda: draw.choice(("010-{}-{}", "02-{}-{}", "+82 10 {} {}", "(031) {}-{}", "010{}{}")).format(
            digits(4), digits(4)
        ),
        "phone": lambda: draw.choice(("+49 30 {} {}", "+1 415 {} {}", "+81 3 {} {}", "(202) 555-{}")).format(
            draw.randrange(1000, 9999), digits(4)
        ),
        "resident_number": lambda: f"{date()}-{draw.choice('12345678')}{digits(6)}",
    }
    clean = [text for text in texts if not places(text)]
    print(f"personal data in {len(clean):,} documents without any, one planted in each of {len(KINDS) * 500:,}:")
    missed, wrong, their_missed = Counter[str](), 0, Counter[str]()
    for at in range(len(KINDS) * 500):
        kind, text = KINDS[at % len(KINDS)], draw.choice(clean)
        spaces = [place for place, one in enumerate(text[:20_000]) if one == " "] or [0]
        what, cut = make[kind](), draw.choice(spaces)
        planted = f"{text[:cut]} {what} {text[cut:]}"
        found = [(one, planted[first:last]) for one, first, last in places(planted)]
        missed[kind] += (kind, what) not in found
        wrong += len(found) > ((kind, what) in found)
        if theirs and kind in ("mail", "ipv4"):
            their_missed[kind] += what in theirs["PII"](planted)
    for kind in KINDS:
        beside = f"; datatrove {1 - their_missed[kind] / 500:.3f}" if theirs and kind in ("mail", "ipv4") else ""
        print(f"  {kind}: recall {1 - missed[kind] / 500:.3f}{beside}")
    print(f"  found besides, or as something else: {wrong}")


def datatrove(folder: Path) -> dict[str, Callable[[str], Any]]:
    """Its formatter of personal data, and its C4 filter on moai's sentences."""
    sys.path.append(str(folder))
    from datatrove.data import Document
    from datatrove.pipeline.filters import c4_filters
    from datatrove.pipeline.formatters.pii import PIIFormatter

    c4_filters.split_into_sentences = lambda line, _: [0] * max(1, len(c4._SENTENCE_END.findall(line)))
    pii, lines = PIIFormatter(), c4_filters.C4QualityFilter()
    lines.stat_update = lambda *_, **__: None

    def equal(text: str) -> bool:
        document = Document(text=text, id="")
        keeps = lines.filter(document) is True
        kept, lorem, braces, sentences = c4.judged_lines(text)
        return keeps == (not lorem and not braces and sentences >= 5) and (
            not keeps or document.text == "\n".join(kept).strip()
        )

    return {"PII": pii.format, "C4": lambda text: lines.filter(Document(text=text, id="")), "c4 equal": equal}


if __name__ == "__main__":
    main()
