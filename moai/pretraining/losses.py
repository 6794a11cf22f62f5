"""What a preparation lost or doubled, said in one line each; and where conversations lost too much, no data at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moai.core.errors import TooManyBadRecords
from moai.transforms.chat import MARK_ANSWERS
from moai.transforms.encode_examples import REFUSED

_MOST_UNVERIFIED = 0.1
"""Share of the turns to learn that may be left out unless --max_bad_ratio allows more: a template either proves nearly
all or is the wrong one.
"""
_MULTIPLIED = 1.2
"""Examples a conversation from which on somebody should know."""
_FEW = 10
_FAILS = "the tokenizer fails on them (its pre-tokenizer's pattern gives up, or it has no token for what is unknown)"


def losses(content: Mapping[str, Any]) -> Iterator[str]:
    """Warnings about the content of a manifest."""
    tokens, chat = content["token_counts"], content.get("chat", {}).get("counts", {})
    for end, at in (("bos", "begin with"), ("eos", "end with")):
        if twice := tokens.get(f"{end}_twice"):
            yield (
                f"{twice:,} of {content['documents']:,} documents {at} the {end.upper()} token already, and have it "
                "twice now; take it out of the text"
            )
    if failed := _failed(content):
        yield f"{failed:,} documents are left out: {_FAILS}"
    if chat.get("turns_unverified"):
        yield _unverified(chat)
    if chat.get("examples", 0) > _MULTIPLIED * content["documents"]:
        yield (
            f"{content['documents']:,} conversations became {chat['examples']:,} examples: this chat template writes "
            f"an earlier turn otherwise than the last, so each such turn is learned with all before it again. To learn "
            f"every turn once, {MARK_ANSWERS}: --chat_template FILE"
        )


def check_losses(content: Mapping[str, Any], max_bad_ratio: float) -> None:
    """Raises TooManyBadRecords where more turns could not be verified, or more texts not tokenized, than may be.

    content  `chat`, `filtered` and `records` of a manifest
    """
    failed, read = _failed(content), content["records"]["read"]
    if failed > _FEW and failed > max_bad_ratio * read:
        raise TooManyBadRecords(
            f"{failed:,} of {read:,} documents, more than --max_bad_ratio {max_bad_ratio} allows: {_FAILS}"
        )
    chat, most = content.get("chat", {}).get("counts", {}), max(_MOST_UNVERIFIED, max_bad_ratio)
    if chat.get("turns_unverified", 0) > most * chat.get("turns", 0):
        raise TooManyBadRecords(
            f"{_unverified(chat)}. That is over {most:.0%}: take such a template, or allow the loss with "
            f"--max_bad_ratio 1"
        )


def _failed(content: Mapping[str, Any]) -> int:
    """Documents that the tokenizer itself fails on."""
    return sum(content["filtered"].get(reason, 0) for reason in ("tokenizer.refused", f"chat.{REFUSED}"))


def _unverified(chat: Mapping[str, int]) -> str:
    return (
        f"{chat['turns_unverified']:,} of {chat['turns']:,} turns to learn are not learned: under this chat template "
        f"their text does not begin with what asks for it. To learn them, {MARK_ANSWERS}: --chat_template FILE"
    )
