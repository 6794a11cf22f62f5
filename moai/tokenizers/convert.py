"""Convert a tokenizer that has no tokenizer.json into one that has: the remedy of SlowTokenizerError. One whose
tokenizer.json lacks tokens that the files beside it declare is written with them.

    python scripts/train_tokenizer.py --convert SLOW_DIR --output_dir FAST_DIR

A vocab.txt with `##` pieces is BERT's WordPiece, whatever model stands beside it; unless `do_lower_case` is declared,
its capitals, accents and Hangul syllables decide how text is normalized, and the result says so. Otherwise, where
tokenizer_config.json or config.json names the model, transformers knows the class and builds it. A bare vocab.json with
merges.txt is GPT-2's BPE. A bare SentencePiece .model is built here, with
what its normalizer specification says, because the generic way of transformers 5.23 leaves out the dummy prefix and the
collapsing of white space; it is then compared with the sentencepiece library on real lines. Known to differ: conjoining
jamo that NFKC composes across what the tokenizers library takes for two graphemes (16 of 98,150 lines of the demo
corpus).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from moai.core.errors import TokenizerError
from moai.core.files import write_atomic
from moai.tokenizers.declared_tokens import lacking
from moai.tokenizers.load import load_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NEEDS = "install it for the conversion: .venv/bin/pip install sentencepiece protobuf"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # the kinds of piece in sentencepiece_model.proto
_UNIGRAM, _BPE = 1, 2  # its model types
_SAMPLE = (
    "The quick brown fox jumps over the lazy dog.",
    "  leading, trailing and   repeated spaces  ",
    "대한민국은 민주공화국이다. 모든 권력은 국민으로부터 나온다.",
    "재밌게 봤습니다ㅎㅎ 10점 만점에 9.5점!!",
    "for (int i = 0; i < 10; ++i) { total += values[i]; }",
    "naïve café, ２０２６年 漢字とかな, Ａｂｃ, ﬁne, 1,234.5 %",
    "tabs\tand emoji 🙂 and ¹²³",
)


def convert(source: Path, place: Path) -> str:
    """Write `source` as a fast tokenizer into `place`; returns what was done in one line. Raises TokenizerError."""
    if not source.is_dir():
        raise TokenizerError(f"--convert {source}: no such directory")
    if (source / "tokenizer.json").exists():
        if not lacking(source / "tokenizer.json", load_file(source / "tokenizer.json")):
            raise TokenizerError(f"--convert {source}: has a tokenizer.json, so it is fast already")
        return _through_transformers(source, place, "PreTrainedTokenizerFast")
    model = next(iter(sorted(source.glob("*.model"))), None)
    settings = _json(source / "tokenizer_config.json")
    if _has_wordpieces(source / "vocab.txt") and not settings.get("tokenizer_class"):
        return _through_transformers(source, place, "BertTokenizer")  # also beside a config.json of DeBERTa
    if settings.get("tokenizer_class") or _json(source / "config.json").get("model_type"):
        return _through_transformers(source, place, None)
    if (source / "vocab.txt").exists():
        return _through_transformers(source, place, "BertTokenizer")
    if (source / "vocab.json").exists() and (source / "merges.txt").exists():
        return _through_transformers(source, place, "GPT2Tokenizer")
    if model is None:
        lone = next(iter(sorted(source.glob("*vocab*.txt"))), None)
        advice = f"; if {lone.name} is a WordPiece vocabulary, rename it to vocab.txt" if lone else ""
        raise TokenizerError(
            f"--convert {source}: holds no vocab.txt, vocab.json with merges.txt, or SentencePiece .model{advice}"
        )
    return _from_sentencepiece(model, place)


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TokenizerError(f"{path}: not readable as JSON: {error}") from error
    return loaded if isinstance(loaded, dict) else {}


def _through_transformers(source: Path, place: Path, class_name: str | None) -> str:
    import transformers

    transformers_log = logging.getLogger("transformers.tokenization_utils_tokenizers")
    transformers_log.setLevel(logging.ERROR)  # its advice on tiktoken misleads where sentencepiece is what is missing
    settings, vocabulary = _json(source / "tokenizer_config.json"), source / "vocab.txt"
    wordpieces = class_name != "PreTrainedTokenizerFast" and _has_wordpieces(vocabulary)
    options: dict[str, bool] = {}
    note = ""
    if (wordpieces or class_name == "BertTokenizer") and "do_lower_case" not in settings:
        options, note = _normalization(_pieces(vocabulary), settings)
    try:
        cls = transformers.AutoTokenizer if class_name is None else getattr(transformers, class_name)
        tokenizer = cls.from_pretrained(str(source), **options)
    except (ValueError, TypeError, OSError, ImportError, KeyError) as error:
        if list(source.glob("*.model")) and not _installed("sentencepiece"):
            raise TokenizerError(f"--convert {source}: its .model needs the sentencepiece package; {_NEEDS}") from error
        raise TokenizerError(
            f"--convert {source}: transformers cannot read it: {' '.join(str(error).split())[:300]}"
        ) from error
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"--convert {source}: transformers has no fast form of {type(tokenizer).__name__}; train one: --dataset "
            f"FILE..."
        )
    if wordpieces and len(tokenizer) < len(_pieces(vocabulary)):
        raise TokenizerError(
            f"--convert {source}: {type(tokenizer).__name__} took {len(tokenizer):,} of the "
            f"{len(_pieces(vocabulary)):,} pieces of vocab.txt; "
            f'it is WordPiece: set "tokenizer_class": "BertTokenizer" in tokenizer_config.json'
        )
    tokenizer.save_pretrained(str(place))
    return f"converted as {type(tokenizer).__name__}, {len(tokenizer):,} tokens{note}"


def _pieces(vocabulary: Path) -> list[str]:
    try:
        return vocabulary.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{vocabulary}: not UTF-8 at byte {error.start}; it should hold a piece a line") from error


def _has_wordpieces(vocabulary: Path) -> bool:
    return vocabulary.exists() and any(piece.startswith("##") for piece in _pieces(vocabulary))


def _normalization(pieces: Sequence[str], settings: Mapping[str, Any]) -> tuple[dict[str, bool], str]:
    """How BERT's normalizer must treat text so that it can meet every piece, and that in words.

    Lower-casing takes accents away too unless told otherwise, by decomposing: every Hangul syllable would fall apart.
    """
    ordinary = [piece for piece in pieces if piece[:1] != "["]  # [UNK] and its kind say nothing
    capitals = any(piece != piece.lower() for piece in ordinary)
    options = {"do_lower_case": not capitals}
    note = f", lower-casing {'off' if capitals else 'on'} (the vocabulary has {'' if capitals else 'no '}capitals)"
    if not capitals and settings.get("strip_accents") is None:
        composed = any(normalize("NFD", piece) != piece for piece in ordinary)
        options["strip_accents"] = not composed
        what = "kept (it has some, or Hangul syllables)" if composed else "taken away (it has none)"
        note += f", accents {what}"
    return options, note


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _from_sentencepiece(model: Path, place: Path) -> str:
    proto = _parsed(model)
    tokenizer = sentencepiece_as_fast(proto, name=str(model))
    if not _installed("sentencepiece"):
        agreement = "not compared with the sentencepiece library, which is not installed"
    else:
        from sentencepiece import SentencePieceProcessor  # type: ignore[import-not-found,import-untyped,unused-ignore]

        reference = SentencePieceProcessor(model_file=str(model))
        same = [reference.encode(line) == tokenizer.encode(line, add_special_tokens=False).ids for line in _SAMPLE]
        agreement = f"the same ids as the sentencepiece library on {sum(same)} of {len(same)} sample lines"
        if sum(same) < len(same) - 1:
            differing = _SAMPLE[same.index(False)]
            raise TokenizerError(
                f"--convert {model}: not exact ({agreement}; the first that differs: {differing!r}), so nothing was "
                f"written"
            )
    spec = proto.trainer_spec
    known = {piece.piece for piece in proto.pieces}
    roles = {
        "bos_token": spec.bos_piece,
        "eos_token": spec.eos_piece,
        "pad_token": spec.pad_piece,
        "unk_token": spec.unk_piece,
    }
    settings = {role: piece for role, piece in roles.items() if piece in known}
    place.mkdir(parents=True, exist_ok=True)
    settings |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_atomic(place / "tokenizer_config.json", (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
    write_atomic(place / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    return f"converted {model.name}, {len(proto.pieces):,} pieces; {agreement}"


def _parsed(model: Path) -> Any:
    """The file as a ModelProto, by the copy of its definition that transformers carries."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]
    from transformers.convert_slow_tokenizer import import_protobuf

    try:
        proto = import_protobuf().ModelProto()  # type: ignore[no-untyped-call]
        proto.ParseFromString(model.read_bytes())
    except ImportError as error:
        raise TokenizerError(f"--convert {model}: needs the protobuf package; {_NEEDS}") from error
    except DecodeError as error:
        raise TokenizerError(f"--convert {model}: not a SentencePiece model") from error
    if not proto.pieces:
        raise TokenizerError(f"--convert {model}: not a SentencePiece model")
    return proto


