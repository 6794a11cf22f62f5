"""datatrove's DocumentTokenizer, one task a process, no shuffle: token files with an index of document ends, not
packed.

    python datatrove_tokens.py FOLDER OUT TOKENIZER SEQ_LEN NUM_PROC EOS

FOLDER holds several .jsonl files, since its tasks share work by the file.
"""

import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    data, out, tokenizer, _, processes, eos = sys.argv[1:]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(data, glob_pattern="*.jsonl"),
            DocumentTokenizer(
                out + "/saved",
                tokenizer_name_or_path=tokenizer + "/tokenizer.json",
                eos_token=eos,
                shuffle_documents=False,
            ),
        ],
        tasks=int(processes),
        workers=int(processes),
        logging_dir=out + "/rest",
    ).run()
