"""The collectives over gloo, between processes, for every element type that the workers send."""

import json
import subprocess
import sys

import pytest
import torch
from octavo.workers.parallel import TensorParallel


def test_what_only_compiles_meets_no_other_rank():
    """A rank that lives on has its kernels, and would not come: no group is joined here."""
    tp = TensorParallel(1, 2, torch.device("cpu")).for_compiling()
    tensor = torch.tensor([[3.0, -1.0]])
    assert tp.all_reduce(tensor).tolist() == [[3.0, -1.0]]
    assert [part.tolist() for part in tp.start_all_reduce(tensor, tensor)()] == [[[3.0, -1.0]]]
    assert tp.all_reduce_max(tensor).tolist() == [[3.0, -1.0]]
    assert tp.all_gather(tensor).shape == (2, 1, 2)
    assert (tp.min_int(5), tp.rank, tp.size) == (5, 1, 2)


SCRIPT = """
import json, os, sys
import torch
import torch.distributed as dist
from octavo.workers.parallel import TensorParallel

rank, size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(path, size), rank=rank, world_size=size)
tp = TensorParallel(rank, size, torch.device("cpu"), dist.group.WORLD)
found = {"min_int": tp.min_int(10 - rank)}
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64):
    tensor = torch.arange(3).to(dtype) * (rank + 1)
    found[str(dtype)] = {
        "all_reduce": tp.all_reduce(tensor.clone()).tolist(),
        "all_reduce_max": tp.all_reduce_max(-tensor).tolist(),
        "all_gather": tp.all_gather(tensor.expand(2, 3).t()).tolist(),
    }
# Minus infinity is what masked logits are.
found["masked"] = tp.all_reduce_max(torch.tensor([-torch.inf, 2.0 - 3 * rank])).tolist()
print(json.dumps(found), flush=True)
dist.barrier()
# Gloo's threads do not always survive the end of the interpreter, which is not what is tested.
os._exit(0)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks got."""
    store = tmp_path_factory.mktemp("store") / "file"
    command = [sys.executable, "-c", SCRIPT]
    processes = [
        subprocess.Popen([*command, str(rank), "2", str(store)], stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(output) for output in outputs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "int64"])
def test_collectives(dtype, ranks):
    for found in ranks:
        results = found[f"torch.{dtype}"]
        assert results["all_reduce"] == [0, 3, 6]
        assert results["all_reduce_max"] == [0, -1, -2]
        assert results["all_gather"] == [[[0, 0], [1, 1], [2, 2]], [[0, 0], [2, 2], [4, 4]]]


def test_ranks_agree_on_the_least_and_on_masked_logits(ranks):
    assert [found["min_int"] for found in ranks] == [9, 9]
    assert [found["masked"] for found in ranks] == [[-float("inf"), 2.0]] * 2


def test_one_rank_needs_no_group():
    tp = TensorParallel(0, 1, torch.device("cpu"))
    tensor = torch.tensor([1.0, 2.0])
    assert tp.all_reduce(tensor) is tensor
    assert tp.all_reduce_max(tensor) is tensor
    assert tp.all_gather(tensor).tolist() == [[1.0, 2.0]]
    assert tp.min_int(4) == 4
