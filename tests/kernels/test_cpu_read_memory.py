"""The read of the memory, against the look-back attention of the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csae import reference
from csae.kernels import cpu
from csae.kernels.cpu.read_memory import read_memory
from csae.kernels.portable import read_memory as portable

if not cpu.available():
    pytest.skip(f"native library: {cpu.why_not()}", allow_module_level=True)


pytestmark = pytest.mark.usefixtures("isa")


def inputs(B: int, L: int, H: int, d_head: int, d_value: int, t: int, scale: float = 1.0) -> list[Tensor | int]:
    generator = torch.Generator().manual_seed(B + L + H + d_head + d_value + t)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [
        scale * normal(B, H, d_head),
        scale * normal(B, L, H * (d_head + d_value)),
        torch.rand(B, L, generator=generator) > 0.2,
        normal(H).abs(),
        normal(H),
        torch.randint(0, max(1, t), (B,), generator=generator),
        torch.rand(B, generator=generator) > 0.1,
        t,
    ]


SHAPES = [
    (1, 1, 1, 1, 1, 0),
    (1, 1, 1, 1, 1, 1),
    (2, 5, 3, 7, 9, 4),  # room for more
    (2, 5, 3, 7, 9, 5),
    (3, 5, 2, 16, 32, 17),  # old positions forgotten
    (4, 40, 8, 32, 64, 33),
    (1, 17, 2, 33, 1, 100),
    (2, 9, 1, 4, 0, 9),
    (0, 4, 2, 3, 5, 3),
]


def widened(given: list[Tensor | int]) -> list[Tensor | int]:
    return [of.double() if isinstance(of, Tensor) and of.is_floating_point() else of for of in given]


def wanted(
    q: Tensor, memory: Tensor, takes_part: Tensor, slope: Tensor, null: Tensor, start: Tensor, looks: Tensor, t: int
) -> Tensor:
    """The last position of the reference's attention over what the ring buffer holds, in order, and position t."""
    B, H, d_head = q.shape
    at = torch.arange(max(0, t - memory.shape[1]), t)
    rows = memory[:, at % memory.shape[1]]
    keys, values = rows[..., : H * d_head].unflatten(-1, (H, d_head)), rows[..., H * d_head :].unflatten(-1, (H, -1))
    here = takes_part[:, at % memory.shape[1]] & (at >= start[:, None])
    # Position t has no key and no value of its own: it looks at earlier ones only.
    queries, keys, values = (
        torch.cat([of.expand(B, len(at), *of.shape[2:]), last.expand(B, 1, *of.shape[2:])], dim=1)
        for of, last in ((q[:, None] * 0, q[:, None]), (keys, q[:, None]), (values, values.new_zeros(1, 1, 1, 1)))
    )
    mask = torch.cat([here, looks[:, None]], dim=1)
    return reference.lookback_attention(queries, keys, values, slope, null, mask)[:, -1].flatten(1)


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, ...]) -> None:
    given = inputs(*shape)
    expected = wanted(*widened(given))  # type: ignore[arg-type]
    torch.testing.assert_close(read_memory(*given).double(), expected, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_plain_one_matches_it_too(shape: tuple[int, ...]) -> None:
    """With a number and with a tensor for t."""
    *given, t = widened(inputs(*shape))
    expected = wanted(*given, t)  # type: ignore[arg-type]
    for at in (t, torch.tensor([t])):
        torch.testing.assert_close(portable.read_memory(*given, at), expected, rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]


def test_large_scores_do_not_overflow() -> None:
    given = inputs(2, 30, 2, 8, 4, 30, scale=40)
    expected = wanted(*widened(given))  # type: ignore[arg-type]
    torch.testing.assert_close(read_memory(*given).double(), expected, rtol=1e-4, atol=1e-3)  # type: ignore[arg-type]


def test_nan_is_seen_where_it_is_looked_at() -> None:
    q, memory, takes_part, slope, null, start, looks, t = inputs(3, 8, 2, 4, 4, 8)
    assert isinstance(memory, Tensor)
    assert isinstance(takes_part, Tensor)
    memory[1, 5] = torch.nan
    start, looks = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
    takes_part[:] = True
    seen = read_memory(q, memory, takes_part, slope, null, start, looks, t)  # type: ignore[arg-type]
    assert seen[1].isnan().all()
    assert seen[[0, 2]].isfinite().all()
    takes_part[1, 5] = False
    hidden = read_memory(q, memory, takes_part, slope, null, start, looks, t)  # type: ignore[arg-type]
    assert hidden.isfinite().all()


def test_any_strides_and_any_number_of_threads() -> None:
    q, memory, takes_part, slope, null, start, looks, t = inputs(5, 12, 2, 3, 4, 11)
    assert isinstance(memory, Tensor)
    expected = read_memory(q, memory, takes_part, slope, null, start, looks, t)  # type: ignore[arg-type]
    wider = torch.zeros(5, 12, 2, memory.shape[2])
    wider[:, :, 1] = memory
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found = read_memory(q, wider[:, :, 1], takes_part, slope, null, start, looks, t)  # type: ignore[arg-type]
            assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("place", "value", "error", "words"),
    [
        (0, torch.zeros(2, 3, 7, dtype=torch.float64), TypeError, "q: given torch.float64"),
        (1, torch.zeros(3, 5, 48), ValueError, "memory: given shape"),
        (1, torch.zeros(2, 5, 47), ValueError, "memory: given rows of 47"),
        (2, torch.zeros(2, 4, dtype=torch.bool), ValueError, "takes_part: given shape"),
        (5, torch.zeros(2, dtype=torch.int32), TypeError, "start: given torch.int32"),
        (7, -1, ValueError, "t: given -1"),
    ],
)
def test_bad_arguments(place: int, value: object, error: type[Exception], words: str) -> None:
    given = inputs(2, 5, 3, 7, 9, 4)
    given[place] = value  # type: ignore[call-overload]
    with pytest.raises(error, match=words):
        read_memory(*given)  # type: ignore[arg-type]
