"""The numbers that rules stand on: by hand, and the compiled ones beside the plain ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_shapes import demo_documents

from moai.quality import plain

ROOT = Path(__file__).parents[2]
PIECES = (
    *("a", "the", "of", "be", "한국어", "가나다", "_", "é", "x1", "#", "...", "…", ".", "-", "•", "!", "€", "?"),
    *(" ", "\n", "\n\n", "\n\n\n", "\r\n", "\t", "\u2028", "\x85", "\x1c", "the same words again and again. "),
)


def by_name(text: str) -> dict[str, int]:
    return dict(zip(plain.NAMES, plain.statistics(text), strict=True))


def test_the_numbers_of_a_text_that_a_person_can_count() -> None:
    text = "The cat sat.\n\n- the cat sat...\nThe cat sat.\n"
    found = by_name(text)
    assert plain.words_of(text)[:5] == ["The", "cat", "sat", ".", "-"]
    assert {name: found[name] for name in ("chars", "newlines", "words", "plain_words", "plain_word_chars")} == {
        "chars": 44,
        "newlines": 4,
        "words": 15,
        "plain_words": 9,
        "plain_word_chars": 27,
    }
    assert (found["lines"], found["bullet_lines"], found["ellipsis_lines"], found["ellipses"]) == (4, 1, 1, 1)
    assert (found["full_lines"], found["punctuated_lines"], found["short_lines"]) == (3, 3, 3)
    assert found["dup_full_line_chars"] == len("The cat sat.")
    assert (found["spans"], found["dup_spans"], found["paragraphs"], found["dup_paragraphs"]) == (4, 1, 2, 0)
    assert found["stop_words"] == 1  # "The" is not "the"
    assert found["top_2_gram_chars"] == 3 * len("cat sat")


def test_a_text_without_words_has_no_share_of_anything() -> None:
    assert by_name("")["words"] == by_name("\n \n")["words"] == 0
    assert by_name("a")["top_2_gram_chars"] == 0


@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=60).map("".join) | st.text(max_size=60), max_size=6))
def test_compiled_numbers_are_the_plain_ones(texts: list[str]) -> None:
    scan = pytest.importorskip("moai.quality.scan", reason="numba is not installed")
    clean = [text.encode("utf-8", "ignore").decode() for text in texts]
    found = scan.statistics(pa.array(["before", *clean], pa.large_string())[1:])
    assert found.tolist() == [plain.statistics(text) for text in clean]


def test_compiled_numbers_of_real_documents_are_the_plain_ones() -> None:
    scan = pytest.importorskip("moai.quality.scan", reason="numba is not installed")
    texts = demo_documents()[::12]
    assert len(texts) > 50
    wanted = np.array([plain.statistics(text) for text in texts])
    assert np.array_equal(scan.statistics(pa.array(texts, pa.string())), wanted)


def test_without_numba_the_numbers_are_the_same_and_it_is_said() -> None:
    program = (
        "import sys, logging; sys.modules['numba'] = None; logging.basicConfig(format='%(message)s')\n"
        "import pyarrow as pa; from moai.quality.statistics import TextStatistics, warn_without_numba\n"
        "warn_without_numba()\n"
        "found = TextStatistics().measure(pa.record_batch({'text': pa.array(['a b', 'c'], pa.large_string())}))\n"
        "print(found['words'].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[2, 1]\n"
    assert "numba is not installed" in done.stderr
