"""What is learned of a conversation: exactly what transformers marks where the template says it, and by hand-written
tables where it does not.
"""

from __future__ import annotations

import chat_examples as chat
import pytest
from chat_examples import encode, learned, turns

from moai.core.errors import TokenizerError
from moai.tokenizers.backends import Reference
from moai.tokenizers.load import load_tokenizer
from moai.transforms.chat import check_template
from moai.transforms.template import ChatTemplate, find_template

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "더하기 <a & b>",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "셋"]}}}
CONVERSATIONS = {
    "one turn": turns("안녕?", "안녕하세요! 반갑습니다."),
    "three turns": turns("1 + 1?", "2", "그럼 2 + 2?", "넷입니다.", "thanks", "You are welcome."),
    "system": turns("누구세요?", "저는 모델입니다.", system="  짧게 답하세요. "),
    "white space": turns("  hi  ", "  two spaces\n\nand lines\n", "x", "y"),
    "empty answer": turns("say nothing", "", "again", "something"),
    "special tokens in words": turns("what is <|im_end|>?", "a token, <|im_end|>", "and </s>?", "too"),
    "emoji inside": turns("😀🎉?", "👨‍👩‍👧‍👦 가족 🎉입니다", "é́", "한글 ㅎㅏㄴ 결합"),
    "reasoning": [
        *turns("2 x 3?"),
        {"role": "assistant", "reasoning_content": "2를 세 번 더한다", "content": "6"},
        *turns("x 2?"),
        {"role": "assistant", "reasoning_content": "6 + 6", "content": "12"},
    ],
}
TOOL_TALK = [
    *turns("1 + [2, 셋]?"),
    {"role": "assistant", "content": "잠시만요.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00001", "content": "3"},
    {"role": "assistant", "content": "3입니다."},
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(spec=load_tokenizer(str(chat.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))))


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The same tokenizer, whose tokens' places leave out the spaces in front of them, as those of GPT-2's kind do."""
    return Reference(
        spec=load_tokenizer(str(chat.write_tokenizer(tmp_path_factory.mktemp("trimmed"), trim_offsets=True)))
    )


@pytest.fixture(scope="module")
def transformers_tokenizer(reference: Reference):  # type: ignore[no-untyped-def]
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(Path(reference.spec.path).parent))


@pytest.mark.parametrize("template", chat.MARKED)
@pytest.mark.parametrize("name", [*CONVERSATIONS, "tools"])
def test_marked_templates_give_transformers_own_ids_and_mask(
    reference: Reference, transformers_tokenizer, template: str, name: str
) -> None:  # type: ignore[no-untyped-def]
    source, messages = chat.MARKED[template], CONVERSATIONS.get(name, TOOL_TALK)
    record = {"messages": messages, **({"tools": [ADD]} if name == "tools" else {})}
    expected = transformers_tokenizer.apply_chat_template(
        messages,
        tools=record.get("tools"),
        chat_template=source,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    (example,), counts = encode(reference, source, record)
    assert example == (expected["input_ids"], expected["assistant_masks"])
    assert 0 < sum(example[1]) < len(example[1]), "not vacuous: something is learned, something is not"
    assert counts["tokens.text"] == len(example[0])
    assert counts["tokens.trained"] == sum(example[1])


@pytest.mark.parametrize("template", [name for name in chat.MARKED if name != "without special tokens"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_tokenizer_that_trims_places_learns_the_same(
    reference: Reference, trimmed: Reference, template: str, name: str
) -> None:
    """Where an answer begins with a space, transformers finds no token at its first character and marks nothing more of
    the conversation.
    """
    record = {"messages": CONVERSATIONS[name]}
    assert encode(trimmed, chat.MARKED[template], record) == encode(reference, chat.MARKED[template], record)


def test_a_last_character_of_several_tokens_is_learned_as_a_whole(reference: Reference) -> None:
    """transformers marks its first token only; half a character is nobody's answer. The space is of the same token as
    the word, as in transformers.
    """
    ((ids, trained),), _ = encode(reference, chat.PLAIN_MARKED, {"messages": turns("?", "네 😀")})
    assert learned(reference, ids, trained) == [" 네 😀"]


def test_the_first_token_of_an_example_is_never_learned(reference: Reference) -> None:
    ((_, trained),), counts = encode(
        reference,
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        {"messages": turns("one two", "three")},
    )
    assert trained == [0, *[1] * (len(trained) - 1)]
    assert counts["tokens.trained"] == len(trained) - 1


HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
TABLE = {
    "chatml": (
        chat.CHATML,
        turns("q1", "a1", "q2", "a2 "),
        [
            (
                "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
                "a1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2 <|im_end|>\n",
                ["a1<|im_end|>", "a2 <|im_end|>"],
            )
        ],
    ),
    "llama": (
        chat.LLAMA,
        turns("q1", "a1", "q2", "a2", system="s"),
        [
            (
                "<s>"
                + HEAD.format("system")
                + "s<|eot_id|>"
                + HEAD.format("user")
                + "q1<|eot_id|>"
                + HEAD.format("assistant")
                + "a1<|eot_id|>"
                + HEAD.format("user")
                + "q2<|eot_id|>"
                + HEAD.format("assistant")
                + "a2<|eot_id|>",
                ["a1<|eot_id|>", "a2<|eot_id|>"],
            )
        ],
    ),
    "mistral": (
        chat.MISTRAL,
        turns("q1", "a1", "q2", "답 둘"),
        [
            (
                "<s>[INST] q1 [/INST] a1<|endoftext|>[INST] q2 [/INST] 답 둘<|endoftext|>",
                [" a1<|endoftext|>", " 답 둘<|endoftext|>"],
            )
        ],
    ),
    "gemma": (
        chat.GEMMA,
        turns("q1", " a1 ", "q2", "a2"),
        [
            (
                "<s><start_of_turn>user\nq1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn>\n<start_of_turn>user\n"
                "q2<end_of_turn>\n<start_of_turn>model\na2<end_of_turn>\n",
                ["a1<end_of_turn>", "a2<end_of_turn>"],
            )
        ],
    ),
    "a turn for the user at the end": (
        chat.CHATML,
        turns("q1", "a1", "never answered", system="s"),
        [
            (
                "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n",
                ["a1<|im_end|>"],
            )
        ],
    ),
    "two answers in a row": (
        chat.CHATML,
        [*turns("q", "a", system="s"), {"role": "assistant", "content": "b"}],
        [
            (
                "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
                "<|im_start|>assistant\nb<|im_end|>\n",
                ["a<|im_end|>", "b<|im_end|>"],
            )
        ],
    ),
    "weights": (
        chat.CHATML,
        [*turns("q1", system="s"), {"role": "assistant", "content": "a1", "weight": 0}, *turns("q2", "a2")],
        [
            (
                "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
                "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n",
                ["a2<|im_end|>"],
            )
        ],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_unmarked_templates_by_hand(reference: Reference, name: str) -> None:
    source, messages, expected = TABLE[name]
    made, counts = encode(reference, source, {"messages": messages})
    assert [(reference.decode(ids), learned(reference, ids, trained)) for ids, trained in made] == expected
    assert counts.get("chat.turns_unverified", 0) == 0


def test_a_template_that_drops_earlier_reasoning_gives_each_such_turn_the_text_it_was_said_in(
    reference: Reference,
) -> None:
    """Learned from the whole text, the first answer would come without its reasoning, which no model is asked for."""
    made, counts = encode(reference, chat.THINKING, {"messages": CONVERSATIONS["reasoning"]})
    user, assistant = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"
    first, second = "<think>\n2를 세 번 더한다\n</think>\n\n6<|im_end|>", "<think>\n6 + 6\n</think>\n\n12<|im_end|>"
    assert [(reference.decode(ids), learned(reference, ids, trained)) for ids, trained in made] == [
        (user.format("2 x 3?") + assistant + first + "\n", [first]),
        (
            user.format("2 x 3?") + assistant + "6<|im_end|>\n" + user.format("x 2?") + assistant + second + "\n",
            [second],
        ),
    ]
    assert (counts["chat.turns"], counts["chat.examples"], counts.get("filtered", 0)) == (2, 2, 0)


def test_turns_around_a_tool_share_an_example_where_the_template_keeps_their_reasoning(reference: Reference) -> None:
    messages = [
        *turns("q"),
        {"role": "assistant", "reasoning_content": "r1", "content": "look"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "reasoning_content": "r2", "content": "42!"},
    ]
    ((ids, trained),), _ = encode(reference, chat.THINKING, {"messages": messages})
    assert learned(reference, ids, trained) == [
        "<think>\nr1\n</think>\n\nlook<|im_end|>",
        "<think>\nr2\n</think>\n\n42!<|im_end|>",
    ]


def test_a_template_that_moves_tools_is_not_learned_where_it_would_be_wrong(reference: Reference) -> None:
    """The question is asked with tools before it and written without them once it is answered: no turn can be shown to
    follow what was asked.
    """
    made, counts = encode(reference, chat.MISTRAL, {"messages": turns("q1", "a1"), "tools": [ADD]})
    assert made == []
    assert (counts["chat.turns_unverified"], counts["filtered.chat.unverified"], counts["filtered"]) == (1, 1, 1)


def test_a_conversation_that_begins_with_an_answer_is_learned_from_the_next_one_on(reference: Reference) -> None:
    messages = [{"role": "assistant", "content": "hello"}, *turns("q", "a")]
    ((ids, trained),), counts = encode(reference, chat.CHATML, {"messages": messages})
    assert learned(reference, ids, trained) == ["a<|im_end|>"]
    assert counts["chat.turns_unverified"] == 1


@pytest.mark.parametrize("source", [chat.CHATML, chat.DEMO, chat.THINKING], ids=["unmarked", "marked", "thinking"])
def test_only_the_last_turn_is_learned_when_asked(reference: Reference, source: str) -> None:
    ((ids, trained),), _ = encode(reference, source, {"messages": turns("q1", "a1", "q2", "a2")}, train_on="last")
    said = learned(reference, ids, trained)
    assert len(said) == 1
    assert said[0].endswith("a2<|im_end|>")


def test_marks_that_are_no_turns_are_refused_where_turns_must_be_chosen(reference: Reference) -> None:
    source = chat.DEMO.replace(
        "{{- '<|im_end|>' -}}\n{%- endgeneration -%}",
        "{%- endgeneration -%}{%- generation -%}{{- '<|im_end|>' -}}{%- endgeneration -%}",
    )
    assert source != chat.DEMO
    ((ids, trained),), _ = encode(reference, source, {"messages": turns("q1", "a1", "q2", "a2")})
    assert learned(reference, ids, trained) == ["a1<|im_end|>", "a2<|im_end|>"]
    made, counts = encode(reference, source, {"messages": turns("q1", "a1", "q2", "a2")}, train_on="last")
    assert made == []
    assert counts["quarantined.turns cannot be told apart"] == 1


def test_templates_that_cannot_be_learned_from_are_refused_with_the_way_out() -> None:
    def check(source: str) -> str | None:
        return check_template(ChatTemplate(source=source, tokens=chat.TOKENS), ("<|im_end|>", "<|endoftext|>"), "x")

    with pytest.raises(TokenizerError, match=r"put \{% generation %\}"):
        check(chat.FORCED_THINKING)
    with pytest.raises(TokenizerError, match="does not take a question"):
        check("{{ raise_exception('no') }}")
    with pytest.raises(TokenizerError, match="does not take a question"):
        check("{% for m in messages %}")
    assert "not learn to stop" in (check(chat.PLAIN_MARKED) or "")
    assert check(chat.DEMO) is None
    assert check(chat.CHATML) is None


def test_the_day_is_pinned_or_the_template_refused(tmp_path, reference: Reference) -> None:  # type: ignore[no-untyped-def]
    dated = tmp_path / "dated.jinja"
    dated.write_text("{{ strftime_now('%d %b %Y') + '\n' }}" + chat.CHATML)
    file = chat.write_tokenizer(tmp_path / "t") / "tokenizer.json"
    with pytest.raises(TokenizerError, match="--template_date 2025-01-31"):
        find_template(file, file=str(dated), eos_token="<|endoftext|>", date=None)
    template = find_template(file, file=str(dated), eos_token="<|endoftext|>", date="2024-07-26")
    for _ in range(2):
        assert template.render(turns("q"))[0].startswith("26 Jul 2024\n")
    other = find_template(file, file=str(dated), eos_token="<|endoftext|>", date="2025-01-31")
    assert other.render(turns("q"))[0].startswith("31 Jan 2025\n")
    assert template.render(turns("q"))[0].startswith("26 Jul 2024\n")


def test_where_a_template_is_found(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def found(folder: str) -> ChatTemplate:
        return find_template(tmp_path / folder / "tokenizer.json", file=None, eos_token="<|im_end|>", date=None)

    chat.write_tokenizer(tmp_path / "none")
    with pytest.raises(TokenizerError, match="--chat_template FILE"):
        found("none")
    chat.write_tokenizer(tmp_path / "configured", template=chat.CHATML)
    assert found("configured").source == chat.CHATML
    assert found("configured").tokens == {**chat.TOKENS, "eos_token": "<|im_end|>"}
    (tmp_path / "configured" / "chat_template.jinja").write_text(chat.GEMMA)
    assert found("configured").source == chat.GEMMA, "the file wins, as in transformers"
    named = [{"name": "default", "template": chat.CHATML}, {"name": "tool_use", "template": chat.DEMO}]
    chat.write_tokenizer(tmp_path / "two")
    config = tmp_path / "two" / "tokenizer_config.json"
    config.write_text(config.read_text()[:-1] + ', "chat_template": ' + __import__("json").dumps(named) + "}")
    two = found("two")
    assert "Tools: " in two.render(turns("q"), [ADD])[0]
    assert "Be kind." in two.render(turns("q"))[0]
