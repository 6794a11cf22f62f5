"""Batches that were cut from others must not carry what lay beside them into a file."""

from __future__ import annotations

import pyarrow as pa

from moai.cache.shards import regroup


def test_one_column_that_is_a_slice_is_copied_though_the_others_are_whole() -> None:
    whole = pa.array([[7], [8]], pa.list_(pa.uint32()))
    cut = pa.array([[1], [2], [3]], pa.list_(pa.uint32())).slice(1)
    (found,) = regroup(iter([pa.record_batch({"whole": whole, "cut": cut})]), 2)
    assert found.to_pydict() == {"whole": [[7], [8]], "cut": [[2], [3]]}
    assert (found["cut"].offset, len(found["cut"].values)) == (0, 2)
