"""The process group: joined only when the data is there, and the first thing it does is agree on the data.

Before a collective can time out, all ranks meet at the launcher's store, where waiting for a late one costs nothing.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from moai.core.distributed import Ranks, owner
from moai.core.errors import MoaiError

logger = logging.getLogger(__name__)

T = TypeVar("T")
SHARED = "every rank raises this"
"""A note on an error that `together` raises everywhere: rank 0 says it for all."""
_MEET_SECONDS = 1800
"""How long the ranks wait for the last of them: loading libraries on a busy shared file system takes minutes."""


def join_on_cpu(here: Ranks, *, timeout_seconds: int, environ: Mapping[str, str]) -> None:
    """Make the gloo group with `--ddp_timeout`, which transformers passes on for accelerators only; a later stage finds
    it made.
    """
    if here.world_size == 1:
        return
    from torch.distributed import init_process_group, is_initialized
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if is_initialized():
        return
    logger.info("Meeting %d ranks at %s:%s", here.world_size, environ.get("MASTER_ADDR"), environ.get("MASTER_PORT"))
    store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=_MEET_SECONDS)))
    # The launcher's store outlives ranks that it starts anew, and with it the addresses of those before them.
    attempt = PrefixStore(f"moai/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # The store keeps its own, long timeout: a group made from an address would give it the short one, and a late rank
    # ends the launch.
    init_process_group(
        "gloo", store=attempt, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds)
    )


def agree(facts: Mapping[str, Any], here: Ranks) -> None:
    """The first collective: every rank raises the same MoaiError, listing all values, unless all ranks state the same
    facts.

    Ranks with other data would end as a hang in the middle of training: they run out of rows at different steps.
    """
    if here.world_size == 1:
        return
    from torch.distributed import all_gather_object

    stated: list[dict[str, Any]] = [{} for _ in range(here.world_size)]
    all_gather_object(stated, dict(facts))
    differing = [name for name in facts if any(other[name] != facts[name] for other in stated)]
    if differing:
        lists = "; ".join(
            f"{name}: " + ", ".join(f"rank {rank} {other[name]}" for rank, other in enumerate(stated))
            for name in differing
        )
        raise MoaiError(
            f"the ranks do not hold the same data ({lists}); do all nodes see the same --dataset, --tokenizer_path and "
            f"--cache_dir?"
        )


def from_rank_0(decide: Callable[[], T], here: Ranks) -> T:
    """What `decide` gives in rank 0, in every rank; a MoaiError it raises is raised in every rank."""
    if here.world_size == 1:
        return decide()
    from torch.distributed import broadcast_object_list

    box: list[Any] = [None, None]
    if here.rank == 0:
        try:
            box[0] = decide()
        except MoaiError as error:
            box[1] = error
    broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    decided: T = box[0]
    return decided


def together(act: Callable[[], T], here: Ranks) -> list[T]:
    """Run `act` in every rank, wait for all, and give what each returned. A MoaiError it raises in one is raised in
    every rank, the lowest's where there are several.
    """
    mine: T | MoaiError
    try:
        mine = act()
    except MoaiError as raised:
        mine = raised
    found: list[Any] = [mine] * here.world_size
    if here.world_size > 1:
        from torch.distributed import all_gather_object

        all_gather_object(found, mine)
    if error := next((one for one in found if isinstance(one, MoaiError)), None):
        error.add_note(SHARED)
        raise error
    return found


def everyone(here: Ranks) -> list[dict[str, Any]]:
    """The `owner` of every rank, so that each can tell which of them are gone."""
    found: list[dict[str, Any]] = [owner()] * here.world_size
    if here.world_size > 1:
        from torch.distributed import all_gather_object

        all_gather_object(found, owner())
    return found


def is_broken(error: Exception) -> bool:
    """Whether a collective failed, because another rank ended or came too late."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class Question:
    """The largest number that a rank says, 0 while all are silent. Asked at every step, so the price is one all-reduced
    number that nobody waits for.

    On an accelerator the answer is that to the question before, since this one is only queued there: reading it at once
    would let the device run dry at the end of each step. On the CPU it is the answer to this one.
    """

    def __init__(self, here: Ranks, device: Any) -> None:
        self.alone = here.world_size == 1
        if self.alone:
            return
        import torch

        on_cpu = device.type == "cpu"
        self._said = torch.zeros(1, dtype=torch.int32, device=device)
        self._answer = self._said if on_cpu else torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._copied = None if on_cpu else torch.Event(device)

    def ask(self, number: int) -> int:
        """A collective. The same answer in every rank."""
        if self.alone:
            return number
        from torch.distributed import ReduceOp, all_reduce

        if self._copied is not None:
            self._copied.synchronize()  # of the step before: the device is past it
        before = int(self._answer)
        self._said.fill_(number)
        all_reduce(self._said, ReduceOp.MAX)
        if self._copied is None:
            return int(self._answer)
        self._answer.copy_(self._said, non_blocking=True)
        self._copied.record()
        return before


def leave(here: Ranks) -> None:
    """Close the group. The caller has let go of the model: whatever of it is in reference cycles is collected first.

    A wrapped model that outlived the group would end it from its own destructor, with the interpreter's lock held, and
    wait for a gloo thread that wants the same lock. Every fourth run of two ranks hung there.
    """
    if here.world_size > 1:
        from torch.distributed import destroy_process_group, is_initialized

        gc.collect()
        if is_initialized():  # not where nothing was left to train
            destroy_process_group()
