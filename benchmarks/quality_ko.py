"""FineWeb-2's thresholds for Korean on the morphemes of Kiwi, and on moai's words: fitted on one half of documents, and
compared on the other.

    .venv/bin/python benchmarks/quality_ko.py --data ../shared/data [--documents 1600]

Which half a document is in is decided by its hash. A threshold is the one with which most documents of the fitting half
are decided as on Kiwi's words; where fewer than ten of them fail, that of FineWeb-2 times the ratio of the medians (of
the most frequent n-grams: of the 99 % quantiles). The profile `fineweb2_ko` holds the result, rounded.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
import zstandard
from kiwipiepy import Kiwi

from moai.quality import plain, scan
from moai.quality.korean import STOP_WORDS, KoreanWords
from moai.quality.profiles import PROFILES
from moai.quality.rules import Numbers, is_least, measure

FINEWEB2 = {
    "gopher.min_words": 50,
    "gopher.max_words": 100_000,
    "gopher.min_word_length": 1,
    "gopher.max_word_length": 6,
    "gopher.max_hashes": 0.1,
    "gopher.max_ellipses": 0.1,
    "gopher.max_bullet_lines": 0.9,
    "gopher.max_ellipsis_lines": 0.3,
    "gopher.min_alpha_words": 0.791,
    "fineweb2_ko.min_stop_words": 2,
    "repetition.max_dup_lines": 0.374,
    "repetition.max_dup_line_chars": 0.1,
    "repetition.max_top_2_gram": 0.282,
    "repetition.max_top_3_gram": 0.228,
    "repetition.max_top_4_gram": 0.185,
    **{
        f"repetition.max_dup_{n}_grams": share
        for n, share in zip(range(5, 11), (0.201, 0.184, 0.168, 0.154, 0.14, 0.127), strict=True)
    },
    "fineweb.min_punctuated_lines": 0.062,
    "fineweb.max_dup_line_chars": 0.1,
    "fineweb.max_newlines": 0.196,
}
"""huggingface/fineweb-2, configs/kor_Hang.yml, and what its pipeline sets for all languages."""
OF_ONE_SOURCE, LEAST_FAILING = 700, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with ko.jsonl.zst")
    parser.add_argument("--documents", type=int, default=1600)
    given = parser.parse_args()
    texts = documents(given.data / "ko.jsonl.zst", given.documents)
    fits = np.array([xxhash.xxh3_64_intdigest(text.encode(), seed=7) % 2 == 0 for text in texts])
    kiwi, own = on_kiwi(texts), on_own_words(texts)
    print("| rule | FineWeb-2 | fitted | agree before | after |\n|---|---:|---:|---:|---:|")
    fitted = {}
    for rule, threshold in FINEWEB2.items():
        wanted = fails(kiwi, rule, threshold)
        fitted[rule] = fit(rule, threshold, wanted[fits], measure(rule, kiwi)[fits], measure(rule, own)[fits])
        agree = [np.mean((fails(own, rule, at) == wanted)[~fits]) for at in (threshold, fitted[rule])]
        print(f"| {rule} | {threshold:g} | {fitted[rule]:.3g} | {agree[0]:.1%} | {agree[1]:.1%} |")
    wanted = any_fails(kiwi, FINEWEB2)
    for name, thresholds in (
        ("FineWeb-2's numbers", FINEWEB2),
        ("fitted", fitted),
        ("fineweb2_ko", PROFILES["fineweb2_ko"]),
    ):
        same = np.mean((any_fails(own, thresholds) == wanted)[~fits])
        print(f"| all, {name} on moai's words | | | {same:.1%} of {np.sum(~fits):,} | |")


def documents(path: Path, number: int) -> list[str]:
    """Of 100 to 12,000 characters, from each source some."""
    sources, chosen, draw = defaultdict(list), [], random.Random(0)
    for line in zstandard.open(path, "rb").read().splitlines():
        record = json.loads(line)
        sources[record["meta"]["repo"]].append(record["text"])
    for _, texts in sorted(sources.items()):
        fitting = [text for text in texts if 100 <= len(text) <= 12_000]
        draw.shuffle(fitting)
        chosen += fitting[:OF_ONE_SOURCE]
    draw.shuffle(chosen)
    return chosen[:number]


def on_kiwi(texts: list[str]) -> Numbers:
    """The numbers with the words that datatrove's Korean tokenizer gives."""
    kiwi, found, stops = Kiwi(num_workers=1), [], []
    for text in texts:
        clean = re.sub("[0-9,]{20,}", "", text)
        words = [word for one in kiwi.tokenize(clean) if (word := clean[one.start : one.start + one.len].strip())]
        found.append(plain.statistics(text, words))
        stops.append(len({*STOP_WORDS} & {*words}))
    return {**dict(zip(plain.NAMES, np.array(found).T, strict=True)), "ko_stop_words": np.array(stops)}


def on_own_words(texts: list[str]) -> Numbers:
    column = pa.array(texts, pa.large_string())
    stops = KoreanWords().measure(pa.record_batch({"text": column}))
    return {**dict(zip(plain.NAMES, scan.statistics(column).T, strict=True)), **stops}


def fit(rule: str, threshold: float, wanted: np.ndarray, kiwi: np.ndarray, own: np.ndarray) -> float:
    if np.array_equal(kiwi, own) or rule == "fineweb2_ko.min_stop_words":
        return threshold
    if wanted.sum() < LEAST_FAILING:
        at = 0.99 if "top" in rule else 0.5
        return threshold * np.quantile(own, at) / np.quantile(kiwi, at) if np.quantile(kiwi, at) else threshold
    edges = np.unique(np.quantile(own, np.linspace(0, 1, 400)))
    tried = np.append((edges[1:] + edges[:-1]) / 2, threshold)
    scores = [np.mean((own < one if is_least(rule) else own > one) == wanted) for one in tried]
    return float(min(tried[np.array(scores) == max(scores)], key=lambda one: abs(one - threshold)))


def fails(numbers: Numbers, rule: str, threshold: float) -> np.ndarray:
    value = measure(rule, numbers)
    return value < threshold if is_least(rule) else value > threshold


def any_fails(numbers: Numbers, thresholds: dict[str, float]) -> np.ndarray:
    return np.any([fails(numbers, rule, threshold) for rule, threshold in thresholds.items()], axis=0)


if __name__ == "__main__":
    main()
