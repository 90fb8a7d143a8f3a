"""Evaluations from config to results.json, against decode.generate, NumPy and enumeration."""

import dataclasses
import gc
import itertools
import json
import math
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from decode import evaluate, job
from decode.evaluation import plan, run, scoring
from decode.job import Job
from decode.outputs import OutputFile
from decode.tasks import gsm as gsm_task
from proxy_jax.errors import InputError
from proxy_jax.jobs import files
from tests.decode import evaluations, jobs
from tests.decode.evaluations import ALPHAS, RIGHT, SWEPT, last_number
from tests.decode.tasks import rows as task_rows
from tests.trios import PROMPTS

ROWS = ("base", "expert", "antiexpert", "proxy", "tuned")
TASK_NAMES = ("gsm", "triviaqa")


@pytest.fixture(scope="module")
def expected(llama, tmp_path_factory):
    """By task and row, the texts of decode.generate; sweeps as "0.5"."""
    directory = tmp_path_factory.mktemp("generated")
    rows = (*ROWS, *(str(alpha) for alpha in ALPHAS if alpha != 1.0))
    return {
        task: {row: evaluations.generated(llama, directory, task, row) for row in rows}
        for task in TASK_NAMES
    }


@pytest.fixture(scope="module")
def data(expected, tmp_path_factory):
    """A directory with the tasks' files, whose answers are what some of the rows say."""
    directory = tmp_path_factory.mktemp("evaluation")
    for task in TASK_NAMES:
        right = [expected[task][row][i] for i, row in enumerate(RIGHT)]
        evaluations.write_data(directory, task, right)
    return directory


@pytest.fixture(scope="module")
def finished(llama, data):
    """The config of an evaluation that has run, and what was alive when models were loaded."""
    config = evaluations.config_of(llama, data, *TASK_NAMES)
    load = Job.load
    weights: list[Any] = []
    alive: list[Any] = []

    def watched(*args):
        gc.collect()
        alive.append([w for w in weights if w() is not None])
        loaded = load(*args)
        weights.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(loaded.params))
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "load", watched)
        evaluate.main(config)
    return config, alive


def correct(task, texts):
    """1 or 0 of each text, by the rule of the task and the answers that were written."""
    golds = expected_golds[task]
    if task == "gsm":
        return [float(last_number(text) == gold) for text, gold in zip(texts, golds, strict=False)]
    return [float(t.strip().lower() == g.lower()) for t, g in zip(texts, golds, strict=False)]


expected_golds: dict[str, list[str]] = {}


@pytest.fixture(scope="module", autouse=True)
def golds(data):
    for task in TASK_NAMES:
        rows = [json.loads(line) for line in (data / f"{task}.jsonl").read_text().splitlines()]
        expected_golds[task] = [
            row["answer"].split("#### ")[1] if task == "gsm" else row["answers"][0].strip()
            for row in rows
        ]


def test_every_row_is_what_generate_makes(finished, expected):
    config, _ = finished
    for task in TASK_NAMES:
        for row in ROWS:
            texts = [one["text"] for one in evaluations.lines(config, f"{task}/{row}")]
            assert texts == expected[task][row], (task, row)
        assert len({tuple(expected[task][row]) for row in ROWS}) == len(ROWS)


def test_sweep_is_separate_runs_at_each_alpha(finished, expected):
    """One batched run; its own alpha comes from the proxy's row, and is not decoded twice."""
    config, _ = finished
    for task in TASK_NAMES:
        for alpha in (0.0, 0.5, 2.0):
            texts = [one["text"] for one in evaluations.lines(config, f"{task}/alpha_{alpha:g}")]
            assert texts == expected[task][str(alpha)][:SWEPT]
        assert not (Path(config.output_dir) / task / "alpha_1").exists()
        sweep = evaluations.results(config)["tasks"][task]["sweep"]
        assert [p["alpha"] for p in sweep["points"]] == list(ALPHAS)
        assert [p["is_proxy_row"] for p in sweep["points"]] == [False, False, True, False]
        for point in sweep["points"]:
            row = "proxy" if point["alpha"] == 1.0 else str(point["alpha"])
            right = correct(task, expected[task][row][:SWEPT])
            assert point["metrics"]["exact_match"]["value"] == pytest.approx(np.mean(right))
            assert point["metrics"]["exact_match"]["count"] == SWEPT
        for row in ("base", "expert", "tuned"):
            right = correct(task, expected[task][row][:SWEPT])
            assert sweep["rows"][row]["exact_match"]["value"] == pytest.approx(np.mean(right))


