"""Templates as models ship them, and copies that mark answers: learned is what the template marks, or what follows the
prompt, or nothing, and then it is counted.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import chat_examples as chat
import numpy as np
import pytest
from chat_examples import turns

from moai.core.errors import TokenizerError
from moai.tokenizers.backends import Fastokens, Reference
from moai.tokenizers.load import load_tokenizer
from moai.transforms.chat import Example, check_template, split_examples
from moai.transforms.conversation import Conversation, choose_chat_shape, read_conversation
from moai.transforms.encode_examples import EncodeExamples
from moai.transforms.shapes import BadRecord
from moai.transforms.template import ChatTemplate

DATA = chat.ROOT.parent / "shared" / "conformance"
TEMPLATES = DATA / "chat_templates"
DATE = "2025-01-31"
REFUSED = {
    "begins an answer otherwise": {"deepseekv3", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"},
    "leaves out the words": {"idefics3", "idefics3_training"},
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
ADD = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
HARDER: dict[str, dict[str, Any]] = {
    "Korean": {"messages": turns("하나 더하기 하나는?", "둘입니다.", "그럼 둘 더하기 둘은?", "넷이지요.")},
    "white space": {"messages": turns(" q ", "  two spaces\n\nand lines\n", "x", "\ty\t")},
    "blank": {"messages": turns("say nothing", "", "again", "something.")},
    "special tokens": {"messages": turns("what is <|im_end|>?", "a token, <|im_end|> or </s>.", "and <s>?", "too.")},
    "two in a row": {"messages": [*turns("q", "first."), {"role": "assistant", "content": "second."}]},
    "three times": {"messages": turns("a", "same.", "b", "same.", "c", "same.")},
    "tools": {
        "messages": [
            *turns("1 + 1?"),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call00001", "name": "add", "content": "2"},
            {"role": "assistant", "content": "It is two."},
        ],
        "tools": [ADD],
    },
}


def files() -> list[Path]:
    return sorted(TEMPLATES.rglob("*.jinja"))


pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not beside this checkout")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(spec=load_tokenizer(str(chat.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))))


@pytest.fixture(scope="module")
def transformers_tokenizer(reference: Reference) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(Path(reference.spec.path).parent))


def oracle(render: Any, talk: Conversation, example: Example) -> list[tuple[int, int]]:
    """The prefix oracle, written down once more: places of each answer in the example's text."""
    found = []
    for turn in talk.learned:
        before, after = render(talk.messages[:turn], True), render(talk.messages[: turn + 1])
        if before and after and after.startswith(before) and example.text.startswith(after) and after != before:
            found.append((len(before), len(after)))
    return found


def test_there_are_templates() -> None:
    assert len(files()) > 20


@pytest.mark.parametrize("file", files(), ids=lambda file: file.stem)
def test_text_is_transformers_own_and_every_answer_is_learned_or_counted(
    file: Path, reference: Reference, transformers_tokenizer: Any
) -> None:
    source, enders = file.read_text(encoding="utf-8"), tuple(reference.special_tokens())
    template = ChatTemplate(source=source, tokens=chat.TOKENS, date=DATE)
    for says, names in REFUSED.items():
        if file.stem in names:
            with pytest.raises(TokenizerError, match=says) as refused:
                check_template(template, enders, str(file))
            assert "\n" not in str(refused.value)
            twin = file.with_name(f"{file.stem}_training.jinja")
            assert (
                not twin.exists() or says == "leaves out the words" or f"--chat_template {twin}" in str(refused.value)
            )
            return
    check_template(template, enders, str(file))
    expected = json.loads((DATA / "expected.json").read_bytes())["chat_templates"]["conversations"]
    tried = learned_turns = 0
    fast = EncodeExamples(backend=Fastokens(spec=reference.spec), reference=reference, seq_len=4096)
    for record in (*({"messages": messages} for messages in expected.values()), *HARDER.values()):
        shape = choose_chat_shape(dict.fromkeys(record, "list"), source="a test")
        talk = read_conversation(shape, record)

        def render(messages: list[Any], prompt: bool = False, talk: Conversation = talk) -> str | None:
            with contextlib.suppress(Exception):  # a template that takes no such talk
                return str(
                    transformers_tokenizer.apply_chat_template(
                        messages, tools=talk.tools, chat_template=source, tokenize=False, add_generation_prompt=prompt
                    )
                )
            return None

        try:
            examples, unverified = split_examples(template, talk, enders)
        except BadRecord:
            assert render(talk.messages) is None
            continue
        tried += 1
        pairs = [(example.text, example.spans) for example in examples]
        for ours_, theirs_ in zip(fast._marked(pairs), fast._by_reference(pairs)) if pairs else ():
            assert np.array_equal(ours_, theirs_), record
        assert {example.text for example in examples} <= {render(talk.messages[:n]) for n in range(1, 9)}
        if template.marks_generation:
            ids, _, places = reference.encode_with_offsets([example.text for example in examples])
            theirs = transformers_tokenizer.apply_chat_template(
                talk.messages,
                tools=talk.tools,
                chat_template=source,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            ours = [
                int(
                    any(start < end and places[i][1] > start and places[i][0] < end for start, end in examples[0].spans)
                )
                for i in range(len(ids))
            ]
            assert (ids.tolist(), ours) == (theirs["input_ids"], theirs["assistant_masks"]), record
            learned_turns += len(talk.learned) - unverified
            continue
        spans = [(example, span) for example in examples for span in example.spans]
        assert len(spans) + unverified == len(talk.learned)
        learned_turns += len(spans)
        for example, (start, end) in spans:
            assert any(
                start == first and not example.text[end:last].strip() for first, last in oracle(render, talk, example)
            )
    assert tried > 5
    assert learned_turns > 10
