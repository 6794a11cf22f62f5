"""Buckets of so many documents that not all of their pairs were made: what is still to be compared once it is known
which of them stay.

A licence header puts thousands of files into one bucket, a form letter thousands of copies. Of the former nearly no
pair is likely by its slots, and of the latter nearly none stays; so few pairs are left, and they come in rounds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.quality.bands import HEADS, likely
from moai.quality.corpus import Corpus, Ids
from moai.quality.minhash import SIGNATURE

logger = logging.getLogger(__name__)

_HEADS_A_ROUND = 8
_NONE = np.empty((0, 2), np.int64)
MOST = 4096
"""Documents of a bucket that stay and are all compared with one another. Of a larger one the first so many are compared
with all; what two others have in common is then found by another band, or not."""


@dataclass(frozen=True)
class Crowds:
    corpus: Corpus
    floor: float
    members: tuple[Ids, ...]
    heads: tuple[set[int], ...] = field(default_factory=tuple)
    """Documents of each that were compared with all others that stayed then."""

    @classmethod
    def of(cls, listed: pa.Table, corpus: Corpus, floor: float) -> Crowds:
        """From rows of (first of a bucket, one of it), bucket by bucket."""
        first, second = (listed[name].to_numpy() for name in ("first", "second"))
        # A bucket begins where its first document stands beside itself.
        members = tuple(np.split(second, np.flatnonzero(first == second)[1:])) if len(second) else ()
        return cls(corpus, floor, members, tuple({*found[:HEADS].tolist()} for found in members))

    def uncompared(
        self, stays: npt.NDArray[np.bool_], known: Ids, order: Callable[[Ids], Ids], ours: Callable[[Ids], Ids]
    ) -> Ids:
        """Pairs of documents that stay, are in one bucket and were never compared, ordered: the next ones, or none.

        order  the order in which documents are taken
        ours   those pairs that are to be compared
        """
        number = np.int64(self.corpus.documents)
        compared = known[:, 0] * number + known[:, 1]
        while True:
            found = [self._next(one[stays[one]], heads, order) for one, heads in zip(self.members, self.heads)]
            pairs = np.unique(np.sort(np.concatenate([_NONE, *found]), axis=1), axis=0)
            new = ours(pairs[~np.isin(pairs[:, 0] * number + pairs[:, 1], compared)])
            if len(new) or not len(pairs):
                return new

    def _next(self, members: Ids, heads: set[int], order: Callable[[Ids], Ids]) -> Ids:
        """The likely pairs of the next heads: of as many heads as it takes to find one."""
        if {*members.tolist()} <= heads:
            return _NONE
        members = np.sort(members)
        signatures = self.corpus.take("min_hash", SIGNATURE, members)
        taken = order(members)
        if len(members) > MOST:
            logger.warning(
                "%s documents that stay share a bucket: %s of them are compared with all others",
                f"{len(members):,}",
                MOST,
            )
        left = np.array([at for at in taken[:MOST].tolist() if int(members[at]) not in heads], np.int64)
        for start in range(0, len(left), _HEADS_A_ROUND):
            some = left[start : start + _HEADS_A_ROUND]
            heads.update(members[some].tolist())
            one, other = np.repeat(some, len(members)), np.tile(np.arange(len(members)), len(some))
            new = (one != other) & likely(signatures, one, other, self.floor)
            if new.any():
                return np.stack((members[one[new]], members[other[new]]), axis=1)
        return _NONE
