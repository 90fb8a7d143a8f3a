"""A page of headings, tables and figures, as Markdown and as one HTML file that needs no other."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Literal

from decode.evaluation.plots import PALETTE, in_css


@dataclasses.dataclass(frozen=True)
class Heading:
    """The title of a section; level 1 is the page's."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Note:
    """A text that stands out."""

    kind: Literal["warning", "note"]
    text: str


@dataclasses.dataclass(frozen=True)
class Cards:
    """A few figures in large type: (label, figure, small print)."""

    cards: Sequence[tuple[str, str, str]]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table cell with small print behind it; `row` gives it the colour of a row."""

    text: str
    small: str = ""
    row: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns after the first `texts` hold numbers; `strong` is the index of a row to stress."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    texts: int = 1
    strong: int | None = None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing of decode.evaluation.plots; name is that of its file beside the Markdown."""

    name: str
    svg: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Text:
    """Text as a model reads or writes it, and whose it is."""

    label: str
    text: str
    row: str = ""


@dataclasses.dataclass(frozen=True)
class Folded:
    """Blocks that open on demand."""

    summary: str
    blocks: Sequence[Block]


Block = Heading | Paragraph | Note | Cards | Table | Figure | Text | Folded


_LONG = 40  # characters of a table cell that may be broken anywhere


def to_markdown(blocks: Sequence[Block], figures: str) -> str:
    """The page as Markdown.

    Args:
      blocks: of the page.
      figures: path of the folder with the figures, NAME.svg, as seen from the file.
    """
    return "\n\n".join(_markdown(block, figures) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], title: str) -> str:
    """The page as HTML, light or dark as the reader's system is."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_colours()}{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _markdown(block: Block, figures: str) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text):
            return _plain(text)
        case Note(kind, text):
            return f"> **{kind.capitalize()}.** {_plain(text)}"
        case Cards(cards):
            return "\n".join(
                f"- {label}: **{figure}** {small}".rstrip() for label, figure, small in cards
            )
        case Table():
            return _markdown_table(block)
        case Figure(name, _, caption):
            return f"![{_plain(caption)}]({figures}/{name}.svg)"
        case Text(label, text, _):
            fence = "```"
            while fence in text:
                fence += "`"
            return f"{_plain(label)}\n\n{fence}text\n{text}\n{fence}"
        case Folded(summary, inner):
            content = "\n\n".join(_markdown(one, figures) for one in inner)
            return f"<details><summary>{html.escape(summary)}</summary>\n\n{content}\n\n</details>"


def _markdown_table(table: Table) -> str:
    def cell(content: str | Cell, strong: bool) -> str:
        one = content if isinstance(content, Cell) else Cell(content)
        text = _plain(one.text).replace("|", "\\|")
        text = f"**{text}**" if strong and text else text
        return f"{text} {one.small}".strip()

    rule = ["---" if i < table.texts else "---:" for i in range(len(table.header))]
    lines = [
        [_plain(name) for name in table.header],
        rule,
        *([cell(one, i == table.strong) for one in row] for i, row in enumerate(table.rows)),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text without what Markdown would take for markup."""
    for mark in "\\`*_<[":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def _html(block: Block) -> str:
    escape = html.escape
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Note(kind, text):
            return f'<p class="{kind}"><strong>{kind.capitalize()}.</strong> {escape(text)}</p>'
        case Cards(cards):
            inner = "".join(
                f"<div><dt>{escape(label)}</dt><dd>{escape(figure)}<small>{escape(small)}</small>"
                "</dd></div>"
                for label, figure, small in cards
            )
            return f'<dl class="cards">{inner}</dl>'
        case Table():
            return _html_table(block)
        case Figure(_, svg, caption):
            drawing = in_css(svg).replace(
                "<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1
            )
            return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"
        case Text(label, text, row):
            head = f"<h4>{escape(label)}</h4>"
            return f'<div class="text"{_of(row)}>{head}<pre>{escape(text)}</pre></div>'
        case Folded(summary, inner):
            content = "\n".join(_html(one) for one in inner)
            return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"


