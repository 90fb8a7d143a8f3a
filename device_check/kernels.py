"""Where the time of a decode step goes: one chunk, traced and summed by kernel."""

from __future__ import annotations

import collections
import gzip
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from decode import timing
from decode.requests import Options
from decode.scheduler import Generator, longest_contexts
from decode.timing import Case
from device_check.decoding import placement
from device_check.figures import Record
from device_check.sizes import Sizes
from proxy_jax.trio import load_trio

Event = tuple[str, float, float]  # name, first and last nanosecond
TRACE = "trace.xplane.pb.gz"
_SHOWN = 12  # kinds of kernels in the table
_STEPS = 4  # of the traced chunk
_NUMBERED = re.compile(r"([._]\d+)+$")
_AROUND = ("while", "conditional", "call")  # their events span those of what they run
_TO_HOST = re.compile(r"memcpyd2h|memcpy.*dtoh|device-to-host|infeed|outfeed", re.I)


def run(sizes: Sizes, record: Record, directory: Path) -> None:
    """Records the kernels of a chunk, and leaves its trace, for XProf, in the directory."""
    trio = sizes.trio(("separate", "bfloat16"))
    loaded = load_trio(trio, place=placement())
    case = Case(sizes.middle, sizes.prompts[0], 3 * _STEPS)
    options = Options(
        batch_size=case.batch, max_new_tokens=case.output, eos_ids=(), chunk_steps=_STEPS
    )
    generator = Generator(loaded, options)
    requests = case.requests(trio, alpha=1.0)
    state = generator.new_state(longest_contexts(requests))
    state = generator.admit(state, dict(enumerate(requests)), {})
    state, _ = generator.chunk(state)
    jax.block_until_ready(state)
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch):
            jax.block_until_ready(generator.chunk(state))
        (written,) = Path(scratch).rglob("*.xplane.pb")
        data = written.read_bytes()
    with gzip.open(directory / TRACE, "wb") as file:
        file.write(data)
    kernels, copies = device_events(jax.profiler.ProfileData.from_serialized_xspace(data))
    record(
        {
            **summary(kernels, _STEPS),
            "copies_to_host": len(copies),
            "steps": _STEPS,
            "batch": case.batch,
            "prompt": case.prompt,
            "bytes": timing.step_bytes(loaded, case),
        }
    )


def device_events(profile: Any) -> tuple[list[Event], list[Event]]:
    """The kernels that ran on the first device, and its copies to the host, in order of time.

    A GPU's are on its streams, a TPU's are its XLA operations. On a CPU, whose threads are the
    device, they are the operations of its threads.
    """
    planes = {plane.name: plane for plane in profile.planes}
    devices = sorted(name for name in planes if name.startswith(("/device:GPU", "/device:TPU")))
    plane = planes[devices[0] if devices else "/host:CPU"]
    kernels, copies = [], []
    for line in plane.lines:
        if devices and not line.name.startswith(("Stream", "XLA Ops")):
            continue  # sums over the streams
        for event in line.events:
            stats = dict(event.stats)
            name = str(stats.get("hlo_op", event.name))
            entry = name, event.start_ns, event.start_ns + event.duration_ns
            if _TO_HOST.search(event.name):
                copies.append(entry)
            elif (devices or "hlo_op" in stats) and not name.startswith(_AROUND):
                kernels.append(entry)
    return sorted(kernels, key=lambda e: e[1]), sorted(copies, key=lambda e: e[1])


def summary(kernels: Sequence[Event], steps: int) -> dict[str, Any]:
    """Sums kernels by kind, and what lies between them.

    Args:
      kernels: in order of time; those of several threads may overlap.
      steps: that they belong to.

    Returns:
      Microseconds a step: from the first kernel's start to the last one's end, during which one
      ran at least, and in the gaps between; kernels a step; and the kinds that take most, as
      [name, microseconds a step, kernels a step].
    """
    if not kernels:
        return {"span_us": 0.0, "busy_us": 0.0, "gap_us": 0.0, "kernels": 0.0, "kinds": []}
    busy, reached = 0.0, kernels[0][1]
    for _, start, end in kernels:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = reached - kernels[0][1]
    times: dict[str, float] = collections.defaultdict(float)
    counts: collections.Counter[str] = collections.Counter()
    for name, start, end in kernels:
        kind = _NUMBERED.sub("", name)
        times[kind] += end - start
        counts[kind] += 1
    per_step = 1e3 * steps
    most = sorted(times, key=times.__getitem__, reverse=True)[:_SHOWN]
    return {
        "span_us": span / per_step,
        "busy_us": busy / per_step,
        "gap_us": (span - busy) / per_step,
        "kernels": len(kernels) / steps,
        "kinds": [[kind, times[kind] / per_step, counts[kind] / steps] for kind in most],
    }
