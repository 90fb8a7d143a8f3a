"""Host memory while a sharded model of 1.5 B parameters is loaded by two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.real import models

pytestmark = pytest.mark.real_trio
# On CPU what a device holds is host memory. Pages of the mapped file are not counted: the kernel
# takes them back as it likes.
LOAD = """
import json, sys, threading, time
import jax
from proxy_jax.checkpoints.loading import load_params, open_checkpoint
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.sharding import Placement, make_mesh

path, stacked, address, index = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
place = Placement(make_mesh({"fsdp": 4, "tensor": 2}))
checkpoint = open_checkpoint(path)
config = config_from_hf(checkpoint.hf_config)


def held():
    with open("/proc/self/status") as file:
        return next(1024 * int(l.split()[1]) for l in file if l.startswith("RssAnon"))


def watch():
    while not done.wait(0.005):
        seen.append(held())


before, seen, done = held(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
params = load_params(
    [checkpoint], config, "bfloat16", place, stacked=stacked == "stacked", turned=True
)
jax.block_until_ready(params)
done.set()
watcher.join()
shard = sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards)
print(json.dumps([shard, max(seen) - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("layers", ["unrolled", "stacked"])
def test_a_process_holds_its_shard_and_a_tenth(layers):
    path = models.path("qwen2.5-coder-1.5b-instruct")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(path), layers, address, str(index)],
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in processes:
        output, _ = process.communicate()
        shard, peak = json.loads(output.splitlines()[-1])
        print(f"{layers}: shard {shard / 1e9:.2f} GB, peak {peak / shard:.3f} of it")
        assert 1.7e9 < shard < 1.8e9
        assert peak < 1.1 * shard
