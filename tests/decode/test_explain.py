"""The analyses of recorded completions, on records the tests make, and the page on a real one."""

import html
import json
import math
import re
from typing import Any

import numpy as np
import pytest
import scipy.stats

from decode import explain, token_page
from decode.explain import Record, Words
from decode.trace import ALTERNATIVES, Trace
from proxy_jax.errors import InputError
from tests import trios
from tests.decode.test_trace import recorded
from tests.trios import PROMPTS


def record(pieces, deltas=None, changed=None):
    """A record of tokens that read the same alone and in the text; p_M is 0.1 everywhere."""
    steps = len(pieces)
    deltas = np.zeros(steps) if deltas is None else np.asarray(deltas)
    changed = np.zeros(steps, bool) if changed is None else np.asarray(changed)
    top = np.zeros((steps, 2, ALTERNATIVES), np.int32)
    top[:, 0, 0] = changed
    trace = Trace(
        names=("proxy", "base"),
        log_probs=np.log(np.stack([0.1 + deltas, np.full(steps, 0.1)], 1)).astype(np.float32),
        ranks=np.zeros((steps, 2), np.int32),
        entropies=np.stack([np.arange(steps), np.ones(steps)], 1).astype(np.float32),
        top_ids=top,
        top_log_probs=np.full(top.shape, -1.0, np.float32),
        kl=np.full(steps, 0.5, np.float32),
        overlap=None,
    )
    return Record("", tuple(range(steps)), tuple(pieces), tuple(pieces), trace)


def test_welch_equals_scipy():
    rng = np.random.default_rng(0)
    for one, other in [((30, 1), (50, 3)), ((2, 0.1), (400, 5)), ((9000, 1), (7000, 1.5))]:
        a, b = rng.normal(0.0, one[1], one[0]), rng.normal(0.4, other[1], other[0])
        own: Any = explain.welch(a, b)  # type: ignore[arg-type]
        theirs: Any = scipy.stats.ttest_ind(a, b, equal_var=False)
        assert (own.t, own.df, own.p) == pytest.approx(
            (theirs.statistic, theirs.df, theirs.pvalue), rel=1e-9
        )


def test_welch_of_the_published_analysis():
    """scipy's output in the authors' notebook (notebooks/S6.1_analysis.ipynb)."""
    p = explain.t_test_p(33.08578492661922, 23665.983157064817)
    assert p == pytest.approx(1.049491530636505e-234, rel=1e-6)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], []), ([1.0, 1.0], [2.0, 2.0])])
def test_welch_undefined(a, b):
    assert explain.welch(a, b) is None


def reference_sides(tokens):
    """The published rule, written out: `in` a string holds for any piece of it, and for ""."""
    left: list[Any] = []
    right: list[Any] = []
    for place, token in enumerate(tokens):
        if token != "=":
            continue
        for side, step in ((left, -1), (right, 1)):
            at = place + step
            while 0 <= at < len(tokens):
                if not (tokens[at].isdigit() or tokens[at] in ",$€+-x*/"):
                    break
                side.append(at)
                at += step
    return left, right


@pytest.mark.parametrize(
    ("pieces", "left", "right"),
    [
        # A blank belongs to a side, and so does what stands between numbers.
        (["So", " ", "3", " +", " 4", " =", " $", "7", " apples"], [1, 2, 3, 4], [6, 7]),
        # A decimal point ends a side.
        (["1", ".", "5", "*", "2", "=", "3", ".", "0"], [2, 3, 4], [6]),
        # The middle counts on both.
        (["2", "+", "2", "=", "4", "=", "8", "/", "2"], [0, 1, 2, 4], [4, 6, 7, 8]),
        # A bracket ends a side; "=" within a token is none.
        (["(", "1", "+", "1", ")", "=", "2", "\n", "x=", "3"], [], [6]),
        (["=", ",$", "5"], [], [1, 2]),
    ],
)
def test_published_equation_sides(pieces, left, right):
    found = explain._published_sides(pieces)
    assert (sorted(found[0]), sorted(found[1])) == (left, right)
    answers = reference_sides([piece.strip(" ") for piece in pieces])
    assert tuple(map(sorted, answers)) == (left, right)


