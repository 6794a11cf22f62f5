"""Search by words and vectors, in step with the chunks; measured before it serves; one alias over strategies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_law
from tiny_law import reembed

from moai.core.errors import ConfigError, NotProven, SourceError
from moai.reembedding import command, evaluation, keyword, search, vectors, versions
from moai.reembedding import database as databases
from moai.reembedding.database import Database
from moai.reembedding.evaluation import Figures, wilson
from moai.reembedding.retrieval import Searcher, fuse

ARTICLES = [
    ("1", "1", "① 대한민국은 민주공화국이다."),
    ("1", "2", "②대한민국의 주권은 국민에게 있고, 모든 권력은 국민으로부터 나온다."),
    ("11", None, "모든 국민은 법 앞에 평등하다."),
    ("1000", None, "상속인은 피상속인의 재산에 관한 권리와 의무를 승계한다."),
    ("840", None, "부부의 일방은 다음 각 호의 사유가 있는 경우에는 가정법원에 이혼을 청구할 수 있다."),
    ("618", None, "임차인은 차임을 지급할 의무가 있다."),
]


@pytest.fixture(params=["sqlite3", "apsw"])
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "sqlite3":
        monkeypatch.setattr(databases, "apsw", None)


@pytest.fixture
def law(law: Path) -> Path:
    tiny_law.change(law, "DELETE FROM statute_articles")
    for number, row in enumerate(ARTICLES, 1):
        tiny_law.change(
            law,
            "INSERT INTO statute_articles(id, statute_id, article_no, clause_no, text) VALUES(?1, 1, ?2, ?3, ?4)",
            (number, *row),
        )
    return law


def found(law: Path, question: str, **asked: Any) -> list[tuple[str, int]]:
    with Searcher.open(law, version_id=5) as searcher:
        return [(hit.source_type, hit.source_id) for hit in searcher.ask(question, mode="keyword", **asked)]


@pytest.mark.parametrize(
    ("question", "article"),
    [
        ("대한민국헌법 제1조", 1),
        ("민주공화국", 1),
        ("제1000조", 4),
        ("제11조", 3),
        ("상속", 4),
        ("이혼", 5),
        ("임차", 6),
        ("이혼하려면?", 5),
    ],
)
def test_words_of_two_syllables_and_numbers_of_articles_find_their_article_first(
    law: Path, question: str, article: int
) -> None:
    reembed(law)
    assert found(law, question, source_types=["statute_article"])[0] == ("statute_article", article)


def test_filters_citations_and_many_questions(law: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reembed(law)
    assert {kind for kind, _ in found(law, "국민의 권리", top=500)} > {"case_paragraph", "statute_article"}
    only = found(law, "국민의 권리", top=500, source_types=["case_paragraph"])
    assert {kind for kind, _ in only} == {"case_paragraph"}
    words = ["search", "--db", str(law), "--mode", "keyword", "--top", "2", "--query", "민주공화국", "상속"]
    command.main([*words, "--json"], {})
    answers = json.loads(capsys.readouterr().out)
    assert [answer["question"] for answer in answers] == ["민주공화국", "상속"]
    assert answers[0]["version"] == 5
    best = answers[1]["hits"][0]
    assert (best["source_type"], best["source_id"], best["citation"]) == ("statute_article", 4, "대한민국헌법 제1000조")
    command.main(words, {})
    assert (
        "대한민국헌법 제1조 제1항  (statute_article 1 [0:16])  ① 대한민국은 민주공화국이다." in capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match="choose from"):
        found(law, "x", source_types=["treaty"])


@pytest.mark.usefixtures("driver")
def test_words_and_vectors_follow_every_change_in_its_transaction(law: Path) -> None:
    reembed(law)
    reembed(law, version_id=6)
    tiny_law.change(law, "UPDATE statute_articles SET text = '유언은 방식에 의한다.' WHERE id = 4")
    tiny_law.change(law, "DELETE FROM statute_articles WHERE id = 5")
    reembed(law)
    assert ("statute_article", 4) not in found(law, "상속")
    assert found(law, "유언")[0] == ("statute_article", 4)
    assert found(law, "이혼") == []
    with Database.open(law) as db:
        has_vectors = vectors.load(db)  # the standard library's SQLite may load no extensions
        for version_id in (5, 6):
            made = db.rows("SELECT id FROM text_chunks WHERE embedding_version_id = ?", (version_id,))
            chunks = {row[0] for row in made}
            assert {row[0] for row in db.rows(f"SELECT rowid FROM {keyword.table(version_id)}")} == chunks
            assert vectors.is_there(db, version_id) == has_vectors
            if not has_vectors:
                continue
            assert {row[0] for row in db.rows(f"SELECT rowid FROM {vectors.table(version_id)}")} == chunks
            queries = next(search.pages(db, version_id))[1][:3]
            exact = search.brute_force(db, version_id, queries, k=5, source_types=["case_paragraph"])
            for query, wanted in zip(queries, exact):
                near = vectors.find(db, version_id, query, k=5, source_types=["case_paragraph"])
                assert np.allclose([one for one, _ in near], [one for one, _ in wanted], atol=1e-5)
    command.main(["activate", "--db", str(law), "--version-id", "5"], {})
    command.main(["delete", "--db", str(law), "--version-id", "6"], {})
    assert tiny_law.rows(law, "SELECT count(*) FROM sqlite_master WHERE name LIKE 'reembed%\\_6' ESCAPE '\\'") == [(0,)]


def test_a_run_without_the_package_leaves_no_vectors_behind_that_a_search_would_read(
    law: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reembed(law)
    tiny_law.change(law, "UPDATE statute_articles SET text = '유언은 방식에 의한다.' WHERE id = 4")
    with monkeypatch.context() as without:
        without.setattr(vectors, "load", lambda database: False)
        reembed(law)
    with Database.open(law) as db:
        assert "sqlite_vec" not in versions.get(db, 5).made
    tiny_law.change(law, "UPDATE statute_articles SET text = '유언은 방식에 따라야 한다.' WHERE id = 4")
    reembed(law)
    with Database.open(law) as db:
        assert versions.get(db, 5).made["sqlite_vec"] == 16
        assert vectors.load(db)
        rows = db.value(f"SELECT count(*) FROM {vectors.table(5)}")
        assert rows == db.value("SELECT count(*) FROM text_chunks WHERE embedding_version_id = 5")


def test_a_version_of_another_program_is_searched_by_words_without_being_written_to(law: Path) -> None:
    before = law.read_bytes()
    with Searcher.open(law, version_id=1) as searcher:
        assert searcher.ask("옛 조각 2", mode="keyword")[0].source_id == 2
        with pytest.raises(SourceError, match="legacy-model"):
            searcher.ask("옛 조각 2")
    assert law.read_bytes() == before


def test_fusion_puts_what_both_lists_have_first_and_without_weight_keeps_the_words() -> None:
    words, dense = [(9.0, 1), (8.0, 2), (7.0, 3)], [(0.9, 3), (0.8, 4)]
    assert [chunk for _, chunk in fuse(words, dense, dense_weight=1.0)] == [3, 1, 2, 4]
    assert [chunk for _, chunk in fuse(words, dense, dense_weight=0.0)] == [1, 2, 3]


def test_figures_that_a_person_can_check_by_hand() -> None:
    figures = Figures((1, 2, None, 1))
    assert figures.values["recall@1"] == 0.5
    assert figures.values["recall@5"] == 0.75
    assert figures.values["mrr"] == (1 + 0.5 + 0 + 1) / 4
    assert figures.values["ndcg@10"] == pytest.approx((1 + 1 / np.log2(3) + 0 + 1) / 4)
    low, high = wilson(430, 500)  # 0.86: the published interval is 0.827 to 0.888
    assert (round(low, 3), round(high, 3)) == (0.827, 0.888)
    assert evaluation.got_worse(figures, Figures((1, 5, None, None))) == [3, 1]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    asked = [("주권은 누구에게 있나", 2), ("상속인의 의무", 4), ("가정법원에 이혼 청구", 5), ("차임 지급", 6)]
    path = tmp_path / "questions.jsonl"
    rows = ({"question": q, "source_type": "statute_article", "source_id": number} for q, number in asked)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_evaluate_measures_each_version_and_says_what_cannot_be_searched(
    law: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reembed(law)
    words = ["evaluate", "--db", str(law), "--questions", str(questions), "--versions", "5", "1"]
    command.main([*words, "--json"], {})
    measured = json.loads(capsys.readouterr().out)
    assert measured["5"]["keyword"]["recall@1"] == 1.0
    assert measured["1"]["keyword"]["recall@10"] < 1.0
    assert measured["5"]["keyword"]["intervals"]["recall@1"][1] == 1.0
    assert "legacy-model" in measured["1"]["unsearchable"]  # its model is gone
    command.main(words, {})
    said = capsys.readouterr().out
    assert "questions have their answer further down in version 1 than in version 5 (keyword)" in said
    assert "not searchable" in said


def test_a_version_that_finds_too_little_is_complete_but_not_activated(law: Path, questions: Path) -> None:
    with questions.open("a") as file:
        file.write('{"question": "저작권 등록", "source_type": "statute_article", "source_id": 1}\n')
    with pytest.raises(NotProven, match=r"not activated: recall@10 is 0.800, below --min_recall 0.9"):
        reembed(law, questions=str(questions), min_recall=0.9)
    assert tiny_law.active(law) == {1}
    with Database.open(law) as db:
        assert versions.get(db, 5).is_complete
    reembed(law, questions=str(questions), min_recall=0.8, not_worse=True)
    assert tiny_law.active(law) == {1, 5}
    tiny_law.change(law, "UPDATE statute_articles SET text = '가나다라' WHERE id = 6")
    with pytest.raises(NotProven, match=r"recall@1 is .*, below .*, that of version 5, which serves"):
        reembed(law, version_id=6, questions=str(questions), not_worse=True)
    with pytest.raises(ConfigError, match="need --questions"):
        reembed(law, version_id=7, min_recall=0.5)


@pytest.mark.parametrize("line", ["{", '{"question": "x"}', '{"question": "x", "source_type": "a", "source_id": 1}'])
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(SourceError, match="line 2"):
        evaluation.read(path)


def serving(law: Path) -> list[tuple[object, ...]]:
    return tiny_law.rows(law, "SELECT DISTINCT version_id FROM serving_chunks")


def test_one_alias_serves_over_strategies_before_during_and_after_a_switch(law: Path) -> None:
    reembed(law, activate=False)
    assert serving(law) == [(1,)]  # what programs read before
    command.main(["activate", "--db", str(law), "--version-id", "5"], {})
    assert serving(law) == [(5,)]
    reembed(law, version_id=7, chunking_strategy="standard")
    assert tiny_law.active(law) == {5, 7}
    assert serving(law) == [(7,)]
    with pytest.raises(ConfigError, match="is active"):
        command.main(["delete", "--db", str(law), "--version-id", "7"], {})
    command.main(["rollback", "--db", str(law), "--version-id", "7"], {})
    assert serving(law) == [(5,)]
    command.main(["rollback", "--db", str(law), "--version-id", "5"], {})
    assert serving(law) == [(1,)]
    assert tiny_law.rows(law, "SELECT version_id, model FROM serving_version") == [(1, "legacy-model")]
