"""The published corpus as training rows: its splits, its tokenizer, and the promise that is checked before anything is
scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moai.core.errors import ConfigError, DamagedError
from moai.coref.manifest import read_manifest
from moai.coref.mlm import Sample
from moai.coref.mlm_tokens import MlmTokenizer, load_mlm_tokenizer
from moai.coref.samples import IGNORED


@dataclass(frozen=True)
class Corpus:
    """An opened corpus. `rows("train")` is a `datasets.Dataset` of that split."""

    path: Path
    content: dict[str, Any]
    tokenizer: MlmTokenizer
    dataset: Any

    @classmethod
    def open(cls, path: str) -> Corpus:
        """Raises ConfigError where there is no corpus, or none that is whole."""
        folder = Path(path).expanduser()
        try:
            content = read_manifest(folder)["content"]
        except DamagedError as error:
            raise ConfigError(f"--dataset {path}: {error}; prepare one: python -m moai entity-coref --help") from error
        from datasets import load_from_disk

        tokenizer = load_mlm_tokenizer(str(folder), content["config"]["mask_token"])
        return cls(folder, content, tokenizer, load_from_disk(str(folder)))

    @property
    def labelled(self) -> bool:
        return bool(self.content["config"]["mode"] != "text")

    def rows(self, split: str, *, most: int | None = None, longest: int | None = None) -> Any:
        """The samples of a split; of more than `most`, as many spread evenly; none longer than `longest` tokens."""
        wanted = self.dataset.data.column("split").to_numpy() == split
        if longest is not None:
            import pyarrow.compute as pc

            wanted &= pc.list_value_length(self.dataset.data.column("input_ids")).to_numpy() <= longest
        found = np.flatnonzero(wanted)
        if most is not None and len(found) > most:
            found = found[np.linspace(0, len(found) - 1, most).astype(np.int64)]
        return self.dataset.select(found)

    def fits(self, vocab_size: int, place: str) -> None:
        """Raises ConfigError unless a model of that vocabulary knows every id."""
        if vocab_size < self.tokenizer.spec.vocab_size:
            raise ConfigError(
                f"{place}: vocab_size {vocab_size:,}, but the corpus was made with a tokenizer of "
                f"{self.tokenizer.spec.vocab_size:,} ids; use its own model"
            )


def check_window(sample: Sample) -> None:
    """The antecedent stands unmasked before the mask, inside the row: without it there is nothing to look up. Raises
    DamagedError.
    """
    asked = [place for place, label in enumerate(sample["labels"]) if label != IGNORED]
    begin, end = sample["antecedent_begin"], sample["antecedent_end"]
    if not asked or not 0 <= begin < end <= asked[0] or asked[-1] >= len(sample["input_ids"]):
        raise DamagedError(
            f"{sample['doc_id']}: the sample for {sample['target']!r} has its antecedent at {begin}:{end} and its "
            f"masks at {asked[:1]}..{asked[-1:]}"
        )
