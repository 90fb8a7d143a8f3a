"""What an evaluation's config comes to before anything runs: models, tasks and prompts of rows."""

import importlib
import pkgutil

import pytest

import configs.evaluate
from configs.evaluate.defaults import evaluation
from decode import job
from decode.evaluation import plan
from decode.tasks import TASKS
from tests.decode import evaluations, jobs
from tests.decode.tasks import rows as task_rows


def experiments():
    modules = pkgutil.iter_modules(configs.evaluate.__path__)
    return [module.name for module in modules if module.name != "defaults"]


@pytest.mark.parametrize("name", experiments())
def test_experiments(name):
    """Each config names tasks that there are, and models for every row."""
    config = importlib.import_module(f"configs.evaluate.{name}").get_config()
    assert config.output_dir == f"runs/evaluate/{name}"
    assert set(config.tasks) <= set(TASKS)
    for row in plan.ROWS:
        if row == "tuned" and not config.tuned.path:
            continue
        own = plan.decoding_config(config, row)
        specs, options = job.model_specs(own), job.options(own)
        assert set(specs) == ({"base", "expert", "antiexpert"} if row == "proxy" else {"base"})
        assert options.batch_size == config.batch_size
    if "70b" in name:
        assert "70b" in config.base.path
        assert config.mesh.tensor == 8
    with pytest.raises(AttributeError, match="alhpa"):
        config.alhpa = 1.0


def test_system_prompts_go_where_there_is_a_place(llama, tmp_path):
    task_rows.write(tmp_path / "truthfulqa_mc.jsonl", task_rows.TRUTHFULQA)
    config = evaluations.config_of(llama, tmp_path, "truthfulqa_mc")
    found = {one.row: one.prompts[0] for one in plan.plan_evaluation(config).jobs}
    assert {row for row, prompt in found.items() if prompt.system} == {"expert", "proxy"}
    assert found["base"].text == found["proxy"].text
    assert found["expert"].text == found["base"].text.rstrip("\n")  # as a chat model alone reads


def test_an_adapter_without_a_path_is_on_m(llama, tmp_path):
    config = evaluation(jobs.config_of(llama, tmp_path), "gsm")
    config.tuned.adapter = "adapter"
    specs = job.model_specs(plan.decoding_config(config, "tuned"))
    assert specs["base"].path == str(llama.paths["base"])
    assert specs["base"].adapter == "adapter"
