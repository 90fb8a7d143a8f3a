"""Models and adapters read from training runs, against the arrays that were saved."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.train.defaults import sft as defaults
from proxy_jax.checkpoints.adapters import read_adapter, save_adapter, with_adapter
from proxy_jax.checkpoints.loading import load_params, open_checkpoint
from proxy_jax.errors import InputError
from proxy_jax.jobs import manifest
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import apply
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.models.lora import init_adapter, is_adapted
from proxy_jax.sharding import Placement, make_mesh
from proxy_jax.trio import ModelSpec, load_trio, open_trio
from tests import trios
from train.checkpoint import Checkpoints
from train.export import export_expert, write_model
from train.optimizer import OptimizerConfig, make_optimizer
from train.step import Recipe, new_state

ONE = Placement(make_mesh({"data": 1}))
EIGHT = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
RANK, ALPHA = 3, 7.0
FIRST, LAST = 9, 10  # steps: the last is not the last by name
TOKENS = np.arange(24).reshape(2, 12) % 90
POSITIONS = np.broadcast_to(np.arange(12), (2, 12))
BOTH = pytest.mark.parametrize("stored", [False, True], ids=["unrolled", "stacked"])


def stack(tree: Any) -> Any:
    return {**tree, "layers": jax.tree.map(lambda *x: np.stack(x), *tree["layers"])}


def save_run(directory: Path, model: ModelConfig, trees: dict[int, Any], **fields: Any) -> Path:
    """A run with checkpoints of these trees by step, saved as training saves them."""
    config = defaults()
    config.update(fields)
    directory.mkdir(parents=True)
    manifest.write(directory, manifest.new(config.to_dict(), {}))
    recipe = Recipe(model, make_optimizer(OptimizerConfig(), 20), "float32", "none", ONE)
    with Checkpoints(directory / "checkpoints", every=1, keep=5) as checkpoints:
        for step, tree in trees.items():
            trained = jax.device_put(jax.tree.map(jnp.asarray, tree), ONE.sharding(()))
            state = new_state(recipe, trained, jax.random.key(0))
            checkpoints.save(step, state, {"next_index": step}, None)
    return directory


def assert_same(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)  # one structure, too


# Runs that train all weights.


@dataclasses.dataclass(frozen=True)
class Full:
    """A run of each layout, and what its checkpoints hold, layers unrolled."""

    model: ModelConfig
    paths: dict[bool, Path]
    saved: dict[int, Any]

    def load(self, path: Path, place: Placement = ONE, *, stacked: bool = False) -> Any:
        return load_params(
            [open_checkpoint(str(path))], self.model, "float32", place, stacked=stacked
        )


def save_full(reference: Any, directory: Path, scales: dict[int, float]) -> Full:
    """Runs whose checkpoints hold a family's weights times a number."""
    model = reference.config
    weights = jax.tree.map(np.asarray, reference.params)
    saved = {s: jax.tree.map(lambda x, n=n: n * x, weights) for s, n in scales.items()}
    stacked = {step: stack(tree) for step, tree in saved.items()}
    paths = {
        False: save_run(directory / "unrolled", model, saved),
        True: save_run(directory / "stacked", model, stacked),
    }
    for path in paths.values():
        write_model(path / "model", model, trios.make_tokenizer(), (trios.EOS, 5), "float32")
    return Full(model, paths, saved)


@pytest.fixture(scope="module")
def full(build, tmp_path_factory) -> Full:
    return save_full(build("llama"), tmp_path_factory.mktemp("full"), {FIRST: 2.0, LAST: 1.0})


@BOTH
@pytest.mark.parametrize("place", [ONE, EIGHT], ids=["one", "eight"])
def test_the_latest_weights(full, stored, place):
    assert_same(full.load(full.paths[stored], place), full.saved[LAST])
    stacked = full.load(full.paths[stored], place, stacked=True)
    assert_same(stacked, stack(full.saved[LAST]))


@BOTH
def test_the_weights_of_a_step(full, stored):
    for step, saved in full.saved.items():
        assert_same(full.load(full.paths[stored] / "checkpoints" / str(step)), saved)


