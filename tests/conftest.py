"""Settings that must be made before jax is imported, and models that several tests share."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Most of the time of the tests is compilation: what one module, worker or program has compiled, the
# others read, and so do the next tests.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

from collections.abc import Callable, Iterator

import jax
import pytest

from tests.models import families

# An array that is added to one of another rank is more often a mistake than meant.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Compiled programs are forgotten with their module: a process may map only so many pages of
    code (vm.max_map_count), and the compiler crashes beyond."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; downloaded if it is absent."""
    from tests.real import models

    return models.path("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], families.Reference]:
    """Gives the tiny random model of a name in families.FAMILIES, made once a session."""
    made: dict[str, families.Reference] = {}

    def get(name: str) -> families.Reference:
        if name not in made:
            made[name] = families.make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session", params=families.FAMILIES)
def reference(
    request: pytest.FixtureRequest, build: Callable[[str], families.Reference]
) -> families.Reference:
    """Every tiny model in turn."""
    return build(request.param)


@pytest.fixture
def quick_compiles() -> Iterator[None]:
    """For tests that compile many tiny models: the compiler does not try hard."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
