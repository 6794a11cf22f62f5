"""Records -> `tokens` of whole examples, and `trained`: 1 for each token that the assistant says.

A conversation is one text, filled in by the chat template and tokenized as a whole: special tokens of the template are recognised, and no BOS or
EOS is added, since the template writes its own. What is learned is found in that text:

    {% generation %}   what the template marks, as `apply_chat_template(return_assistant_tokens_mask=True)` finds it
    without            of each assistant's turn what follows `messages[:i]` with the words that begin an answer, up to the end of `messages[:i + 1]`,
                       without white space behind the token that ends the turn; both must be beginnings of the whole text

Some templates write an earlier turn otherwise than when it was the last (Qwen3 drops its reasoning). Such a turn gets an example of its own, the
conversation up to it, which is what a model will see when it is asked. A turn that cannot be found there either is not learned, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai import columns
from moai.backends import Reference
from moai.engine.pipeline import advance, count
from moai.errors import TokenizerError
from moai.transforms.conversation import ASSISTANT, Conversation, read_conversation
from moai.transforms.filters import Split
from moai.transforms.template import ChatTemplate, Marks
from moai.transforms.text import BadRecord, TextShape, each_record, each_row, parse_object

_EXAMPLES_AT_ONCE = 256
"""Texts that are tokenized together: their tokens' places take some 100 bytes a token until they are arrays."""
_PROBE = [{"role": "user", "content": "1 + 1?"}, {"role": ASSISTANT, "content": "2, of course."}]

Trained = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Example:
    """A text to train on, and where in it the assistant speaks, in characters."""

    text: str
    spans: Marks


@dataclass(frozen=True, kw_only=True)
class Chats:
    """Examples longer than `seq_len` are left out, or cut where `truncate` is set and a token to learn remains.

    train_on  all of the assistant's turns, or the last
    """

    shape: TextShape
    template: ChatTemplate
    reference: Reference
    seq_len: int
    truncate: bool = False
    train_on: str = "all"
    split: Split | None = None
    """By the text of the whole conversation."""
    max_doc_bytes: int = 16 << 20

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if "record" in batch.schema.names:
                found = list(each_record(batch, lambda record: self._examples(parse_object(record)), self.max_doc_bytes))
            else:
                found = list(each_row(batch, self.shape.columns, self._examples))
            advance(batch.num_rows)
            yield from self._encode(self._on_our_side(found))

    def _examples(self, row: Mapping[str, Any]) -> list[Example]:
        conversation = read_conversation(self.shape, row, train_on=self.train_on)
        examples, unverified = split_examples(self.template, conversation, self._enders)
        if any(_utf8_bytes(example.text) > self.max_doc_bytes for example in examples):
            raise BadRecord("too large", f"over {self.max_doc_bytes} bytes once the template is filled in")
        count("chat.turns", len(conversation.learned))
        count("chat.turns_unverified", unverified)
        return examples

    def _on_our_side(self, records: list[list[Example]]) -> list[list[Example]]:
        if self.split is None:
            return records
        kept = [record for record in records if not record or self.split.keeps(record[-1].text.encode())]
        self.split.count_dropped(len(records) - len(kept))
        return kept

    @cached_property
    def _enders(self) -> tuple[str, ...]:
        return tuple(token for token in self.reference.special_tokens() if token.strip())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_enders"}

    def _encode(self, records: Sequence[Sequence[Example]]) -> Iterator[pa.RecordBatch]:
        """The examples that are kept. A record is kept if one of its examples is."""
        kept, lost = [False] * len(records), [""] * len(records)
        examples = [(number, example) for number, record in enumerate(records) for example in record]
        for first in range(0, len(examples), _EXAMPLES_AT_ONCE):
            some = examples[first : first + _EXAMPLES_AT_ONCE]
            ids, offsets, places = self.reference.encode_with_offsets([example.text for _, example in some])
            count("tokens.text", len(ids))
            trained = np.zeros(len(ids), np.uint8)
            keep, lengths = np.zeros(len(ids), bool), []
            for (number, example), start, end in zip(some, offsets[:-1].tolist(), offsets[1:].tolist()):
                _mark(trained[start:end], places[start:end], example.spans)
                length = self._length(trained[start:end])
                if length:
                    keep[start : start + length] = True
                    kept[number] = True
                    lengths.append(length)
                else:
                    lost[number] = "too_long" if end - start > self.seq_len else "untrained"
                    count(f"chat.{lost[number]}")
            count("tokens.dropped", len(ids) - sum(lengths))
            count("tokens.trained", int(trained[keep].sum()))
            count("chat.examples", len(lengths))
            if lengths:
                grown = np.concatenate(([0], np.cumsum(lengths)))
                yield pa.record_batch([columns.lists(grown, ids[keep]), columns.lists(grown, trained[keep])], names=["tokens", "trained"])
        _count_records(kept, lost)

    def _length(self, trained: Trained) -> int:
        """Tokens of an example that are kept; 0 leaves it out."""
        if len(trained) > self.seq_len and not self.truncate:
            return 0
        return min(len(trained), self.seq_len) if trained[: self.seq_len].any() else 0