def sentencepiece_as_fast(proto: Any, *, name: str = "model") -> Tokenizer:
    """The tokenizer that a SentencePiece ModelProto describes: same pieces, same ids, same normalization."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    spec, normal = proto.trainer_spec, proto.normalizer_spec
    model: Any
    if spec.model_type == _UNIGRAM:
        model = models.Unigram(
            [(p.piece, p.score) for p in proto.pieces], unk_id=spec.unk_id, byte_fallback=spec.byte_fallback
        )
    elif spec.model_type == _BPE:
        ids = {p.piece: number for number, p in enumerate(proto.pieces)}
        merges = _merges({p.piece: number for number, p in enumerate(proto.pieces) if p.type == _NORMAL})
        model = models.BPE(ids, merges, unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=spec.byte_fallback)
    else:
        raise TokenizerError(
            f"--convert {name}: is a word or character model (type {spec.model_type}); only unigram and BPE have a "
            f"fast form"
        )
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(normal.precompiled_charsmap)] if normal.precompiled_charsmap else []
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if normal.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    unprefix = [decoders.Strip(" ", 1, 0)] if normal.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *unprefix]
    )
    tokenizer.add_special_tokens(
        [AddedToken(p.piece, normalized=False, special=True) for p in proto.pieces if p.type in (_UNKNOWN, _CONTROL)]
    )
    tokenizer.add_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == _USER_DEFINED])
    return tokenizer


def _merges(ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair that makes a piece, in the pieces' order: SentencePiece keeps pieces by rank and no list of merges."""
    pairs = []
    for piece, rank in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                pairs.append((rank, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(pairs)]
