"""C4's lines and Korean stop words, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from moai.prepared.manifest import Prepared
from moai.quality.c4 import C4Lines, C4Statistics
from moai.quality.korean import STOP_WORDS, KoreanWords
from moai.transforms.named import parse_parts

TEXT = """Menu
The first line stays.[1] It has two sentences!
Too short.
This one has no end
This one trails off...
  Enable javascript to see this page.
We have a privacy policy for you.
"He said that it stays," she said.'
"""
KEPT = 'The first line stays. It has two sentences!\n"He said that it stays," she said.\''


def numbers(*texts: str) -> list[tuple[int, ...]]:
    made = C4Statistics().measure(pa.record_batch({"text": pa.array(texts, pa.string())}))
    return list(zip(*(column.to_pylist() for column in made.values()), strict=True))


def test_lines_stay_by_their_end_their_words_and_what_they_speak_of() -> None:
    batch = pa.record_batch({"text": pa.array([TEXT, "", "a b " + "c" * 1001 + "."], pa.large_string())})
    assert C4Lines().apply(batch)["text"].to_pylist() == [KEPT, "", ""]
    assert "This one has no end" in C4Lines(terminal_marks=False).apply(batch)["text"][0].as_py()


def test_what_drops_a_text_is_counted_in_the_lines_that_would_stay() -> None:
    assert numbers(TEXT, "Lorem ipsum dolor sit.\nA brace { stands here.\nA brace { stands there", "") == [
        (0, 0, 3),
        (1, 1, 2),
        (0, 0, 0),
    ]


def test_rules_judge_the_text_before_its_lines_go(prepare: Callable[..., Prepared], texts: Any, tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    documents = [TEXT, "Only one sentence here.", "Three words, and { a brace. One more. And one more."]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    rules = {"c4.max_braces": 0, "c4.min_sentences": 3}
    prepared = prepare(str(path), quality=rules, transforms=parse_parts(["C4Lines"], place="test"))
    assert texts(prepared) == [KEPT]
    plain = prepare(str(path), quality=rules)
    name = "signals-00000-c4_statistics.arrow"
    assert (plain.path / name).stat().st_ino == (prepared.path / name).stat().st_ino


def test_korean_stop_words_count_where_a_word_ends_in_them() -> None:
    texts = ["", "나는 학교에서 책을 읽었다.", "이상한 의자", "이 길로 가!", "no Korean here", "있고되로"]
    made = KoreanWords().measure(pa.record_batch({"text": pa.array(texts, pa.large_string())}))
    # 는, 에서 (and 서 is none), 을, 다 | 한 | 이, 로, 가 | - | 로
    assert made["ko_stop_words"].tolist() == [0, 4, 1, 3, 0, 1]
    assert len(set(STOP_WORDS)) == 21
