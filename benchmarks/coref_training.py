"""Does the corpus train what it promises? The same small DeBERTa-v2, trained equally long on the corpus's labels and as
the prior program trained.

    python benchmarks/coref_training.py FILES... [--steps 600] [--seeds 3] [--seq_len 192] [--work DIR] [flags of moai
    entity-coref]

entity  mode span: every token of a later mention masked and labelled
random  mode text: one mask written into the text in place of the mention, then 15 % of the tokens masked at random
        (that mask is never asked for)

Both begin from the same weights for a seed and see equally many rows. Both are scored on the same held-out documents,
in mode span: -log p of the whole name (nats; lower is better), and the share of names filled in exactly. The tokenizer
is a WordPiece of 8,000 pieces, trained on FILES.

With --work DIR a model that stands there already is not trained again, so that a run may be stopped and gone on with.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from coref import read

from moai import coref as entity_coref
from moai.core.config import resolve
from moai.core.without_pandas import with_pandas
from moai.coref.mlm_evaluate import EvaluateConfig, evaluate
from moai.coref.mlm_finetune import FinetuneConfig, finetune
from moai.coref.options import CorefConfig

MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "relative_attention": True,
    "position_buckets": 64,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "max_position_embeddings": 512,
    "max_relative_positions": -1,
}
"""The shape of kf-deberta-base, small."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seq_len", type=int, default=192)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--work", type=Path)
    given, flags = parser.parse_known_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        run(given, flags, given.work or Path(folder))
    return 0


def run(given: argparse.Namespace, flags: list[str], work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    vocab_size = tokenizer(given.files, work / "tokenizer")
    corpora = {mode: str(corpus(given, flags, work, mode)) for mode in ("span", "text")}
    with_pandas()
    (work / "model.json").write_text(json.dumps({**MODEL, "vocab_size": vocab_size}))
    print(
        "| seed | masking | nll of a name | nll of a token | exact | real@1 | real@5 |\n|---|---|---|---|---|---|---|"
    )
    better = []
    for seed in range(given.seeds):
        scores = {masking: train(given, corpora, work, masking, seed) for masking in ("entity", "random")}
        for masking, found in scores.items():
            shares = " | ".join(f"{found[name]:.1%}" for name in ("exact", "real_at_1", "real_at_5"))
            print(f"| {seed} | {masking} | {found['nll']:.3f} | {found['nll_per_token']:.3f} | {shares} |", flush=True)
        better.append(scores["entity"]["nll"] < scores["random"]["nll"])
    spans = scores["entity"]["spans"]
    print(
        f"\n{spans} held-out names; {given.steps} steps of {given.batch_size} rows; entity better in {sum(better)} of "
        f"{len(better)} seeds"
    )


def train(given: argparse.Namespace, corpora: dict[str, str], work: Path, masking: str, seed: int) -> dict[str, Any]:
    config = FinetuneConfig(
        model_config=str(work / "model.json"),
        dataset=corpora["span" if masking == "entity" else "text"],
        masking=masking,
        max_steps=given.steps,
        batch_size=given.batch_size,
        gradient_accumulation=1,
        lr=given.lr,
        eval_steps=given.steps,
        output_dir=str(work / "runs"),
        run_name=f"{masking}-{seed}",
        seed=seed,
    )
    if not (work / "runs" / config.run_name / "final_results.json").exists():
        finetune(config)
    return evaluate(
        EvaluateConfig(
            checkpoint=str(work / "runs" / config.run_name / "final_model"),
            dataset=corpora["span"],
            limit=10**6,
            per_document=10**6,
        )
    )


def corpus(given: argparse.Namespace, flags: list[str], work: Path, mode: str) -> Path:
    own = [
        "--input",
        *map(str, given.files),
        "--model",
        str(work / "tokenizer"),
        "--output-dir",
        str(work / mode),
        "--mode",
        mode,
        "--seq-len",
        str(given.seq_len),
    ]
    resolved = resolve([CorefConfig], [*own, *flags], os.environ, prog="coref_training.py")
    return entity_coref.prepare(resolved[CorefConfig], origins=resolved.origins)


def tokenizer(files: list[Path], folder: Path) -> int:
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    path = folder / "tokenizer.json"
    if not path.exists():
        trained = BertWordPieceTokenizer(lowercase=False, strip_accents=False)
        trained.train_from_iterator(read(files), vocab_size=8000, show_progress=False)
        folder.mkdir(exist_ok=True)
        trained.save(str(path))
    return int(Tokenizer.from_file(str(path)).get_vocab_size())


if __name__ == "__main__":
    sys.exit(main())
