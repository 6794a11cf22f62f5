"""The guides' loop: a pool whose initializer loads Kiwi, chunks of 2,000 texts, results as they come; then a second
pass of Kiwi over what passed.

    python coref_guides.py DATA.jsonl WORKERS CHUNKSIZE MIN_NNP MAX_NNP PRONOUNS(0|1) MAX_ENTITY_FREQ

Its tokenization, its padding to seq_len and its second copy at the end are left out, in its favour: it stops at the
samples.
"""

import json
import multiprocessing
import sys
from collections import Counter

kiwi = None


def init_worker():
    global kiwi
    from kiwipiepy import Kiwi

    kiwi = Kiwi()
    kiwi.tokenize("")


def check(item):
    text, least, most = item
    if sum(text.count(mark) for mark in ".?!") < 3:
        return None
    if sum("가" <= letter <= "힣" for letter in text) / len(text) < 0.4:
        return None
    if sum(not letter.isalnum() and letter not in " \n\t" for letter in text) / len(text) > 0.3:
        return None
    tokens = kiwi.tokenize(text)
    ratio = sum(token.tag == "NNP" for token in tokens) / max(1, len(tokens))
    return text if least <= ratio <= most else None


def extract(text):
    return text, [{"form": token.form, "tag": token.tag, "start": token.start} for token in kiwi.tokenize(text)]


if __name__ == "__main__":
    data, workers, chunksize, least, most, pronouns, cap = sys.argv[1:8]
    with open(data, encoding="utf-8") as lines:
        texts = [text for line in lines if 800 <= len(text := json.loads(line)["text"]) <= 2500]
    passed = []
    with multiprocessing.Pool(int(workers), initializer=init_worker, maxtasksperchild=1000) as pool:
        for result in pool.imap_unordered(
            check, ((text, float(least), float(most)) for text in texts), chunksize=int(chunksize)
        ):
            if result is not None:
                passed.append(result)
        samples, of = [], Counter()
        for text, tokens in pool.imap_unordered(
            extract, passed, chunksize=max(1, min(int(chunksize), len(passed) // (2 * int(workers)) or 1))
        ):
            if int(pronouns) and any(token["tag"] == "NP" for token in tokens):
                continue
            places = {}
            for token in tokens:
                if token["tag"] == "NNP" and len(token["form"]) >= 2:
                    places.setdefault(token["form"], []).append(token["start"])
            for entity, (first, *later) in places.items():
                for place in later[:3]:
                    if 10 <= place - first <= 2000 and of[entity] < int(cap):
                        of[entity] += 1
                        samples.append(
                            {
                                "text": text[:place] + "[MASK]" + text[place + len(entity) :],
                                "target": entity,
                                "distance": place - first,
                            }
                        )
    print(json.dumps({"documents": len(texts), "passed": len(passed), "samples": len(samples)}))
