"""Is the tokenizer a fast one, how fast is it here, and does text come back from its tokens?

Measured on the demo corpus of the project, or on built-in sentences where that is absent.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai.core.errors import TokenizerError
from moai.doctor.check import BOOTSTRAP, Check, failed, judged

if TYPE_CHECKING:
    from moai.pretraining.tokenizer_backend import Chosen
    from moai.tokenizers.backends import Backend, Reference

MEASURE_SECONDS = 1.5
ROUND_TRIP_LINES = 200
_PROBED = 50
_DEMO = Path(__file__).resolve().parents[2] / "data" / "demo"
_SLOW_MB_PER_SECOND = 0.5
"""Byte-level BPE in the `tokenizers` library does about 3 MB/s a core; six times less is not the tokenizer's doing."""
_TRAIN = "train a fast one: python scripts/train_tokenizer.py --dataset FILE --output_dir DIR"
_SENTENCES = (
    "The kernel counts what a group of processes may use, and the host shows more than that.",
    "첫 번째 학습 단계까지 걸리는 시간은 데이터를 읽고, 나누고, 묶는 속도에 달려 있습니다.",
    "def fill_rate(tokens: int, rows: int, seq_len: int) -> float:\n    return tokens / (rows * seq_len)  # 0.0 .. 1.0",
    "Les données sont lues une seule fois; 日本語の文と中文句子也在这里。 Ωμέγα, naïve café, 10⁻³ — €5 🙂",
    '{"name": "moai", "values": [1, 2.5, -3e8], "nested": {"empty": [], "text": "줄\\n바꿈"}}',
)


def check_tokenizer(tokenizer_path: str, *, eos_token: str | None = None) -> list[Check]:
    """Loading, backend, speed and round trip; only the first if that fails."""
    try:  # what these modules import may be absent, which a doctor reports
        from moai.pretraining.options import DataConfig
        from moai.pretraining.tokenizer_backend import choose, distrusted
        from moai.tokenizers.load import load_tokenizer

        spec = load_tokenizer(tokenizer_path, eos_token=eos_token)
    except TokenizerError as error:
        value, _, remedy = str(error).rpartition("; ")
        return [failed("tokenizer", value or str(error), remedy if value else _TRAIN)]
    except ImportError as error:
        return [failed("tokenizer", str(error), BOOTSTRAP)]
    documents, origin = sample()
    config = DataConfig(tokenizer_path=tokenizer_path)
    chosen = choose(config, spec, distrusted(Path(config.cache_dir).expanduser()), documents[:_PROBED])
    value = f"fast, {spec.vocab_size:,} tokens, ends documents with {spec.eos_token}"
    return [
        judged("tokenizer", value, vocab_size=spec.vocab_size),
        check_backend(chosen),
        check_speed(chosen.backend, documents, origin),
        check_round_trip(chosen.reference, documents),
    ]


def check_backend(chosen: Chosen) -> Check:
    """What would encode, and why. The reference alone is right, and slow."""
    made_by = chosen.backend.made_by()
    name = made_by["tokenizer"]
    remedy = "a byte-level BPE tokenizer would be encoded some thirty times as fast" if name == "tokenizers" else ""
    return judged("tokenizer backend", f"{name} {made_by['version']}: {chosen.reason}", remedy, backend=name)


def sample() -> tuple[list[str], str]:
    """Documents with the languages taking turns, and where they come from."""
    try:
        sources = [list(_read_documents(path)) for path in sorted(_DEMO.glob("*.jsonl.zst"))]
    except (ImportError, OSError, ValueError):
        sources = []  # a doctor has to work in a damaged clone too
    if documents := [document for turn in itertools.zip_longest(*sources) for document in turn if document]:
        return documents, "the demo corpus"
    # Numbers keep the repeats from being one cached word after another.
    return [f"{sentence} {n}" for n in range(300) for sentence in _SENTENCES], "built-in sentences"


def check_speed(backend: Backend, documents: list[str], origin: str) -> Check:
    """One document a call, as one core does it: a whole batch would use as many threads as the environment allows."""
    for document in documents[:10]:
        backend.encode_batch([document])
    num_tokens = num_bytes = 0
    start = time.perf_counter()
    for document in itertools.cycle(documents):
        num_tokens += len(backend.encode_batch([document])[0])
        num_bytes += len(document.encode())
        seconds = time.perf_counter() - start
        if seconds >= MEASURE_SECONDS:
            break
    tokens, megabytes = num_tokens / seconds, num_bytes / seconds / 1e6
    remedy = "about 3 MB/s is usual: is the machine busy, or the container's CPU quota used up?"
    return judged(
        "tokenizer speed",
        f"{tokens / 1e6:.2f} M tokens/s, {megabytes:.2f} MB/s on one core ({origin})",
        remedy if megabytes < _SLOW_MB_PER_SECOND else "",
        tokens_per_second=round(tokens),
        mb_per_second=round(megabytes, 3),
        bytes_per_token=round(num_bytes / max(1, num_tokens), 2),
    )


def check_round_trip(backend: Reference, documents: list[str]) -> Check:
    """Lines spread over the sample. A difference is advice: some tokenizers fold case or spaces by design."""
    lines = [line[:2000] for document in documents for line in document.splitlines() if line.strip()]
    lines = lines[:: max(1, len(lines) // ROUND_TRIP_LINES)][:ROUND_TRIP_LINES]
    changed = [line for line in lines if backend.decode(backend.encode_batch([line])[0].tolist()) != line]
    value = f"{len(lines) - len(changed)} of {len(lines)} lines come back unchanged"
    figures: dict[str, Any] = {"lines": len(lines), "changed": len(changed)}
    if not changed:
        return judged("round trip", value, **figures)
    remedy = "the tokenizer normalizes or drops characters: keep it if that is meant, else take a byte-level one"
    return judged("round trip", f"{value}, first {changed[0][:40]!r}", remedy, **figures)


def _read_documents(path: Path) -> Iterator[str]:
    from moai.sources.streams import open_blocks  # pyarrow may be what is missing

    for line in b"".join(open_blocks(str(path), "zst", 1 << 20)).splitlines():
        yield json.loads(line)["text"]