def test_models_are_loaded_once_a_row_and_freed(finished):
    _, alive = finished
    assert alive == [[]] * len(ROWS)  # two tasks and a sweep, five loads


def test_figures(finished, expected):
    """Means, differences, counts and the gap, from the texts alone."""
    config, _ = finished
    for task in TASK_NAMES:
        found = evaluations.results(config)["tasks"][task]
        right = {row: np.asarray(correct(task, expected[task][row])) for row in ROWS}
        assert len({mean.mean() for mean in right.values()}) > 2  # the check would miss little
        for row in ROWS:
            metric = found["rows"][row]["metrics"]["exact_match"]
            assert metric["value"] == pytest.approx(right[row].mean())
            assert metric["count"] == len(PROMPTS)
            predictions = evaluations.lines(config, f"{task}/{row}")
            assert [one["values"]["exact_match"] for one in predictions] == right[row].tolist()
        for difference in found["differences"]:
            if difference["metric"] == "exact_match":
                apart = right["proxy"] - right[difference["to"]]
                assert difference["value"] == pytest.approx(apart.mean())
                assert difference["better"] == (apart > 0).sum()
                assert difference["worse"] == (apart < 0).sum()
                assert difference["low"] <= apart.mean() <= difference["high"]
        gap = found["gap_closed"]["exact_match"]
        low, high = right["base"].mean(), right["tuned"].mean()
        assert gap["to"] == "tuned"
        assert gap["value"] == pytest.approx((right["proxy"].mean() - low) / (high - low))
        below = right["proxy"].mean() < right["expert"].mean()
        assert (found["below_expert"] is not None) == below
    gaps = [t["gap_closed"]["exact_match"]["value"]
            for t in evaluations.results(config)["tasks"].values()]  # fmt: skip
    assert evaluations.results(config)["mean_gap_closed"]["value"] == pytest.approx(np.mean(gaps))
    assert evaluations.results(config)["unfinished"] == []


def test_prompts_that_are_shown(finished):
    config, _ = finished
    rows = evaluations.results(config)["tasks"]["gsm"]["rows"]
    asked = f"Answer the following question.\n\nQuestion: {PROMPTS[0]}"
    chat = f"[INST] {asked} [/INST] Answer:"
    assert rows["base"]["first_prompt"] == {"base": f"{asked}\nAnswer:"}
    assert rows["expert"]["first_prompt"] == {"base": chat}
    assert rows["tuned"]["first_prompt"] == {"base": f"[T] {asked} Answer:"}
    assert rows["proxy"]["first_prompt"] == {
        "base": f"{asked}\nAnswer:",
        "expert": chat,
        "antiexpert": f"{asked}\nAnswer:",
    }


@pytest.fixture
def loads_nothing(monkeypatch):
    """Nothing is opened, loaded or decoded from here on."""
    for owner, name in ((job, "open_job"), (Job, "load"), (run, "Generator"), (run, "Scorer")):
        monkeypatch.setattr(owner, name, None)


def test_second_start_only_renders(finished, loads_nothing, monkeypatch):
    config, _ = finished
    directory = Path(config.output_dir)
    before = {name: (directory / name).read_bytes() for name in ("results.json", "report.html")}
    (directory / "report.html").unlink()
    monkeypatch.setattr(scoring, "_score", None)
    evaluate.main(config)
    assert {name: (directory / name).read_bytes() for name in before} == before


