"""The quickstart from end to end, on a world of few pages: too little to learn, enough to run."""

import json

import quickstart
from train import corpus


def test_quickstart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "_PAGES", 120)
    quickstart.main(seeds=1)

    home = tmp_path / "runs/quickstart/0"
    task = json.loads((home / "report/results.json").read_text())["tasks"]["questions"]
    printed = capsys.readouterr().out
    for row, what in quickstart.WHAT.items():
        share = task["rows"][row]["metrics"]["exact_match"]["value"]
        assert f"{what:32}{share:8.1%}" in printed
    held_out = (home / "world/held_out.jsonl").read_text().splitlines()
    answered = (home / "report/questions/proxy/outputs.jsonl").read_text().splitlines()
    assert len(answered) == len(held_out)
    for page in ("report/report.html", "tokens/tokens.html"):
        assert f"runs/quickstart/0/{page}" in printed
        assert (home / page).stat().st_size > 10_000

    # What is there is not made again.
    made = {path: path.stat().st_mtime_ns for path in home.rglob("*.safetensors")}
    assert len(made) == 4
    quickstart.main(seeds=1)
    assert made == {path: path.stat().st_mtime_ns for path in home.rglob("*.safetensors")}
    assert capsys.readouterr().out.endswith(printed[printed.index("\nquestions answered") :])
