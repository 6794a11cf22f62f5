"""What a check found: one line for a person, one object for a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OK, ADVICE, FAILED = "ok", "advice", "FAILED"
BOOTSTRAP = "install the pinned packages: bash scripts/bootstrap.sh"


@dataclass(frozen=True)
class Check:
    """`advice` costs time or memory, `FAILED` will stop or spoil a run; both carry a remedy."""

    name: str
    value: str
    verdict: str = OK
    remedy: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name:<25}  {self.verdict:<6}  {self.value}" + (f"  -> {self.remedy}" if self.remedy else "")


def judged(name: str, value: str, remedy: str = "", **figures: Any) -> Check:
    """Advice where there is a remedy, else ok."""
    return Check(name, value, ADVICE if remedy else OK, remedy, figures)


def failed(name: str, value: str, remedy: str, **figures: Any) -> Check:
    return Check(name, value, FAILED, remedy, figures)
