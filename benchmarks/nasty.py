"""Texts on which tokenizers have been seen to differ, at full length: what tests and benchmarks ask of every backend.

`moai.tokenizers.differing_strings` repeats the classes in short, since the reference reads those at every start.
"""

from __future__ import annotations

import random
import string
import unicodedata
from collections.abc import Sequence


def nasty(special_tokens: Sequence[str] = ()) -> dict[str, str]:
    """About 7 MB under their names, the same at every call; each special token in many places too."""
    draw = random.Random(0)

    def drawn(count: int, *ranges: tuple[int, int]) -> str:
        """`count` times one letter of each range."""
        return "".join(chr(draw.randrange(start, end)) for _ in range(count) for start, end in ranges)

    texts = {
        # white space and ends of lines
        "empty": "",
        "space": " ",
        "newline": "\n",
        "leading": "   leading",
        "trailing": "trailing   ",
        "1M spaces": " " * 1_000_000,
        "100k newlines": "\n" * 100_000,
        "100k CRLF": "\r\n" * 100_000,
        "100k tab, space, newline": "\t \n" * 100_000,
        "100k no-break spaces": "\u00a0" * 100_000,
        "ends of lines": "a\r\nb\rc\n\nd \n e\n \r\n\r\n x\n\r" * 2000,
        "spaces of Unicode": "\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000\x85\v\f x" * 2000,
        # length
        "1 MB one line": "The quick brown fox, 대한민국의 주권은 국민에게 있고; it's 3.14 o'clock (日本語). " * 9600,
        "1 MB one word": "a" * 1_000_000,
        "200k letters": "".join(draw.choices(string.ascii_letters, k=200_000)),
        "100k Hangul word": drawn(100_000, (0xAC00, 0xD7A4)),
        "100k digits": "".join(draw.choices(string.digits, k=100_000)),
        "100k dots": "." * 100_000,
        "100k NUL": "\0" * 100_000,
        # composition and case
        "combining": "z" + "\u0301\u0302\u0323" * 20_000,
        "combining first": "\u0301\u0302\u0303x " * 1000,
        "jamo": drawn(20_000, (0x1100, 0x1113), (0x1161, 0x1176), (0x11A7, 0x11C3)),
        "half jamo": "\u1112" * 5000 + "\u1161" * 5000,
        "compatibility jamo": "ㄱㄴㄷㅏㅑㅓㅋㅋㅎㅎ" * 3000,
        "NFD": unicodedata.normalize("NFD", "대한민국 각 é ñ Å ﬁ Ω " * 3000),
        "case": "İıſẞßǅΣσςﬀKÅ Ĳﬃŉǰΐ" * 2000,
        "contractions": "'s't're've'm'll'd 'S'T'RE'VE'M'LL'D '\u017f don’t we'LL " * 2000,
        # scripts
        "right to left": "שלום עולם مرحبا \u202eabc\u202c " * 3000,
        "Thai, Devanagari": "สวัสดีชาวโลกนมस्ते " * 3000,
        "ideographs": "一丁丂七丄丅丆万丈三上下丌不与丏丐丑丒专且丕世丗丘丙业丛东丝" * 1000,
        "Mongolian": "\u1820\u180e\u1821 \u180ex  \u180e\u180fabc \u180e\n\u180e. " * 500,
        "astral": drawn(30_000, (0x10000, 0x30000)),
        "private": drawn(10_000, (0xE000, 0xF900)),
        "the first plane": "".join(chr(code) for code in range(1, 0x10000) if not 0xD800 <= code < 0xE000),
        "every 37th of the other planes": "".join(map(chr, range(0x10000, 0x110000, 37))),
        "each new letter": "".join(
            f"a{chr(code)}\u0323's {chr(code)}{chr(code)}b" for start, end in _NEW for code in range(start, end)
        ),
        # signs
        "NUL inside": "a\0b\0\0 c",
        "BOM": "\ufeffBOM \ufeff in \ufefftext",
        "control": "".join(map(chr, range(32))) * 500 + "\x7f\x80\x9f" * 500,
        "bytes as letters": bytes(range(256)).decode("latin-1") * 100,
        "joined emoji": "👩\u200d👩\u200d👧\u200d👦👍🏽🇰🇷" * 2000,
        "variation": "☺️☺︎©️®️™️#️⃣" * 3000,
        "zero width": "a\u200bb\u200cc\u200dd\u2060e\xadf\u061cg " * 2000,
        "replacement": "�" * 5000,
        "numbers": "1,234,567.89 ٣٤٥ ५६७ Ⅳ ½ ² 0xFF 1e-9 00 000 0000 " * 2000,
        "quotes": "\"'`“”‘’«»" * 3000,
        "URL": "https://example.org/a?b=c&d=%20e#f mail@example.org " * 2000,
        "names": "snake_case_CamelCase-kebab/slash\\back 2x4 " * 2000,
        "code": "def f(x):\n\treturn {'a': [1, 2.5e-3]}  # 주석\n\n\n    pass\n" * 1000,
        "HTML": "<b>&amp;</b><!-- <| not |> <|endoftext <|endoftext|\n" * 500,
        "pieces": "▁ ▁▁ ##ing Ġ Ċ Â â ĠĠ </w> <0x41> [UNK] " * 2000,
    }
    for token in special_tokens:
        texts[f"only {token}"] = token
        texts[f"{token} in text"] = (
            f"{token}a{token} {token}  {token}\n{token}{token}{token[:-1]} {token[1:]} 한글{token}한글 {token.upper()} "
            f"{token.lower()} " * 300
        )
    return texts


_NEW = (
    (0x088F, 0x0900),
    (0x0C5C, 0x0C5E),
    (0x166D, 0x166F),
    (0x1AC1, 0x1AE0),
    (0x2E43, 0x2E5E),
    (0xA7CB, 0xA7F5),
    (0x10940, 0x1095A),
    (0x10EFD, 0x10F00),
    (0x11DB0, 0x11DDC),
    (0x1CCD6, 0x1CCFA),
    (0x1E030, 0x1E090),
    (0x2B820, 0x2B840),
    (0x323B0, 0x323D0),
)
"""Ranges of letters and marks that came with late releases of Unicode, which libraries follow at different times."""
