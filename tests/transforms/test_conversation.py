"""Keys and columns that say what a conversation is: read in every spelling, or the record is set aside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_examples as chat
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_examples import turns

from moai.core.errors import TokenizerError, TooManyBadRecords
from moai.prepared.manifest import Prepared
from moai.tokenizers.backends import Reference
from moai.tokenizers.load import load_tokenizer
from moai.transforms import template as templates
from moai.transforms.conversation import choose_chat_shape, read_conversation
from moai.transforms.shapes import BadRecord, choose_shape
from moai.transforms.template import ChatTemplate, find_template

PrepareIt = Callable[..., Prepared]
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}{% if loop.last and "
    "messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
"""The system's words stand before the last turn if that is the user's, so that no answer follows its prompt."""
PARTS_ONLY = (
    "{% for m in messages %}{{ m.role + ': ' }}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}" + (
    "{% endfor %}" * 2
)


def read(record: dict[str, Any], **how: Any) -> Any:
    kinds = {name: "list" if isinstance(value, list) else "string" for name, value in record.items()}
    return read_conversation(choose_chat_shape(kinds, source="a test"), record, **how)


def called(arguments: Any, **beside: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "mv", "arguments": arguments}}
    return {"messages": [*turns("q"), {"role": "assistant", "content": None, "tool_calls": [call]}], **beside}


NULL = {"id": 7, "parent": None, "more": [{"x": None}]}
SCHEMA = {"name": "mv", "parameters": {"properties": {"parent": {"default": None, "enum": ["a", None]}}}}


@pytest.mark.parametrize("columnar", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
def test_nulls_are_kept_where_they_were_written(as_json: bool, columnar: bool) -> None:
    """A columnar file has every key of every object, so that null there is absent; JSON in a string is JSON."""
    spell = json.dumps if as_json else lambda value: value
    talk = read(called(spell(NULL), tools=spell([SCHEMA])), nulls_are_absent=columnar)
    stripped = columnar and not as_json
    message = talk.messages[-1]
    assert message["content"] is None, "what a template asks for that writes calls"
    assert message["tool_calls"][0]["function"]["arguments"] == ({"id": 7, "more": [{}]} if stripped else NULL)
    parent = {"enum": ["a", None]} if stripped else {"default": None, "enum": ["a", None]}
    assert talk.tools == [{"name": "mv", "parameters": {"properties": {"parent": parent}}}]


ASKED = {"instruction": "And its capital?", "input": "", "output": "Paris."}
BEFORE = turns("Name a country.", "France.")


@pytest.mark.parametrize("columnar", [False, True])
@pytest.mark.parametrize(
    "history",
    [[["Name a country.", "France."]], json.dumps([["Name a country.", "France."]]), BEFORE, None, [], ""],
    ids=["pairs", "JSON", "messages", "null", "none", "blank"],
)
def test_history_stands_before_the_question(history: Any, columnar: bool) -> None:
    talk = read({**ASKED, "system": "Be brief.", "history": history}, nulls_are_absent=columnar)
    earlier = BEFORE if history else []
    assert talk.messages == [
        {"role": "system", "content": "Be brief."}, *earlier, *turns("And its capital?", "Paris.")
    ]  # fmt: skip
    assert talk.learned == ([2, 4] if history else [2])
    assert read({**ASKED, "history": history}, train_on="last").learned == [len(earlier) + 1]


@pytest.mark.parametrize("history", ["no JSON", [["one"]], [["q", 5]], {"q": "a"}, [["q", "a", "b"]], 5])
def test_a_history_of_another_form_is_a_bad_record(history: Any) -> None:
    with pytest.raises(BadRecord) as bad:
        read({**ASKED, "history": history})
    assert bad.value.reason == "history is no list of pairs"


FLAGS = ("loss", "train", "weight", "trainable", "loss_mask", "step_loss_mask", "loss_scale")


@pytest.mark.parametrize("flag", [*FLAGS, "masked"])
def test_a_turn_is_learned_or_not_in_every_spelling(flag: str) -> None:
    def learned(value: Any) -> bool:
        answer = {"role": "assistant", "content": "a", flag: value}
        talk = read({"messages": [*turns("q"), answer]})
        assert flag not in talk.messages[1]
        return bool(talk.learned)

    no, yes = [False, 0, 0.0, "0", "false", "False", "no"], [True, 1, 1.0, "1", "true", "TRUE", " yes "]
    assert {learned(value) for value in no} == {flag == "masked"}
    assert {learned(value) for value in yes} == {flag != "masked"}
    assert learned(None), "null is absent"
    for neither in (0.5, 2, "maybe", "", [], {}):
        with pytest.raises(BadRecord, match=f"'{flag}' of a turn is"):
            learned(neither)


@pytest.mark.parametrize("key", ["content", "value", "body"])
def test_a_part_whose_text_has_another_key_is_a_bad_record_of_text_too(key: str) -> None:
    shape = choose_shape({"messages": "list"}, source="a test")
    image = {"type": "image_url", "image_url": {"url": "x"}}

    def render(*parts: Any) -> str:
        return shape.render({"messages": [{"role": "user", "content": list(parts)}, *turns("x", "end")[1:]]})

    assert render({"type": "text", "text": "a"}, image, "b", None) == "ab\n\nend"
    for part in ({"type": "text", key: "a"}, {"type": "input_text", key: "a"}, {key: "a"}, {"type": "text", "text": 5}):
        with pytest.raises(BadRecord, match="a part of a turn of 'messages'"):
            render(part)


@pytest.mark.parametrize("layout", ["now", "default beside it", "default in the configuration", "as a list"])
def test_the_template_for_tools_is_found_in_every_layout(tmp_path: Path, layout: str) -> None:
    """As transformers finds it: whatever it renders is what is rendered."""
    from transformers import PreTrainedTokenizerFast

    tools, folder = [{"type": "function", "function": {"name": "add"}}], tmp_path / "t"
    with_tools = "{{ 'TOOLS ' + tools | tojson }}" + chat.CHATML
    named = [{"name": "default", "template": chat.CHATML}, {"name": "tool_use", "template": with_tools}]
    both, config = layout == "as a list", layout == "default in the configuration"
    chat.write_tokenizer(folder, template=named if both else chat.CHATML if config else None)  # type: ignore[arg-type]
    more = folder / "additional_chat_templates"
    if not both:
        more.mkdir()
        (more / "tool_use.jinja").write_text(with_tools)
    if layout == "now":
        (folder / "chat_template.jinja").write_text(chat.CHATML)
    elif layout == "default beside it":
        (more / "default.jinja").write_text(chat.CHATML)
    found = find_template(folder / "tokenizer.json", file=None, eos_token="<|endoftext|>", date=None)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    for given in (None, tools):
        if given is None and config:
            continue  # transformers finds no default there
        text = theirs.apply_chat_template(turns("q", "a"), tools=given, tokenize=False)
        assert found.render(turns("q", "a"), given)[0] == text
    assert found.render(turns("q", "a"), tools)[0].startswith("TOOLS ")
    assert not found.render(turns("q", "a"))[0].startswith("TOOLS ")


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def with_template(prepare: PrepareIt, tmp_path: Path) -> PrepareIt:
    """`with_template(source, records, ...)`: prepare these conversations with the tokenizer of all templates."""

    def run(source: str, records: list[Any], **changes: Any) -> Prepared:
        (tmp_path / "t.jinja").write_text(source)
        given = {"data_format": "chat", "chat_template": str(tmp_path / "t.jinja"), **changes}
        folder = chat.write_tokenizer(tmp_path / "tokenizer")
        return prepare(write(tmp_path / "data.jsonl", records), tokenizer_path=str(folder), **given)

    return run


def test_turns_that_cannot_be_verified_are_said_and_end_the_run_where_they_are_many(
    with_template: PrepareIt, caplog: pytest.LogCaptureFixture
) -> None:
    """20 conversations with the system's words under such a template, and one without."""
    records = [{"messages": turns("q", "a", system="s")}] * 20 + [{"messages": turns("q", "a")}]
    says = r"20 of 21 turns to learn are not learned.*_training\.jinja.*--chat_template FILE\. That is over 10%"
    with pytest.raises(TooManyBadRecords, match=says) as many:
        with_template(MISTRAL, records)
    assert "\n" not in str(many.value)
    for _ in range(2):  # prepared, and found prepared
        caplog.clear()
        prepared = with_template(MISTRAL, records, max_bad_ratio=1)
        assert [line for line in caplog.messages if "20 of 21 turns to learn are not learned" in line]
    assert prepared.content["chat"]["counts"]["turns_unverified"] == 20
    assert prepared.content["filtered"] == {"chat.unverified": 20}
    with pytest.raises(TooManyBadRecords, match="20 of 21"):
        with_template(MISTRAL, records)
    few = [{"messages": turns("q", "a")}] * 20 + records[:1]
    assert with_template(MISTRAL, few).content["chat"]["counts"]["turns_unverified"] == 1


