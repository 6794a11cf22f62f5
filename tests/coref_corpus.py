"""Korean text for the entity-coref tests: news-like documents that pass every rule, others that fail one each, and two
small tokenizers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PEOPLE = ("이순신", "안중근", "김영삼", "김대중", "노무현", "이명박", "반기문", "장영실", "정약용", "신사임당")
PLACES = ("서울", "부산", "인천", "대구", "광주", "제주도", "독일", "프랑스", "베트남", "캐나다")
FIRMS = ("삼성전자", "현대자동차", "한국은행", "국민은행", "한국전력", "대한항공", "포항제철", "네이버")
SENTENCES = (
    "{a} 시장은 지난해보다 크게 늘어난 예산을 바탕으로 새로운 도로와 공원을 만들겠다고 {b} 의회에서 설명했다.",
    "{a} {c}의 올해 매출은 지난해 같은 기간보다 십이 퍼센트 늘었고 영업 이익도 꾸준히 좋아지고 있다는 평가를 받는다.",
    "전문가들은 {a} 지역과 {b} 지역의 주택 가격이 당분간 안정될 것이라고 보면서도 "
    "금리가 오르면 상황이 달라질 수 있다고 말했다.",
    "{d} 전 대통령이 {a}에서 열린 행사에 참석해 참석자들과 오랫동안 이야기를 나누었다고 관계자가 전했다.",
    "이번 조사는 {c}과 {a} 연구소가 함께 진행했으며 결과는 다음 달에 책으로 나올 예정이라고 한다.",
    "{b}에서 온 관광객들은 {a}의 시장과 음식이 특히 기억에 남는다고 하면서 다시 오고 싶다는 뜻을 밝혔다.",
    "{a} 회의에 앞서 {d} 기념관을 찾은 학생들은 전시를 둘러보고 안내원의 설명을 들으며 많은 질문을 했다.",
    "정부는 {b} 대사관과 {c}의 계획을 검토한 뒤 필요한 지원을 하겠다고 했지만 구체적인 금액은 밝히지 않았다.",
)


def news(seed: int) -> str:
    """About 1,000 characters, 5 to 20 % proper nouns, no pronoun, names that come again."""
    choose = random.Random(seed)
    names = {
        "a": choose.choice(PLACES[:5]),
        "b": choose.choice(PLACES[5:]),
        "c": choose.choice(FIRMS),
        "d": choose.choice(PEOPLE),
    }
    return " ".join(choose.choice(SENTENCES).format(**names) for _ in range(17))


def failing(rule: str, seed: int = 0) -> str:
    """A document that passes all rules before `rule` and fails that one."""
    text = news(seed)
    return {
        "length": text[:200],
        "sentences": text.replace(".", ","),
        "hangul": text[:400] + " and then. it was. written in English" * 20,
        "special": text[:500] + "#$%&~" * 70,
        "nnp": "오늘은 날씨가 아주 맑고 바람도 시원하게 불어서 사람들이 공원에 나와 천천히 걸었다. " * 20,
        "pronoun": text + " 그는 웃었다.",
    }[rule]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text(
        "".join(
            json.dumps({"id": f"doc-{number}", "text": text}, ensure_ascii=False) + "\n"
            for number, text in enumerate(texts)
        )
    )
    return path


def wordpiece(folder: Path) -> Path:
    """A BERT tokenizer with its ends, [CLS] and [SEP]: frequent syllables and a few names whole, the rest in pieces,
    and two pieces that hold the end of a name and its particle.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    text = "".join(news(seed) for seed in range(40)) + "".join((*PEOPLE, *PLACES, *FIRMS))
    letters = sorted({letter for letter in text if not letter.isspace()} | set("aegorty0123456789"))
    whole = ["서울", "독일", "대통령", "은행", "##은행", "##전자", "전문", "##했다", "##자동차"]
    whole += ["##산의", "##신은"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *whole]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "[PAD]", "mask_token": "[MASK]"}')
    return folder


def byte_level(folder: Path, demo: Path) -> Path:
    """The shipped tokenizer with a mask added. Its tokens are bytes: they may begin inside a character, and carry the
    space before a word.
    """
    model: dict[str, Any] = json.loads((demo / "tokenizer.json").read_text())
    new = 1 + max(model["model"]["vocab"].values())
    model["added_tokens"].append(
        {
            "id": new,
            "content": "<mask>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(model, ensure_ascii=False))
    return folder


def rows(corpus: Path) -> Iterator[dict[str, Any]]:
    """Every sample of a published corpus."""
    import pyarrow as pa

    for path in sorted(corpus.glob("*/data-*.arrow")):
        with pa.memory_map(str(path)) as file:
            yield from (row for batch in pa.ipc.open_stream(file) for row in batch.to_pylist())


def contents(corpus: Path) -> dict[str, bytes]:
    """Every file that must be the same for any workers and after any crash: all but the two that say when and how it
    was made.
    """
    return {
        path.relative_to(corpus).as_posix(): path.read_bytes()
        for path in sorted(corpus.rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", "metadata.json")
    }
