"""The report says what results.json says, in a page that needs no other."""

import copy
import html.parser
import json
import re
from typing import Any

import pytest

from decode.evaluation.plots import PALETTE
from decode.evaluation.report import make_report, write_report
from decode.evaluation.wording import LABELS, below_expert, model_names

VOID = {"meta", "br", "use"}
EXACT = {"base": 0.25, "expert": 0.5, "antiexpert": 0.0, "proxy": 0.4375, "tuned": 0.75}
HARM = {"base": 0.8125, "expert": 0.125, "antiexpert": 0.875, "proxy": 0.0625, "tuned": 0.0}
COUNT = 16


def estimate(value):
    return {
        "value": value,
        "standard_error": 0.1,
        "low": max(0.0, value - 0.11),
        "high": min(1.0, value + 0.12),
        "count": COUNT,
    }


def task(name, values, *, higher_is_better=True, sweep=()):
    """A task's part of results.json with one metric, "a_score"."""
    metric = {"name": "a_score", "higher_is_better": higher_is_better, "share": True}
    rows = {
        row: {
            "metrics": {"a_score": estimate(value)},
            "groups": {"kind": {"one_half": {"a_score": estimate(value / 2)}}},
            "unjudged": False,
            "completions": COUNT,
            "new_tokens": 100.0 + 10 * value,
            "cut": value / 10,
            "first_prompt": {"base": f"What is it?\n<{row}>"},
            "templates": {"base": "raw"},
        }
        for row, value in values.items()
    }
    differences = [
        {
            "metric": "a_score",
            "of": "proxy",
            "to": row,
            "value": values["proxy"] - values[row],
            "low": values["proxy"] - values[row] - 0.03,
            "high": values["proxy"] - values[row] + 0.04,
            "better": 7,
            "worse": 3,
        }
        for row in ("base", "expert", "tuned")
        if row in values
    ]
    apart = values["proxy"] - values["expert"]
    worse = apart < 0 if higher_is_better else apart > 0
    share = (values["proxy"] - values["base"]) / (values.get("tuned", 1.0) - values["base"])
    decoding = {"max_new_tokens": 200, "temperature": None, "stop": ["\n", "Q:"], "samples": 1}
    return {
        "name": name,
        "form": "published",
        "examples": COUNT,
        "available": 1319,
        "letters": False,
        "judge": "",
        "decoding": decoding,
        "published_decoding": decoding | {"max_new_tokens": 512},
        "metrics": [metric],
        "headline": "a_score",
        "rows": rows,
        "differences": differences,
        "gap_closed": {
            "a_score": {
                "to": "tuned" if "tuned" in values else "expert",
                "value": share,
                "low": share - 0.2,
                "high": share + 0.3,
                "gap_is_clear": True,
            }
        },
        "below_expert": differences[1] if worse else None,
        "sweep": {
            "examples": 8,
            "points": [
                {
                    "alpha": alpha,
                    "is_proxy_row": alpha == 1.0,
                    "metrics": {"a_score": estimate(0.3 + alpha / 7)},
                }
                for alpha in sweep
            ],
            "rows": {row: part["metrics"] for row, part in rows.items()},
        }
        if sweep
        else None,
        "texts": {
            "gained": [
                {
                    "id": "q7",
                    "prompt": "What is it?\nAnswer:",
                    "rows": {
                        row: {"text": f" <b>{row}</b> & ```so```", "extracted": "so", "value": 1.0}
                        for row in values
                    },
                }
            ]
        },
    }


def results_of(*tasks, unfinished=()):
    part = dict.fromkeys(("adapter", "quantize"), "")
    part |= {"path": "models/a-model", "dtype": "float32", "template": "raw"}
    rows = {row for one in tasks for row in one["rows"]} - {"proxy"}
    return {
        "models": {row: part | {"path": f"models/{row}-1b/"} for row in LABELS if row in rows},
        "proxy": {
            "plan": "shared",
            "alpha": 1.0,
            "alpha_schedule": [],
            "beta": 1.0,
            "base_filter": {"top_p": 1.0, "min_p": 0.1},
        },
        "run": {"seed": 0, "batch_size": 32, "mesh": {"data": 1, "tensor": 2}},
        "tasks": {one["name"]: one for one in tasks},
        "mean_gap_closed": {"value": 0.6789, "tasks": ["gsm", "toxigen"]}
        if len(tasks) > 1
        else None,
        "unfinished": list(unfinished),
    }