def test_another_metric_is_scored_but_not_decoded(finished, loads_nothing, data, expected):
    """Other answers in the data: the prompts are the same, so are the texts."""
    config, _ = finished
    before = evaluations.results(config)
    original = (data / "gsm.jsonl").read_text()
    try:
        evaluations.write_data(data, "gsm", expected["gsm"]["expert"])
        evaluate.main(config)
        found = evaluations.results(config)["tasks"]
        numbers = [last_number(text) for text in expected["gsm"]["expert"]]
        hits = [last_number(t) == n for t, n in zip(expected["gsm"]["proxy"], numbers, strict=True)]
        rows = found["gsm"]["rows"]
        sure = np.mean([number != "none" for number in numbers])
        assert rows["expert"]["metrics"]["exact_match"]["value"] == pytest.approx(sure)
        assert rows["proxy"]["metrics"]["exact_match"]["value"] == pytest.approx(np.mean(hits))
        assert found["gsm"]["below_expert"]["to"] == "expert"
        assert found["triviaqa"] == before["tasks"]["triviaqa"]
        page = (Path(config.output_dir) / "report.md").read_text()
        assert "gsm: the proxy is worse than its expert alone" in page
    finally:
        (data / "gsm.jsonl").write_text(original)
    evaluate.main(config)
    assert evaluations.results(config) == before


def test_interrupted_again_and_again(finished, llama, data, monkeypatch):
    """Each start ends at its 25th write, of whatever file; the end is that of one start."""
    config = evaluations.config_of(llama, data, *TASK_NAMES, output_dir=str(data / "again"))
    append, replace = OutputFile.append, files.replace
    calls = []

    def stopping(function):
        def write(*args):
            calls.append(args)
            if len(calls) == 25:
                raise KeyboardInterrupt
            return function(*args)

        return write

    monkeypatch.setattr(OutputFile, "append", stopping(append))
    monkeypatch.setattr(files, "replace", stopping(replace))
    starts = 0
    while True:
        starts, calls[:] = starts + 1, []
        try:
            evaluate.main(config)
            break
        except KeyboardInterrupt:
            with (data / "again" / "gsm" / "base" / "outputs.jsonl").open("a") as file:
                file.write('{"row": 7, "text": "half')
    assert starts > 4
    whole = Path(finished[0].output_dir)
    again = (data / "again" / "results.json").read_bytes()
    assert again == (whole / "results.json").read_bytes()
    for task, row in itertools.product(TASK_NAMES, ("proxy", "alpha_0.5")):
        one = f"{task}/{row}/predictions.jsonl"
        assert (data / "again" / one).read_bytes() == (whole / one).read_bytes()


def test_more_examples_and_alphas_later(finished, llama, data, monkeypatch):
    config = evaluations.config_of(
        llama, data, "gsm", tasks__gsm__limit=3, sweep__alphas=(0.5,), output_dir=str(data / "more")
    )
    evaluate.main(config)
    found = evaluations.results(config)["tasks"]["gsm"]
    assert (found["examples"], found["available"], found["sweep"]["examples"]) == (3, 8, 3)
    written = []
    append = OutputFile.append
    monkeypatch.setattr(
        OutputFile,
        "append",
        lambda self, some: [written.extend(some), append(self, some)],  # type: ignore[func-returns-value]
    )
    config.tasks.gsm.limit, config.sweep.alphas = 0, ALPHAS
    evaluate.main(config)
    assert len(written) == 5 * (8 - 3) + (SWEPT - 3) + 2 * SWEPT
    whole = evaluations.results(finished[0])["tasks"]["gsm"]
    assert evaluations.results(config)["tasks"]["gsm"] == whole


