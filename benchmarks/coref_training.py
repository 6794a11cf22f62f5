"""Which samples teach: the same small DeBERTa-v2, trained equally long on three corpora of the same documents.

    python benchmarks/coref_training.py FILES... [--steps 600] [--seeds 3] [--seq_len 192] [--work DIR]

v2      --rules v2, with bounds on proper nouns and no pronoun rule, so that there are documents at all: one mention is
        masked, copies of it stay in sight
new     the defaults: every other copy of the name is hidden
random  the rows of v2, names put back, 15 % of the tokens masked at random

All begin from the same weights for a seed and see equally many rows, of which v2 and new have one labelled name each.
All are scored on the same held-out documents, on names whose antecedent is the only cue (the validation side of
`new`): -log p of the whole name (nats; lower is better), and the share of names filled in exactly; beside them the
rules without a model. The tokenizer is a WordPiece of 8,000 pieces, trained on FILES.

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
from moai.coref.manifest import read_manifest
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


CORPORA = {
    "v2": ["--rules", "v2", "--no-pronoun-filter", "--min-nnp-ratio", "0.02", "--max-nnp-ratio", "0.4"],
    "new": [],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seq_len", type=int, default=192)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    given = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        run(given, given.work or Path(folder))
    return 0


def run(given: argparse.Namespace, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    vocab_size = tokenizer(given.files, work / "tokenizer")
    corpora = {name: corpus(given, flags, work, name) for name, flags in CORPORA.items()}
    for name, path in corpora.items():
        content = read_manifest(path)["content"]
        print(f"{name}: {content['rows']:,} samples of {content['documents']:,} documents, {content['split']}")
    with_pandas()
    (work / "model.json").write_text(json.dumps({**MODEL, "num_hidden_layers": given.layers, "vocab_size": vocab_size}))
    print("\n| seed | trained on | nll of a name | nll of a token | exact | exact, long |\n|---|---|---|---|---|---|")
    better: list[bool] = []
    for seed in range(given.seeds):
        scores = {arm: train(given, corpora, work, arm, seed) for arm in ("v2", "new", "random")}
        for arm, found in scores.items():
            long = found["by_distance"].get("long", {"exact": 0.0})["exact"]
            print(
                f"| {seed} | {arm} | {found['nll']:.3f} | {found['nll_per_token']:.3f} | {found['exact']:.1%} | "
                f"{long:.1%} |",
                flush=True,
            )
        better.append(scores["new"]["nll"] < min(scores["v2"]["nll"], scores["random"]["nll"]))
    rules = ", ".join(f"{name} {share:.1%}" for name, share in scores["new"]["baselines"].items())
    print(
        f"\n{scores['new']['spans']} held-out names; {given.steps} steps of {given.batch_size} rows; new is best in "
        f"{sum(better)} of {len(better)} seeds; rules without a model get right: {rules}"
    )


def train(given: argparse.Namespace, corpora: dict[str, Path], work: Path, arm: str, seed: int) -> dict[str, Any]:
    config = FinetuneConfig(
        model_config=str(work / "model.json"),
        dataset=str(corpora["new" if arm == "new" else "v2"]),
        masking="random" if arm == "random" else "entity",
        max_steps=given.steps,
        batch_size=given.batch_size,
        gradient_accumulation=1,
        lr=given.lr,
        eval_steps=given.steps,
        eval_samples=100,
        output_dir=str(work / "runs"),
        run_name=f"{arm}-{seed}",
        seed=seed,
    )
    if not (work / "runs" / config.run_name / "final_results.json").exists():
        finetune(config)
    return evaluate(
        EvaluateConfig(
            checkpoint=str(work / "runs" / config.run_name / "final_model"),
            dataset=str(corpora["new"]),
            limit=10**6,
            per_document=10**6,
        )
    )


def corpus(given: argparse.Namespace, flags: list[str], work: Path, name: str) -> Path:
    own = ["--input", *map(str, given.files), "--model", str(work / "tokenizer"), "--output-dir", str(work / name)]
    own += ["--seq-len", str(given.seq_len), "--validation-ratio", "0.2", *flags]
    resolved = resolve([CorefConfig], own, os.environ, prog="coref_training.py")
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
