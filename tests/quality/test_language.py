"""Languages: by script, by the model on a window from the middle, and what is of none."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from tokenizer_shapes import demo_documents

from moai.core.errors import ConfigError
from moai.quality import fasttext, language
from moai.quality.language import NO_LANGUAGE, SCRIPTS, Language

# Article 1 of the Universal Declaration of Human Rights (public domain).
ARTICLE = {
    "en": (
        "All human beings are born free and equal in dignity and rights. They are "
        "endowed with reason and conscience and should act towards one another in a "
        "spirit of brotherhood."
    ),
    "ko": (
        "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 "
        "이성과 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다."
    ),
    "de": (
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit "
        "Vernunft und Gewissen begabt und sollen einander im Geiste der Brüderlichkeit "
        "begegnen."
    ),
    "fr": (
        "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils "
        "sont doués de raison et de conscience et doivent agir les uns envers les "
        "autres dans un esprit de fraternité."
    ),
    "es": (
        "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, "
        "dotados como están de razón y conciencia, deben comportarse fraternalmente los"
        " unos con los otros."
    ),
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "ru": (
        "Все люди рождаются свободными и равными в своем достоинстве и правах. Они "
        "наделены разумом и совестью и должны поступать в отношении друг друга в духе "
        "братства."
    ),
}
CODE = (
    "def main(path):\n    with open(path) as file:\n        for line in file:\n            print(line)\n\nmain('a')\n"
)
TABLE = "\n".join(f"{row},{row * 3},{row / 7:.3f},A{row}" for row in range(60))


def measured(*texts: str) -> list[tuple[str, float]]:
    made = Language().measure(pa.record_batch({"text": pa.array(["", *texts], pa.large_string())[1:]}))
    return list(zip(made["language"], made["language_score"], strict=True))


def test_every_language_is_told_from_a_sentence_or_two() -> None:
    found = measured(*ARTICLE.values())
    assert [name for name, _ in found] == list(ARTICLE)
    assert all(score > 0.65 for _, score in found)


def test_code_tables_and_nothing_are_of_no_language() -> None:
    assert measured(CODE * 5, TABLE, "", " \n\t", "12345 67890", '{"a": [1, 2, {"b": "some words here"}]}') == (
        [(NO_LANGUAGE, 1.0)] * 6
    )


def test_an_english_beginning_does_not_make_a_korean_document_english() -> None:
    front = "title: Release notes\ndescription: What is new in this release of the product\n\n"
    assert measured(front * 5 + ARTICLE["ko"] * 20) == [("ko", 1.0)]
    assert measured(front + ARTICLE["de"] * 20)[0][0] == "de"


def test_shares_are_of_the_letters() -> None:
    made = Language().measure(pa.record_batch({"text": pa.array(["한글 ab, 漢字! かな 12", ""], pa.string())}))
    shares = {script: made[f"{script}_share"].tolist() for script in SCRIPTS}
    assert shares == {script: [0.25, 0.0] for script in SCRIPTS}


def test_documents_that_are_looked_at_together_do_not_change_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*ARTICLE.values(), CODE, "", "\n", TABLE, *demo_documents()[:60:3]]
    alone = [measured(text)[0] for text in texts]
    assert measured(*texts) == alone
    monkeypatch.setattr(language, "_SLICE_BYTES", 700)
    assert measured(*texts) == alone


def test_no_document_of_the_demo_is_of_another_language_than_it_is() -> None:
    found = measured(*demo_documents()[::3])
    assert len(found) > 200
    assert {name for name, score in found if score > 0.65} == {"ko", "en", NO_LANGUAGE}


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"a.bin: is no fastText model"):
        fasttext.load(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match=r"b.bin: no such file"):
        fasttext.load(tmp_path / "b.bin")