RUNS = [
    {
        "task": "gsm",
        "row": "proxy",
        "device": "1 x cpu (cpu)",
        "commit": "0123456789abcdef+changes",
        "versions": {"jax": "0.10.2"},
        "tokens_per_second": 12.34,
    }
]


class Page(html.parser.HTMLParser):
    """The tables, texts and tags of a page; its tags must match."""

    def __init__(self, text):
        super().__init__()
        self.open: list[Any] = []
        self.tables: list[Any] = []
        self.tags: list[Any] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open or "svg" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def page_of(tmp_path, results, runs=RUNS):
    # As it is read back from the file.
    tmp_path.mkdir(exist_ok=True)
    write_report(tmp_path, json.loads(json.dumps(results)), runs)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def markdown_tables(text):
    tables: list[Any] = []
    last = False
    for line in text.split("\n"):
        if line.startswith("| "):
            cells = [
                cell.strip().replace("**", "").replace("\\", "") for cell in line[2:-2].split(" | ")
            ]
            tables = tables if last else [*tables, []]
            if not set("".join(cells)) <= set("-: "):
                tables[-1].append(cells)
        last = line.startswith("| ")
    return tables


def test_figures_are_those_of_the_results(tmp_path):
    """Every figure of the tables, found again by its place, in HTML and in Markdown."""
    results = results_of(task("gsm", EXACT, sweep=(0.0, 0.5, 1.0)))
    page = page_of(tmp_path, results)
    rows, differences, gaps, sweep, groups, *_ = page.tables
    found = results["tasks"]["gsm"]
    assert rows[0] == ["row", "model", "a score", "new tokens", "cut off"]
    for line, (row, part) in zip(rows[1:], found["rows"].items(), strict=True):
        metric = part["metrics"]["a_score"]
        assert line == [
            LABELS[row],
            "alpha = 1" if row == "proxy" else f"{row}-1b",
            f"{100 * metric['value']:.1f} % "
            f"[{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]",
            f"{part['new_tokens']:.0f}",
            f"{100 * part['cut']:.0f} %",
        ]
    for line, one in zip(differences[1:], found["differences"], strict=True):
        signed = [f"{100 * one[name]:+.1f}".replace("-", "−") for name in ("value", "low", "high")]
        assert line == [
            "a score", LABELS[one["to"]], signed[0], f"{signed[1]} to {signed[2]}", "7", "3"
        ]  # fmt: skip
    gap = found["gap_closed"]["a_score"]
    low, value, high = (f"{100 * gap[name]:.1f} %" for name in ("low", "value", "high"))
    assert gaps[1] == ["a score", "M to the directly tuned M", value, f"{low} to {high}"]
    for line, point in zip(sweep[1:], found["sweep"]["points"], strict=True):
        value = point["metrics"]["a_score"]["value"]
        assert line[0] == f"{point['alpha']:g}"
        assert line[1].startswith(f"{100 * value:.1f} % [")
    assert groups == [
        ["kind", *LABELS.values()],
        ["one half", *(f"{50 * value:.1f} %" for value in EXACT.values())],
    ]
    written = markdown_tables((tmp_path / "report.md").read_text())
    assert written[:5] == [rows, differences, gaps, sweep, groups]
    assert len(written) == len(page.tables)
    # The verdict in words, and the plots' own labels.
    assert "better on 7 examples, worse on 3" in page.text
    svg = (tmp_path / "plots" / "gsm-rows.svg").read_text()
    for share in EXACT.values():
        assert f">{100 * share:.1f} %<" in svg
    assert ">M+<" in (tmp_path / "plots" / "gsm-sweep.svg").read_text()