def split_examples(template: ChatTemplate, chat: Conversation, enders: tuple[str, ...] = ()) -> tuple[list[Example], int]:
    """The examples of a conversation, and how many turns are in none of them. What follows the last turn to learn is left out.

    enders  tokens that may end a turn; white space behind one is not learned
    Raises BadRecord when the template refuses the conversation.
    """
    if not chat.learned:
        return [], 0
    if template.marks_generation:
        text, marks = template.render(chat.messages[: chat.learned[-1] + 1], chat.tools)
        return [Example(text, _marked_turns(marks, chat))], 0
    whole = chat.learned[-1] + 1
    finder = _Turns(template, chat, enders, {(whole, False): template.render(chat.messages[:whole], chat.tools)[0]})
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
    """A warning about a template, or None. Raises TokenizerError for one whose answers cannot be told from its questions."""
    try:
        found, unverified = split_examples(template, Conversation(_PROBE, None, [1]), enders)
    except BadRecord as error:
        raise TokenizerError(f"{where}: the chat template does not take a question and an answer ({error}); name another with --chat_template FILE") from error
    if unverified or not found[0].spans:
        raise TokenizerError(
            f"{where}: the chat template begins an answer otherwise than it asks for one (add_generation_prompt), so what the assistant says cannot be told; "
            "put {% generation %} and {% endgeneration %} around it in a copy of the template, and name that with --chat_template FILE"
        )
    example = found[0]
    learned = "".join(example.text[start:end] for start, end in example.spans)
    if not learned.rstrip().endswith(enders):
        return f"{where}: the chat template ends an answer with no token that is learned, so the model will not learn to stop; write one there, as {{{{ eos_token }}}}"
    return None


@dataclass(frozen=True)
class _Turns:
    """Finds assistant's turns in texts of a template that does not mark them."""

    template: ChatTemplate
    chat: Conversation
    enders: tuple[str, ...]
    texts: dict[tuple[int, bool], str | None]
    """What was filled in already."""

    def text(self, messages: int, *, prompt: bool = False) -> str | None:
        """The conversation's first messages; None where the template refuses them: many take none that begins with an answer."""
        if (messages, prompt) not in self.texts:
            try:
                self.texts[messages, prompt] = self.template.render(self.chat.messages[:messages], self.chat.tools, prompt=prompt)[0]
            except BadRecord:
                self.texts[messages, prompt] = None
        return self.texts[messages, prompt]

    def span(self, turn: int, text: str) -> tuple[int, int] | None:
        """Where a turn stands in a text; None if it cannot be shown to stand there."""
        before, after = self.text(turn, prompt=True), self.text(turn + 1)
        if before is None or after is None or len(before) >= len(after) or not after.startswith(before) or not text.startswith(after):
            return None
        said = after[len(before) :]
        ended = said.rstrip()
        return len(before), len(before) + len(ended if ended.endswith(self.enders) else said)


def _utf8_bytes(text: str) -> int:
    """Raises BadRecord for half a character, as the arguments of a call can spell one in JSON inside JSON."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise BadRecord("lone surrogate", f"the filled-in template has {error.object[error.start]!a} alone") from None


def _marked_turns(marks: Marks, chat: Conversation) -> Marks:
    """The marks of the turns to learn. Raises BadRecord where marks and turns cannot be matched."""
    turns = [index for index, message in enumerate(chat.messages[: chat.learned[-1] + 1]) if message["role"] == ASSISTANT]
    if turns == chat.learned:
        return marks
    if len(marks) != len(turns):
        raise BadRecord("turns cannot be told apart", f"the template marks {len(marks)} places as generated, for {len(turns)} turns of the assistant")
    return [mark for turn, mark in zip(turns, marks) if turn in chat.learned]


def _mark(trained: Trained, places: npt.NDArray[np.int64], spans: Marks) -> None:
    """Set the tokens of each span: from the first that reaches into it to the last, all between included. A document's first token has nothing
    that could predict it."""
    for start, end in spans:
        inside = np.flatnonzero((places[:, 1] > start) & (places[:, 0] < end))
        if len(inside) and end > start:
            trained[inside[0] : inside[-1] + 1] = 1
    trained[:1] = 0


def _count_records(kept: Sequence[bool], lost: Sequence[str]) -> None:
    reasons = Counter(reason or "untrained" for keep, reason in zip(kept, lost) if not keep)
    for reason, number in reasons.items():
        count(f"filtered.{reason}", number)
    count("filtered", reasons.total())
    count("kept", sum(kept))
