"""The decode step compiled for a TPU slice that is not there: memory, traffic, transfers."""

import importlib.util
from typing import Any

import jax
import pytest

from decode.compile_check import Check, StepReport, describe_trio
from decode.requests import Options
from proxy_jax.errors import InputError
from proxy_jax.sharding import Placement, make_mesh
from proxy_jax.topology import tpu_devices
from proxy_jax.trio import ModelSpec, Trio

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu, the compiler, is not installed", allow_module_level=True)

BATCH, CONTEXT = 8, 2048
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
LARGE = SMALL | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles_of_all() -> None:
    """The compiler does its best here: what it does is what is tested."""


def trio(quantize: str = "") -> Trio:
    table = {"large/model": LARGE, "small/expert": SMALL, "small/anti": SMALL}
    roles = ("base", "expert", "antiexpert")
    specs = {
        role: ModelSpec(name, "bfloat16", quantize=quantize)
        for role, name in zip(roles, table, strict=True)
    }
    return describe_trio(specs, table)


def place(topology: str = "v5e:2x2", **mesh: int) -> Placement:
    return Placement(make_mesh(mesh, tpu_devices(topology)))


@pytest.fixture(scope="module")
def check() -> Check:
    """Weights are split over both axes, rows and caches over fsdp and tensor."""
    options = Options(batch_size=BATCH, max_new_tokens=128)
    return Check(trio(), "stacked", options, place(fsdp=2, tensor=2), CONTEXT)


@pytest.fixture(scope="module")
def step(check: Check) -> StepReport:
    return check.step()


def test_what_a_device_holds(step):
    def weights(fields):
        width, layers = fields["hidden_size"], fields["num_hidden_layers"]
        products = 4 if fields is SMALL else 2 + 2 / 2  # q and o; k and v of half as many heads
        layer = products * width**2 + 3 * width * fields["intermediate_size"]
        # Four devices share everything but the norms.
        split = layers * layer + 2 * fields["vocab_size"] * width
        return 2 * (split / 4 + (2 * layers + 1) * width)

    def caches(fields):
        return 2 * fields["num_hidden_layers"] * BATCH * CONTEXT * 8 * 128 * 2 / 4

    assert step.weights == weights(LARGE) + 2 * weights(SMALL)
    assert step.caches == caches(LARGE) + 2 * caches(SMALL)
    assert (
        step.weights + step.caches <= step.memory.arguments <= 1.01 * (step.weights + step.caches)
    )


def test_no_copies(step):
    held = step.weights + step.caches
    assert step.memory.temporary < 0.05 * held
    assert step.memory.peak < 1.06 * held
    assert 1.0 <= step.traffic / step.floor < 1.1


def test_only_activations_move(step):
    assert step.moved_weights == []
    assert set(step.layers) == {"base", "expert_antiexpert"}
    for name, found in step.layers.items():
        fields, roles = (LARGE, 1) if name == "base" else (SMALL, 2)
        # A few vectors a row: less than any weight of a layer.
        most = roles * BATCH * (8 * fields["hidden_size"] + 2 * fields["intermediate_size"]) * 4
        assert 0 < sum(one.size for one in found) < most
        assert len(found) <= 8


def test_8_bits_stay_8_bits(step):
    options = Options(batch_size=BATCH, max_new_tokens=128)
    small = Check(trio("int8"), "stacked", options, place(fsdp=2, tensor=2), CONTEXT).step()
    assert small.caches == step.caches
    # All but the embedding and the norms; of each output there is a scale.
    embedding = 2 * 32000 * (LARGE["hidden_size"] + 2 * SMALL["hidden_size"]) / 4
    assert (small.weights - embedding) / (step.weights - embedding) == pytest.approx(0.5, abs=0.01)
    assert small.memory.temporary < 0.05 * (small.weights + small.caches)
    assert small.traffic / small.floor < 1.1
    assert small.moved_weights == []


def test_prefill_leaves_the_weights_where_they_are(check, step):
    report = check.prefill(0, CONTEXT - 128)
    assert (report.rows, report.length) == (1, CONTEXT)
    assert report.moved_weights == []
    assert report.memory.peak + step.weights + step.caches < 15.75 * 2**30


def test_a_mesh_that_does_not_divide():
    with pytest.raises(InputError, match=r"base: kv heads \(8\) .* 16 devices of .* 'tensor'"):
        Check(trio(), "separate", Options(), place("v5e:4x4", tensor=16), CONTEXT)
    with pytest.raises(InputError, match="tensor=3: 3 of the 4 devices are no slice"):
        place(tensor=3)


def test_a_mesh_that_cuts_an_axis_of_the_slice():
    assert place("v6e:4x4", tensor=8, fsdp=2).split("heads") == 8


def test_an_unknown_slice():
    with pytest.raises(InputError, match="topology 'v5e:1000x1'"):
        tpu_devices("v5e:1000x1")
    assert jax.default_backend() == "cpu"