def test_another_evaluation_in_the_directory(finished, llama, data):
    """Its settings are refused with the first that differs, before any model is opened."""
    before = evaluations.results(finished[0])
    config = evaluations.config_of(llama, data, *TASK_NAMES, tasks__gsm__max_new_tokens=5)
    message = r"gsm/base: made by another job \(decoding.max_new_tokens: 24, now 5\)"
    with pytest.raises(InputError, match=message):
        evaluate.main(config)
    other = evaluations.config_of(llama, data, "triviaqa", alpha=0.5)
    with pytest.raises(InputError, match=r"triviaqa/proxy: made by another job \(alpha: 1.0"):
        evaluate.main(other)
    assert evaluations.results(finished[0]) == before


def test_without_tuned_the_expert_stands_in(finished, loads_nothing, llama, data):
    config = evaluations.config_of(llama, data, *TASK_NAMES, tuned__path="")
    before = evaluations.results(finished[0])
    evaluate.main(config)
    found = evaluations.results(config)
    assert found["mean_gap_closed"] is None
    for task in found["tasks"].values():
        values = {
            row: part["metrics"]["exact_match"]["value"] for row, part in task["rows"].items()
        }
        assert "tuned" not in values
        gap = task["gap_closed"]["exact_match"]
        assert gap["to"] == "expert"
        width = values["expert"] - values["base"]
        share = (values["proxy"] - values["base"]) / width if width else None
        assert gap["value"] == (share if share is None else pytest.approx(share))
    page = (Path(config.output_dir) / "report.md").read_text()
    assert "No directly tuned M is among the rows; the expert alone stands in its place." in page
    evaluate.main(finished[0])
    assert evaluations.results(finished[0]) == before


def test_letters(llama, tmp_path):
    """Sums of log-probabilities from torch, for each letter and alpha; the highest wins."""
    examples = task_rows.REALTIMEQA
    task_rows.write(tmp_path / "realtimeqa.jsonl", examples)
    config = evaluations.config_of(
        llama, tmp_path, "realtimeqa", tasks__realtimeqa__letters=True, tuned__path="",
        sweep__alphas=(0.5, 1.0), sweep__limit=1,
    )  # fmt: skip
    config.expert.template = "raw"
    evaluate.main(config)

    def log_probs(combine, roles, index):
        options = [o for o in examples[index]["choices"] if o]
        shown = [f"{'ABCD'[i]}. {option}" for i, option in enumerate(options)]
        question = examples[index]["question"].strip()
        text = "\n".join([question, *shown]) + "\n\nThe answer is:"
        encode = llama.tokenizers["base"].encode
        scores = {}
        for letter in "ABCD"[: len(options)]:
            context, total = encode(text), 0.0
            for token in encode(f"{text} {letter}")[len(context) :]:
                given = {role: llama.fitted(role, context).astype(np.float64) for role in roles}
                logits = np.where(llama.valid, combine(given), -np.inf)
                total += logits[token] - np.logaddexp.reduce(logits)
                context.append(token)
            scores[letter] = total
        return scores

    for place, alpha in (("proxy", 1.0), ("alpha_0.5", 0.5), ("base", None), ("expert", None)):
        roles = ("base", "expert", "antiexpert") if alpha is not None else (place,)
        shifted = llama.shifted(alpha or 0.0)
        combine = (lambda s, f=shifted: f(s, 0)) if alpha is not None else (lambda s, r=place: s[r])
        outputs = evaluations.lines(config, f"realtimeqa/{place}", "outputs.jsonl")
        assert len(outputs) == (1 if place == "alpha_0.5" else 2)
        for index, output in enumerate(outputs):
            wanted = log_probs(combine, roles, index)
            assert output["letters"] == pytest.approx(wanted, abs=2e-4)
        predicted = evaluations.lines(config, f"realtimeqa/{place}")
        answer = max(wanted, key=wanted.__getitem__)
        assert predicted[-1]["extracted"] == answer
        right = "ABCD"[int(np.ravel(examples[len(outputs) - 1]["answer"])[0])]
        assert predicted[-1]["values"]["accuracy"] == float(answer == right)