@pytest.mark.parametrize(
    ("pieces", "left", "right"),
    [
        (["So", " ", "3", " +", " 4", " =", " $", "7", " apples"], [2, 3, 4], [7]),
        (["1", ".", "5", "*", "2", "=", "3", ".", "0", "."], [0, 1, 2, 3, 4], [6, 7, 8]),
        (["2", "+", "2", "=", "4", "=", "8", "/", "2"], [0, 1, 2], [6, 7, 8]),
        (["(", "1", "+", "1", ")", "=", "2"], [1, 2, 3], [6]),
        (["<<", "1", "2", "*", "5", "=", "6", "0", ">>", "6", "0"], [1, 2, 3, 4], [6, 7]),
        (["5", ".", " ", "3", "×", "2", " =", " ", "6"], [3, 4, 5], [8]),
        (["x", " =", " ", "6", ",", " y", " =", " ", "7"], [], []),
        # Tokens that are more than one thing: only what lies on one side counts.
        ([" 12", "0-", "20=", "100", "%."], [0, 1], [3]),
    ],
)
def test_strict_equation_sides(pieces, left, right):
    assert explain._strict_sides(pieces) == (left, right)


def test_strict_sides_of_hostile_text():
    """No text takes more than a moment."""
    for text in ("1", "1+", "( ", " ", "1 ", "(", "-", "1,", ".1", "1.", "$("):
        assert explain._strict_sides(list(text * 5000)) == ([], [])


def test_equation_sides():
    deltas = [0.3, 0.1, 0.5, 0.0, 0.2]
    records = [record(["1", "+", "2", "=", "3"], deltas), record(["9", "=", "9"], [0.1, 0, 0.0])]
    sides: Any = explain.equation_sides(records, "strict")
    assert (sides.left.count, sides.right.count) == (4, 2)
    assert sides.left.value == pytest.approx(np.mean([0.3, 0.1, 0.5, 0.1]), abs=1e-6)
    assert sides.right.value == pytest.approx(0.1, abs=1e-6)
    answer: Any = scipy.stats.ttest_ind([0.3, 0.1, 0.5, 0.1], [0.2, 0.0], equal_var=False)
    assert sides.test.p == pytest.approx(answer.pvalue, rel=1e-5)
    nothing = explain.equation_sides([record(["no", " numbers"])])
    assert (nothing.left, nothing.right, nothing.test) == (None, None, None)


def test_changed_by_position():
    rows = [[1, 0, 0, 0, 0, 1], [1, 1, 0], [0], [1, 0, 1, 1, 1, 1, 0, 0, 1]]
    records = [record(["a"] * len(row), changed=np.asarray(row, bool)) for row in rows]
    shares = explain.changed_by_position(records)
    found = [(s.first, s.last, s.value, s.steps, s.completions) for s in shares]
    assert found == [
        (0, 0, 3 / 4, 4, 4),
        (1, 1, 1 / 3, 3, 3),
        (2, 2, 1 / 3, 3, 3),
        (3, 3, 1 / 2, 2, 2),
        (4, 7, 3 / 6, 6, 2),
        (8, 8, 1.0, 1, 1),
    ]
    assert explain.changed(records).value == 10 / 19
    for one in shares:
        assert 0 <= one.low < one.value <= one.high <= 1
    with pytest.raises(ValueError, match="no completion has 10 tokens"):
        explain.changed(records, 9)


def test_interval_of_independent_steps_is_wilsons():
    """One step a completion: scipy's interval of a proportion, but for the factor n / (n - 1)."""
    hits, n = 40, 200
    records = [record(["a"], changed=[i < hits]) for i in range(n)]
    one = explain.changed(records)
    answer = scipy.stats.binomtest(hits, n - 1).proportion_ci(method="wilson")
    assert (one.low, one.high) == pytest.approx((answer.low, answer.high), abs=2e-3)


def test_interval_covers_with_alike_steps():
    """Completions differ: of 150 samples of 40, about 95 % of the intervals hold the truth."""
    rng = np.random.default_rng(1)
    held = naive = 0
    for _ in range(150):
        rates = rng.choice([0.05, 0.5], 40)
        rows = [rng.random(40) < rate for rate in rates]
        one = explain.changed([record(["a"] * 40, changed=row) for row in rows])
        held += one.low <= 0.275 <= one.high
        answer = scipy.stats.binomtest(int(np.sum(rows)), 1600).proportion_ci(method="wilson")
        naive += answer.low <= 0.275 <= answer.high
    assert 0.91 < held / 150 < 0.99
    assert naive / 150 < 0.5


