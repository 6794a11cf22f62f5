"""Records of any known shape -> one conversation: messages as chat templates take them, tools, and which turns are to
be learned.

    messages        [{"role": "user", "content": "..."}, ...], content as a string or as parts; tool_calls,
                    reasoning_content and all else is kept
    conversations   [{"from": "human", "value": "..."}, ...], ShareGPT; its function_call is an assistant's tool call
    instruction, input, output and other pairs of question and answer: one turn each
    prompt, completion                  strings, or lists of messages; what the assistant says in the prompt is not
                                        learned

Beside them a `system` text and `tools` (a list, or JSON) where there are such columns; beside a question and an answer
also `history`, the turns before. A key of a turn that is null is left out, and of a columnar file every key, because
Parquet cannot tell null from absent. A turn with `"weight": 0`, `"train": false`, `"loss": "0"` and the like is read
and not learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moai.core.errors import SourceError
from moai.transforms.shapes import (
    TEXT_PARTS,
    BadRecord,
    TextShape,
    described,
    first_fitting,
    in_each_file,
    need_columns,
)
from moai.transforms.template import Message

ASSISTANT = "assistant"
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "function_call": ASSISTANT,
    "tool_call": ASSISTANT,
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
_CALLS = ("function_call", "tool_call")
_BESIDE = ("system", "tools")
_LEARN = ("weight", "train", "loss", "trainable", "loss_mask", "step_loss_mask", "loss_scale")
"""Keys that say whether a turn is learned."""
_YES, _NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")
_OURS = ("role", "from", "content", "value", *_LEARN, "masked")
"""Keys of a turn that are read here; all others are the template's."""


@dataclass(frozen=True)
class Conversation:
    """`learned`: indices of the assistant's messages that are to be learned, in order."""

    messages: list[Message]
    tools: list[Any] | None
    learned: list[int]


def choose_chat_shape(columns: Mapping[str, str], *, source: str, text_column: str | None = None) -> TextShape:
    """The first shape that the columns (name -> type, like {"messages": "list"}) fit. Raises SourceError listing what
    was found.
    """
    if text_column:
        need_columns((text_column,), columns, source, f"--text_column {text_column}")
        shape = _turns(f"column {text_column}", text_column)
    elif (found := first_fitting(_KNOWN, columns)) is None:
        raise SourceError(
            f"{source}: no conversations among its columns ({described(columns)}); known are messages, conversations, "
            f"instruction/input/output, instruction/context/response, "
            "prompt/completion, prompt/response, question/answer, input/output; a list of turns under another name: "
            "--text_column NAME"
        )
    else:
        shape = found
    return in_each_file(shape, columns, optional=("string", "list"))


def read_conversation(
    shape: TextShape, row: Mapping[str, Any], *, train_on: str = "all", nulls_are_absent: bool = False
) -> Conversation:
    """The conversation of one record. Raises BadRecord.

    nulls_are_absent  the row is one of a columnar file, where objects have every key that any of them has
    """
    row = _without_nulls(row) if nulls_are_absent else row
    prompt: list[Message] = []
    shape.check(row)
    if shape.turns:
        turns = _list(row, shape.turns[0])
    elif shape.lists:
        prompt, turns = [_message(turn)[0] for turn in _list(row, "prompt")], _list(row, "completion")
    else:
        turns = [*_history(row), *_pair(shape, row)]
    found = [_message(turn) for turn in turns]
    if not found:
        raise BadRecord("no turn", "the conversation is empty")
    messages = [*prompt, *(message for message, _ in found)]
    learned = [len(prompt) + index for index, (_, learn) in enumerate(found) if learn]
    if (system := row.get("system")) and messages[0]["role"] != "system":
        messages, learned = [{"role": "system", "content": _text(system)}, *messages], [index + 1 for index in learned]
    return Conversation(messages, _tools(row.get("tools")), learned[-1:] if train_on == "last" else learned)


def _list(row: Mapping[str, Any], column: str) -> list[Any]:
    turns = row.get(column)
    if not isinstance(turns, list):
        raise BadRecord(
            "no turn" if turns is None else "turns are no list",
            f"{column!r} is {type(turns).__name__}, not a list of turns",
        )
    return turns


def _pair(shape: TextShape, row: Mapping[str, Any]) -> list[Message]:
    """Question and answer; the answer is the last of the required columns, the question all other columns in their
    order.
    """
    answer = shape.required[-1]
    asked = [(name, row.get(name)) for name in shape.columns if name not in (answer, "history", *_BESIDE)]
    for name, value in [*((n, v) for n, v in asked if n in shape.required), (answer, row.get(answer))]:
        if not isinstance(value, str):
            raise BadRecord(
                "no content" if value is None else "content is no text", f"{name!r} is {type(value).__name__}"
            )
    question = "\n\n".join(_text(value) for _, value in asked if value)
    return [{"role": "user", "content": question}, {"role": ASSISTANT, "content": row[answer]}]