def _html_table(table: Table) -> str:
    def cell(content: str | Cell, column: int) -> str:
        one = content if isinstance(content, Cell) else Cell(content)
        tag = "th" if column == 0 else "td"
        long = ' class="long"' if len(one.text) > _LONG else ""
        kind = long if column < table.texts else ' class="number"'
        small = f" <small>{html.escape(one.small)}</small>" if one.small else ""
        return f"<{tag}{kind}{_of(one.row)}>{html.escape(one.text)}{small}</{tag}>"

    head = "".join(
        f"<th{'' if i < table.texts else ' class=' + chr(34) + 'number' + chr(34)}>"
        f"{html.escape(name)}</th>"
        for i, name in enumerate(table.header)
    )
    rows = []
    for i, row in enumerate(table.rows):
        strong = ' class="strong"' if i == table.strong else ""
        rows.append(f"<tr{strong}>{''.join(cell(one, j) for j, one in enumerate(row))}</tr>")
    narrow = ' class="narrow"' if len(table.header) == 2 else ""
    return (
        f'<div class="table"><table{narrow}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _of(row: str) -> str:
    return f' style="--of: var(--{row})" data-row="{row}"' if row else ""


def _colours() -> str:
    def rules(colours: Mapping[str, str]) -> str:
        return " ".join(f"--{name}: {value};" for name, value in colours.items())

    light = {name: pair[0] for name, pair in PALETTE.items()} | _PAGE_LIGHT
    dark = {name: pair[1] for name, pair in PALETTE.items()} | _PAGE_DARK
    return (
        f":root {{ color-scheme: light dark; {rules(light)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {rules(dark)} }} }}\n"
    )


_PAGE_LIGHT = {"page": "#ffffff", "raised": "#f6f7f9", "warn": "#b3401f", "warn-ground": "#fdf1ec"}
_PAGE_DARK = {"page": "#14171a", "raised": "#1d2125", "warn": "#ff9b78", "warn-ground": "#33211b"}
_STYLE = """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .8rem; padding-top: 1.2rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 2rem 0 .6rem; }
h4 { font-size: .82rem; font-weight: 600; margin: 0; color: var(--muted); }
p { margin: .6rem 0; max-width: 46rem; }
small, figcaption { color: var(--muted); font-size: .8rem; font-weight: 400; }
.warning, .note { padding: .7rem 1rem; border-left: 3px solid var(--muted);
  background: var(--raised); border-radius: 0 6px 6px 0; }
.warning { border-color: var(--warn); background: var(--warn-ground); }
.warning strong { color: var(--warn); }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.4rem 0; }
.cards div { flex: 1 1 9rem; padding: .8rem 1rem; background: var(--raised); border-radius: 8px; }
.cards dt { font-size: .8rem; color: var(--muted); }
.cards dd { margin: .1rem 0 0; font-size: 1.55rem; font-weight: 600; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.cards small { display: block; letter-spacing: 0; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .42rem .7rem; border-bottom: 1px solid var(--line);
  font-weight: 400; vertical-align: baseline; }
thead th { color: var(--muted); font-size: .8rem; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
.number { text-align: right; white-space: nowrap; }
tr.strong { background: var(--raised); }
tr.strong th, tr.strong td { font-weight: 650; }
th[data-row]::before, h4[data-row]::before { content: ""; display: inline-block; width: .65rem;
  height: .65rem; margin: 0 .5rem 0 .1rem; border-radius: 2px; background: var(--of); }
.long { overflow-wrap: anywhere; }
th[data-row] { white-space: nowrap; }
table.narrow { width: auto; }
table.narrow td:first-child, table.narrow th:first-child { padding-right: 2.5rem; }
figure { margin: 1.2rem 0; }
figure svg { display: block; max-width: 100%; height: auto; }
pre { margin: .3rem 0 0; font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.text { margin: .7rem 0; padding: .6rem .9rem; border-left: 3px solid var(--of, var(--line));
  background: var(--raised); border-radius: 0 6px 6px 0; }
details { margin: .7rem 0; }
summary { cursor: pointer; color: var(--muted); }
summary:hover { color: var(--ink); }
details[open] > summary { margin-bottom: .6rem; color: var(--ink); }
@media print { details { display: block; } body { font-size: 11pt; } }
"""
