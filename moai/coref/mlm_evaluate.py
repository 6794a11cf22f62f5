"""Score a masked language model on entity-coref samples.

    python scripts/evaluate_entity_coref.py --checkpoint DIR --dataset CORPUS

    baselines  the share that the nearest repeated name gets right, the one repeated most, and with --before DIR the
               model before training; all of them also by kind of name and by distance
    exact      every token of the name filled in, one mask after another: all or nothing
    nll        -log p of the whole name, in nats
    real_at_k  the prior program's measure: one mask for the whole name, the 50 likeliest tokens, those that Kiwi calls
               nouns, the first k; a hit if one equals the name, holds it or is held by it. One syllable may hit: it
               flatters, and stands here to compare with old figures
    lambada    the last word of --lambada FILE, measured like real_at_1
    score      0.4 real_at_1 + 0.3 real_at_5 + 0.3 lambada, where there is a lambada

Before a sample is scored its antecedent is asserted to stand unmasked inside the row.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from moai.core.config import option
from moai.core.errors import ConfigError
from moai.core.files import write_atomic
from moai.coref.korean import analyser
from moai.coref.mlm import (
    Corpus,
    PadBatch,
    Sample,
    check_window,
    each_span,
    in_batches,
    likeliest,
    load_model,
    run,
    summary,
    with_one_mask,
)
from moai.coref.mlm_tokens import MlmTokenizer
from moai.coref.statistics import RANGES

_CANDIDATES = 50
_NOUNS = ("NNG", "NNP")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation: a model and a corpus."""

    checkpoint: str = option("", "directory or Hub name of the model")
    dataset: str = option("", "the corpus; configs/entity_coref_real.yaml makes the prior program's evaluation set")
    before: str = option("", "the model before training, scored beside the other")
    split: str = option("validation", "which samples", choices=("train", "validation"))
    limit: int = option(1600, "samples at most, spread evenly over the split")
    per_document: int = option(3, "samples of one document at most")
    batch_size: int = option(16, "rows at a time")
    lambada: str = option("", "JSON lines with text or context, and target or answer")
    output: str = option("", "write the results there, as JSON")

    def require(self) -> EvaluateConfig:
        if not self.checkpoint or not self.dataset:
            raise ConfigError("name both: --checkpoint DIR (the model) and --dataset DIR (the corpus)")
        return self


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """All measures as one object. Raises errors of moai.core.errors."""
    config = config.require()
    corpus = Corpus.open(config.dataset)
    if not corpus.labelled:
        raise ConfigError(
            f"--dataset {config.dataset}: was made in mode text and has no labels to score; make it in mode span"
        )
    model = load_model(config.checkpoint)
    corpus.check_fit(model, config.checkpoint)
    samples = list(_samples(corpus, config))
    if not samples:
        raise ConfigError(f"--dataset {config.dataset}: no sample in the split {config.split}")
    tokenizer, size = corpus.tokenizer, config.batch_size
    pad = PadBatch(pad_id=tokenizer.pad_id)
    nlls, sizes, exact = each_span(model, in_batches(samples, size, pad))
    results: dict[str, Any] = asdict(summary(nlls, sizes, exact))
    answers = {"exact": exact, **baselines(samples)}
    if config.before:
        old = load_model(config.before)
        corpus.check_fit(old, config.before)
        answers["before"] = each_span(old, in_batches(samples, size, pad))[2]
    results["baselines"] = {name: float(right.mean()) for name, right in answers.items() if name != "exact"}
    results["by_kind"] = by_part([str(sample["kind"]) for sample in samples], answers)
    results["by_distance"] = by_part([_range_of(sample["distance"]) for sample in samples], answers)
    singles = [(with_one_mask(sample), str(sample["target"])) for sample in samples]
    real = lenient(model, tokenizer, singles, size, (1, 5))
    results |= {f"real_at_{k}": value for k, value in real.items()}
    if config.lambada:
        words = list(_lambada(Path(config.lambada), tokenizer, int(corpus.content["seq_len"])))
        results["lambada"] = lenient(model, tokenizer, words, size, (1,))[1]
        results["score"] = 0.4 * results["real_at_1"] + 0.3 * results["real_at_5"] + 0.3 * results["lambada"]
    if config.output:
        write_atomic(Path(config.output), json.dumps(results, indent=1).encode())
    return results


