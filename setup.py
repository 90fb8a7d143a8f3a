"""Installs proxy_jax (the library) with the programs in decode/ and their configs."""

from pathlib import Path

from setuptools import find_packages, setup

JAX = ">=0.10,<0.12"  # 0.10 is the last for Python 3.11; beyond 0.11 nothing has been tried

setup(
    name="proxy_jax",
    version="0.1.0",
    description="Proxy-tuning of language models in JAX: compiled, batched, sharded",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",  # hashlib.file_digest
    packages=find_packages(
        include=["proxy_jax*", "decode*", "train*", "configs*", "device_check*"]
    ),
    package_data={"proxy_jax.cpu": ["*.cc"]},
    install_requires=[
        f"jax{JAX}",
        "flax>=0.12.6,<0.13",  # nnx.to_pure_dict and nnx.List as used here; 0.13 may drop them
        # config.json of both RoPE spellings, defaults filled in. Which class reads a tokenizer is
        # guessed anew in many releases: the ids were compared under 5.0, 5.8, 5.18 and 5.24.
        "transformers>=5,<5.25",
        "safetensors>=0.8",  # numpy slices of bfloat16 tensors
        "gguf>=0.17,<1",  # dequantisation of every type that proxy_jax reads
        "jinja2>=3.1",  # chat templates
        "ml-collections>=1.1,<2",  # config flags
        "absl-py>=2.1",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12,<0.13",  # its v1 interface still moves between releases
        "grain>=0.2.15,<0.3",
        "tensorstore>=0.1.74",  # reads what orbax writes
        "tensorboardX>=2.6",
        "matplotlib>=3.9",
        "numpy>=2",
        "scipy>=1.13",
        "tqdm>=4.66",
    ],
    extras_require={
        "cpu": [f"jax[cpu]{JAX}"],
        "cuda": [f"jax[cuda13]{JAX}"],
        "tpu": [f"jax[tpu]{JAX}"],
        "eval": ["lm-eval>=0.4.9,<0.5", "datasets>=3"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.15,<0.18",  # formatting differs between minor versions
            "mypy>=1.18,<3",
            "accelerate>=1",  # transformers asks for it to read GGUF files into torch
            "peft>=0.17",  # oracle of the adapters
            "torch==2.13.0",  # the oracle of the parity tests; nothing else uses it
            "proxy_jax[eval]",  # the harness that runs on trios
            # libtpu of jax's version: the compiler for TPU slices that are not there
            f"jax[tpu]{JAX}; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
)
