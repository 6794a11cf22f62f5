"""README.md of a corpus: the dataset card, with its figures, its sources and their licences, and how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moai.sources.discover import Input

_NOT_STATED = "not stated"


def license_of(given: Input) -> str:
    """As the dataset card beside the files says it; most files say nothing."""
    folders = dict.fromkeys(folder for file in given.files[:1] for folder in list(Path(file.path).parents)[:3])
    for card in (folder / "README.md" for folder in folders):
        try:
            head = card.read_text(encoding="utf-8").split("---")[1]
        except (OSError, ValueError, IndexError):
            continue
        if found := re.search(r"^license:\s*(\S.*?)\s*$", head, re.MULTILINE):
            return found[1][:80]
    return _NOT_STATED


def render(content: Mapping[str, Any]) -> str:
    """The card. All of it follows from the manifest's content."""
    config, split, entities = content["config"], content["split"], content["entities"]
    files = [f"  - split: {name}\n    path: {name}/data-*.arrow" for name, number in split.items() if number]
    sources = [
        f"| {one['name']} | {one['origin'].get('dataset', one['kind'])} | {one['license']} | {one['read']:,} | "
        f"{one['passed']:,} |"
        for one in content["sources"]
    ]
    steps = [f"| {name} | {number:,} |" for name, number, _ in [*content["funnel"], *content["mentions"]]]
    distances, lengths = content["distance_stats"], content["length_stats"]
    return "\n".join(
        [
            "---", "language: ko", "task_categories: [fill-mask]", "pretty_name: Entity-coref",
            "configs:", "- config_name: default", "  data_files:", *files, "---", "",
            f"# entity_coref_v2_{content['seq_len']}", "",
            f"{content['rows']:,} samples ({split['train']:,} train, {split['validation']:,} validation) from "
            f"{content['documents']:,} Korean documents, {entities['unique']:,} names. In each a later mention of a "
            f"repeated name is masked, with its tokens as labels, and must be found again from where it was named "
            f"first. Documents of one cluster stand on one side of the split.", "",
            f"Characters from antecedent to mask: median {distances['median']:,}, {distances['min']:,} to "
            f"{distances['max']:,}. Tokens of a sample: median {lengths['median']:,}, at most {lengths['max']:,}.", "",
            "## Sources and licences", "",
            "The samples quote their sources whole, so the sources' licences hold for them.", "",
            "| source | what | licence | documents read | passed |", "|---|---|---|---|---|", *sources, "",
            "## How it was made", "", "```json", _settings(config), "```", "",
            "| step | number |", "|---|---|", *steps, "",
            "Most frequent names: " + ", ".join(f"{name} ({number:,})" for name, number in entities["top"]) + ".", "",
        ]
    )  # fmt: skip


def _settings(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=1, ensure_ascii=False, sort_keys=True)
