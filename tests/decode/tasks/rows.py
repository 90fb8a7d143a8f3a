"""Small rows in the official format of each data set."""

import json
from pathlib import Path
from typing import Any

GSM = [
    {"question": " How many? ", "answer": "Six and six.\n<<6+6=12>>\n#### 1,012"},
    {"question": "How cold?", "answer": "#### -10"},
]
TRUTHFULQA = [
    {
        "Type": "Adversarial",
        "Category": "Nature",
        "Question": "What is rain?",
        "Best Answer": "Water",
        "Correct Answers": "Water; Drops of water.",
        "Incorrect Answers": "Milk; Ink.; Tea; Oil;",
        "Source": "-",
    },
    {
        "Type": "Adversarial",
        "Category": "Nature",
        "Question": "What is ice?",
        "Best Answer": "Frozen water",
        "Correct Answers": "Frozen water",
        "Incorrect Answers": "Glass",
        "Source": "-",
    },
]
ALPACA = [
    {"dataset": "helpful_base", "instruction": "Name a colour.", "output": "Red.",
     "generator": "text_davinci_003"},
    {"dataset": "koala", "instruction": "Say hello.", "output": "", "generator": "x"},
]  # fmt: skip
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    }
]
TRIVIAQA = [{"question": "Who wrote it?", "answers": ["Jane Austen", "AUSTEN "], "question_id": 7}]
TRIVIAQA_OFFICIAL = {
    "Data": [
        {
            "Question": "Who wrote it?",
            "QuestionId": "7",
            "Answer": {"Value": "Jane Austen", "Aliases": ["Jane Austen", "AUSTEN "]},
        }
    ]
}
QUESTIONS = [{"prompt": "Q: one and one\nA:", "completion": " two"}]
REALTIMEQA = [
    {"question_id": "20230101_0", "question_date": "2023/01/01", "question": "Who won? ",
     "choices": ["One", "Two", "Three", "Four", ""], "answer": ["2"]},
    {"question_id": "20230101_1", "question_date": "2023/01/01", "question": "True or false: ...?",
     "choices": ["TRUE", "FALSE"], "answer": "1"},
]  # fmt: skip


def ds1000_row(problem: int, library: str = "Numpy", **metadata: Any) -> dict[str, Any]:
    """Asks for the sum of an array; `result` is compared."""
    context = (
        "import numpy as np\n"
        "def generate_test_case(i):\n    return np.arange(i + 3), np.arange(i + 3).sum()\n"
        "exec_context = 'import numpy as np\\na = test_input\\n[insert]\\n'\n"
        "def test_execution(solution):\n"
        "    code = exec_context.replace('[insert]', solution)\n"
        "    for i in range(2):\n"
        "        given, expected = generate_test_case(i)\n"
        "        env = {'test_input': given}\n        exec(code, env)\n"
        "        assert env['result'] == expected\n"
        "def test_string(solution):\n    assert 'for' not in solution\n"
    )
    return {
        "prompt": "Problem: sum a\nA:\n<code>\nimport numpy as np\n</code>\nBEGIN SOLUTION\n<code>",
        "reference_code": "result = a.sum()",
        "code_context": context,
        "metadata": {
            "problem_id": problem,
            "library_problem_id": problem,
            "library": library,
            "test_case_cnt": 2,
            "perturbation_type": "Origin",
            "perturbation_origin_id": problem,
            **metadata,
        },
    }


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