def test_a_template_that_multiplies_the_data_says_so_with_the_way_out(
    with_template: PrepareIt, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"messages": turns("q", "a", "r", "b", "s", "c")}] * 10
    assert with_template(chat.THINKING, records).content["chat"]["counts"]["examples"] == 30
    [said] = [line for line in caplog.messages if " examples: this chat template" in line]
    assert "10 conversations became 30 examples" in said
    assert "_training.jinja" in said
    caplog.clear()
    with_template(chat.CHATML, records)
    assert not [line for line in caplog.messages if "became" in line]


def test_marks_that_are_fewer_than_turns_are_counted(with_template: PrepareIt) -> None:
    """A template that marks the last answer alone teaches no other, without a word of it."""
    last = chat.LLAMA_MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    with pytest.raises(TooManyBadRecords, match="5 of 10 turns"):
        with_template(last, [{"messages": turns("q", "a", "q2", "a2")}] * 5)


def test_a_template_that_leaves_out_the_answer_is_refused(with_template: PrepareIt) -> None:
    for source in (PARTS_ONLY, "{% for m in messages %}{{ m.role + '<|im_end|>' }}{% endfor %}"):
        with pytest.raises(TokenizerError, match="leaves out the words of an answer"):
            with_template(source, [{"messages": turns("q", "a")}])