def test_judges_are_asked_once(llama, tmp_path, monkeypatch):
    """First without a judge; then with one, which fails at first; then again."""
    task_rows.write(tmp_path / "alpaca_eval.jsonl", task_rows.ALPACA)
    config = evaluations.config_of(
        llama, tmp_path, "alpaca_eval", tuned__path="", antiexpert__path="", sweep__alphas=(),
        tasks__alpaca_eval__max_new_tokens=8,
    )  # fmt: skip
    config.expert.template = "raw"
    evaluate.main(config)
    found = evaluations.results(config)["tasks"]["alpaca_eval"]
    assert found["headline"] is None
    assert all(row["unjudged"] for row in found["rows"].values())
    assert found["texts"]["first"][0]["rows"]["proxy"]["text"]
    assert "Unjudged: win rate" in (Path(config.output_dir) / "report.md").read_text()

    asked: list[str] = []

    def prefers_long(examples, texts):
        asked.extend(texts)
        if len(asked) > 2 * 2:
            raise InputError("out of money")
        return [{"preference": float(len(text) > 12)} for text in texts]

    judge = types.ModuleType("a_judge")
    judge.prefers_long = prefers_long  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_judge", judge)
    monkeypatch.setattr(Job, "load", None)
    config.tasks.alpaca_eval.judge = "a_judge:prefers_long"
    with pytest.raises(InputError, match="out of money"):
        evaluate.main(config)
    del asked[:]  # two of the three rows are judged
    evaluate.main(config)
    assert len(asked) == 2
    found = evaluations.results(config)["tasks"]["alpaca_eval"]
    for row in ("base", "expert", "proxy"):
        texts = [one["text"] for one in evaluations.lines(config, f"alpaca_eval/{row}")]
        rate = np.mean([len(text) > 12 for text in texts])
        assert found["rows"][row]["metrics"]["win_rate"]["value"] == pytest.approx(rate)
        assert not found["rows"][row]["unjudged"]