@pytest.mark.parametrize("higher_is_better", [True, False])
@pytest.mark.parametrize("proxy", [0.25, 0.499, 0.5, 0.501, 0.75])
def test_warns_exactly_when_the_proxy_is_below_the_expert(tmp_path, proxy, higher_is_better):
    one = task("gsm", EXACT | {"proxy": proxy}, higher_is_better=higher_is_better)
    page = page_of(tmp_path, results_of(one))
    worse = proxy < 0.5 if higher_is_better else proxy > 0.5
    warnings = [tag for tag, attributes in page.tags if attributes.get("class") == "warning"]
    assert bool(warnings) == worse
    text = f"the proxy is worse than its expert alone, {100 * proxy:.1f} % against 50.0 % a score"
    assert (text in page.text) == worse
    assert ("**Warning.**" in (tmp_path / "report.md").read_text()) == worse
    assert bool(below_expert(one)) == worse
    if worse:
        undecided = abs(proxy - 0.5) < 0.03
        assert ("16 examples do not settle" in below_expert(one)) == undecided


def test_one_file_for_light_and_dark(tmp_path):
    """Nothing is fetched; every colour of a drawing is set by the page, for both."""
    page_of(tmp_path, results_of(task("gsm", EXACT, sweep=(0.0, 1.0))))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert "url(http" not in text
    assert "@import" not in text
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 2
    used = set()
    for drawing in drawings:
        assert re.findall(r"(?:fill|stroke): #", drawing) == []
        used |= set(re.findall(r"var\(--(\w+)\)", drawing))
    assert used == set(PALETTE) - {"antiexpert"} | {"antiexpert"}
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    for name, (on_light, on_dark) in PALETTE.items():
        assert f"--{name}: {on_light};" in light
        assert f"--{name}: {on_dark};" in dark
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    file = (tmp_path / "plots" / "gsm-rows.svg").read_text()
    assert "var(" not in file


def test_texts_are_no_markup(tmp_path):
    page = page_of(tmp_path, results_of(task("gsm", EXACT)))
    assert " <b>proxy</b> & ```so```" in page.text
    assert ("b", {}) not in page.tags
    written = (tmp_path / "report.md").read_text()
    assert "````text\n <b>proxy</b> & ```so```\n````" in written


def test_settings_that_were_changed_are_told(tmp_path):
    page = page_of(tmp_path, results_of(task("gsm", EXACT)))
    settings = next(table for table in page.tables if ["prompts", "published"] in table)
    assert ["examples", "16 of 1,319"] in settings
    assert ["max new tokens", "200 (published: 512)"] in settings
    assert ["temperature", "greedy"] in settings
    assert ["stop", r"'\n', 'Q:'"] in settings
    assert ["filter on M", "min_p 0.1"] in page.tables[-2]
    assert page.tables[-1][1] == [
        "proxy gsm", "1 x cpu (cpu)", "0123456789 and changes", "jax 0.10.2", "12.3"
    ]  # fmt: skip


def test_several_tasks_and_what_is_not_finished(tmp_path):
    chat = task("gsm", EXACT)
    toxic = task("toxigen", HARM, higher_is_better=False)
    page = page_of(tmp_path, results_of(chat, toxic, unfinished=["gsm/alpha_0.5"]))
    assert page.tables[0] == [
        ["task", "metric", *LABELS.values(), "gap closed"],
        ["gsm", "a score", "25.0 %", "50.0 %", "0.0 %", "43.8 %", "75.0 %", "37.5 %"],
        ["toxigen", "a score", "81.2 %", "12.5 %", "87.5 %", "6.2 %", "0.0 %", "92.3 %"],
    ]
    assert "Mean share of the gap closed: 67.9 % (gsm, toxigen)." in page.text
    assert "Not finished: gsm/alpha_0.5." in page.text
    # Of the two, one is below its expert.
    assert page.text.count("is worse than its expert alone") == 1