def baselines(samples: Sequence[Sample]) -> dict[str, Any]:
    """Whether a rule without a model gives the name of each sample: the repeated name that stands last before the
    mask, the one that the document repeats most. Copies that are hidden count for neither.
    """
    return {
        name: np.array([sample[name] == sample["target"] for sample in samples]) for name in ("nearest", "frequent")
    }


def by_part(parts: Sequence[str], answers: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each part: how many samples it has, and the share that each of `answers` gets right."""
    found = {}
    for part in sorted(set(parts)):
        here = np.array([other == part for other in parts])
        found[part] = {
            "samples": int(here.sum()),
            **{name: float(right[here].mean()) for name, right in answers.items()},
        }
    return found


def lenient(
    model: Any, tokenizer: MlmTokenizer, samples: Sequence[tuple[Sample, str]], batch_size: int, ks: tuple[int, ...]
) -> dict[int, float]:
    """Share of (sample with one mask, target) that hit among the first k nouns, for each k."""
    decode, hits = tokenizer.reference.decode, Counter[int]()
    number = min(_CANDIDATES, tokenizer.spec.vocab_size)
    batches = in_batches((sample for sample, _ in samples), batch_size, PadBatch(pad_id=tokenizer.pad_id))
    found = (row for batch in batches for row in likeliest(model, batch, number))
    for (_, target), ids in zip(samples, found, strict=True):
        nouns = [word for token in ids if is_noun(word := decode([token]).removeprefix("##").strip())]
        hits.update(k for k in ks if any(word == target or word in target or target in word for word in nouns[:k]))
    return {k: hits[k] / max(1, len(samples)) for k in ks}


def is_noun(word: str) -> bool:
    """One token, all of it a noun to Kiwi."""
    return bool(word) and [morpheme.tag in _NOUNS for morpheme in analyser("cong").tokenize(word)] == [True]


def main(argv: Sequence[str]) -> int:
    return run(EvaluateConfig, evaluate, argv, prog="evaluate_entity_coref.py", description=__doc__)


def _range_of(distance: int) -> str:
    """As metadata.json names distances: short, medium, long."""
    return next(name for name, (_, high) in RANGES.items() if distance < high)


def _samples(corpus: Corpus, config: EvaluateConfig) -> Iterator[Sample]:
    seen = Counter[str]()
    for sample in corpus.rows(config.split, most=config.limit):
        seen[sample["doc_id"]] += 1
        if seen[sample["doc_id"]] <= config.per_document:
            check_window(sample)
            yield sample


def _lambada(path: Path, tokenizer: MlmTokenizer, seq_len: int) -> Iterator[tuple[Sample, str]]:
    """A passage with one mask in place of its last word; of a long one, its end."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"--lambada {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = orjson.loads(line)
            text, target = str(row.get("text") or row["context"]), str(row.get("target") or row["answer"])
        except (orjson.JSONDecodeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"--lambada {path} line {number}: expected text or context, and target or answer"
            ) from error
        before = text.removesuffix(".").removesuffix(target)
        ids = tokenizer.reference.encode_batch([before])[0].tolist()[-(tokenizer.room(seq_len) - 1) :]
        row_ids = [*tokenizer.prefix, *ids, tokenizer.mask_id, *tokenizer.suffix]
        labels = [tokenizer.mask_id if token == tokenizer.mask_id else -100 for token in row_ids]
        yield {"input_ids": row_ids, "labels": labels}, target
