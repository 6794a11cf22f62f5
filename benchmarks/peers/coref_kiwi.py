"""Nothing but Kiwi, as fast as it goes on these cores: loaded once, forked, one call a document, only a count comes
back.

python coref_kiwi.py SURVIVORS.jsonl WORKERS
"""

import json
import multiprocessing
import sys
import warnings

from kiwipiepy import Kiwi

warnings.simplefilter("ignore", DeprecationWarning)


def analyse(text):
    return len(kiwi.tokenize(text))


if __name__ == "__main__":
    kiwi = Kiwi(num_workers=0)
    kiwi.tokenize("")
    with open(sys.argv[1], encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    with multiprocessing.get_context("fork").Pool(int(sys.argv[2])) as pool:
        print(json.dumps({"documents": len(texts), "tokens": sum(pool.imap_unordered(analyse, texts, chunksize=16))}))