def test_gaps_to_the_expert_and_gaps_that_are_not_clear(tmp_path):
    alone = task("gsm", {row: value for row, value in EXACT.items() if row != "tuned"})
    text = page_of(tmp_path, results_of(alone)).text
    assert "Of the gap between M and the expert alone it closes" in text
    assert "No directly tuned M is among the rows" in text
    unclear = copy.deepcopy(task("gsm", EXACT))
    unclear["gap_closed"]["a_score"] |= {"low": None, "high": None, "gap_is_clear": False}
    text = page_of(tmp_path, results_of(unclear)).text
    assert "it closes 37.5 %. 16 examples do not settle whether there is a gap." in text
    unclear["gap_closed"]["a_score"]["value"] = None
    text = page_of(tmp_path, results_of(unclear)).text
    assert "a share that is undefined" in text


def test_a_metric_that_an_alpha_does_not_have(tmp_path):
    """No answer of multiple choice may name an option, and then there is no accuracy."""
    one = task("choices", EXACT, sweep=(0.0, 0.5, 1.0))
    del one["sweep"]["points"][0]["metrics"]["a_score"]
    page = page_of(tmp_path, results_of(one))
    sweep = next(table for table in page.tables if table[0] == ["alpha", "a score"])
    assert [line[1] == "" for line in sweep[1:]] == [True, False, False]
    assert "Best of these is alpha = 1." in page.text
    for point in one["sweep"]["points"][1:]:
        point["metrics"]["a_score"] = estimate(0.4)
    assert "Best of these is alpha = 1." in page_of(tmp_path, results_of(one)).text  # its own
    svg = (tmp_path / "plots" / "choices-sweep.svg").read_text()
    assert [f">{alpha}<" in svg for alpha in ("0", "0.5", "1")] == [False, True, True]
    del one["sweep"]["points"][1]["metrics"]["a_score"]
    page_of(tmp_path / "less", results_of(one))
    assert not (tmp_path / "less" / "plots" / "choices-sweep.svg").exists()


def test_names_of_models():
    """The end of a path; more of it where several models end alike."""
    paths = {"base": "owner/large-2b", "expert": "/a/small.gguf", "antiexpert": "/a/small.gguf"}
    models = {row: {"path": path, "adapter": ""} for row, path in paths.items()}
    models["expert"]["adapter"] = "runs/gsm"
    assert model_names(models) == {
        "base": "large-2b", "expert": "small + adapter", "antiexpert": "small"
    }  # fmt: skip
    paths = {"base": "runs/large/expert", "expert": "runs/tuned/expert/", "antiexpert": "expert"}
    models = {row: {"path": path, "adapter": ""} for row, path in paths.items()}
    assert model_names(models) == {
        "base": "large/expert", "expert": "tuned/expert", "antiexpert": "expert"
    }  # fmt: skip


def test_nothing_judged_and_nothing_finished(tmp_path):
    """No figures: the texts are shown, and the page says why."""
    one = task("alpaca_eval", EXACT)
    for row in one["rows"].values():
        row |= {"metrics": {}, "groups": {}, "unjudged": True}
    one |= {"headline": None, "differences": [], "gap_closed": {}, "below_expert": None}
    one["texts"] = {"first": one["texts"]["gained"]}
    for entry in one["texts"]["first"][0]["rows"].values():
        entry["value"] = None
    page = page_of(tmp_path, results_of(one))
    assert "Unjudged: a score can only be said by a judge" in page.text
    assert "The first examples" in page.text
    assert not any(tag == "svg" for tag, _ in page.tags)
    empty = task("gsm", EXACT)
    empty |= {"rows": {}, "differences": [], "gap_closed": {}, "headline": None, "texts": {}}
    empty["below_expert"] = None
    results = results_of(task("gsm", EXACT), unfinished=["gsm/base"])
    results["tasks"] = {"gsm": empty}
    page = page_of(tmp_path, results, runs=[])
    assert "Not finished: gsm/base. The same command goes on." in page.text


def test_the_same_results_make_the_same_files(tmp_path):
    results = results_of(task("gsm", EXACT, sweep=(0.0, 1.0)))
    first, second = tmp_path / "a", tmp_path / "b"
    for directory in (first, second):
        write_report(directory, results, RUNS)
    for file in ("report.html", "report.md", "plots/gsm-rows.svg", "plots/gsm-sweep.svg"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert make_report(results, RUNS) == make_report(results, RUNS)