def test_a_task_that_samples(llama, tmp_path):
    """HumanEval with two samples; banned and stop strings and sampling are the task's."""
    task_rows.write(tmp_path / "humaneval.jsonl", task_rows.HUMANEVAL)
    config = evaluations.config_of(
        llama, tmp_path, "humaneval", tuned__path="", antiexpert__path="", sweep__alphas=(0.5,),
        sweep__limit=0, tasks__humaneval__max_new_tokens=12, tasks__humaneval__samples=3,
        base__path=str(llama.paths["expert"]), batch_size=2, seed=5,
    )  # fmt: skip
    config.expert.template = "raw"
    evaluate.main(config)
    jobs.write_prompts(tmp_path / "prompts.jsonl", task_rows.HUMANEVAL)
    for row in ("expert", "proxy"):
        alone = jobs.config_of(
            llama, tmp_path, method=row, max_new_tokens=12, samples=3, batch_size=2, seed=5,
            sampling__temperature=0.8, sampling__top_p=0.95, banned_tokens=("pass", "..."),
            stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"), antiexpert__path="",
            base__path=str(llama.paths["expert"]), expert__template="raw",
            output_dir=str(tmp_path / row),
        )  # fmt: skip
        evaluations.generate.main(alone)
        texts = [one["text"] for one in jobs.outputs(alone)]
        assert len(set(texts)) == 3
        assert [one["text"] for one in evaluations.lines(config, f"humaneval/{row}")] == texts
    swept = [one["text"] for one in evaluations.lines(config, "humaneval/alpha_0.5")]
    assert len(set(swept)) == 3
    found = evaluations.results(config)["tasks"]["humaneval"]
    assert found["headline"] == "pass@1"  # three samples say nothing of pass@10
    assert found["rows"]["proxy"]["completions"] == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_dir": ""}, "output_dir is empty"),
        ({"expert__path": ""}, "expert.path is empty: an evaluation compares"),
        ({"tasks__gsm__limit": -1}, "tasks.gsm.limit must be at least 0, not -1"),
        ({"tasks__gsm__form": "old"}, "form 'old' is unknown"),
        ({"tasks__gsm__letters": True}, "tasks.gsm.letters: gsm has no choices"),
        ({"tasks__gsm__judge": "a:b"}, "tasks.gsm.judge: gsm needs no judge"),
        ({"tasks__gsm__data": "/nowhere.jsonl"}, "/nowhere.jsonl: No such file"),
        ({"sweep__alphas": (1.0, 1.0)}, "sweep.alphas: one is there twice"),
        ({"sweep__alphas": ("1",)}, "sweep.alphas: '1' is not a number"),
        ({"sweep__alphas": (math.inf,)}, "sweep.alphas: coefficient must be finite"),
        ({"sweep__limit": -2}, "sweep.limit must be at least 0"),
        ({"base__path": "/nowhere/at/all"}, "/nowhere/at/all: no such file or directory"),
        ({"mesh__data": 3}, r"batch_size \(4\) does not divide by the 3 devices"),
        ({"tasks__gsm__max_new_tokens": 480}, r"gsm 0: \d+ tokens for base and 480 new ones"),
        ({"tuned__template": "{text}"}, "template '{text}' is not raw"),
    ],
    ids=str,
)
def test_bad_configs(llama, data, tmp_path, fields, message, monkeypatch):
    monkeypatch.setattr(Job, "load", None)  # nothing is loaded first
    given = {"output_dir": str(tmp_path / "out")} | fields
    with pytest.raises(InputError, match=message) as error:
        evaluate.main(evaluations.config_of(llama, data, "gsm", **given))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_metric_code_is_part_of_what_scores_depend_on(finished, monkeypatch, tmp_path):
    """A changed file among the tasks' makes other predictions necessary."""
    evaluation_plan = plan.plan_evaluation(finished[0])
    one = evaluation_plan.jobs[0]
    before = scoring._made_from(one)
    assert scoring._made_from(one) == before
    source = Path(gsm_task.__file__)
    digest = scoring.manifest.digest
    monkeypatch.setattr(
        scoring.manifest, "digest", lambda path: "other" if path == source else digest(path)
    )
    assert scoring._made_from(one) != before


def test_task_runs_keep_the_published_settings(llama, data):
    config = evaluations.config_of(llama, data, "gsm")
    (found,) = plan.plan_evaluation(config).runs
    assert found.published["max_new_tokens"] == 512
    assert dataclasses.asdict(found.task.decoding) == {**found.published, "max_new_tokens": 24}


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "manifest.json: runs is empty"),
        (3, "manifest.json: not a manifest of a job"),
        ([3], "manifest.json: runs must hold dict values, not 3"),
        ([{}], "manifest.json: runs: device is missing"),
        ([{"device": "cpu"}], "manifest.json: runs: versions: proxy_jax is missing"),
        ([{"device": "cpu", "versions": 3}], "manifest.json: runs: versions must be an object"),
    ],
)
def test_damaged_manifests(tmp_path, runs, message):
    """Of a finished row, whose device the report tells."""
    (tmp_path / "manifest.json").write_text(json.dumps({"config": {}, "inputs": {}, "runs": runs}))
    task = types.SimpleNamespace(task=types.SimpleNamespace(name="gsm"))
    done = types.SimpleNamespace(directory=tmp_path, number=0, run=task, row="base")
    evaluation: Any = types.SimpleNamespace(jobs=[done])
    with pytest.raises(InputError, match=message):
        evaluate._runs(evaluation, [])


def test_no_nan_in_results(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "make_results", lambda *_: {"alpha": math.nan})
    evaluation: Any = types.SimpleNamespace(directory=tmp_path)
    config: Any = None
    with pytest.raises(InputError, match=r"results.json: cannot be written \(.*not JSON compliant"):
        evaluate._publish(config, evaluation, [])
    assert not list(tmp_path.iterdir())
