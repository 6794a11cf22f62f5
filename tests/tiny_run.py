"""A prepared directory made by hand, a tiny model, and a driver that trains on it: what the training tests share.

python tests/tiny_run.py PREPARED[,PREPARED_OF_RANK_1] TOKENIZER train.py's training flags [--then more of them, for
another run of the same ranks]
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moai.core.config import resolve
from moai.core.errors import MoaiError
from moai.core.files import digest_json
from moai.core.stopping import end
from moai.prepared.manifest import Prepared
from moai.pretraining.options import DataConfig
from moai.tokenizers.load import load_tokenizer
from moai.training.arguments import TrainConfig

SEQ_LEN = 24
SHARDS = 3
MODEL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "use_qk_norm": True,
    "hidden_act": "swiglu",
    "tie_word_embeddings": True,
    "eos_token_id": 7,
}


def write_model_config(folder: Path, **changes: object) -> Path:
    path = folder / "model.json"
    path.write_text(json.dumps(MODEL | changes))
    return path


def write_tokenizer(folder: Path) -> Path:
    """Byte-level BPE without a merge: 256 bytes and two special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<pad>", special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def write_prepared(
    folder: Path, tokenizer: Path, *, rows: int = 26, seed: int = 0, sources: Sequence[str] = ("counting",) * SHARDS
) -> Path:
    """Rows of two counting documents (5 6 7 8 ...), some with a rest to pad, and the manifest that train() reads.
    `sources` are those of the shards.
    """
    import datasets
    import numpy as np

    generator = np.random.default_rng(seed)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "seq_lengths": []}
    for _ in range(rows):
        first = int(generator.integers(5, 12))
        second = SEQ_LEN - first - int(generator.integers(0, 4))
        starts = generator.integers(0, 40, 2)
        columns["input_ids"].append(
            [int(starts[0]) + i for i in range(first)] + [int(starts[1]) + i for i in range(second)]
        )
        columns["seq_lengths"].append([first, second])
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("uint16")), "seq_lengths": datasets.List(datasets.Value("uint32"))}
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder), num_shards=SHARDS)
    in_shard = [rows // SHARDS + (number < rows % SHARDS) for number in range(SHARDS)]
    tokens = sum(map(len, columns["input_ids"]))
    ends = np.cumsum([0, *in_shard])
    shards = [
        {
            "file": f"data-{number:05d}-of-{SHARDS:05d}.arrow",
            "rows": count,
            "source": sources[number],
            "tokens": sum(map(len, columns["input_ids"][ends[number] : ends[number + 1]])),
        }
        for number, count in enumerate(in_shard)
    ]
    content = {
        "columns": [
            {"name": "input_ids", "type": "uint16", "per": "token"},
            {"name": "seq_lengths", "type": "uint32", "per": "piece"},
        ],
        "shards": [*shards[:1], {"file": None, "rows": 0, "source": sources[0], "tokens": 0}, *shards[1:]],
        "documents": 2 * rows,
        "tokens": tokens,
        "rows": rows,
        "fill_rate": tokens / rows / SEQ_LEN,
        "seq_len": SEQ_LEN,
        "packing": "bfd_split",
        "vocab_size": 258,
        "tokenizer_digest": load_tokenizer(str(tokenizer)).digest,
        "records": {"quarantined": 3},
        "data": digest_json(columns),
        "sources": [{"name": name, "documents": 2 * rows, "tokens": tokens} for name in dict.fromkeys(sources)],
    }
    (folder / "manifest.json").write_text(json.dumps({"content": content, "content_digest": digest_json(content)}))
    return folder


def open_prepared(folder: Path, memory_mode: str = "memory") -> Prepared:
    return Prepared(folder, json.loads((folder / "manifest.json").read_text()), memory_mode)


def main() -> int:
    from moai.training.logs import start_logging
    from moai.training.stages import Stage
    from moai.training.trainer import train

    folders, rank = sys.argv[1].split(","), int(os.environ.get("RANK", "0"))
    words = [*sys.argv[3:], "--then"]
    runs = [
        resolve(
            [TrainConfig, DataConfig],
            [*words[: words.index("--then")], "--tokenizer_path", sys.argv[2]],
            os.environ,
            prog="tiny_run",
        )
    ]
    if more := words[words.index("--then") + 1 : -1]:
        runs.append(
            resolve(
                [TrainConfig, DataConfig],
                [*words[: words.index("--then")], *more, "--tokenizer_path", sys.argv[2]],
                os.environ,
                prog="tiny_run",
            )
        )
    config = runs[0][TrainConfig].require()
    start_logging(Path(config.output_dir), rank)
    try:
        prepared = open_prepared(Path(folders[min(rank, len(folders) - 1)]))
        summary = train(config, [Stage(run[TrainConfig], run[DataConfig], prepared) for run in runs], runs[0].origins)[
            -1
        ]
    except MoaiError as error:
        print(f"tiny_run: error: {error}", file=sys.stderr)
        return error.exit_code
    if rank == 0:
        print("\n".join(summary.lines()))
    return 0


if __name__ == "__main__":
    end(main())
