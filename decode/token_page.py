"""An HTML page of recorded completions: each token coloured by how much the tuning raised it.

One file without outside parts. The colour is log p_proxy - log p_M; an underline says that M's own
likeliest token is another one; hovering over a token, or walking with the arrow keys, shows what
each model would rather have said.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from decode.explain import Record, Words, changed, step_means

_LABELS = {"proxy": "proxy", "base": "M", "expert": "M+", "antiexpert": "M−"}
_FULL = math.log(100)  # of the log-ratio at which the colour is strongest
_OPEN_PROMPT = 600  # characters; longer prompts are folded


def render(records: Sequence[Record], words: Words, title: str) -> str:
    """The page.

    Args:
      records: at least one; a token takes about 500 bytes.
      words: what alternatives read as.
      title: plain text.
    """
    table: dict[int, int] = {}
    content = {
        "title": html.escape(title),
        "figures": _figures(records),
        "completions": "\n".join(_completion(n, record) for n, record in enumerate(records)),
        "data": _json(
            {
                "labels": [_LABELS[name] for name in records[0].trace.names],
                "rows": [_row(record, table) for record in records],
                "words": [words.word(i) for i in table],
            }
        ),
    }
    # In one pass: what is put in may itself look like a place to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: content[match[1]], _PAGE)


def _figures(records: Sequence[Record]) -> str:
    share, means = changed(records), step_means(records)
    figures = [
        (f"{len(records)}", "completions" if len(records) > 1 else "completion"),
        (f"{share.steps}", "tokens"),
        (
            f"{100 * share.value:.1f} %",
            f"of tokens where the tuning changes M's first choice ({100 * share.low:.0f} to "
            f"{100 * share.high:.0f}&nbsp;%)",
        ),
        (f"{means['kl']:.2f}", "nats, mean KL(proxy ‖ M)"),
    ]
    if means["overlap"] is not None:
        figures.append((f"{100 * means['overlap']:.0f} %", "mean overlap of proxy and M+"))
    return "".join(f"<div><b>{value}</b> {what}</div>" for value, what in figures)


def _completion(number: int, record: Record) -> str:
    raised, other = record.trace.raised, record.trace.changed
    tokens = []
    for i, (word, piece) in enumerate(zip(record.words, record.pieces, strict=True)):
        strength = min(1.0, abs(float(raised[i])) / _FULL)
        kind = ("up" if raised[i] > 0 else "down") + (" other" if other[i] else "")
        shown = html.escape(piece, quote=False).replace("\n", "<i>↵</i>\n")
        if not piece:
            shown = f"<i>{'·' if word else '∅'}</i>"  # part of a character; nothing at all
        tokens.append(f'<span class="{kind}" style="--s:{strength:.2f}">{shown}</span>')
    folded = "" if len(record.prompt) > _OPEN_PROMPT else " open"
    return (
        f"<article><details{folded}><summary>{number + 1}. prompt</summary>"
        f"<pre>{html.escape(record.prompt, quote=False)}</pre></details>"
        f'<pre class="tokens" tabindex="0" data-row="{number}">{"".join(tokens)}</pre>'
        f"<footer>{len(tokens)} tokens, M's first choice changed at {int(other.sum())}"
        "</footer></article>"
    )


def _row(record: Record, table: dict[int, int]) -> list[dict[str, Any]]:
    """What the card shows of each token; texts are indices into the table's words."""
    trace = record.trace

    def word(i: int) -> int:
        return table.setdefault(int(i), len(table))

    return [
        {
            "w": word(record.ids[t]),
            "p": [_probability(x) for x in trace.log_probs[t]],
            "r": trace.ranks[t].tolist(),
            "e": [round(float(x), 2) for x in trace.entropies[t]],
            "k": round(float(trace.kl[t]), 3),
            "o": None if trace.overlap is None else round(float(trace.overlap[t]), 3),
            "a": [
                [
                    [word(i), _probability(x)]
                    for i, x in zip(ids, log_probs, strict=True)
                    if np.isfinite(x)
                ]
                for ids, log_probs in zip(trace.top_ids[t], trace.top_log_probs[t], strict=True)
            ],
        }
        for t in range(len(record.ids))
    ]


def _probability(log_prob: float) -> float:
    return float(f"{math.exp(log_prob):.3g}")


