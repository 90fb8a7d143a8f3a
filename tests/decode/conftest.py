"""Trios that the tests of decoding share; loading and compiling them takes most of the time."""

from collections.abc import Iterator

import jax
import pytest

from decode import scheduler
from proxy_jax.trio import LoadedTrio
from tests import trios


@pytest.fixture(scope="module", autouse=True)
def quick_compiles_of_all() -> Iterator[None]:
    """Most of the time of these tests is compilation: less effort, and fewer prefills."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "_SHORTEST_BUCKET", 32)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> trios.TinyTrio:
    return trios.llama_trio(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> trios.TinyTrio:
    return trios.mixed_trio(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="session")
def loaded(llama: trios.TinyTrio) -> LoadedTrio:
    return llama.load()


@pytest.fixture(scope="session")
def expected(llama: trios.TinyTrio) -> list[list[int]]:
    """Greedy tokens of the llama trio in torch, alpha 1, a list a prompt."""
    return [llama.greedy(llama.ids(prompt), trios.STEPS) for prompt in trios.PROMPTS]
