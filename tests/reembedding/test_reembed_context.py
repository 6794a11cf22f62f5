"""What stands before a chunk, how it is cited, and what is left out: nothing but empty, deleted and unreadable rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_law
from test_reembed_chunks import chunks
from tiny_law import reembed

from moai.core.errors import ConfigError, SourceError
from moai.reembedding import versions
from moai.reembedding.context import DEFAULT, Templates
from moai.reembedding.database import Database
from moai.reembedding.kinds import DELETED, NO_TEXT, NOT_UTF8, skip_reason


@pytest.fixture
def constitution(law: Path) -> Path:
    tiny_law.change(law, "DELETE FROM statute_articles")
    rows = [
        (1, "1", "1", None, "① 대한민국은 민주공화국이다."),
        (2, "1", "2", None, "②대한민국의 주권은 국민에게 있고, 모든 권력은 국민으로부터 나온다."),
        (3, "24의2", None, "자본금", "1억원 이상이어야 한다."),
        (4, None, None, None, "부칙"),
    ]
    for row in rows:
        tiny_law.change(law, "INSERT INTO statute_articles VALUES(?1, 1, ?2, ?3, ?4, ?5)", row)
    return law


def test_a_clause_stands_under_its_own_id_behind_its_place_and_its_short_siblings(constitution: Path) -> None:
    reembed(constitution)
    found = tiny_law.rows(
        constitution,
        "SELECT source_id, text, start_char, end_char, meta FROM text_chunks WHERE embedding_version_id = 5 AND "
        "source_type = 'statute_article' ORDER BY source_id",
    )
    assert [row[:2] for row in found] == [
        (
            1,
            "대한민국헌법 제1조 제1항 / ②대한민국의 주권은 국민에게 있고, 모든 권력은 국민으로부터 나온다.\n"
            "① 대한민국은 민주공화국이다.",
        ),
        (
            2,
            "대한민국헌법 제1조 제2항 / ① 대한민국은 민주공화국이다.\n"
            "②대한민국의 주권은 국민에게 있고, 모든 권력은 국민으로부터 나온다.",
        ),
        (3, "대한민국헌법 제24조의2(자본금)\n1억원 이상이어야 한다."),
        (4, "대한민국헌법\n부칙"),
    ]
    for source_id, text, start, end, meta in found:
        context = json.loads(str(meta))["context_chars"]
        source = tiny_law.document(constitution, "statute_article", int(str(source_id)))
        assert str(text)[context + 1 :] == source[int(str(start)) : int(str(end))]
        assert str(text)[context] == "\n"
    with Database.open(constitution) as db:
        cited = Templates.default().citations(db, "statute_article", [1, 3, 4, 99])
        assert cited[1] == "대한민국헌법 제1조 제1항"
        assert cited[3] == "대한민국헌법 제24조의2"
        assert cited[99] == "statute_article 99"  # gone meanwhile


def test_a_case_is_cited_by_court_date_and_number_and_what_is_not_there_is_left_out(law: Path) -> None:
    tiny_law.change(law, "ALTER TABLE cases ADD COLUMN announce_date TEXT")
    tiny_law.change(
        law, "UPDATE cases SET court = '대법원', doc_id = '2014다46211', announce_date = '20150122' WHERE id = 1"
    )
    with Database.open(law) as db:
        cited = Templates.default().citations(db, "case_paragraph", [1, 2])
        assert cited == {1: "대법원 2015. 1. 22. 선고 2014다46211 판결", 2: "case-2 판결"}
        assert Templates.default().contexts(db, "case_paragraph", 1, 2) == {1: "대법원 2014다46211", 2: "case-2"}


def test_a_changed_context_embeds_again_what_it_changes_also_in_the_active_version(
    constitution: Path, tmp_path: Path
) -> None:
    reembed(constitution)
    assert tiny_law.active(constitution) == {1, 5}
    file = tmp_path / "context.yaml"
    file.write_text('statute_article: {context: ["{name} {heading}"], siblings: 0}\n')
    assert reembed(constitution, context=str(file)).counts["documents_embedded"] == 4
    assert reembed(constitution).counts["documents_embedded"] == 0  # the version keeps its template
    tiny_law.change(constitution, "UPDATE statutes SET name = '헌법'")
    assert reembed(constitution).counts["documents_embedded"] == 1  # the one with a heading names the statute
    assert tiny_law.rows(
        constitution,
        "SELECT text FROM text_chunks WHERE embedding_version_id = 5 AND source_id = 3 AND level='article'",
    ) == [("헌법 자본금\n1억원 이상이어야 한다.",)]


def test_an_edited_clause_embeds_its_siblings_again_and_no_others(constitution: Path) -> None:
    reembed(constitution)
    tiny_law.change(constitution, "UPDATE statute_articles SET text = '① 대한민국은 공화국이다.' WHERE id = 1")
    assert reembed(constitution, doc_batch_size=1).counts["documents_embedded"] == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("삭제", DELETED),
        ("(삭제)", DELETED),
        ("제3조의2(정의) 삭제 <2014. 5. 20.>", DELETED),
        ("② 삭제 <2005.3.31>", DELETED),
        ("1. 삭  제", DELETED),
        ("가. 삭제 [2010·1·1]", DELETED),
        (" \n\t", NO_TEXT),
        ("① 삭제된 조항은 효력이 없다.", None),
        ("기록을 삭제한다.", None),
        ("부칙", None),
        ("- 1 -", None),
    ],
)
def test_only_empty_and_deleted_rows_are_left_out(text: str, reason: str | None) -> None:
    assert skip_reason([text]) == reason


def test_text_that_is_no_utf8_is_set_aside_counted_and_named(
    constitution: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mojibake = "제7조 국민의 권리".encode("cp949")
    tiny_law.change(constitution, "UPDATE statute_articles SET text = CAST(? AS TEXT) WHERE id = 1", (mojibake,))
    report = reembed(constitution)
    assert report.skipped == {NOT_UTF8: 1, NO_TEXT: 1}
    assert report.complete
    assert "1 documents are set aside" in caplog.text
    assert "statute_article 1" in caplog.text
    assert tiny_law.rows(
        constitution, "SELECT count(*) FROM text_chunks WHERE text LIKE '%' || char(0xFFFD) || '%'"
    ) == [(0,)]


def test_a_long_context_leaves_three_quarters_of_what_the_model_reads_to_the_text() -> None:
    found = chunks(tiny_law.sentence(1, 900), context="대한민국헌법 " * 60, max_tokens=64)
    assert all(len(row["ids"]) <= 64 and not row["truncated"] for row in found)
    assert {row["context_chars"] for row in found} == {len(found[0]["text"].partition("\n")[0])}
    assert len(tiny_law.Pieces().ids([found[0]["text"].partition("\n")[0]])[0]) - 2 == 62 // 4


def test_one_source_type_needs_only_its_own_tables(law: Path) -> None:
    for table in ("decision_paragraphs", "decisions"):
        tiny_law.change(law, f"DROP TABLE {table}")
    with pytest.raises(SourceError, match=r"no table decision_paragraphs, decisions.*--source-type"):
        reembed(law)
    report = reembed(law, source_type=("statute_article",))
    assert (report.counts["documents_embedded"], report.complete) == (6, False)
    with Database.open(law) as db:
        assert versions.statistics(db, 5)["documents"] == 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("treaty: {cite: []}", "no source type 'treaty'"),
        ("case_paragraph: {cite: 7}", "is no list of text"),
        ('case_paragraph: {cite: ["{court:upper}"]}', "no form 'upper'"),
        ("case_paragraph: {siblings: many}", "siblings: 'many'"),
        ("- 1", "is no mapping"),
        ("a: [", "not a YAML file"),
    ],
)
def test_a_template_that_means_nothing_is_one_line(law: Path, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "context.yaml"
    file.write_text(text)
    with pytest.raises((ConfigError, SourceError), match=said):
        reembed(law, context=str(file))


@pytest.mark.parametrize("page", ["docs/reembedding.md", "docs/ko/reembedding.md"])
def test_the_documented_default_is_the_one_that_is_used(page: str) -> None:
    assert f"```yaml\n{DEFAULT}```" in (tiny_law.ROOT / page).read_text()
