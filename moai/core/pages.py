"""Self-contained HTML pages: one frame, one set of colours.

They follow the reader's choice of light or dark, load nothing from anywhere, and run no script.

    page("a corpus", ["<h2>Documents</h2>", bars([("kept", 90, 0.9, ""), ("dropped", 10, 0.1, "lost")])])
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #69707d; --paper: #fdfdfc; --line: #d9dce1; --bar: #4878a8;
  --lost: #b9bec7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #9aa1ad; --paper: #17191d; --line: #343840;
  --bar: #6f9fd0; --lost: #50555f; } }
body { font: 15px/1.6 system-ui, "Noto Sans KR", "Apple SD Gothic Neo", "Malgun Gothic", sans-serif;
  color: var(--ink); background: var(--paper); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
small, .soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; }
td, th { padding: .15rem .5rem .15rem 0; text-align: left; font-weight: normal; } th { color: var(--soft); }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; width: 1%; }
td.name { white-space: nowrap; width: 1%; }
.bar { height: .9rem; background: var(--bar); min-width: 1px; } .lost { background: var(--lost); }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2.5rem; }
@media (max-width: 45rem) { .columns { grid-template-columns: 1fr; } }
"""


def page(title: str, parts: Iterable[str], *, style: str = "", lang: str = "en") -> str:
    """A whole document. `parts` are HTML already; `title` is text; `style` is added to the common one."""
    return (
        f"<!doctype html><html lang={lang}><meta charset=utf-8><meta name=viewport "
        f"content='width=device-width'><title>{escape(title)}</title>"
        f"<style>{_STYLE}{style}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )


def bars(rows: Iterable[tuple[str, int, float, str]]) -> str:
    """A table of (name, number, length of the bar from 0 to 1, its class). Nothing has no bar, a little has the
    thinnest.
    """
    lines = (
        f"<tr><td class=name>{escape(name)}</td><td class=number>{number:,}</td><td>{_bar(share, style)}</td></tr>"
        for name, number, share, style in rows
    )
    return f"<table>{''.join(lines)}</table>"


def _bar(share: float, style: str) -> str:
    return f"<div class='bar {style}' style='width:{share:.2%}'></div>" if share else ""
