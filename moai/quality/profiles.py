"""The profiles that moai ships: thresholds by rule.

gopher        Rae et al. 2021 (arXiv 2112.11446), table A1. Expects English
fineweb       gopher, and the rules of FineWeb (arXiv 2406.17557). Expects English
fineweb2_ko   FineWeb-2's for Korean (configs/kor_Hang.yml, Apache-2.0), fitted to moai's words: those were found on
              the morphemes of Kiwi. On 761 documents that were not fitted on, decisions agree with those on Kiwi's
              words for 97.1 %; with FineWeb-2's own numbers on moai's words for 68.1 % (benchmarks/quality_ko.py)
c4            what C4 (arXiv 1910.10683) drops a text for. English prose; beside the Map C4Lines
repetition    the repetition rules of gopher. Any language but code, which repeats itself
code          what one file of source code in a hundred exceeds: tables of numbers, generated files, one line over and
              over
demo          all kinds of text at once, as in data/demo: `code` for all, and Korean and English have stop words
"""

from __future__ import annotations

from collections.abc import Mapping

_REPETITION = {
    **{f"repetition.max_dup_{what}": 0.3 for what in ("paragraphs", "lines")},
    **{f"repetition.max_dup_{what}_chars": 0.2 for what in ("paragraph", "line")},
    **{f"repetition.max_top_{n}_gram": top for n, top in ((2, 0.2), (3, 0.18), (4, 0.16))},
    **{f"repetition.max_dup_{n}_grams": round(0.2 - 0.01 * n, 2) for n in range(5, 11)},
}
_GOPHER = {
    "gopher.min_words": 50,
    "gopher.max_words": 100_000,
    "gopher.min_word_length": 3,
    "gopher.max_word_length": 10,
    "gopher.max_hashes": 0.1,
    "gopher.max_ellipses": 0.1,
    "gopher.max_bullet_lines": 0.9,
    "gopher.max_ellipsis_lines": 0.3,
    "gopher.min_alpha_words": 0.8,
    "gopher.min_stop_words": 2,
    **_REPETITION,
}
_FINEWEB2_KO = {
    "gopher.min_words": 31,
    "gopher.max_words": 61_000,
    "gopher.min_word_length": 1.5,
    "gopher.max_word_length": 9.2,
    "gopher.max_hashes": 0.1,
    "gopher.max_ellipses": 0.1,
    "gopher.max_bullet_lines": 0.9,
    "gopher.max_ellipsis_lines": 0.3,
    "gopher.min_alpha_words": 0.64,
    "repetition.max_dup_lines": 0.374,
    "repetition.max_dup_line_chars": 0.1,
    **{f"repetition.max_top_{n}_gram": top for n, top in ((2, 0.45), (3, 0.43), (4, 0.47))},
    **{
        f"repetition.max_dup_{n}_grams": share
        for n, share in zip(range(5, 11), (0.19, 0.185, 0.18, 0.165, 0.14, 0.133), strict=True)
    },
    "fineweb.min_punctuated_lines": 0.062,
    "fineweb.max_dup_line_chars": 0.1,
    "fineweb.max_newlines": 0.31,
    "fineweb2_ko.min_stop_words": 2,
}
_CODE = {
    "min_chars": 50,
    "gopher.max_word_length": 12,
    "gopher.min_alpha_words": 0.25,
    "repetition.max_dup_lines": 0.7,
    "repetition.max_dup_line_chars": 0.6,
    **{f"repetition.max_top_{n}_gram": top for n, top in ((2, 0.3), (3, 0.5), (4, 0.7))},
    **{f"repetition.max_dup_{n}_grams": round(0.7 - 0.01 * n, 2) for n in range(5, 11)},
}
PROFILES: dict[str, dict[str, float]] = {
    "gopher": _GOPHER,
    "fineweb": {
        **_GOPHER,
        "fineweb.min_punctuated_lines": 0.12,
        "fineweb.max_short_lines": 0.67,
        "fineweb.max_dup_line_chars": 0.01,
        "fineweb.max_newlines": 0.3,
    },
    "fineweb2_ko": _FINEWEB2_KO,
    "c4": {"c4.max_lorem_ipsum": 0, "c4.max_braces": 0, "c4.min_sentences": 5},
    "repetition": _REPETITION,
    "code": _CODE,
    "demo": _CODE,
}
LANGUAGES: Mapping[str, Mapping[str, Mapping[str, float | None]]] = {
    "demo": {
        "ko": {"fineweb2_ko.min_stop_words": 2, "gopher.min_words": 31},
        "en": {"gopher.min_stop_words": 2, "gopher.min_words": 50, "gopher.min_word_length": 3},
    }
}
"""Of a profile what differs for documents in a language."""
