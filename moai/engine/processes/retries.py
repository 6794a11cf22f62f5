"""What a worker's death means: its shard again, a document set aside, or the end of the run.

A worker leaves in its beacon which of the source's records it works on, so a death leads to a batch. The shard is
worked on again by a fresh worker in smaller pieces, those records one by one; where memory may have been short, with
nothing beside it. A record that kills twice when it is alone was in three deaths: it is set aside with its place, and
the rest of the shard goes through. Deaths that lead to no record, or too many records, are the machine's doing rather
than the data's: then the run ends before data is lost.

A SIGKILL that the kernel did not count as one for memory came from outside. It says something of the machine and next
to nothing of the record, so such a death counts half: chance does not hit one record alone four times.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

from moai.core.errors import WorkerDied
from moai.engine.pipeline import BEHIND, DIED, HUNG, Care, Order

logger = logging.getLogger(__name__)

MOST_LEFT_OUT = 3
"""Records of one run that are set aside for having killed or hung workers; more of them say that it is not they."""
MOST_DEATHS = 20
"""Of one run. One that dies again and again goes on only if somebody looks at it."""
_ENOUGH = 4
"""Two deaths, or four from outside: of a record alone, of a shard without a record, of workers before they work."""
_PARTS = 8


@dataclass(frozen=True, kw_only=True)
class Try:
    """An order, and what the deaths of its workers have taught."""

    order: Order
    care: Care = field(default_factory=Care)
    alone: bool = False
    """Nothing else may be in work beside it."""
    deaths: int = 0
    """Weight of those that led to no record alone, since the beginning or since a record was set aside."""
    lone: tuple[int, ...] = ()
    """The records that were alone with a worker that died, each as often as that death weighs."""

    @property
    def id(self) -> str:
        return self.order[1].id


@dataclass(frozen=True, kw_only=True)
class Death:
    """`how` it ended, as a person would say it, and `signal` or so as it stands in the quarantine: the same on every
    run.
    """

    tried: Try
    pid: int
    how: str
    detail: str
    hung: bool = False
    memory: bool = False
    """Too little memory may be the cause."""
    outside: bool = False
    """Somebody killed it: by SIGTERM or so, or by SIGKILL while the kernel counts nobody that it killed for memory."""
    peak_bytes: int = 0
    started: bool = True
    """It was ready to work, so that what killed it came with the shard."""
    record: int = 0
    records: int = 0

    is_lost: bool = False
    """It lives, but nobody would tell how it ends: the process it was forked from is gone."""

    @property
    def weight(self) -> int:
        return 1 if self.outside else 2

    @property
    def where(self) -> str:
        if not self.started:
            return "at its start"
        if self.records == BEHIND:
            return f"behind the last of {self.record} records, while the shard was packed and written"
        if self.records == 0:
            return f"while it read on behind {self.record} records"
        return (
            f"at record {self.record + 1} of the shard"
            if self.records == 1
            else f"at records {self.record + 1} to {self.record + self.records} of the shard"
        )

    def __str__(self) -> str:
        peak = f", having held {self.peak_bytes / 1e6:,.0f} MB or more" if self.peak_bytes else ""
        return f"{self.tried.id}: worker {self.pid} {self.how} {self.where}{peak}"


@dataclass
class Deaths:
    """Of one run."""

    number: int = 0
    at_start: int = 0
    """Weight of those in a row."""
    left_out: int = 0

    def next_try(self, death: Death) -> Try:
        """How the shard is worked on again. Raises WorkerDied where that would help nobody."""
        self.number += 1
        self.at_start = 0 if death.started else self.at_start + death.weight
        tried = death.tried
        if self.at_start >= _ENOUGH:
            raise _end(death, "the last in a row of workers that did not get to work")
        self._check_number(death)
        if not death.started:
            logger.warning("%s; another one takes the shard", death)
            return tried
        if death.records == 1 and death.record in tried.care.singly:
            tried = replace(tried, lone=(*tried.lone, *[death.record] * death.weight))
            if tried.lone.count(death.record) >= _ENOUGH:
                return self._leave_out(death)
        else:
            tried = replace(tried, deaths=tried.deaths + death.weight)
            if tried.deaths >= _ENOUGH:
                raise _end(death, "the last of deaths of this shard that lead to no document that is to blame")
            singly = range(death.record, death.record + max(0, death.records))
            tried = replace(tried, care=replace(tried.care, parts=_PARTS, singly=singly))
        logger.warning(
            "%s; the shard is worked on again, with more care%s", death, " and alone" if death.memory else ""
        )
        return replace(tried, alone=death.memory)

    def lose_all(self, death: Death) -> None:
        """All workers at once, which counts as one death. Raises WorkerDied like `next_try`."""
        self.number += 1
        self._check_number(death)
        logger.warning("%s; it is started again, and the shards in work begin anew", death.how)

    def _check_number(self, death: Death) -> None:
        if self.number > MOST_DEATHS:
            raise _end(
                death,
                f"death number {self.number} of this run: something is wrong with this machine rather than with the "
                f"data",
            )

    def _leave_out(self, death: Death) -> Try:
        self.left_out += 1
        if self.left_out > MOST_LEFT_OUT:
            raise _end(
                death,
                f"document number {self.left_out} in this run that did so alone: something is wrong with this machine "
                f"rather than with the data",
            )
        logger.warning("%s, alone again: that record is set aside, the rest of the shard goes on", death)
        care = death.tried.care
        left_out = (*care.left_out, (death.record, HUNG if death.hung else DIED, death.detail))
        return replace(death.tried, care=replace(care, singly=range(0), left_out=left_out), deaths=0, lone=())


def _end(death: Death, why: str) -> WorkerDied:
    hint = ""
    if death.hung:
        hint = "; raise --stall_timeout if documents are this slow"
    elif death.memory:
        hint = "; often the answer to too little memory: fewer --num_proc, or a smaller --shard_bytes"
    return WorkerDied(f"{death}: {why}{hint}; finished shards are kept, run again to go on")
