"""The HTML side of a report: escaping, tables, one inline SVG for both themes, and the page around them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moesaic.bench.palette import DARK

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --text: #1f2328; --soft: #5c646d; --line: #dde2e7; --wash: #f5f7f9; --good: #0072b2;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
  %(light)s
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --text: #e6e9ec; --soft: #9aa4ae; --line: #343a41; --wash: #1c2024; --good: #56b4e9;
    %(dark)s
  }
}
@media print {
  :root {
    color-scheme: light;
    --page: #ffffff; --text: #000000; --soft: #444444; --line: #cccccc; --wash: #ffffff; --good: #0072b2;
    %(light)s
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 72rem;
  background: var(--page); color: var(--text); font: 1rem/1.55 var(--sans); overflow-wrap: break-word;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.6rem 0 .6rem; }
p, ul { max-width: 46rem; }
ul { padding-left: 1.2rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.words { font-size: 1.05rem; border-left: 3px solid var(--good); padding-left: 1rem; }
figure { margin: 1rem 0 .5rem; }
.scroll { overflow-x: auto; }
figure svg { display: block; width: 100%%; height: auto; min-width: var(--least, 0); }
figure svg text { font-family: var(--sans) !important; }
figcaption { max-width: 46rem; margin-top: .3rem; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td {
  padding: .28rem 1.1rem .28rem 0; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line);
}
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
td.long { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; }
pre { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre {
  background: var(--wash); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  figure svg { min-width: 0; }
  figure, tr, pre { break-inside: avoid; }
  h2 { break-after: avoid; }
  table { font-size: 7.5pt; }
  th, td { padding-right: .5rem; white-space: normal; }
}
"""
_WIDE_INCHES = 6.0


def escape(text: object) -> str:
    """Text safe inside HTML."""
    return html.escape(str(text))


@dataclass(frozen=True)
class Column:
    """A table column: its heading and how entries are set: ``number`` flush right, ``text``, or ``long``."""

    name: str
    kind: str = "number"


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls sideways by itself where the page is narrow."""
    head = "".join(f"<th{_kind(c)}>{escape(c.name)}</th>" for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{_kind(c)}>{escape(v)}</td>" for c, v in zip(columns, row, strict=True)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _kind(column: Column) -> str:
    return f' class="{column.kind}"'


def figure(svg: str, caption: str, title: str) -> str:
    """An inline SVG with its caption; colours follow the page's theme, and a wide one scrolls on a phone."""
    width = float(found.group(1)) if (found := re.search(r'<svg[^>]*?\bwidth="([\d.]+)pt"', svg)) else 0.0
    least = "44rem" if width > _WIDE_INCHES * 72 else "0"
    return (
        f'<figure><div class="scroll" style="--least: {least}">{_inline(svg, title)}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _inline(svg: str, title: str) -> str:
    """The SVG element alone: no prolog, no fixed size, no group ids (figures share them), colours as variables."""
    body = svg[svg.index("<svg") :]
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    for color in DARK:
        rest = rest.replace(color, f"var({_variable(color)})")
    return f'<svg role="img" aria-label="{escape(title)}" {box.group(0) if box else ""}>{rest}'


def _variable(color: str) -> str:
    return f"--c{color.removeprefix('#')}"


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document, self-contained: no script, no font, no image from elsewhere."""
    light = " ".join(f"{_variable(c)}: {c};" for c in DARK)
    dark = " ".join(f"{_variable(c)}: {d};" for c, d in DARK.items())
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE % {'light': light, 'dark': dark}}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