@pytest.mark.parametrize("name", ["llama_yarn_biases", "qwen3", "gemma3"])
def test_every_kind_of_tensor(build, tmp_path, name):
    """Biases, norms of queries and keys, tied heads; merged axes cut at a head."""
    run = save_full(build(name), tmp_path, {LAST: 1.0})
    for path in run.paths.values():
        assert config_from_hf(open_checkpoint(str(path)).hf_config) == run.model
        assert_same(run.load(path, EIGHT), run.saved[LAST])


def test_logits_equal_those_of_the_export(full, tmp_path):
    path, tokenizer = tmp_path / "expert", trios.make_tokenizer()
    weights = jax.tree.map(jnp.asarray, full.saved[LAST])
    export_expert(path, full.model, weights, tokenizer, "", dtype="float32")
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(path)
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        params = full.load(full.paths[True])
        ours = jax.jit(apply, static_argnums=0)(full.model, params, TOKENS, POSITIONS)[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_tokenizer_and_ends_of_text(full):
    checkpoint = open_checkpoint(str(full.paths[False]))
    assert checkpoint.at_hand
    assert checkpoint.eos_ids == (trios.EOS, 5)
    assert checkpoint.tokenizer().get_vocab() == trios.make_tokenizer().get_vocab()


def test_what_is_half_written_is_not_taken(full, tmp_path):
    run = shutil.copytree(full.paths[False], tmp_path / "run")
    saved = run / "checkpoints"
    shutil.copytree(saved / str(FIRST), saved / "11.orbax-checkpoint-tmp")
    assert_same(full.load(run), full.saved[LAST])


# LoRA runs.


@dataclasses.dataclass(frozen=True)
class Lora:
    """Runs of each layout that train an adapter on M-.

    Attributes:
      trio: M and M- on disk; M- is the runs' base.
      model: M-'s architecture.
      paths: the runs.
      saved: the adapters by step, layers unrolled.
      peft: the last one as a PEFT directory.
    """

    trio: trios.TinyTrio
    model: ModelConfig
    paths: dict[bool, Path]
    saved: dict[int, Any]
    peft: Path

    def specs(self, path: str | Path, adapter: str | Path = "") -> dict[str, ModelSpec]:
        """The trio with M+ from somewhere else."""
        given = {role: self.trio.spec(role) for role in ("base", "antiexpert")}
        return {**given, "expert": ModelSpec(str(path), adapter=str(adapter))}


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Lora:
    home = tmp_path_factory.mktemp("home")
    roles = {"base": 0, "antiexpert": 2}
    trio = trios.write_trio(home, {r: trios.make_model("llama", 320, s) for r, s in roles.items()})
    checkpoint = open_checkpoint(str(trio.paths["antiexpert"]))
    model = config_from_hf(checkpoint.hf_config)
    params = load_params([checkpoint], model, "float32", ONE, stacked=False)
    fresh = init_adapter(params, ["q_proj", "o_proj", "up_proj"], RANK, jax.random.key(0))
    rng = np.random.default_rng(0)
    last = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), fresh)
    saved = {FIRST: jax.tree.map(np.asarray, fresh), LAST: last}
    fields = {"base": "~/antiexpert", "lora": {"rank": RANK, "alpha": ALPHA}}
    paths = {
        False: save_run(home / "unrolled", model, saved, **fields),
        True: save_run(home / "stacked", model, {s: stack(t) for s, t in saved.items()}, **fields),
    }
    save_adapter(home / "peft", model, last, RANK, ALPHA, "")
    return Lora(trio, model, paths, saved, home / "peft")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path_factory, request):
    """The base of the LoRA runs is "~/antiexpert"."""
    if "lora" in request.fixturenames:
        paths = request.getfixturevalue("lora").trio.paths
        monkeypatch.setenv("HOME", str(paths["antiexpert"].parent))


def matrices(params: Any) -> Any:
    """The adapter on a model's parameters, as training has it."""

    def pairs(tree: Any) -> Any:
        if isinstance(tree, tuple):
            return tuple(map(pairs, tree))
        if is_adapted(tree):
            assert tree.scale == ALPHA / RANK
            return {"a": tree.a, "b": tree.b}
        if not isinstance(tree, dict):
            return None
        found = {key: pairs(value) for key, value in tree.items()}
        return {key: value for key, value in found.items() if value} or None

    return pairs(params)


