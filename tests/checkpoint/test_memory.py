"""What loading needs beside the tensors that it fills, measured on a checkpoint of 1 GiB in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch

from dlm_ray.checkpoint import arrays, commit

FIELDS = {"step": 1, "recipe": {}, "tokenizer": {}, "model": {}, "capabilities": {}, "cursor": {}, "extra": {}}
MIB = 2**20

PROGRAM = """
import json, sys
import torch
from dlm_ray.checkpoint import commit

def resident(name):
    [line] = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024

directory, dtype = sys.argv[1], getattr(torch, sys.argv[2])
tensors = {name: torch.ones(entry.shape, dtype=dtype) for name, entry in commit.read_manifest(directory).arrays.items()}
commit.load(directory, {"warm": tensors.pop("warm")})  # what the library itself needs once
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
commit.load(directory, tensors)
print(json.dumps({"beside": resident("VmHWM") - before, "loaded": sum(tensor.nbytes for tensor in tensors.values())}))
"""


@pytest.fixture(scope="module")
def gibibyte(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("large") / "step_00000001")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w{number}": torch.randn(8192, 8192, generator=generator) for number in range(4)}
    commit.save(directory, tensors | {"warm": torch.ones(100)}, FIELDS)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_its_tensors_and_the_buffer_of_a_chunk(gibibyte, dtype):
    """In place, and by way of a conversion. A chunk of 4 MiB is on its way at a time: as it was stored, decoded, and
    converted. With what the
    allocator keeps for reading threads, resident memory grows by 14 to 26 MiB, for any size of state."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, gibibyte, dtype], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["loaded"] == 4 * 8192 * 8192 * getattr(torch, dtype).itemsize
    assert found["beside"] < 8 * arrays.CHUNK_BYTES, f"{found['beside'] / MIB:.0f} MiB"
