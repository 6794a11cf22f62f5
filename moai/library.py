"""moai from Python: `moai.prepare(...)`, `moai.open_prepared(path)`, and what they give.

prepared = moai.prepare(dataset="corpus.jsonl", tokenizer_path="tokenizers/mine", seq_len=2048)
prepared[0].input_ids, len(prepared)                 # rows, as they lie on disk
for document in prepared.documents(): ...            # what became of each document
for batch in prepared.torch(batch_size=8): ...       # the order of training, for a loop of your own
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from moai.core.config import configured
from moai.core.distributed import ranks
from moai.prepared.manifest import Prepared
from moai.prepared.rows import PackedRows, Row
from moai.pretraining.options import DataConfig, SaveConfig
from moai.pretraining.saving import prepare_and_save
from moai.training import prepared_data
from moai.training.loader import Batches, loader, order_of

if TYPE_CHECKING:
    import datasets

    from moai.engine.executor import Executor


@dataclass(frozen=True)
class PreparedData(Prepared):
    """A prepared directory, or several as one: its rows, the fate of its documents, and batches for training.
    `held_out` is its other side.
    """

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """The row of that number, from the end where it is negative. Raises IndexError."""
        return self._rows[index + len(self) if index < 0 else index]

    def rows(self) -> Iterator[Row]:
        """Every row, in the order they lie on disk. Arrays are views into mapped files and must not be written to."""
        return (self._rows[index] for index in range(len(self)))

    def documents(self) -> Iterator[dict[str, Any]]:
        """Every document that was read, also those that were filtered.

        `source`, `reason` (None if it was kept), `row`, `position` and `pieces` (where its first token stands, and in
        how many parts), `tokens`, `bytes`, `segment` and `offset` within the shard `shard`, and a value for each column
        of a Signal.
        """
        shards = self.manifest["content"]["shards"]
        for number, (shard, first) in enumerate(
            zip(shards, accumulate((shard["rows"] for shard in shards), initial=0))
        ):
            with pa.memory_map(str(self.path / shard["documents_file"]["file"])) as file:
                batches = pa.ipc.open_file(file)
                for at in range(batches.num_record_batches):
                    for found in batches.get_batch(at).to_pylist():
                        row = found.pop("first_row")
                        yield {
                            "source": shard["source"],
                            "shard": number,
                            **found,
                            "row": first + row if found["pieces"] else None,
                        }

    def dataset(self) -> datasets.Dataset:
        """The rows as a dataset of `datasets`."""
        import datasets

        if self.manifest["content"]["files"]:
            return datasets.load_from_disk(str(self.path))
        return datasets.concatenate_datasets(
            [datasets.Dataset.from_file(str(self.path / name)) for name, _ in self._rows.shards]
        )

    def torch(
        self,
        *,
        batch_size: int,
        position: int = 0,
        epochs: float | None = 1.0,
        seed: int = 42,
        mixture: Sequence[str] = (),
        mixture_by: str = "tokens",
        mixture_epochs: Sequence[str] = (),
        shuffle_window: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        num_workers: int = 0,
        pad_to: int | None = None,
    ) -> Any:
        """A torch DataLoader over this rank's batches in the order in which `train.py` takes them: input_ids,
        position_ids, labels, other columns.

        batch_size  rows a rank takes at once; what does not fill a batch of every rank at the end is left out
        position    rows that were trained on before, over all ranks: after n batches of each, `n * batch_size *
                    world_size`. A run may go on
                    from there with other ranks and another batch size, and no row comes twice or never
        epochs      passes over the data; None for no end
        rank, world_size    of the launch, unless named here
        The other options are those of `train.py`. Raises ConfigError.
        """
        here = ranks(os.environ)
        rank, world_size = here.rank if rank is None else rank, here.world_size if world_size is None else world_size
        order, end = order_of(
            self,
            epochs=epochs,
            seed=seed,
            shuffle_window=shuffle_window,
            mixture=mixture,
            mixture_by=mixture_by,
            mixture_epochs=mixture_epochs,
        )
        batches = Batches(order, batch_size=batch_size, rank=rank, world_size=world_size, position=position, end=end)
        return loader(self, batches, num_workers=num_workers, pad_to=pad_to)

    @cached_property
    def _rows(self) -> PackedRows:
        return PackedRows.of(self)


def prepare(*, executor: Executor | None = None, **options: Any) -> PreparedData:
    """Prepare text, or find it prepared. In a launch rank 0 prepares and the others wait: call it before anything makes
    a process group.

    `options` are those of `python -m moai prepare`: dataset, tokenizer_path, seq_len, packing, transforms, save_to,
    ...; `dataset` may be one path or several, `transforms` may hold parts. `executor` runs the shards instead of this
    process or its workers (`start`, `call`, `map`: moai.engine.executor.Executor). Raises errors of moai.core.errors,
    ConfigError for a name that is no option.
    """
    resolved = configured([DataConfig, SaveConfig], options, os.environ, caller="moai.prepare")
    return _opened(
        prepare_and_save(resolved[DataConfig], resolved[SaveConfig], origins=resolved.origins, executor=executor)
    )


def open_prepared(path: str | Path, *more: str | Path) -> PreparedData:
    """A prepared directory, checked against its manifest; several become one, source by source. Raises DamagedError,
    ConfigError.
    """
    return _opened(prepared_data.joined(prepared_data.open_all([str(path), *map(str, more)])))


def _opened(prepared: Prepared) -> PreparedData:
    return PreparedData(prepared.path, prepared.manifest, prepared.memory_mode)