@BOTH
@pytest.mark.parametrize("stacked", [False, True])
def test_the_matrices_of_a_run(lora, stored, stacked):
    checkpoint = open_checkpoint(str(lora.trio.paths["antiexpert"]))
    params = load_params([checkpoint], lora.model, "float32", ONE, stacked=stacked)
    path = lora.paths[stored]
    for directory, step in ((path, LAST), (path / "checkpoints" / str(FIRST), FIRST)):
        adapted = with_adapter(params, directory, lora.model, "float32", ONE)
        expected = lora.saved[step]
        assert_same(matrices(adapted), stack(expected) if stacked else expected)


@pytest.mark.parametrize("as_adapter", [False, True])
def test_a_run_decodes_as_its_peft_directory(lora, as_adapter, quick_compiles):
    anti, run = lora.trio.paths["antiexpert"], lora.paths[True]
    specs = lora.specs(anti, run) if as_adapter else lora.specs(run)
    ours = load_trio(**specs, plan="shared")
    theirs = load_trio(**lora.specs(anti, lora.peft), plan="shared")
    answers = trios.complete(theirs)
    assert trios.complete(ours) == answers
    untrained = lora.specs(run / "checkpoints" / str(FIRST))
    assert trios.complete(load_trio(**untrained, plan="shared")) != answers


def test_a_spec_is_pinned_to_a_checkpoint(lora, full, tmp_path):
    run = lora.paths[False]
    anti, step = str(lora.trio.paths["antiexpert"]), run / "checkpoints" / str(LAST)
    pinned = ModelSpec(anti, adapter=str(step))
    for spec in (
        ModelSpec(str(run)),
        ModelSpec(str(step)),
        ModelSpec("~/antiexpert", adapter=str(run)),
    ):
        assert open_trio({"base": spec}).members["base"].spec == pinned
    # On a model that another run has trained.
    another = edited(run, tmp_path, lambda config: config.update(base=str(full.paths[True])))
    spec = open_trio({"base": ModelSpec(str(another))}).members["base"].spec
    assert spec.path == str(full.paths[True] / "checkpoints" / str(LAST))
    assert spec.adapter == str(another / "checkpoints" / str(LAST))


# What is refused.


def edited(run: Path, directory: Path, change: Any) -> Path:
    """A copy of a run with a changed config."""
    copy = shutil.copytree(run, directory / "edited")
    content = manifest.read(copy)
    assert content
    change(content["config"])
    manifest.write(copy, content)
    return copy


def remove(*parts: str) -> Any:
    def change(run: Path) -> None:
        for path in run.glob("/".join(parts)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def cut_data(run: Path) -> None:
    for file in (run / "checkpoints" / str(LAST) / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change_json(file: str, **fields: Any) -> Any:
    def change(run: Path) -> None:
        content = json.loads((run / file).read_text())
        (run / file).write_text(json.dumps(content | fields))

    return change


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("checkpoints", "*"), "run: a training run that has saved no checkpoint yet"),
        (remove("checkpoints"), "run: a training run that has saved no checkpoint yet"),
        (remove("manifest.json"), "run/manifest.json: no such file"),
        (lambda run: (run / "manifest.json").write_text("{"), "manifest.json: not JSON"),
        (change_json("manifest.json", config={"base": {}}), "not the manifest of a training run"),
        (
            change_json("manifest.json", config={"base": "", "lora": {"rank": "1", "alpha": 1}}),
            "config: lora: rank must be an integer, not .1.$",
        ),
        (
            change_json("manifest.json", config={"base": "", "lora": {"rank": 1, "alpha": 1}}),
            "base must be the path or hub id of a model",
        ),
        (remove("model"), "run/model/config.json: no such file"),
        (remove("checkpoints", "10", "state"), "checkpoints/10: not a whole checkpoint"),
        (remove("checkpoints", "10", "state", "manifest.ocdbt"), "10: not a whole checkpoint"),
        (remove("checkpoints", "10", "state", "**", "d", "*"), "10: cannot read its arrays"),
        (cut_data, "checkpoints/10: cannot read"),
        (
            change_json("model/config.json", vocab_size=107),
            r"10: array embedding has shape \(106, 48\), the model asks for \(107, 48\)",
        ),
        (
            change_json("model/config.json", num_hidden_layers=4, layer_types=None),
            r"tensor model.layers.3.\S+ and \d more is missing|has shape \(3, .* asks for \(4, ",
        ),
        (
            change_json("model/config.json", num_hidden_layers=2, layer_types=None),
            r"layers.2.\S+ and \d more is not part of a model|has shape \(3, .* asks for \(2, ",
        ),
        (
            change_json("model/config.json", tie_word_embeddings=True),
            "10: tensor head is not part of a model",
        ),
    ],
)
def test_a_broken_run(full, tmp_path, stored, change, message):
    run = shutil.copytree(full.paths[stored], tmp_path / "run")
    change(run)
    with pytest.raises(InputError, match=message) as raised:
        load_trio(str(run))
    assert "\n" not in str(raised.value)


