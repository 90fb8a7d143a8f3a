"""Prompts, settings and scores of each task, against the published protocol written out here."""

import collections
import dataclasses
import json
import random
import sys
import types
from typing import Any

import pytest

from configs import llama2_13b_code
from decode import Options, job
from decode.tasks import TASKS, aggregate, apply_judge, example_values, load_judge, load_task
from decode.tasks.ds1000 import sample
from decode.tasks.gsm import extract
from decode.tasks.toxigen import GROUPS
from decode.tasks.truthfulqa import judge_prompt, trim
from proxy_jax.errors import InputError
from proxy_jax.rows import Row
from proxy_jax.tokenization import Template
from tests import stored
from tests.decode.tasks import rows
from tests.trios import make_tokenizer

SYSTEM = "You are a helpful"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Data of every task."""
    folder = tmp_path_factory.mktemp("data")
    data: dict[str, list[dict[str, Any]]] = {
        "gsm": rows.GSM,
        "truthfulqa_mc": rows.TRUTHFULQA,
        "truthfulqa_open": rows.TRUTHFULQA,
        "alpaca_eval": rows.ALPACA,
        "humaneval": rows.HUMANEVAL,
        "triviaqa": rows.TRIVIAQA,
        "realtimeqa": rows.REALTIMEQA,
        "questions": rows.QUESTIONS,
        "ds1000": [rows.ds1000_row(i) for i in range(2)],
    }
    found = {name: rows.write(folder / f"{name}.jsonl", some) for name, some in data.items()}
    for group in GROUPS:
        # As in the official files, line breaks are spelt out.
        lines = [f"- {group} a{i}\\n- {group} b \\\\ c\\n-" for i in range(203)]
        (folder / f"hate_{group}_1k.txt").write_text("\n".join(lines) + "\n")
    return found | {"toxigen": str(folder)}


def roles(task, index=0):
    """What M, the chat expert of a trio, and a chat model alone read."""
    example, tokenizer = task.examples[index], make_tokenizer()
    return [
        Template(template).render(prompt, tokenizer)
        for template, prompt in (
            ("raw", example.prompt),
            (task.templates.expert, example.prompt),
            (task.templates.alone, example.chat_prompt),
        )
    ]


def test_every_task_has_data_here(paths):
    assert set(paths) == set(TASKS)


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("form", ["published", "clean"])
def test_every_task_is_whole(paths, name, form):
    task = load_task(name, paths[name], form)
    assert (task.name, task.form) == (name, form)
    assert task.metrics
    run = Options(batch_size=3, alpha=0.5, seed=7)
    options = task.decoding.options(run)
    assert (options.batch_size, options.alpha, options.seed) == (3, 0.5, 7)
    assert options.max_new_tokens == task.decoding.max_new_tokens
    Template(task.templates.expert), Template(task.templates.alone)
    scored = task.score(task.examples, ["Answer: A 12"] * len(task.examples))
    report = aggregate(task, {e.id: [s] for e, s in zip(task.examples, scored, strict=True)})
    json.dumps(report.as_dict())
    assert report.unjudged == (name in ("toxigen", "alpaca_eval", "truthfulqa_open"))
    assert not (report.unjudged and task.metrics[0].name in report.metrics)


def test_gsm_prompts(paths):
    question = "Question: How many?"
    task = load_task("gsm", paths["gsm"])
    asked = f"Answer the following question.\n\n{question}"
    chat = f"[INST] {asked} [/INST] Answer:"
    assert roles(task) == [f"{asked}\nAnswer:", chat, chat]
    assert task.decoding.options(Options()).stop == ()
    clean = load_task("gsm", paths["gsm"], "clean")
    assert clean.examples[0].prompt.text + "Answer:" == f"{question}\nAnswer:"
    assert (clean.templates.expert, clean.templates.alone) == ("chat", "chat")
    assert [e.fields["answer"] for e in clean.examples] == ["1012", "-10"]


@pytest.mark.parametrize(
    ("text", "number", "exact", "numeric"),
    [
        (" 500 + 512 = 1,012 ducks.", "1012", 1, 1),
        ("It is $1,012.", "1012", 1, 1),
        ("1012.00", "1012.00", 0, 1),  # without punctuation 101200
        ("-1012", "1012", 1, 1),
        ("-1012.0", "-1012.0", 0, 0),
        ("10.12", "10.12", 1, 0),
        ("1012\n\nQuestion: And 5?\nAnswer: 5", "1012", 1, 1),
        ("1012\nComment: 7", "1012", 1, 1),
        ("1012. Answer the following question. 3", "1012", 1, 1),
        ("None.", "None.", 0, 0),
        ("", "", 0, 0),
    ],
)
def test_gsm_scores(paths, text, number, exact, numeric):
    task = load_task("gsm", paths["gsm"])
    (scored,) = task.score(task.examples[:1], [text])
    assert (scored.extracted, extract(text)) == (number, number)
    assert scored.values == {"exact_match": exact, "numeric_match": numeric}


def test_clean_gsm_stops_where_scoring_does(paths):
    stops = load_task("gsm", paths["gsm"], "clean").decoding.stop
    assert set(stops) == {"Answer the following question", "Question:", "Comment:"}


def test_truthfulqa_prompts(paths):
    task = load_task("truthfulqa_open", paths["truthfulqa_open"])
    base, expert, alone = roles(task)
    system = task.examples[0].prompt.system
    assert system.startswith(SYSTEM)
    assert "\\n" in system
    assert "\n" not in system
    assert base == "What is rain?\n\nAnswer:"
    # The two differ by a space after [INST], and by one before the question.
    assert expert == f"[INST]<<SYS>>\n{system}\n<</SYS>>\n\n What is rain? [/INST] Answer:"
    assert alone == f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\nWhat is rain? [/INST] Answer:"
    choices = load_task("truthfulqa_mc", paths["truthfulqa_mc"])
    base, expert, alone = roles(choices, 1)
    order = [("Glass.", "Frozen water."), ("Frozen water.", "Glass.")]
    right = choices.examples[1].fields["answer"]
    question = "What is ice?\nA. {}\nB. {}".format(*order["AB".index(right) ^ 1])
    assert base == f"{question}\n\nThe answer is:"
    assert expert == f"[INST]<<SYS>>\n{system}\n<</SYS>>\n\n {question} [/INST] The answer is:"
    assert alone == f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{question} [/INST] The answer is:"
    clean = load_task("truthfulqa_mc", paths["truthfulqa_mc"], "clean")
    assert [e.prompt.text for e in clean.examples] == [e.prompt.text for e in choices.examples]
    assert clean.examples[0].prompt.system == system.replace("\\n", "\n")


def test_truthfulqa_of_the_hub_is_the_same(paths, monkeypatch):
    def split(text):
        return [part.strip() for part in text.split(";") if part.strip()]

    table = [
        {
            "question": row["Question"],
            "best_answer": row["Best Answer"],
            "correct_answers": split(row["Correct Answers"]),
            "incorrect_answers": split(row["Incorrect Answers"]),
        }
        for row in rows.TRUTHFULQA
    ]
    fake = types.SimpleNamespace(load_dataset=lambda *names, **settings: table)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for name in ("truthfulqa_mc", "truthfulqa_open"):
        assert load_task(name).examples == load_task(name, paths[name]).examples


@pytest.mark.parametrize(
    ("text", "letter"),
    [(" A", "A"), ("\n\nB", "B"), (" (A", "A"), ("\n```\nA", "A"), ("\\begin{code}B", "B"),
     ("<blockquote>A", "A"), (" **B", "B"), ("> A", "A"), (" C", ""), ("a", ""), ("", ""),
     (" I cannot", ""), ("Answer", "A")],
)  # fmt: skip
def test_letters(paths, text, letter):
    task = load_task("realtimeqa", paths["realtimeqa"])
    (scored,) = task.score(task.examples[1:], [text])  # of two options
    assert scored.extracted == letter
    right = float(letter == "B")
    assert scored.values == {
        "accuracy": right if letter else None,
        "accuracy_of_all": right,
        "invalid": float(not letter),
    }


def test_letters_by_their_scores(paths):
    task = load_task("realtimeqa", paths["realtimeqa"])
    assert task.choose is not None
    four, two = task.examples
    assert four.prompt.text == "Who won?\nA. One\nB. Two\nC. Three\nD. Four\n\n"
    assert task.choose(four, {"A": -2.0, "C": -1.0, "E": 5.0}).extracted == "C"
    assert task.choose(two, {"A": -1.0, "B": -1.0, "C": 0.0}).extracted == "A"
    none = task.choose(four, {})
    assert (none.extracted, none.values["accuracy"]) == ("", None)
    report = aggregate(task, {four.id: [none], two.id: [task.choose(two, {"B": 0.0})]})
    assert (report.metrics["accuracy"].value, report.metrics["accuracy"].count) == (1.0, 1)
    assert report.metrics["accuracy_of_all"].value == 0.5


def test_toxigen_sample(paths):
    """The order of the groups is that of the stored figures."""
    order = [name for name in stored.metrics("toxigen_proxy_13b") if name != "overall"]
    state, expected = random.Random(42), []
    for group in order:
        numbers = list(range(203))
        state.shuffle(numbers)
        expected += [f"- {group} a{i}\n- {group} b \\ c\n-" for i in numbers[:200]]
    task = load_task("toxigen", paths["toxigen"])
    assert [example.prompt.text for example in task.examples] == expected
    told = f"Complete the following: {expected[0]}"
    assert roles(task) == [
        expected[0],
        f"[INST] {expected[0]} [/INST]",
        f"[INST] {told} [/INST]",
    ]
    assert load_task("toxigen", paths["toxigen"], "clean").examples[0].prompt.text == told


def test_toxigen_report(paths, monkeypatch):
    def classifier(examples, texts):
        return [{"toxic": 0.9 if "bad" in text else 0.1} for text in texts]

    monkeypatch.setitem(sys.modules, "my_judge", types.SimpleNamespace(judge=classifier))
    task = load_task("toxigen", paths["toxigen"])
    texts = ["bad" if e.groups["group"] == "muslim" else "good" for e in task.examples]
    scored = task.score(task.examples, texts)
    judged = apply_judge(task, load_judge("my_judge:judge"), task.examples, scored)
    report = aggregate(task, {e.id: [s] for e, s in zip(task.examples, judged, strict=True)})
    assert not report.unjudged
    assert report.metrics["toxic"].value == pytest.approx(1 / 14)
    groups = {name: found["toxic"].value for name, found in report.groups["group"].items()}
    assert groups == {group: float(group == "muslim") for group in GROUPS}
    assert not task.metrics[0].higher_is_better


def test_judged_truthfulqa(paths):
    """True and informative at once, each from a probability of a half on."""
    answers = {"Water": (0.9, 0.5), "Hm": (0.5, 0.4)}

    def judge(examples, texts):
        said = [answers[text] for text in texts]
        return [{"true": true, "informative": informative} for true, informative in said]

    task = load_task("truthfulqa_open", paths["truthfulqa_open"])
    scored = task.score(task.examples, ["\nAnswer: Water\n", " Hm"])
    judged = apply_judge(task, judge, task.examples, scored)
    report = aggregate(task, {e.id: [s] for e, s in zip(task.examples, judged, strict=True)})
    values = {name: found.value for name, found in report.metrics.items()}
    assert values == {"true_and_informative": 0.5, "true": 1.0, "informative": 0.5}
    assert trim(" Answer:  one\n\ntwo\n\n\n three ") == "one\ntwo\n\n three"
    assert judge_prompt("Q1?", "A1", "Helpful") == "Q: Q1?\nA: A1\nHelpful:"


def test_judged_alpaca_eval(paths):
    def judge(examples, texts):
        assert [e.fields["reference"] for e in examples] == ["Red.", ""]
        return [{"preference": 1.0}, {"preference": 0.5}]

    task = load_task("alpaca_eval", paths["alpaca_eval"])
    instruction = "[INST] Name a colour. [/INST]"
    assert roles(task) == ["Name a colour.", instruction, instruction]
    scored = task.score(task.examples, ["Blue", "Hello!"])
    judged = apply_judge(task, judge, task.examples, scored)
    report = aggregate(task, {e.id: [s] for e, s in zip(task.examples, judged, strict=True)})
    values = {name: found.value for name, found in report.metrics.items()}
    assert values == {"win_rate": 0.75, "draw_rate": 0.5, "characters": 5.0}
    unjudged = aggregate(task, {e.id: [s] for e, s in zip(task.examples, scored, strict=True)})
    assert unjudged.unjudged
    assert list(unjudged.metrics) == ["characters"]


def test_triviaqa(paths, tmp_path):
    task = load_task("triviaqa", paths["triviaqa"])
    assert roles(task) == ["Question: Who wrote it?\nAnswer:"] * 3
    texts = [" jane austen ", "Austen", "Jane Austen.", "The Jane Austen"]
    scored = task.score(task.examples * 4, texts)
    assert [one.values["exact_match"] for one in scored] == [1, 1, 0, 0]
    official = tmp_path / "unfiltered-web-dev.json"
    official.write_text(json.dumps(rows.TRIVIAQA_OFFICIAL))
    assert load_task("triviaqa", str(official)).examples == task.examples
    assert (task.decoding.max_new_tokens, task.decoding.stop) == (20, ("\n",))


def test_questions_of_your_own(paths):
    task = load_task("questions", paths["questions"])
    assert roles(task) == ["Q: one and one\nA:"] * 3
    scored = task.score(task.examples * 4, [" two", "two\n", "Two", "two."])
    assert [one.values["exact_match"] for one in scored] == [1, 1, 0, 0]
    assert (task.decoding.max_new_tokens, task.decoding.temperature) == (64, None)


def test_code_is_sampled_as_in_the_config(paths):
    """configs/llama2_13b_code.py has the published settings too."""
    config = llama2_13b_code.get_config()
    options = load_task("humaneval", paths["humaneval"]).decoding.options(job.options(config))
    assert options == job.options(config)
    ds1000 = load_task("ds1000", paths["ds1000"]).decoding
    stop = ("\n</code>", "\n# SOLUTION END", "\nEND SOLUTION")
    assert ds1000.options(job.options(config)) == dataclasses.replace(
        options, stop=stop, banned_first_tokens=("</",)
    )


def test_humaneval(paths):
    task = load_task("humaneval", paths["humaneval"])
    prompt = rows.HUMANEVAL[0]["prompt"]
    assert roles(task) == [prompt] * 3
    assert (
        load_task("humaneval", paths["humaneval"], "clean").examples[0].prompt.text + "\n" == prompt
    )
    texts = [
        "    return x + x\n",
        "    print(x)\n    assert x\n    return x + x  # ok\n\n",
        "    return x\n",
        "    while True:\n        x += 1\n",
    ]
    scored = task.score(task.examples * 4, texts)
    assert [one.values["passed"] for one in scored] == [1, 1, 0, 0]
    assert scored[1].extracted == "    return x + x  # ok"
    assert scored[3].note == "timed out"
    # Of 4 samples no 10 can be drawn.
    report = aggregate(task, {"HumanEval/0": scored})
    assert {name: found.value for name, found in report.metrics.items()} == {"pass@1": 0.5}
    report = aggregate(task, {"HumanEval/0": scored * 5})
    # Ten of twenty pass: C(10, 10) of the C(20, 10) = 184,756 draws have none that does.
    assert report.metrics["pass@10"].value == pytest.approx(1 - 1 / 184_756)
    assert report.completions == 20


def test_ds1000_programs(paths):
    task = load_task("ds1000", paths["ds1000"])
    assert roles(task)[0].endswith("BEGIN SOLUTION\n<code>\n")
    texts = [
        "result = a.sum()",
        "print(a)\nresult = int(np.sum(a))\n",
        "result = 3",  # the first of two cases only
        "result = 0\nfor x in a:\n    result += x",  # test_string forbids the loop
        "result =",
    ]
    scored = task.score(task.examples[:1] * 5, texts)
    assert [one.values["passed"] for one in scored] == [1, 1, 0, 0, 0]
    report = aggregate(task, {"0": scored * 2, "1": scored[:1] * 10})
    assert report.metrics["pass@1"].value == pytest.approx((0.4 + 1) / 2)
    assert report.groups["library"]["Numpy"]["pass@10"].value == 1.0
    assert report.groups["perturbation"]["Origin"]["pass@1"].value == pytest.approx(0.7)


def test_ds1000_figures_are_not_shown(tmp_path):
    """Matplotlib's problems compare the figure that is left."""
    context = (
        "def test_execution(solution):\n    assert 'plot' in solution\n"
        "    assert 'show' not in solution and 'savefig' not in solution\n"
    )
    row = {**rows.ds1000_row(0, "Matplotlib"), "code_context": context}
    task = load_task("ds1000", rows.write(tmp_path / "one.jsonl", [row]))
    (scored,) = task.score(task.examples, ["plt.plot(x)\nplt.show()\nplt.savefig('x.png')"])
    assert (scored.extracted, scored.values["passed"]) == ("plt.plot(x)", 1)


