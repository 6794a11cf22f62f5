"""What a preparation lost or doubled, said in one line each; and where conversations lost too much, no data at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moai.core.errors import TooManyBadRecords
from moai.transforms.chat import MARK_ANSWERS, REFUSED

_MOST_UNVERIFIED = 0.1
"""Share of the turns to learn that may be left out unless --max_bad_ratio allows more: a template either proves nearly
all or is the wrong one.
"""


def losses(content: Mapping[str, Any]) -> Iterator[str]:
    """Warnings about the content of a manifest."""
    tokens, chat = content["token_counts"], content.get("chat", {}).get("counts", {})
    for end, at in (("bos", "begin with"), ("eos", "end with")):
        if twice := tokens.get(f"{end}_twice"):
            yield (
                f"{twice:,} of {content['documents']:,} documents {at} the {end.upper()} token already, and have it "
                "twice now; take it out of the text"
            )
    if failed := content["filtered"].get("tokenizer.refused", 0) + chat.get(REFUSED, 0):
        yield f"{failed:,} documents are left out: the tokenizer fails on them; its pre-tokenizer's pattern may give up"
    if chat.get("turns_unverified"):
        yield _unverified(chat)


def check_losses(chat: Mapping[str, int], max_bad_ratio: float) -> None:
    """Raises TooManyBadRecords where more turns could not be verified than may be.

    chat  the counts of conversations; empty where there are none
    """
    most = max(_MOST_UNVERIFIED, max_bad_ratio)
    if chat.get("turns_unverified", 0) > most * chat.get("turns", 0):
        raise TooManyBadRecords(
            f"{_unverified(chat)}. That is over {most:.0%}: take such a template, or allow the loss with "
            f"--max_bad_ratio 1"
        )


def _unverified(chat: Mapping[str, int]) -> str:
    return (
        f"{chat['turns_unverified']:,} of {chat['turns']:,} turns to learn are not learned: under this chat template "
        f"their text does not begin with what asks for it. To learn them, {MARK_ANSWERS}: --chat_template FILE"
    )
