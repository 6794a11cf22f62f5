"""Records -> `examples`: texts of conversations, and where in them the assistant speaks.

A conversation is one text, filled in by the chat template and tokenized as a whole: special tokens of the template are
recognised, and no BOS or EOS is added, since the template writes its own. What is learned is found in that text:

    {% generation %}   what the template marks, as `apply_chat_template(return_assistant_tokens_mask=True)` finds it
    without            of each assistant's turn what follows `messages[:i]` with the words that begin an answer, up to
                       the end of `messages[:i + 1]`,
                       without white space behind the token that ends the turn; both must be beginnings of the whole
                       text

Some templates write an earlier turn otherwise than when it was the last (Qwen3 drops its reasoning). Such a turn gets
an example of its own, the conversation up to it, which is what a model will see when it is asked. A turn that cannot be
found there either is not learned, and counted; `moai.pretraining.losses` says how many, and ends the run where they
are many.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from moai.core.errors import TokenizerError
from moai.engine.documents import DOCUMENT
from moai.engine.part import EXAMPLES, UNKEYED, Part
from moai.engine.pipeline import add_documents, advance, count
from moai.engine.schema import Column
from moai.tokenizers.backends import Reference
from moai.transforms.bounds import more_memory
from moai.transforms.conversation import ASSISTANT, Conversation, read_conversation
from moai.transforms.shapes import BadRecord, TextShape
from moai.transforms.template import ChatTemplate, Filling, Marks, Message
from moai.transforms.text import column_value, each_record, each_row, parse_object, places_of, with_plain

MARK_ANSWERS = (
    "put {% generation %} and {% endgeneration %} around what the assistant says in a copy of the template (TRL's "
    "*_training.jinja are such copies)"
)
_ANSWER = "2, of course."
_PROBE: list[Message] = [{"role": "user", "content": "1 + 1?"}, {"role": ASSISTANT, "content": _ANSWER}]
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
_PROBE_CALL: list[Message] = [
    _PROBE[0],
    {"role": ASSISTANT, "content": "", "tool_calls": [{"id": "call00001", **_CALL}]},
]
_MEMORY_BYTES = 2 << 30
"""What filling in the templates of one batch may take in addition."""

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())]))


@dataclass(frozen=True)
class Example:
    """A text to train on, and where in it the assistant speaks, in characters."""

    text: str
    spans: Marks


@dataclass(frozen=True, kw_only=True)
class ToExamples(Part):
    """Records -> `examples` of a conversation (as JSON), and beside them what parts look at: `text`, the contents of
    all turns joined by newlines, without the template; `messages`, each with `role` and `content`; and `columns` of the
    source.

    train_on  all of the assistant's turns, or the last
    """

    version: ClassVar[int] = 3  # 2 dropped nulls of tools' arguments, and knew neither history nor loss

    shape: TextShape
    template: ChatTemplate
    reference: Reference
    train_on: str = "all"
    columns: tuple[Column, ...] = ()
    shown: frozenset[str] = field(default=frozenset(), metadata=UNKEYED)
    """Which of `text` and `messages` a part looks at."""
    max_doc_bytes: int = 16 << 20

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        names = (*self.shape.columns, *(column.name for column in self.columns))
        for batch in batches:
            is_records = "record" in batch.schema.names
            batch = batch if is_records else with_plain(batch, self.columns)
            read = (
                each_record(batch, lambda record: self._read(parse_object(record)), self.max_doc_bytes)
                if is_records
                else each_row(batch, names, lambda row: self._read(row, nulls_are_absent=True))
            )
            with more_memory(_MEMORY_BYTES):
                found = list(read)
            advance(batch.num_rows)
            if found:
                yield self._batch(
                    places_of(batch, [index for index, _ in found]), [row for _, row in found], is_records
                )

    def _batch(self, records: pa.RecordBatch, rows: Sequence[_Read], is_records: bool) -> pa.RecordBatch:
        sizes = (
            pc.binary_length(records["record"]).to_numpy()
            if is_records
            else np.array([len(row.examples) for row in rows])
        )
        made = {
            DOCUMENT: pa.array(add_documents(records, sizes)),
            EXAMPLES: pa.array([row.examples for row in rows], pa.large_binary()),
        }
        if "text" in self.shown:
            made["text"] = pa.array(["\n".join(content for _, content in row.turns) for row in rows], pa.large_string())
        if "messages" in self.shown:
            made["messages"] = pa.array(
                [[{"role": role, "content": content} for role, content in row.turns] for row in rows], MESSAGES
            )
        made |= {
            column.name: pa.array([row.values[at] for row in rows], column.value_type)
            for at, column in enumerate(self.columns)
        }
        return pa.record_batch(list(made.values()), names=list(made))

    def _read(self, row: Mapping[str, Any], *, nulls_are_absent: bool = False) -> _Read:
        conversation = read_conversation(self.shape, row, train_on=self.train_on, nulls_are_absent=nulls_are_absent)
        values = [column_value(row, column) for column in self.columns]
        examples, unverified = split_examples(self.template, conversation, self._enders)
        if any(_utf8_bytes(example.text) > self.max_doc_bytes for example in examples):
            raise BadRecord("too large", f"over {self.max_doc_bytes} bytes once the template is filled in")
        count("chat.turns", len(conversation.learned))
        count("chat.turns_unverified", unverified)
        turns = (
            [(message["role"], message.get("content") or "") for message in conversation.messages] if self.shown else []
        )
        unproven = not examples and unverified
        made = None if unproven else [[example.text, example.spans] for example in examples]
        return _Read(orjson.dumps(made), turns, values)

    @cached_property
    def _enders(self) -> tuple[str, ...]:
        return tuple(token for token in self.reference.special_tokens() if token.strip())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_enders"}


@dataclass(frozen=True)
class _Read:
    """What one record gives; null instead of examples where none of its turns could be verified."""

    examples: bytes
    turns: list[tuple[str, str]]
    values: list[Any]


def split_examples(
    template: ChatTemplate, chat: Conversation, enders: tuple[str, ...] = ()
) -> tuple[list[Example], int]:
    """The examples of a conversation, and how many turns are in none of them. What follows the last turn to learn is
    left out.

    enders  tokens that may end a turn; white space behind one is not learned
    Raises BadRecord when the template refuses the conversation.
    """
    if not chat.learned:
        return [], 0
    whole = chat.learned[-1] + 1
    filling = template.filling(chat.messages, chat.tools)
    if template.marks_generation:
        text, marks = filling.text(whole)
        marks, unverified = _marked_turns(marks, chat)
        return ([Example(text, marks)] if marks else []), unverified
    if example := _in_one_pass(filling, chat, enders):
        return [example], 0
    finder = _Turns(filling, enders, {(whole, False): filling.text(whole)[0]})
    left, unverified = list(chat.learned), 0
    examples: list[Example] = []
    while left:
        last = left[-1]
        text = finder.text(last + 1) or ""
        spans = {turn: span for turn in left if (span := finder.span(turn, text))}
        unverified += last not in spans
        left = [turn for turn in left if turn not in spans and turn != last]
        if spans:
            examples.append(Example(text, list(spans.values())))
    return examples[::-1], unverified


def check_template(template: ChatTemplate, enders: tuple[str, ...], where: str) -> str | None:
    """A warning about a template, or None. Raises TokenizerError for one whose answers cannot be told from its
    questions, or that leaves them out.
    """
    try:
        with more_memory(_MEMORY_BYTES):
            found, unverified = split_examples(template, Conversation(_PROBE, None, [1]), enders)
    except BadRecord as error:
        raise TokenizerError(
            f"{where}: the chat template does not take a question and an answer ({error}); name another with "
            f"--chat_template FILE"
        ) from error
    learned = "".join(example.text[start:end] for example in found for start, end in example.spans)
    if unverified or not learned:
        raise TokenizerError(
            f"{where}: the chat template begins an answer otherwise than it asks for one (add_generation_prompt), so "
            f"what the assistant says cannot be told; {_way_out(where)}"
        )
    if _ANSWER not in learned:
        raise TokenizerError(
            f"{where}: the chat template leaves out the words of an answer, so there is nothing to learn: of "
            f"{_ANSWER!r} it writes {learned[:40]!r}; it may take content as a list of parts only, where moai gives a "
            "string; name one that takes strings with --chat_template FILE"
        )
    if not learned.rstrip().endswith(enders):
        return (
            f"{where}: the chat template ends an answer with no token that is learned, so the model will not learn "
            f"to stop; write one there, as {{{{ eos_token }}}}"
        )
    return None


def _way_out(where: str) -> str:
    twin = Path(where).with_name(f"{Path(where).stem}_training.jinja")
    if twin.is_file():
        return f"its twin marks that: --chat_template {twin}"
    return f"{MARK_ANSWERS}, and name that with --chat_template FILE"


def turn_ends(template: ChatTemplate, enders: Sequence[str]) -> list[str]:
    """The tokens with which an answer and a tool's call end under a template, when they are the last turn: what a model
    that learned them says at the end.
    """
    ends = []
    for probe in (_PROBE, _PROBE_CALL):
        with contextlib.suppress(BadRecord):
            examples, _ = split_examples(template, Conversation(probe, None, [1]), tuple(enders))
            learned = [example.text[start:end].rstrip() for example in examples for start, end in example.spans][-1:]
            ends += [max((token for token in enders if said.endswith(token)), key=len, default="") for said in learned]
    return list(dict.fromkeys(filter(None, ends)))


def _in_one_pass(filling: Filling, chat: Conversation, enders: tuple[str, ...]) -> Example | None:
    """What `_Turns` finds, where the template shows it at once and every turn to learn is found."""
    if not chat.learned[0]:  # nothing stands before it to ask for an answer
        return None
    try:
        found = filling.text_and_borders(chat.learned[-1] + 1)
    except BadRecord:  # may refuse a beginning only: the other way says which
        return None
    if found is None:
        return None
    text, borders, prompt = found
    spans = []
    for turn in chat.learned:
        start, end = borders[turn - 1] + len(prompt), borders[turn]
        if start >= end or not text.startswith(prompt, borders[turn - 1]):
            return None
        spans.append((start, start + _said(text[start:end], enders)))
    return Example(text, spans)


def _said(said: str, enders: tuple[str, ...]) -> int:
    """Characters of an answer without the white space behind a token that ends it."""
    ended = said.rstrip()
    return len(ended if ended.endswith(enders) else said)


@dataclass(frozen=True)
class _Turns:
    """Finds assistant's turns in texts of a template that does not mark them."""

    filling: Filling
    enders: tuple[str, ...]
    texts: dict[tuple[int, bool], str | None]
    """What was filled in already."""

    def text(self, messages: int, *, prompt: bool = False) -> str | None:
        """The conversation's first messages; None where the template refuses them: many take none that begins with an
        answer.
        """
        if (messages, prompt) not in self.texts:
            try:
                self.texts[messages, prompt] = self.filling.text(messages, prompt=prompt)[0]
            except BadRecord:
                self.texts[messages, prompt] = None
        return self.texts[messages, prompt]

    def span(self, turn: int, text: str) -> tuple[int, int] | None:
        """Where a turn stands in a text; None if it cannot be shown to stand there."""
        before, after = self.text(turn, prompt=True), self.text(turn + 1)
        if (
            before is None
            or after is None
            or len(before) >= len(after)
            or not after.startswith(before)
            or not text.startswith(after)
        ):
            return None
        return len(before), len(before) + _said(after[len(before) :], self.enders)


def _utf8_bytes(text: str) -> int:
    """Raises BadRecord for half a character, as the arguments of a call can spell one in JSON inside JSON."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise BadRecord("lone surrogate", f"the filled-in template has {error.object[error.start]!a} alone") from None


def _marked_turns(marks: Marks, chat: Conversation) -> tuple[Marks, int]:
    """The marks of the turns to learn, and how many of these have none. Raises BadRecord where marks and turns cannot
    be matched.
    """
    turns = [
        index for index, message in enumerate(chat.messages[: chat.learned[-1] + 1]) if message["role"] == ASSISTANT
    ]
    if turns == chat.learned:
        return marks, max(0, len(turns) - len(marks))
    if len(marks) != len(turns):
        raise BadRecord(
            "turns cannot be told apart",
            f"the template marks {len(marks)} places as generated, for {len(turns)} turns of the assistant",
        )
    return [mark for turn, mark in zip(turns, marks) if turn in chat.learned], 0
