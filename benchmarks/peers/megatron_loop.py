"""The loop of Megatron's preprocess_data, without Megatron: lines through a pool, one tokenizer call a document, an end
appended, .bin and .idx.

    python megatron_loop.py DATA.jsonl OUT TOKENIZER SEQ_LEN NUM_PROC

Importing Megatron and torch would add seconds, which are not charged to it. An empty document gets no end, as there.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
from indexed import id_dtype, write_index

os.environ["USE_TORCH"] = "0"  # read while transformers is imported
from transformers import AutoTokenizer

tokenizer = None


def load(path):
    global tokenizer
    tokenizer = AutoTokenizer.from_pretrained(path)


def encode(line):
    ids = tokenizer(json.loads(line)["text"]).input_ids
    if ids:
        ids.append(tokenizer.eos_token_id)
    return ids


if __name__ == "__main__":
    data, out, path, _, processes = sys.argv[1:6]
    saved = Path(out, "saved")
    saved.mkdir(parents=True)
    load(path)
    dtype, lengths = id_dtype(len(tokenizer)), []
    with (
        open(data, encoding="utf-8") as lines,
        open(saved / "text.bin", "wb") as file,
        multiprocessing.Pool(int(processes), load, (path,)) as pool,
    ):
        for ids in pool.imap(encode, lines, 32):
            file.write(np.array(ids, dtype=dtype).tobytes())
            lengths.append(len(ids))
    write_index(saved / "text.idx", np.array(lengths), dtype)
