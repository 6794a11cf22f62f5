"""The gigatoken way of writing Megatron's files: the whole corpus tokenized in memory by the library's threads, ends
added, .bin and .idx written.

    python megatron_gigatoken.py DATA.jsonl OUT TOKENIZER SEQ_LEN NUM_PROC EOS [--awkward]

--awkward adds the ends with `awkward.concatenate`, as Megatron's own tool does; without it they are put in by numpy,
which is faster. Neither imports Megatron or torch. The library starts a thread for every core it sees.
"""

import sys
from pathlib import Path

import gigatoken
import numpy as np
from indexed import id_dtype, write_index


def add_ends(documents, end, dtype):
    """(all tokens, lengths) with `end` after every document, one copy in all."""
    offsets = np.asarray(documents.layout.offsets)
    ids = np.asarray(documents.layout.content.data)[offsets[0] : offsets[-1]]
    lengths = np.diff(offsets) + 1
    ends = np.cumsum(lengths) - 1
    flat = np.empty(len(ids) + len(ends), dtype)
    is_id = np.ones(len(flat), bool)
    is_id[ends] = False
    flat[is_id] = ids
    flat[ends] = end
    return flat, lengths


def add_ends_awkward(documents, end, dtype):
    import awkward

    column = awkward.singletons(awkward.Array(np.full(len(documents), end, np.uint32)))
    documents = awkward.concatenate([documents, column], axis=1)
    return np.asarray(awkward.flatten(documents)).astype(dtype), awkward.to_numpy(awkward.num(documents))


if __name__ == "__main__":
    data, out, path, _, _, eos, *extra = sys.argv[1:]
    saved = Path(out, "saved")
    saved.mkdir(parents=True)
    tokenizer = gigatoken.Tokenizer(path)
    end = tokenizer.as_hf().convert_tokens_to_ids(eos)
    dtype = id_dtype(tokenizer.vocab_size)
    documents = tokenizer.encode_files(gigatoken.JsonlFileSource([data], field="text"), parallel=True)
    flat, lengths = (add_ends_awkward if "--awkward" in extra else add_ends)(documents, end, dtype)
    flat.tofile(saved / "text.bin")
    write_index(saved / "text.idx", lengths, dtype)
