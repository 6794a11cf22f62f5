"""Templates that show in one pass where each message ends: the same examples as from every beginning of the
conversation; and those of which that cannot be shown.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import chat_examples as chat
import pytest
from chat_examples import turns
from hypothesis import given, settings
from hypothesis import strategies as st

from moai.transforms import chat as transform
from moai.transforms.chat import split_examples
from moai.transforms.conversation import Conversation
from moai.transforms.template import ChatTemplate

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
BODY = "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}"
LOOP = "{% for m in messages %}" + BODY + "{% endfor %}"
SHOWN = {
    "plain": LOOP + PROMPT,
    "another name": "{% set all = messages %}{% for m in all %}" + BODY + "{% endfor %}" + PROMPT,
    "the first and the past": "{% set first = messages[0].role %}{{ bos_token }}{% for m in messages %}"
    "{% if loop.first or loop.previtem.role != m.role %}{{ first }}{% endif %}" + BODY + "{% endfor %}" + PROMPT,
    "a count that goes on": "{% set n = namespace(at=0) %}{% for m in messages %}{% set n.at = n.at + 1 %}{{ n.at }}"
    + BODY
    + "{% endfor %}"
    + PROMPT,
}
HIDDEN = {
    "the last": "{% for m in messages %}{% if loop.last %}!{% endif %}" + BODY + "{% endfor %}" + PROMPT,
    "the next": "{% for m in messages %}{% if loop.nextitem %}!{% endif %}" + BODY + "{% endfor %}" + PROMPT,
    "how many": "{% for m in messages %}{{ messages | length }}" + BODY + "{% endfor %}" + PROMPT,
    "how many left": "{% for m in messages %}{{ loop.revindex }}" + BODY + "{% endfor %}" + PROMPT,
    "the end of the list": "{% set last = messages[-1].content %}" + LOOP + PROMPT,
    "a part of the list": "{% for m in messages[1:] %}" + BODY + "{% endfor %}" + PROMPT,
    "some of the list": "{% for m in messages if m.role != 'system' %}" + BODY + "{% endfor %}" + PROMPT,
    "twice": LOOP + LOOP + PROMPT,
    "a loop within": "{% for m in messages %}{% for t in m.content %}{{ t }}{% endfor %}{% endfor %}" + PROMPT,
    "the prompt elsewhere": "{% if add_generation_prompt %}!{% endif %}" + LOOP + PROMPT,
    "no prompt": LOOP,
    "an end": LOOP + "{{ eos_token }}" + PROMPT,
    "a prompt that reads": LOOP + "{% if add_generation_prompt %}{{ messages[0].content }}{% endif %}",
    "a macro": "{% macro w(m) %}" + BODY + "{% endmacro %}{% for m in messages %}{{ w(m) }}{% endfor %}" + PROMPT,
    "the loop itself": "{% for m in messages %}{% set l = loop %}" + BODY + "{% endfor %}" + PROMPT,
}
TEXTS = st.text("aß가 \n<|im_end|>\0", max_size=6)


def borders(source: str, messages: list[dict[str, Any]]) -> Any:
    template = ChatTemplate(source=source, tokens=chat.TOKENS)
    return template.filling(messages).text_and_borders(len(messages))


@pytest.mark.parametrize("source", SHOWN.values(), ids=SHOWN)
def test_borders_are_the_ends_of_the_beginnings(source: str) -> None:
    messages = turns("q", "a", "r", " b ", system="s")
    template = ChatTemplate(source=source, tokens=chat.TOKENS)
    text, found, prompt = borders(source, messages)
    assert text == template.render(messages)[0]
    assert found == [len(template.render(messages[:number])[0]) for number in range(1, 6)]
    assert prompt == "<|im_start|>assistant\n"


@pytest.mark.parametrize("source", HIDDEN.values(), ids=HIDDEN)
def test_what_looks_further_is_not_believed(source: str) -> None:
    assert borders(source, turns("q", "a")) is None


@pytest.mark.parametrize("source", SHOWN.values(), ids=SHOWN)
@settings(max_examples=60, deadline=None)
@given(contents=st.lists(TEXTS, min_size=1, max_size=6), system=st.sampled_from(["", "s"]), data=st.data())
def test_examples_are_those_of_every_beginning(source: str, contents: list[str], system: str, data: Any) -> None:
    messages = turns(*contents, system=system)
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return
    learned = sorted(data.draw(st.sets(st.sampled_from(answers), min_size=1)))
    template, talk = ChatTemplate(source=source, tokens=chat.TOKENS), Conversation(messages, None, learned)
    enders = ("<|im_end|>",)
    with mock.patch.object(transform, "_in_one_pass", return_value=None):
        wanted = split_examples(template, talk, enders)
    assert split_examples(template, talk, enders) == wanted


def test_a_conversation_takes_one_pass() -> None:
    """Not one for each beginning, which takes time with the square of the messages."""
    messages = turns(*map(str, range(200)))
    talk = Conversation(messages, None, list(range(1, 200, 2)))
    template = ChatTemplate(source=SHOWN["plain"], tokens=chat.TOKENS)
    with mock.patch("moai.transforms.template.Filling.text", side_effect=AssertionError):
        [example], unverified = split_examples(template, talk, ("<|im_end|>",))
    assert (len(example.spans), unverified) == (100, 0)
