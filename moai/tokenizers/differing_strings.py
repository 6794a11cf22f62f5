"""Strings on which tokenizers have been seen to differ: what a fast backend must get right before it is used.

Each stands for a class: white space, ends of lines, Unicode composition, digits, scripts, control characters, special
tokens in text. They are short here, since the reference reads them at every start; tests repeat the classes at full
length.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

_SPACES = (
    " "
    "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u2028\u2029\u202f\u205f\u3000\x85\t\v\f  "
)
STRINGS: tuple[str, ...] = (
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\x00",
    "a\x00b",
    "\ufefftext",
    " " * 4000,
    "\n" * 2000,
    "\t \n" * 500,
    "a" * 3000,
    "가" * 2000,
    "1" * 1000,
    "." * 1000,
    "Hello, world! It's 3.14 o'clock; we'LL, I'M, they'D",
    "don’t ‘quote’ “me” — ok…",
    "x" + _SPACES + "y" + _SPACES,
    "a\r\nb\rc\n\nd \n e\n ",
    "def f(x):\n\treturn {'a': [1, 2.5e-3, 0xFF]}  # 주석\n\n\n    pass",
    "CamelCaseIdentifier_with_underscores-and.dots/slashes\\n",
    "if(a&&b||!c){d+=1;}//\t//",
    "0 00 000 0000 12345678901234567890 1,234,567.89 ٣٤٥ ५६७ 一二三 Ⅳ ½ ²",
    "대한민국의 주권은 국민에게 있고, 모든 권력은 국민으로부터 나온다.",
    "한글ㅋㅋㅋㅎㅎ ㄱㄴㄷ ㅏㅑㅓ 가각갂",
    "\u1100\u1161\u11a8 각 \u1112\u1161\u11ab\u1100\u1173\u11af 한글",
    "e\u0301 é n\u0303 ñ A\u030a \u212b Å ﬁ ﬃ ſ ẞ İ ı ǅ \u2126 Ω",
    "日本語のテキスト 中文文本 ｆｕｌｌｗｉｄｔｈ ﾊﾝｶｸ",
    "שלום עולם مرحبا بالعالم \u202eabc\u202c",
    "नमस\u094dत\u0947 द\u0941निया สว\u0e31สด\u0e35ชาวโลก ქართული ⲕⲟⲡⲧ ᚠᚢᚦ \U00010330\U00010331\U00010332 "
    "\U0001d4d7\U0001d4ee\U0001d4f5\U0001d4f5\U0001d4f8 \U00020000\U00020001",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd "
    "\U0001f1f0\U0001f1f7\U0001f1fa\U0001f1f8 ☺\ufe0f ©®™ �",
    "a\u200bb\u200cc\u200dd\u2060e\xadf\u061cg",
    "\x01\x02\x1b[31mred\x1b[0m\x7f\x80\x9f",
    "\u0301\u0302\u0303combining first",
    "z" + "\u0301" * 200,
    "\u1112" * 50 + "\u1161" * 50,
    "'s't're've'm'll'd 'S'T'RE",
    "  leading",
    "trailing  ",
    "a  b   c    d",
    "\n\n  \n\t\n x",
    "https://example.org/a?b=c&d=%20e#f mail@example.org",
    "<b>html</b> &amp; <!-- c --> <| not special |> <|",
    "[MASK] [CLS] </s> <s> <unk> <pad> [INST] <<SYS>>",
    "▁ ▁▁ ##ing Ġ Ċ Â â",
)


def probes(special_tokens: Sequence[str]) -> Iterator[str]:
    """The strings above, and each special token in the places where it may stand in a text."""
    yield from STRINGS
    for token in special_tokens[:32]:
        yield from (
            token,
            f"a{token}b",
            f" {token} ",
            f"{token}{token}",
            f"x {token}\n{token[:-1]} {token[1:]} {token.upper()}",
            f"{token}한글 {token}  ",
        )
        yield f"x \n{unicodedata.normalize('NFD', token)} {token}\t \n x{unicodedata.normalize('NFC', token)}"
    yield " ".join(special_tokens[:256])
