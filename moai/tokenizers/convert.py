"""Convert a tokenizer that has no tokenizer.json into one that has: the remedy of SlowTokenizerError. One whose
tokenizer.json lacks tokens that the files beside it declare is written with them.

    python scripts/train_tokenizer.py --convert SLOW_DIR --output_dir FAST_DIR

Where tokenizer_config.json or config.json names the model, transformers knows the class and builds it. A bare vocab.txt
is BERT's WordPiece, a bare vocab.json with merges.txt is GPT-2's BPE. A bare SentencePiece .model is built here, with
what its normalizer specification says, because the generic way of transformers 5.23 leaves out the dummy prefix and the
collapsing of white space; it is then compared with the sentencepiece library on real lines. Known to differ: conjoining
jamo that NFKC composes across what the tokenizers library takes for two graphemes (16 of 98,150 lines of the demo
corpus).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    if _class_is_named(source):
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


def _class_is_named(source: Path) -> bool:
    named = {name: _json(source / name) for name in ("tokenizer_config.json", "config.json")}
    return bool(named["tokenizer_config.json"].get("tokenizer_class") or named["config.json"].get("model_type"))


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
    options: dict[str, Any] = {}
    if class_name == "BertTokenizer" and "do_lower_case" not in _json(source / "tokenizer_config.json"):
        options["do_lower_case"] = not _has_upper_case(source / "vocab.txt")
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
    tokenizer.save_pretrained(str(place))
    note = (
        ""
        if not options
        else f", lower-casing {'on' if options['do_lower_case'] else 'off'} (the vocabulary has "
        f"{'no ' if options['do_lower_case'] else ''}capitals)"
    )
    return f"converted as {type(tokenizer).__name__}, {len(tokenizer):,} tokens{note}"


def _has_upper_case(vocabulary: Path) -> bool:
    """Whether ordinary pieces have capitals; [UNK] and its kind say nothing."""
    with open(vocabulary, encoding="utf-8") as lines:
        return any(piece[:1] != "[" and piece != piece.lower() for piece in lines)


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