def _history(row: Mapping[str, Any]) -> list[Any]:
    """The turns before the question: pairs of question and answer as Alpaca's format has them, or messages."""
    written = row.get("history") or []
    history = _json(written) if isinstance(written, str) else written
    turns: list[Any] = []
    for one in history if isinstance(history, list) else [None]:
        if isinstance(one, dict):
            turns.append(one)
        elif isinstance(one, list) and len(one) == 2 and all(isinstance(said, str) for said in one):
            turns += [{"role": role, "content": said} for role, said in zip(("user", ASSISTANT), one)]
        else:
            raise BadRecord("history is no list of pairs", str(written)[:80])
    return turns


def _message(turn: Any) -> tuple[Message, bool]:
    """A turn as a message, and whether it is to be learned."""
    if not isinstance(turn, dict):
        raise BadRecord("turn is no object", f"found {type(turn).__name__}")
    unsaid = turn.get("content", "") is None  # beside calls, which many templates ask for
    turn = {name: value for name, value in turn.items() if value is not None}
    named = turn.get("role", turn.get("from"))
    role = _ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        raise BadRecord("unknown role", f"{str(named)[:40]!r}; known are {', '.join(_ROLES)}")
    message: Message = {"role": role, **{name: value for name, value in turn.items() if name not in _OURS}}
    content = turn.get("content", turn.get("value"))
    if isinstance(named, str) and named.lower() in _CALLS:
        message["tool_calls"] = _called(content)
    elif content is not None:
        message["content"] = _text(content)
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"])
        message |= {"content": None} if unsaid else {}
    if len(message) == 1:
        raise BadRecord("no content", f"a turn of {named!r} has neither content nor tool_calls")
    said = [_flag(turn, name) != (name == "masked") for name in (*_LEARN, "masked") if name in turn]
    return message, role == ASSISTANT and all(said)


def _flag(turn: Message, name: str) -> bool:
    """Yes or no in any spelling. Raises BadRecord for what is neither: half a weight cannot be kept."""
    said = str(turn[name]).strip().lower()
    if said not in (*_YES, *_NO):
        raise BadRecord("unknown flag", f"{name!r} of a turn is {str(turn[name])[:40]!r}; known are true, false, 1, 0")
    return said in _YES


def _text(content: Any) -> str:
    """A content that is a string, or parts that all are texts: an answer about an image cannot be learned without the
    image.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRecord("content is no text", f"found {type(content).__name__}")
    return "".join(_part(part) for part in content)


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(text, str) and (not isinstance(part, dict) or part.get("type", "text") in TEXT_PARTS):
        return text
    raise BadRecord(
        "content is no text",
        f"a part of type {str(part.get('type') if isinstance(part, dict) else type(part).__name__)[:40]!r}",
    )


def _called(content: Any) -> list[Any]:
    """ShareGPT writes a call as the JSON of {"name": ..., "arguments": ...}, or of a list of them."""
    found = _json(content)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise BadRecord("tool call is no JSON", str(content)[:80])
    return [{"type": "function", "function": call} for call in calls]


def _calls(calls: Any) -> list[Any]:
    """Tool calls with their arguments as objects: OpenAI writes them as JSON in a string, and most templates would
    write that as JSON again.
    """
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRecord("tool calls are no list", f"found {type(calls).__name__}")
    return [
        {**call, "function": _parsed(call["function"])} if isinstance(call.get("function"), dict) else _parsed(call)
        for call in calls
    ]


def _parsed(function: Message) -> Message:
    arguments = _json(function.get("arguments"))
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else function


def _tools(tools: Any) -> list[Any] | None:
    if tools is None or tools in ("", "null"):
        return None
    found = _json(tools) if isinstance(tools, str) else tools
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise BadRecord("tools are no list", f"found {type(tools).__name__}, not a list of objects")
    return found or None


def _json(text: Any) -> Any:
    """What a string holds as JSON; None if it holds none."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        spared = "content" if value.get("tool_calls") else None
        return {n: _without_nulls(inner) for n, inner in value.items() if inner is not None or n == spared}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _turns(name: str, column: str) -> TextShape:
    return TextShape(name=name, turns=(column, "content"), optional=_BESIDE)


def _asked(name: str, *required: str, optional: tuple[str, ...] = ()) -> TextShape:
    """Optional columns follow the question and come before the answer."""
    beside = ("history", *_BESIDE)
    return TextShape(
        name=name,
        required=required,
        optional=(*optional, *beside),
        order=(*required[:-1], *optional, required[-1], *beside),
    )


_KNOWN = (
    _turns("messages", "messages"),
    _turns("conversations", "conversations"),
    _turns("conversation", "conversation"),
    TextShape(
        name="prompt completion (messages)",
        required=("prompt", "completion"),
        lists=("prompt", "completion"),
        optional=_BESIDE,
        order=("prompt", "completion", *_BESIDE),
    ),
    _asked("instruction (input) output", "instruction", "output", optional=("input",)),
    _asked("instruction (context) response", "instruction", "response", optional=("context", "input")),
    _asked("prompt completion", "prompt", "completion"),
    _asked("prompt response", "prompt", "response"),
    _asked("question answer", "question", "answer"),
    _asked("input output", "input", "output"),
)
