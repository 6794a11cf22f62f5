"""A training run that writes down which rows every rank trains on at every step, and may stop or kill itself.

python tests/elastic_run.py FOLDER stop:3|kill:3|- train.py's training flags

It runs alone, or under torchrun or accelerate launch.

FOLDER holds `prepared`, `tokenizer` and `model.json` (see `write_place`) and receives
`consumed-<session>-<rank>.jsonl`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import tiny_run

from moai.core.stopping import end

SOURCES = ("ko", "ko", "ko", "en", "en", "code")
"""Of the six shards."""
ROWS = 33
_BASE = 50


def write_place(folder: Path) -> Path:
    """Rows of 12 ids whose first two say which row it is, in six shards of three sources."""
    import datasets

    from moai.core.files import digest_json
    from moai.tokenizers.load import load_tokenizer

    tokenizer = tiny_run.write_tokenizer(folder / "tokenizer")
    tiny_run.write_model_config(folder)
    rows = [[number // _BASE, number % _BASE, *range(60 + number, 70 + number)] for number in range(ROWS)]
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("uint16")), "seq_lengths": datasets.List(datasets.Value("uint32"))}
    )
    table = {"input_ids": rows, "seq_lengths": [[12]] * ROWS}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(folder / "prepared"), num_shards=len(SOURCES))
    counts = [ROWS // len(SOURCES) + (number < ROWS % len(SOURCES)) for number in range(len(SOURCES))]
    content = {
        "columns": [
            {"name": "input_ids", "type": "uint16", "per": "token"},
            {"name": "seq_lengths", "type": "uint32", "per": "piece"},
        ],
        "documents": ROWS,
        "tokens": 12 * ROWS,
        "rows": ROWS,
        "fill_rate": 1.0,
        "seq_len": 12,
        "packing": "none",
        "vocab_size": 258,
        "tokenizer_digest": load_tokenizer(str(tokenizer)).digest,
        "sources": [{"name": name, "documents": 1, "tokens": 12} for name in dict.fromkeys(SOURCES)],
        "shards": [
            {
                "file": f"data-{n:05d}-of-{len(SOURCES):05d}.arrow",
                "rows": count,
                "source": SOURCES[n],
                "tokens": 12 * count,
            }
            for n, count in enumerate(counts)
        ],
    }
    (folder / "prepared" / "manifest.json").write_text(
        json.dumps({"content": content, "content_digest": digest_json(content)})
    )
    return folder


def rows_of(input_ids: Any) -> list[int]:
    return [int(first) * _BASE + int(second) for first, second in input_ids[:, :2].tolist()]


def main() -> int:
    folder, ending = Path(sys.argv[1]), sys.argv[2]
    from moai.training.loop import PackedTrainer

    rank, session = os.environ.get("RANK", "0"), os.environ["SESSION"]
    log = open(folder / f"consumed-{session}-{rank}.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        step = self.state.global_step + 1
        log.write(json.dumps([step, rows_of(inputs["input_ids"])]) + "\n")
        log.flush()
        if rank == "0" and ending == f"kill:{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == "0" and ending == f"stop:{step}":
            os.kill(os.getpid(), signal.SIGTERM)
        return super(PackedTrainer, self).training_step(model, inputs, num_items_in_batch)

    PackedTrainer.training_step = training_step
    sys.argv[1:] = [
        str(folder / "prepared"),
        str(folder / "tokenizer"),
        "--model_config",
        str(folder / "model.json"),
        *sys.argv[3:],
    ]
    return tiny_run.main()


if __name__ == "__main__":
    end(main())
