"""What a check found: one line for a person, one object for a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

OK, ADVICE, FAILED = "ok", "advice", "FAILED"


@dataclass(frozen=True, kw_only=True)
class Check:
    """`advice` costs time or memory, `FAILED` will stop or spoil a run; both carry a remedy."""

    name: str
    value: str
    verdict: str = OK
    remedy: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The measured numbers, in the units their names end with."""

    def __post_init__(self) -> None:
        assert self.verdict in (OK, ADVICE, FAILED), self.verdict
        assert bool(self.remedy) == (self.verdict != OK), (
            f"{self.name}: a remedy goes with advice and failure, and only with them"
        )

    def __str__(self) -> str:
        return f"{self.name:<25}  {self.verdict:<6}  {self.value}" + (f"  -> {self.remedy}" if self.remedy else "")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
