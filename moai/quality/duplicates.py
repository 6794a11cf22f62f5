"""Which copies of a document go: documents are taken in order, and one goes exactly when it is the same as, or similar
enough to, one that stays.

    found = settle(allowed, classes, pairs, jaccards)            # documents are numbered in the order they are taken
    found.keeper[document]                                       # the document that stays in its place, or -1

So of A ~ B ~ C with A and C not similar, A and C stay: B goes because of A, and what goes takes nothing with it. What
is not `allowed` was dropped for another reason: it neither stays nor takes anything away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
_UNDECIDED, _STAYS, _GOES = 0, 1, 2


@dataclass(frozen=True)
class Settled:
    """`keeper` is -1 of a document that stays, or that was not allowed; `jaccard` is what it has in common with it."""

    keeper: Numbers
    jaccard: npt.NDArray[np.float64]


def settle(
    allowed: npt.NDArray[np.bool_], classes: Numbers, pairs: Numbers, jaccards: npt.NDArray[np.float64]
) -> Settled:
    """What goes, in favour of what.

    allowed   bool[documents], in the order they are taken
    classes   int64[documents]: the same number for documents that are equal
    pairs     int64[pairs, 2] of documents that are similar enough, in any order; one pair speaks for the whole classes
    jaccards  float64[pairs]
    """
    documents = len(allowed)
    # The first allowed document of a class stands for it; the others go, whatever becomes of the first.
    first = np.full(int(classes.max(initial=-1)) + 1, documents)
    np.minimum.at(first, classes[allowed], np.flatnonzero(allowed))
    keeper, jaccard = np.full(documents, -1), np.zeros(documents)
    copies = allowed & (first[classes] != np.arange(documents))
    keeper[copies], jaccard[copies] = first[classes[copies]], 1.0

    ends = np.sort(first[classes[pairs]].reshape(-1, 2), axis=1)
    real = (ends[:, 1] < documents) & (ends[:, 0] != ends[:, 1])
    earlier, later, likeness = ends[real, 0], ends[real, 1], jaccards[real]
    state = _states(documents, earlier, later)
    # Named is the most similar one that stays, of several the first.
    takes = (state[earlier] == _STAYS) & (state[later] == _GOES)
    order = np.lexsort((earlier[takes], -likeness[takes], later[takes]))
    goers, at = np.unique(later[takes][order], return_index=True)
    keeper[goers], jaccard[goers] = earlier[takes][order][at], likeness[takes][order][at]
    # A copy of one that goes has gone because of the same document.
    more = np.flatnonzero(copies)
    more = more[state[first[classes[more]]] == _GOES]
    keeper[more], jaccard[more] = keeper[first[classes[more]]], jaccard[first[classes[more]]]
    return Settled(keeper, jaccard)


def _states(documents: int, earlier: Numbers, later: Numbers) -> npt.NDArray[np.int8]:
    """Round after round, those stay that wait for nobody, and those go that one of them takes away."""
    state = np.zeros(documents, np.int8)
    waits = np.zeros(documents, bool)
    waits[later] = True
    state[~waits] = _STAYS
    while len(later):
        state[later[state[earlier] == _STAYS]] = _GOES
        left = (state[later] == _UNDECIDED) & (state[earlier] == _UNDECIDED)
        undecided = np.unique(later[state[later] == _UNDECIDED])
        earlier, later = earlier[left], later[left]
        state[np.setdiff1d(undecided, later)] = _STAYS
    return state
