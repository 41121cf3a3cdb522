"""Native RMSNorm of heads in each instruction set, against the reference in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from csae import reference
from csae.kernels import cpu
from csae.kernels.cpu.scaled_heads import scale_heads, scale_heads_backward
from csae.ops import heads as ops

if not cpu.available():
    pytest.skip(f"native library: {cpu.why_not()}", allow_module_level=True)


SHAPES = [(1, 1, 1), (3, 2, 7), (2, 5, 8, 32), (4, 3, 64), (301, 2, 33), (1, 1, 1, 1, 300), (0, 4, 5)]


def outcomes(heads: Tensor, gain: Tensor | None, grad: Tensor, by: ModuleType = ops) -> list[Tensor]:
    """What comes out with bounded_heads where there is no gain, with unit_heads where there is; and the gradients."""
    inputs = [tensor.clone().requires_grad_() for tensor in (heads, gain) if tensor is not None]
    out = by.bounded_heads(*inputs) if gain is None else by.unit_heads(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference_forward_and_every_gradient(shape: tuple[int, ...], with_gain: bool) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    heads, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    heads *= 10 ** torch.linspace(-4, 3, shape[-2])[:, None]
    gain = torch.randn(shape[-2], generator=generator) if with_gain else None
    wanted = outcomes(heads.double(), None if gain is None else gain.double(), grad.double(), reference)
    for found, right in zip(outcomes(heads, gain, grad), wanted, strict=True):
        assert found.dtype == torch.float32
        largest = float(right.detach().abs().max()) if right.numel() else 0.0
        torch.testing.assert_close(found.double(), right, rtol=2e-5, atol=2e-6 * largest)


def test_zero_stays_zero_and_nan_is_seen() -> None:
    heads = torch.randn(3, 2, 8)
    heads[1, 0], heads[2, 1, 3] = 0, torch.nan
    out, d_heads, d_gain = outcomes(heads, torch.ones(2), torch.ones_like(heads))
    assert not out[1, 0].any()
    assert d_heads[1, 0].isfinite().all()
    assert out[2, 1].isnan().all()
    assert d_heads[2, 1].isnan().all()
    assert out[:2].isfinite().all()
    assert d_gain.isnan().tolist() == [False, True]


def test_any_strides_and_any_number_of_threads() -> None:
    heads, grad, gain = torch.randn(40, 3, 50), torch.randn(40, 3, 50), torch.randn(3)
    wanted = outcomes(heads, gain, grad)
    others = heads.transpose(0, 1).contiguous().transpose(0, 1), grad.repeat(1, 1, 2)[..., :50]
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for found, right in zip(outcomes(others[0], gain, others[1]), wanted, strict=True):
            assert torch.equal(found, right)


def test_a_second_derivative_is_refused() -> None:
    heads = torch.randn(2, 3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.bounded_heads(heads).square().sum(), heads, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("heads", "gain", "error", "words"),
    [
        (torch.zeros(2, 3, 4, dtype=torch.float64), None, TypeError, "heads: given torch.float64"),
        (torch.zeros(4), None, ValueError, r"heads: given shape \[4\]"),
        (torch.zeros(2, 0, 4), None, ValueError, r"heads: given shape \[2, 0, 4\]"),
        (torch.zeros(2, 3, 4), torch.zeros(4), ValueError, r"gain: given shape \[4\]; needed \[3\]"),
        (3, None, TypeError, "heads: given int"),
    ],
)
def test_bad_arguments(heads: Tensor, gain: Tensor | None, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        scale_heads(heads, gain, 1.0, 1.0)


def test_bad_arguments_of_the_gradient() -> None:
    heads, scale = torch.zeros(2, 3, 4), torch.zeros(2, 3, 1)
    with pytest.raises(ValueError, match=r"grad: given shape \[2, 3, 5\]; needed \[2, 3, 4\]"):
        scale_heads_backward(torch.zeros(2, 3, 5), heads, None, scale, 1.0)
    with pytest.raises(ValueError, match=r"scale: given shape \[2, 3\]"):
        scale_heads_backward(heads, heads, None, scale.squeeze(-1), 1.0)
