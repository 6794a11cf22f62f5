"""What a finished run leaves behind to be read: summary.json, the model card, and the last lines on the screen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moai.core.errors import ConfigError
from moai.core.files import write_atomic
from moai.core.fsops import read_regular
from moai.training.record import MOST_BYTES


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of a run. Losses are means over the steps since the log line before, the first that of step 1."""

    prepared: str
    content_digest: str
    documents: int
    tokens: int
    rows: int
    fill_rate: float
    quarantined: int
    seq_len: int
    packing: str
    loss_first: float | None
    loss_last: float | None
    parameters: int
    parameters_without_embeddings: int
    steps: int
    tokens_seen: int
    tokens_per_second: float
    seconds: float
    resumed_from: str | None
    final_model: str
    output_dir: str

    @classmethod
    def load(cls, output_dir: Path) -> Summary | None:
        """Of a run that has ended before; None where there is none, or another version's."""
        try:
            return cls(**json.loads(read_regular(output_dir / "summary.json", MOST_BYTES)))
        except (OSError, ValueError, TypeError):
            return None

    def save(self) -> None:
        write_atomic(Path(self.output_dir) / "summary.json", _json(asdict(self)))

    def lines(self) -> list[str]:
        out = Path(self.output_dir)
        run = run_of(out)
        return [
            f"Loss          {_loss(self.loss_first)} -> {_loss(self.loss_last)} in {self.steps:,} steps",
            f"Trained       {self.tokens_seen:,} tokens, {self.tokens_per_second:,.0f} tokens/s, {self.seconds:,.0f} s",
            f"Model         {self.parameters:,} parameters ({self.parameters_without_embeddings:,} without embeddings)",
            f"Data          {self.documents:,} documents, {self.tokens:,} tokens, {self.rows:,} rows of {self.seq_len} "
            f"(packing {self.packing}, {self.fill_rate:.1%} filled), {self.quarantined:,} records quarantined",
            f"Prepared data {self.prepared}",
            f"Final model   {self.final_model}",
            f"Beside it     {out / 'summary.json'}, {run / 'settings.json'}, {out / 'training.html'}, {run / 'logs'}, "
            f"checkpoints",
        ]


def run_of(output_dir: Path) -> Path:
    """The run that a directory is a stage of, which has the settings; else the directory itself."""
    around = output_dir.parent if output_dir.name else output_dir.absolute().parent
    own, above = ((folder / "settings.json").is_file() for folder in (output_dir, around))
    return around if above and not own else output_dir


def title_of(output_dir: Path) -> str:
    """`moai-2b`, or of a stage `moai-2b, stage_1`."""
    run, name = run_of(output_dir), output_dir.absolute().name
    return name if run == output_dir else f"{run.absolute().name}, {name}"


def save_settings(output_dir: Path, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError where it cannot be written."""
    try:
        write_atomic(output_dir / "settings.json", _json(settings))
    except OSError as error:
        raise ConfigError(
            f"--output_dir {output_dir}: {error.strerror}; name a directory that can be written"
        ) from error


def data_figures(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a summary says of the data, from the manifest's content."""
    names = ("documents", "tokens", "rows", "fill_rate", "seq_len", "packing")
    return {name: content[name] for name in names} | {"quarantined": content.get("records", {}).get("quarantined", 0)}


def losses(log_history: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """(first, last) of the whole run, resumed parts included."""
    found = [float(entry["loss"]) for entry in log_history if "loss" in entry]
    return (found[0], found[-1]) if found else (None, None)


def model_card(summary: Summary, *, content: Mapping[str, Any], architecture: str) -> str:
    """README.md of final_model/, from the manifest. Language and licence are the user's to state: nobody else knows
    them.
    """
    sources = "\n".join(
        f"| {source['name']} | {source['documents']:,} | {source['tokens']:,} |"
        for source in content.get("sources", ())
    )
    table = f"\n| source | documents | tokens |\n|---|---:|---:|\n{sources}\n" if sources else ""
    weights = f"{summary.parameters:,} parameters, {summary.parameters_without_embeddings:,} without embeddings"
    packed = f"rows of {summary.seq_len} ({summary.packing}, {summary.fill_rate:.1%} filled)"
    losses = f"{_loss(summary.loss_first)} at the first step, {_loss(summary.loss_last)} at the end"
    return f"""# {title_of(Path(summary.output_dir))}

A causal language model ({architecture}, {weights}), trained with moai.

## Training data

{summary.documents:,} documents, {summary.tokens:,} tokens, packed into {summary.rows:,} {packed}.
Documents that share a row do not see one another. Records set aside as unreadable: {summary.quarantined:,}.
Digest of the prepared data: `{summary.content_digest}`
{table}
## Training

{summary.steps:,} steps, {summary.tokens_seen:,} tokens; loss {losses}.
All settings with their origin: `settings.json` beside this directory.

## Language, licence, limits

To be stated by whoever publishes this model.
"""


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _loss(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