def _json(content: Any) -> str:
    """JSON that may stand in a script element: nothing in it closes or opens one."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --paper: #ffffff; --ink: #1d1f21; --soft: #63676c; --line: #dddfe2;
  --up: 38 115 196; --down: 217 104 32; --most: .55;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --paper: #1d2024; --ink: #e4e6e8; --soft: #9aa0a6; --line: #34383d;
    --up: 74 150 235; --down: 232 124 52; --most: .62;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 14rem; max-width: 60rem;
  background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0 1rem; max-width: 46rem; color: var(--soft); }
.figures { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; margin: 1rem 0; }
.figures div { max-width: 15rem; color: var(--soft); font-size: .85rem; line-height: 1.35; }
.figures b { display: block; color: var(--ink); font-size: 1.3rem; font-weight: 600; }
.legend {
  position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; align-items: center;
  gap: .3rem 1.4rem; padding: .6rem 0; margin-bottom: .6rem;
  background: var(--page); border-bottom: 1px solid var(--line); font-size: .85rem;
}
.scale { display: flex; align-items: center; gap: .5rem; }
.scale i {
  width: 11rem; height: .9rem; border-radius: 2px; border: 1px solid var(--line);
  background: linear-gradient(to right, rgb(var(--down) / var(--most)), transparent 50%,
    rgb(var(--up) / var(--most)));
}
article {
  background: var(--paper); border: 1px solid var(--line); border-radius: 6px;
  padding: .9rem 1.1rem; margin: 1rem 0;
}
summary, footer { color: var(--soft); font-size: .85rem; cursor: default; }
details summary { cursor: pointer; }
pre { margin: .35rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; }
details pre {
  color: var(--soft); border-left: 3px solid var(--line); padding-left: .8rem;
  max-height: 22rem; overflow: auto;
}
.tokens { margin-top: .7rem; line-height: 1.85; }
.tokens:focus { outline: none; }
.tokens:focus-visible { outline: 2px solid var(--line); outline-offset: 6px; }
.tokens span {
  padding: .12em 0; border-radius: 2px; cursor: default;
  background: rgb(var(--c) / calc(var(--s) * var(--most)));
}
.up { --c: var(--up); }
.down { --c: var(--down); }
.other { text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: .2em; }
.tokens i { font-style: normal; color: var(--soft); opacity: .7; user-select: none; }
.tokens .now { outline: 2px solid var(--ink); outline-offset: 1px; }
#card {
  position: absolute; z-index: 2; width: max-content; max-width: min(46rem, calc(100vw - 1.5rem));
  padding: .8rem 1rem; background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px; box-shadow: 0 4px 18px rgb(0 0 0 / .22); font-size: .85rem;
  pointer-events: none;
}
#card[hidden] { display: none; }
#card p { margin: 0 0 .6rem; color: var(--ink); font-size: .95rem; }
#card small { display: block; margin-top: .6rem; font-size: .8rem; color: var(--soft); }
.models { display: flex; flex-wrap: wrap; align-items: start; gap: .6rem 1.2rem; }
.models table { border-collapse: collapse; min-width: 9rem; }
.models caption { text-align: left; font-weight: 600; padding-bottom: .15rem; }
.models td { padding: .05rem .35rem; max-width: 9rem; white-space: pre; overflow: hidden;
  text-overflow: ellipsis; }
.models td:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.models tr {
  background: linear-gradient(rgb(128 128 128 / .22) 0 0) no-repeat 0 / var(--p) 100%;
}
.models .drawn { font-weight: 700; }
@media (max-width: 40rem) {
  #card { position: fixed; left: 0 !important; right: 0; bottom: 0; top: auto !important;
    width: auto; max-width: none; max-height: 50vh; overflow: auto; border-radius: 6px 6px 0 0; }
}
@media print { #card { display: none; } .legend { position: static; } }
</style>
</head>
<body>
<h1>{{title}}</h1>
<p>Each token is coloured by how much more likely the proxy was to say it than M alone, in the same
place of the same text. Point at a token, or select a text and use the arrow keys, to see what each
model would rather have said; a click keeps it in view.</p>
<div class="figures">{{figures}}</div>
<div class="legend">
<span class="scale">100 times less likely <i></i> 100 times more likely</span>
<span><span class="other">underlined</span>: M's first choice is another token</span>
</div>
{{completions}}
<div id="card" hidden></div>
<script type="application/json" id="data">{{data}}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const card = document.getElementById("card");
let kept = null, shown = null;

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}
function visible(word) {
  if (word === "") return "∅";
  const blanks = s => "␣".repeat(s.length);
  return word.replace(/\\n/g, "↵").replace(/\\t/g, "⇥").replace(/^ +| +$/g, blanks);
}
function percent(p) {
  const x = 100 * p;
  if (x > 99.9 && x < 100) return "> 99.9 %";
  if (x >= 10) return x.toFixed(x > 99 ? 1 : 0) + " %";
  if (x >= 0.1) return x.toFixed(1) + " %";
  return x < 0.0001 ? (x ? "< 0.0001 %" : "0 %") : x.toPrecision(1) + " %";
}
function choice(rank) {
  const ends = {one: "st", two: "nd", few: "rd", other: "th"};
  const end = ends[new Intl.PluralRules("en", {type: "ordinal"}).select(rank + 1)];
  return rank === 0 ? "its first choice" : "its " + (rank + 1) + end + " choice";
}
function times(ratio) {
  return ratio >= 1e4 ? "over 10 000" : ratio >= 10 ? ratio.toFixed(0) : ratio.toFixed(1);
}
function sentence(one) {
  const [now, before] = [one.p[0], one.p[data.labels.indexOf("M")]];
  const rank = one.r[data.labels.indexOf("M")];
  const from = percent(before) + " under M (" + choice(rank) + "), " + percent(now) +
    " under the proxy";
  if (now >= 1.05 * before) return "raised " + times(now / before) + " times: " + from;
  if (before >= 1.05 * now) return "lowered " + times(before / now) + " times: " + from;
  return "left as it was: " + from;
}
function models(one) {
  const box = element("div", undefined, "models");
  one.a.forEach((top, d) => {
    const table = element("table");
    table.append(element("caption", data.labels[d]));
    const add = (word, p, kind) => {
      const row = element("tr", undefined, kind);
      row.style.setProperty("--p", 100 * p + "%");
      row.append(element("td", visible(data.words[word])), element("td", percent(p)));
      table.append(row);
    };
    top.forEach(([word, p]) => add(word, p, word === one.w ? "drawn" : ""));
    if (!top.some(([word]) => word === one.w)) add(one.w, one.p[d], "drawn");
    box.append(table);
  });
  return box;
}
function show(span) {
  if (shown) shown.classList.remove("now");
  shown = span;
  card.hidden = !span;
  if (!span) return;
  span.classList.add("now");
  const place = [...span.parentNode.children].indexOf(span);
  const one = data.rows[span.parentNode.dataset.row][place];
  const line = element("p");
  line.append(element("b", visible(data.words[one.w])), " " + sentence(one));
  let more = "token " + (place + 1) + "; KL(proxy ‖ M) " + one.k + " nats; entropies " +
    one.e.map((e, d) => data.labels[d] + " " + e).join(", ") + " nats";
  if (one.o !== null) more += "; overlap of proxy and M+ " + percent(one.o);
  card.replaceChildren(line, models(one), element("small", more));
  const at = span.getClientRects()[0], edge = document.documentElement.clientWidth;
  card.style.left = Math.max(8, Math.min(at.left, edge - card.offsetWidth - 8)) + scrollX + "px";
  const below = at.bottom + 10;
  const above = at.top - card.offsetHeight - 10;
  card.style.top = (below + card.offsetHeight < innerHeight || above < 0 ? below : above) +
    scrollY + "px";
}
const token = event => event.target.closest(".tokens > span");
document.addEventListener("mouseover", event => { if (!kept) show(token(event)); });
document.addEventListener("click", event => {
  const span = token(event);
  kept = span === kept ? null : span;
  show(kept || span);
});
document.addEventListener("keydown", event => {
  const text = document.activeElement.closest(".tokens");
  if (event.key === "Escape") { kept = null; show(null); return; }
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step || !(kept || text)) return;
  const tokens = [...(kept ? kept.parentNode : text).children];
  const next = tokens[kept ? tokens.indexOf(kept) + step : 0];
  if (next) {
    kept = next;
    show(next);
    next.scrollIntoView({block: "nearest"});
  }
  event.preventDefault();
});
</script>
</body>
</html>
"""
