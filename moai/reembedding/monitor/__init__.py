"""What watches a re-embedding: reads `reembed_runs` and the receipts, never writes, and needs no model.

progress      how many documents of each type a version holds
speed         a line every --interval seconds, a summary at Ctrl-C
performance   seconds a document, documents an hour, what is left, a verdict
"""
