"""Judging documents: measure each once, decide in seconds, pack what stays.

characters  what a character counts as
plain       the statistics of a text, as their definitions read
scan        the same numbers, fast (numba)
statistics  the Signal that measures them
language    the Signal that tells languages; fasttext: models that do, and a user's own
personal    personal data: the Signal that counts it, the Map that masks it
contamination  the Signal that finds evaluation items, by ngrams (ngrams_scan: the same, fast)
findings    what these found, for the report
rules       profiles of thresholds over them
verdicts    which documents of a shard go, and the filter that lets the others pass
report      what every rule costs: quality.json and quality.html
"""