@BOTH
def test_a_flipped_bit_is_no_weight(full, tmp_path, stored):
    """The stored numbers have no check sums of their own: some flips decompress."""
    run = shutil.copytree(full.paths[stored], tmp_path / "run")
    files = (run / "checkpoints" / str(LAST) / "state").rglob("d/*")
    file = max(files, key=lambda file: file.stat().st_size)
    whole, random = file.read_bytes(), np.random.default_rng(0)
    said = []
    for _ in range(30):
        content = bytearray(whole)
        content[random.integers(len(whole))] ^= 1 << random.integers(8)
        file.write_bytes(content)
        try:
            assert_same(full.load(run), full.saved[LAST])
        except InputError as error:
            said.append(str(error))
    assert any("is damaged, it is not what was saved" in line for line in said)


def test_a_checkpoint_that_goes_away(full, tmp_path):
    """A run that still trains removes its old checkpoints."""
    run = shutil.copytree(full.paths[False], tmp_path / "run")
    trio = open_trio({"base": ModelSpec(str(run))})
    trio.check_weights()
    shutil.rmtree(run / "checkpoints" / str(LAST))
    with pytest.raises(InputError, match=r"checkpoints/10: cannot read embedding \(NOT_FOUND"):
        load_trio(trio)


def test_a_stored_piece_is_read_once(full, tmp_path):
    """All layers of a stacked array: they are still there when the files are not."""
    run = shutil.copytree(full.paths[True], tmp_path / "run")
    checkpoint = open_checkpoint(str(run))
    first, *others = [name for name in checkpoint.names if "up_proj" in name]
    whole = (slice(None), slice(None))
    checkpoint.read(first, whole)
    shutil.rmtree(run)
    for i, name in enumerate(others, 1):
        expected = full.saved[LAST]["layers"][i]["mlp"]["up"].T
        np.testing.assert_array_equal(checkpoint.read(name, whole), expected)
    with pytest.raises(InputError, match=r"cannot read layers\.mlp\.down"):
        checkpoint.read("model.layers.0.mlp.down_proj.weight", whole)


def test_a_step_that_is_not_there(full):
    with pytest.raises(InputError, match=r"checkpoints/11: no such checkpoint; the run has 9, 10"):
        open_checkpoint(str(full.paths[False] / "checkpoints" / "11"))


def test_runs_in_the_wrong_place(lora, full, tmp_path):
    run, peft = lora.paths[False], lora.peft
    with pytest.raises(InputError, match="a LoRA adapter on ~/antiexpert, not a whole model"):
        open_checkpoint(str(run))
    for adapter in (peft, run):
        with pytest.raises(InputError, match="unrolled: a LoRA run, which takes no other adapter"):
            open_trio(lora.specs(run, adapter))
    with pytest.raises(InputError, match="a run that trains all weights: a model, not an adapter"):
        load_trio(*lora.specs(lora.trio.paths["antiexpert"], full.paths[True]).values())
    gone = edited(run, tmp_path, lambda config: config.update(base="~/gone"))
    with pytest.raises(InputError, match=r"base of .*/10: ~/gone: no such file or directory"):
        open_trio(lora.specs(gone))


@BOTH
def test_an_adapter_of_another_model(lora, full, stored):
    other = dataclasses.replace(lora.model, num_layers=3)
    with pytest.raises(InputError, match=r"in every layer|has shape \(2, .* asks for \(3, "):
        read_adapter(lora.paths[stored], other)
    with pytest.raises(InputError, match=r"array \S+attention.\S+ has shape \(.*, the model asks"):
        read_adapter(lora.paths[stored], full.model)