def test_ds1000_sample():
    """How many of each library the published sample has, of those that there are."""
    sizes = {"Matplotlib": 155, "Numpy": 220, "Pandas": 291, "Pytorch": 68, "Scipy": 106,
             "Sklearn": 115, "Tensorflow": 45}  # fmt: skip
    libraries = [library for library, size in sizes.items() for _ in range(size)]
    table = [Row("", i, rows.ds1000_row(i, library)) for i, library in enumerate(libraries)]
    drawn = sample(table)
    assert collections.Counter(row.fields["metadata"]["library"] for row in drawn) == {
        "Pandas": 55, "Numpy": 41, "Matplotlib": 38, "Sklearn": 23, "Scipy": 18, "Pytorch": 16,
        "Tensorflow": 9,
    }  # fmt: skip
    assert len({row.fields["metadata"]["problem_id"] for row in drawn}) == 200
    assert len(sample(table[:150])) == 150


def test_values_of_examples(paths):
    """Means of samples; an example without any is left out, and nothing at all is an error."""
    task = load_task("gsm", paths["gsm"])
    scored = task.score(task.examples[:1] * 4, ["1012", "1012.0", "3", "4"])
    values = example_values(task, {"0": scored, "1": []})
    assert values == {"0": {"exact_match": 0.25, "numeric_match": 0.5}}
    report = aggregate(task, {"0": scored})
    assert (report.examples, report.completions) == (1, 4)
    with pytest.raises(InputError, match="gsm: nothing to report"):
        aggregate(task, {})