@pytest.mark.parametrize(
    "bomb", ["{{ 'a' * 100000000000 }}", "{{ '%90000000000d' % 1 }}", "{{ 10 ** (10 ** 9) }}", ENDLESS]
)
def test_a_template_without_end_is_refused(
    with_template: PrepareIt, bomb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "_SECONDS", 0.2)
    with pytest.raises(TokenizerError, match="does not take a question and an answer") as refused:
        with_template(bomb + chat.CHATML, [{"messages": turns("q", "a")}])
    assert "\n" not in str(refused.value)
    assert ChatTemplate(source=chat.CHATML, tokens={}).render(turns("q"))[0], "the limits are lifted again"


@pytest.mark.parametrize("num_proc", [0, 1])
def test_a_record_that_a_template_has_no_end_for_is_set_aside(
    with_template: PrepareIt, num_proc: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "_SECONDS", 0.2 if not num_proc else templates._SECONDS)
    bad = ["make it large"] + ["go on for ever"] * (not num_proc)
    source = (
        "{% for m in messages %}{% if m.content == 'go on for ever' %}" + ENDLESS + "{% elif m.content == 'make it "
    )
    source += "large' %}{{ 'a' * 100000000000 }}{% endif %}{% endfor %}" + chat.CHATML
    records = [{"messages": turns(said, "a")} for said in ("q", *bad, "r")]
    prepared = with_template(source, records, num_proc=num_proc)
    assert prepared.content["quarantined"] == {"template refused": len(bad)}
    assert prepared.content["records"]["kept"] == 2


def test_parquet_and_json_give_the_same_conversations(prepare: PrepareIt, tmp_path: Path) -> None:
    records = [{**ASKED, "history": [["q", "a"]]}, {**ASKED, "history": None}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    template = str(chat.ROOT / "configs" / "chat_template_demo.jinja")
    given = {"data_format": "chat", "chat_template": template}
    made = [prepare(file, **given) for file in (write(tmp_path / "a.jsonl", records), tmp_path / "a.parquet")]
    reference = Reference(spec=load_tokenizer(str(chat.ROOT / "tokenizers" / "demo")))
    said = [[reference.decode(ids) for row in chat.rows_of(one) for ids, _ in row] for one in made]
    assert said[0] == said[1]
    assert "q<|im_end|>" in said[0][0]
    assert made[0].content["sources"][0]["not_read"] == []
