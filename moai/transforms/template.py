"""A tokenizer's chat template: where it is found, what names it in a key, and how it is filled in.

    template = find_template(Path("tokenizers/x/tokenizer.json"), file=None, eos_token="<|im_end|>", date=None)
    text, marks = template.render([{"role": "user", "content": "hi"}], tools=None, prompt=True)

It is filled in by transformers' own functions, those behind `apply_chat_template`: 25 MB and half a second once, in
the process that workers are forked from (no torch), then a fifth of a millisecond a conversation, of which each
beginning is filled in once more where the template does not mark answers (`Filling`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date as Date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moai.core.errors import TokenizerError
from moai.tokenizers.load import CHAT_TEMPLATES, named_token
from moai.transforms.bounds import OutOfTime, processor_time
from moai.transforms.shapes import BadRecord

RENDERER = "transformers.utils.chat_template_utils"
"""The module of transformers that fills templates in."""
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names that a template may use; each is the tokenizer's own token."""
_CLOCK = "strftime_now"
_SECONDS = 5.0
"""Of processor time for one conversation, which takes a fifth of a millisecond."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, Any]
Marks = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template and all that its text depends on, small enough for a worker's pipeline and for a manifest.

    with_tools  the template for conversations with tools, of tokenizers that keep two
    date        what today is to a template that asks for the day, as 2025-01-31
    """

    source: str
    with_tools: str = ""
    tokens: Mapping[str, str]
    date: str | None = None

    @property
    def marks_generation(self) -> bool:
        """Whether the template says itself what the assistant's words are: {% generation %} ... {% endgeneration %}."""
        return bool(_MARKS.search(self.source) and (not self.with_tools or _MARKS.search(self.with_tools)))

    def identity(self) -> dict[str, Any]:
        """What of it changes prepared bytes."""
        content = json.dumps([self.source, self.with_tools, sorted(self.tokens.items())])
        dated = {"chat_template_date": self.date} if self.date else {}
        return {
            "chat_template_sha256": hashlib.sha256(content.encode()).hexdigest(),
            "transformers": version("transformers"),
            **dated,
        }

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False
    ) -> tuple[str, Marks]:
        """The text, and where in it {% generation %} begins and ends, in characters. Raises BadRecord when the template
        refuses.

        prompt  end with the words that begin an assistant's turn
        """
        return self.filling(messages, tools).text(len(messages), prompt=prompt)

    def filling(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Filling:
        """What fills the template in with a conversation and with beginnings of it. Raises BadRecord."""
        with _filling_in():
            return Filling(self, self._compiled(bool(tools)), _plain_messages(messages), _plain_tools(tools))

    def _compiled(self, with_tools: bool) -> Any:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        source = self.with_tools if with_tools and self.with_tools else self.source
        compiled: Any = _compile_jinja_template(source)  # kept by transformers
        if _CLOCK in source:
            compiled.globals[_CLOCK] = Date.fromisoformat(self.date or "").strftime
        return compiled


@dataclass(frozen=True)
class Filling:
    """A compiled template and a conversation in plain Python, as transformers' `render_jinja_template` makes both. It
    makes the messages plain anew each time.
    """

    template: ChatTemplate
    compiled: Any
    messages: list[Message]
    tools: list[Any] | None

    def text(self, number: int, *, prompt: bool = False) -> tuple[str, Marks]:
        """Of the first `number` messages, as ChatTemplate.render. Raises BadRecord."""
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        with _filling_in():
            if not self.template.marks_generation:
                return self.compiled.render(**self._given(number, prompt)), []
            render: Any = _render_with_assistant_indices
            text, marks = render(compiled_template=self.compiled, **self._given(number, prompt))
            return text, [(int(start), int(end)) for start, end in marks]

    def text_and_borders(self, number: int) -> tuple[str, list[int], str] | None:
        """The text of the first `number` messages, where in it each ends, and the words that begin an answer; None
        where one pass does not show them. Raises BadRecord.
        """
        noting = _with_borders(self.compiled.environment, self.template.source) if self.tools is None else None
        if noting is None or _CLOCK in self.template.source:
            return None
        mark = "".join(("border", "\0"))  # told by identity: a message may say the same
        blocks, borders, length = list[str](), list[int](), 0
        with _filling_in():
            for block in noting.generate(border=mark, **self._given(number, True)):
                if block is mark:
                    borders.append(length)
                else:
                    blocks.append(block)
                    length += len(block)
        text = "".join(blocks)
        if len(borders) != number:
            return None
        return text[: borders[-1]], borders, text[borders[-1] :]

    def _given(self, number: int, prompt: bool) -> dict[str, Any]:
        given = {"messages": self.messages[:number], "tools": self.tools, "documents": None}
        return {**given, "add_generation_prompt": prompt, **self.template.tokens}


@functools.lru_cache(maxsize=8)
def _with_borders(environment: Any, source: str) -> Any | None:
    from moai.transforms.one_pass import with_borders

    return with_borders(environment, source)


def _plain_messages(messages: Sequence[Message]) -> list[Message]:
    from transformers.utils.chat_template_utils import _alias_reasoning_fields, _plain_template_data

    plain: Any = _plain_template_data(list(messages))
    return list(_alias_reasoning_fields(plain))


def _plain_tools(tools: Sequence[Any] | None) -> list[Any] | None:
    from transformers.utils.chat_template_utils import _plain_template_data

    if not tools:
        return None
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools must be a list of JSON schemas")
    return list(_plain_template_data(list(tools)))


@contextlib.contextmanager
def _filling_in() -> Iterator[None]:
    """A template is a program of its own: what it raises, and takes too long for, is a BadRecord."""
    try:
        with processor_time(_SECONDS):
            yield
    except OutOfTime:
        raise BadRecord("template refused", f"was not filled in within {_SECONDS:g} s of processor time") from None
    except Exception as error:
        said = " ".join(str(error).split())[:160] or "asks for more than it may have"
        raise BadRecord("template refused", f"{type(error).__name__}: {said}") from None


def find_template(tokenizer_file: Path, *, file: str | None, eos_token: str, date: str | None) -> ChatTemplate:
    """The template in `file`, or else beside tokenizer.json: chat_template.jinja and additional_chat_templates/, or in
    tokenizer_config.json.

    Raises TokenizerError without one, or when its text would depend on the day.
    """
    if file:
        source, with_tools = _read(Path(file).expanduser(), "--chat_template"), ""
    else:
        named = _beside(tokenizer_file)
        source, with_tools = named.get("default", ""), named.get("tool_use", "")
    if not source.strip():
        raise TokenizerError(
            f"{tokenizer_file.parent}: has no chat template (no chat_template.jinja, none in tokenizer_config.json), "
            f"so conversations have no text; "
            "name one with --chat_template FILE (configs/chat_template_demo.jinja is one for <|im_start|> and "
            "<|im_end|>), or take the tokenizer of a chat model"
        )
    if (_CLOCK in source or _CLOCK in with_tools) and not date:
        raise TokenizerError(
            f"the chat template of {file or tokenizer_file.parent} writes today's date ({_CLOCK}), so the same data "
            f"would become other tokens tomorrow; "
            "say which day it is: --template_date 2025-01-31"
        )
    tokens = {name: token for name in TOKENS if (token := named_token(tokenizer_file, name))}
    return ChatTemplate(source=source, with_tools=with_tools, tokens={**tokens, "eos_token": eos_token}, date=date)


def _beside(tokenizer_file: Path) -> dict[str, str]:
    """The tokenizer's own templates by name, as `save_pretrained` writes them now, and as it did."""
    own = tokenizer_file.with_name("chat_template.jinja")
    more = sorted(tokenizer_file.with_name(CHAT_TEMPLATES).glob("*.jinja"))
    files = {**({"default": own} if own.is_file() else {}), **{file.stem: file for file in more}}
    named = {name: _read(file, "the tokenizer's chat template") for name, file in files.items()}
    return named if "default" in named else {**_of_config(tokenizer_file), **named}


def _of_config(tokenizer_file: Path) -> dict[str, str]:
    try:
        config = json.loads(tokenizer_file.with_name("tokenizer_config.json").read_text(encoding="utf-8"))
        found = config.get("chat_template")
    except (OSError, ValueError, AttributeError):
        return {}
    if isinstance(found, list):  # as [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        entries = (entry for entry in found if isinstance(entry, dict) and entry.get("name"))
        return {str(entry["name"]): str(entry.get("template") or "") for entry in entries}
    return {"default": found} if isinstance(found, str) else {}


def _read(file: Path, what: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"{what} {file}: not readable as a template ({error.strerror if isinstance(error, OSError) else error})"
        ) from error