def test_most_changed_with_context():
    often = [" I", " can", " not", " provide", ",", " sorry", "."]
    deltas = [0.1, 0.0, 0.2, 0.6, 0.0, 0.4, 0.3]
    other = [" We", " can", " not", " provide", " any"]
    records = [record(often, deltas)] * 3 + [record(other, [0.0, 0.0, 0.4, 0.8, 0.9])]
    found = explain.most_changed(records, minimum=3, top=4)
    counts = {t.text: t.count for t in found}
    assert list(counts.items()) == [("provide", 4), ("sorry", 3), (".", 3), ("not", 4)]
    assert found[0].delta == pytest.approx((3 * 0.6 + 0.8) / 4, abs=1e-6)
    assert (found[0].context, found[0].context_count) == ("I can not provide", 3)
    assert found[1].context == "can not provide, sorry"
    assert found[2].context == "can not provide, sorry", "the last words before punctuation"
    short = explain.most_changed([record(["Yes"], [0.5])], minimum=1)
    assert [(t.text, t.context) for t in short] == [("Yes", "")]


def test_step_means():
    means = explain.step_means([record(["a"] * 3), record(["a"])])
    assert means == {"kl": 0.5, "overlap": None, "entropies": {"proxy": 0.75, "base": 1.0}}


@pytest.fixture(scope="module")
def words(llama):
    return Words(llama.tokenizers["base"])


@pytest.fixture(scope="module")
def records(loaded, words):
    completions = recorded(loaded, PROMPTS[:4])
    return [
        words.record(prompt, done.token_ids, done.trace)
        for prompt, done in zip(PROMPTS, completions, strict=False)
    ]


def test_pieces_make_the_text(words):
    """Characters of several tokens come with the last; special tokens are named."""
    text = " größer é ü ß: 東京 🙂 apples\n models"
    ids = words.tokenizer(text)["input_ids"]
    trace: Any = None
    one = words.record("A question\n", [*ids, trios.EOS], trace)
    assert "".join(one.pieces) == text + "</s>"
    assert "" in one.pieces
    assert one.pieces[-1] == one.words[-1] == "</s>"
    assert all(len(piece.strip()) <= 6 for piece in one.pieces)
    alone = [words.tokenizer.decode([i]) for i in ids]
    assert list(one.words[:-1]) == alone
    assert "\ufffd" in "".join(alone)


FIGURES: dict[str, Any] = {
    "log_probs": [-1.0, None],
    "ranks": [0, 1],
    "entropies": [1.0, 2.0],
    "top_ids": [[5, 6], [6, 7]],
    "top_log_probs": [[-1.0, -2.0], [-1.5, None]],
}
TRACE: dict[str, Any] = {"proxy": FIGURES, "base": FIGURES, "kl": [0.5, 0.25]}
RECORDED: dict[str, Any] = {"row": 0, "prompt": "A", "token_ids": [5, 6], "trace": TRACE}


def test_rows_are_read(tmp_path, words):
    path = tmp_path / "outputs.jsonl"
    path.write_text(json.dumps(RECORDED) + "\n" + '{"half')
    (one,) = explain.read_records(path, words)
    assert (one.prompt, one.ids, one.trace.names) == ("A", (5, 6), ("proxy", "base"))
    assert one.trace.log_probs.tolist() == [[-1.0, -1.0], [-np.inf, -np.inf]]


def changed_row(**fields):
    return {**RECORDED, **fields}


