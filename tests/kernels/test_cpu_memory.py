"""Memory of large results is reused once nothing refers to it any more, and not before."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from csae.kernels import cpu
from csae.kernels.cpu import memory
from csae.ops import sparse_decode, topk_encode

if not cpu.available():
    pytest.skip(f"native library: {cpu.why_not()}", allow_module_level=True)

map_memory = mmap.mmap
SHAPE = (9, 1 << 20)  # 36 MB of float32


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    cpu.release()
    yield
    cpu.release()


def test_given_out_again_when_it_is_gone() -> None:
    tensor = memory.fresh(SHAPE, torch.float32)
    assert tensor.shape == SHAPE
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    tensor.fill_(1)
    address = tensor.data_ptr()
    assert memory.fresh(SHAPE, torch.float32).data_ptr() != address
    del tensor
    again = memory.fresh((1 << 20, 18), torch.bfloat16)  # as large, whatever it is
    assert again.data_ptr() == address
    assert again.dtype == torch.bfloat16
    assert again.shape == (1 << 20, 18)


def as_gradient(tensor: Tensor) -> Tensor:
    parameter = torch.zeros(SHAPE, requires_grad=True)
    parameter.grad = tensor
    return parameter


@pytest.mark.parametrize(
    ("hold", "look"),
    [
        pytest.param(lambda tensor: tensor[5, ::7], lambda view: float(view.max()), id="view"),
        pytest.param(lambda tensor: tensor.numpy()[2], lambda array: float(array.max()), id="numpy"),
        pytest.param(lambda tensor: memoryview(tensor.numpy()), lambda view: view[3, 4], id="buffer"),
        pytest.param(Tensor.untyped_storage, lambda storage: storage[3] and 3, id="storage"),
        pytest.param(as_gradient, lambda parameter: float(parameter.grad.max()), id="gradient"),
    ],
)
def test_not_given_out_while_something_sees_it(hold: Callable[[Tensor], Any], look: Callable[[Any], float]) -> None:
    tensor = memory.fresh(SHAPE, torch.float32).fill_(3)
    address, held = tensor.data_ptr(), hold(tensor)
    del tensor
    other = memory.fresh(SHAPE, torch.float32).fill_(0)
    assert other.data_ptr() != address
    assert look(held) == 3
    del held
    assert memory.fresh(SHAPE, torch.float32).data_ptr() == address


def test_only_so_much_is_kept() -> None:
    tensors = [memory.fresh(SHAPE, torch.float32) for _ in range(6)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 6
    del tensors
    assert len(memory._free) == 4
    del_me = memory.fresh((memory.MOST_BYTES + 1,), torch.int8)
    del del_me
    small = memory.fresh((100, 100), torch.float32)
    del small
    assert len(memory._free) == 4
    assert all(len(block) == 36 << 20 for block in memory._free)
    cpu.release()
    assert len(memory._free) == 0


def test_blocks_of_other_sizes_are_left() -> None:
    sizes = (33, 47, 61)
    tensors = [memory.fresh((size << 20,), torch.int8) for size in sizes]
    addresses = [tensor.data_ptr() for tensor in tensors]
    tensors.clear()
    assert [memory.fresh((size << 20,), torch.int8).data_ptr() for size in sizes] == addresses
    assert memory.fresh((50 << 20,), torch.int8).data_ptr() not in addresses


def test_a_training_step_of_plain_autograd_maps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two dense gradients, of 40 MB each, are in the memory of those of the step before.

    Page faults aren't counted: malloc may give its small blocks back and have as many.
    """
    mapped = []
    monkeypatch.setattr(memory.mmap, "mmap", lambda *args, **kw: mapped.append(args) or map_memory(*args, **kw))
    x, g = torch.randn(8, 512), torch.randn(8, 512)
    W_enc, W_dec = (torch.randn(20480, 512, requires_grad=True) for _ in range(2))
    b = torch.zeros(20480)
    addresses = []
    for _ in range(6):
        W_enc.grad = W_dec.grad = None
        sparse_decode(*topk_encode(x, W_enc, b, 4), W_dec).backward(g)
        assert W_enc.grad is not None
        assert W_dec.grad is not None
        addresses.append({W_enc.grad.data_ptr(), W_dec.grad.data_ptr()})
    assert len(mapped) == 2
    assert all(step == addresses[0] for step in addresses)


def test_the_memory_is_a_process_s_own() -> None:
    """A child that was forked writes to a copy."""
    program = """
import os, torch
from csae.kernels.cpu import memory
from csae.ops import sparse_decode, topk_encode
torch.set_num_threads(1)  # a child has no other
tensor = memory.fresh((9, 1 << 20), torch.float32).fill_(1)
if os.fork() == 0:
    tensor.fill_(2)
    os._exit(0)
os.wait()
print(float(tensor.max()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "1.0\n"
