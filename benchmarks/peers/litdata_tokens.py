"""LitData's `optimize` with a TokensLoader: chunks of about 64 MB of tokens, int32 as its own guide's tokenizer gives
them.

    python litdata_tokens.py FOLDER OUT TOKENIZER SEQ_LEN NUM_PROC EOS

FOLDER holds several .jsonl files, since its workers share work by the file.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from litdata import TokensLoader, optimize
from tokenizers import Tokenizer


def encode(path, tokenizer, end):
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield torch.tensor([*tokenizer.encode(json.loads(line)["text"]).ids, end], dtype=torch.int)


if __name__ == "__main__":
    data, out, path, seq_len, processes, eos = sys.argv[1:]
    tokenizer = Tokenizer.from_file(path + "/tokenizer.json")
    end = tokenizer.token_to_id(eos)
    optimize(
        fn=partial(encode, tokenizer=tokenizer, end=end),
        inputs=sorted(map(str, Path(data).glob("*.jsonl"))),
        output_dir=out + "/saved",
        chunk_size=int(seq_len) * 8192,
        item_loader=TokensLoader(int(seq_len)),
        num_workers=int(processes),
    )