def changed_trace(**fields):
    return changed_row(trace={**TRACE, **fields})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"row": 0, "prompt": "A", "text": "B"}, "nothing recorded; decode with trace=True"),
        (changed_row(trace=None), "nothing recorded"),
        (changed_row(trace=3), "trace must be an object, not 3"),
        (changed_row(prompt=None), "prompt is missing"),
        (changed_row(prompt=3), "prompt must be a string"),
        (changed_row(token_ids=None), "token_ids is missing"),
        (changed_row(token_ids="56"), "token_ids must be a list"),
        (changed_row(token_ids=[5, True]), "token_ids must hold int values, not True"),
        (changed_row(token_ids=[5.0, 6.0]), "token_ids must hold int values, not 5.0"),
        (changed_row(token_ids=[5]), r"trace .* \(entropies of shape \(2, 2\), not \(1, 2\)"),
        (changed_row(token_ids=[5, -1]), "token_ids are not of this tokenizer"),
        (changed_row(token_ids=[5, 10**6]), r"tokenizer \(1000000 is no token\)"),
        (changed_row(token_ids=[5, 10**30]), "token_ids are not of this tokenizer"),
        (changed_trace(proxy=None), r"trace is not .* \(it needs proxy and base\)"),
        (changed_trace(base={**FIGURES, "ranks": None}), "trace is not one of decode.generate's"),
        (changed_trace(base={**FIGURES, "ranks": [0, -1]}), "ranks and top_ids must be at least 0"),
        (changed_trace(base={**FIGURES, "log_probs": [-1.0, 0.5]}), "a probability is above 1"),
        (changed_trace(base={**FIGURES, "entropies": [1.0, None]}), "entropies must be finite"),
        (changed_trace(kl=[0.5]), r"kl of shape \(1,\), not \(2,\)"),
        (changed_trace(kl=["a", "b"]), "trace is not one of decode.generate's"),
        (changed_trace(overlap=[math.nan, 1.0]), "overlap must be finite"),
        (changed_trace(expert=FIGURES), "trace is of proxy, base, expert, and the rows before it"),
    ],
)  # fmt: skip
def test_rows_that_are_not_of_generate(tmp_path, words, row, message):
    path = tmp_path / "outputs.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (RECORDED, row)))
    with pytest.raises(
        InputError, match=f"outputs.jsonl:2: {message}|outputs.jsonl:2: .*{message}"
    ):
        list(explain.read_records(path, words))


def test_summary_is_json(records):
    summary = json.loads(json.dumps(explain.summarise(records), allow_nan=False))
    assert summary["completions"] == 4
    assert summary["tokens"] == sum(len(one.ids) for one in records)
    assert summary["means"]["overlap"] == pytest.approx(
        np.concatenate([one.trace.overlap for one in records]).mean()
    )


def test_page(records, words):
    hostile = Record("<script>alert(1)</script>", *_rest(records[0]))
    page = token_page.render([hostile, *records[1:]], words, "{{data}} & <b>")
    assert "<h1>{{data}} &amp; &lt;b&gt;</h1>" in page
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page), "nothing from outside"
    assert page.count("</script>") == 2

    found: Any = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(found[1])
    assert data["labels"] == ["proxy", "M", "M+", "M−"]
    texts = re.findall(r'<pre class="tokens".*?>(.*?)</pre>', page, re.DOTALL)
    assert len(texts) == len(data["rows"]) == 4
    for one, text, row in zip(records, texts, data["rows"], strict=True):
        spans = re.findall(r'<span class="(.*?)" style="--s:(.*?)">(.*?)</span>', text, re.DOTALL)
        assert [html.unescape(re.sub("<i>.*?</i>", "", s[2])) for s in spans] == list(one.pieces)
        for t, (kind, strength, _) in enumerate(spans):
            ratio = one.trace.log_probs[t, 0] - one.trace.log_probs[t, 1]
            assert kind.split()[0] == ("up" if ratio > 0 else "down")
            first = [top[0][0] for top in row[t]["a"]]
            assert ("other" in kind) == (first[0] != first[1])
            assert float(strength) == pytest.approx(min(1, abs(ratio) / math.log(100)), abs=0.01)
            assert data["words"][row[t]["w"]] == one.words[t]
            drawn = np.exp(one.trace.log_probs[t])
            np.testing.assert_allclose(row[t]["p"], drawn, rtol=0.01)
            tops = np.exp(one.trace.top_log_probs[t])
            np.testing.assert_allclose(
                [[p for _, p in top] for top in row[t]["a"]], tops, rtol=0.01
            )
    lit = [s for text in texts for s in re.findall(r"--s:(.*?)\"", text) if float(s) == 1.0]
    assert lit


def _rest(one):
    return one.ids, one.words, one.pieces, one.trace
