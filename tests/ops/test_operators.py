"""Every registered operator passes torch.library.opcheck, and works under tracers and transforms."""

from __future__ import annotations

import itertools
import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from csae import ops
from csae.kernels import cpu
from csae.kernels.cpu import library, topk_coarse
from csae.ops.recurrence import Weights
from csae.ops.threshold_encode import _threshold_table
from csae.ops.topk_encode import _round_table

for _module in pkgutil.iter_modules(ops.__path__):
    import_module(f"csae.ops.{_module.name}")  # registers its operators

K = 3


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def apart(tensor: Tensor) -> Tensor:
    """The same numbers, with others between them."""
    return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {"contiguous": lambda t: t, "apart": apart, "transposed": transposed}


def weights(dtype: torch.dtype = torch.float32, d_out: int | None = None, d_query: int = 6) -> Weights:
    """Of width 6, 11 features, 2 heads of width 3 and values of width 4, a memory of width 5; d_out: a transcoder's."""
    out = d_out or 6
    shapes = [(11, 6), (11,), (11, out), (out,), (11, 5), (6, d_query), (6, 5), (8, 5), (out, 8), (2,), (2,), (2,)]
    shapes += [(6, 8)] if d_out else []
    return Weights(*(normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)))


def encoded(B: int, T: int) -> tuple[Tensor, Tensor]:
    return normal(B, T, K).abs(), torch.randint(0, 11, (B, T, K), generator=torch.Generator().manual_seed(1))


def of_the_recurrence(B: int, T: int, form: Callable[[Tensor], Tensor]) -> Iterator[tuple[object, ...]]:
    forms = (
        (False, 2, None, None),
        (True, 0, None, None),
        (False, 2, 7, ()),
        (False, 2, None, (11,)),
        (True, 0, 7, None),
    )
    for decoding, m, d_out, thresholds in forms:
        given = (None, *encoded(B, T)) if decoding else (form(normal(B, T, 6)), None, None)
        mask, starts = normal(B, T) > -1, torch.zeros(B, T, dtype=torch.int64)
        memory, takes_part = torch.zeros(B, 4, 2 * (3 + 4 + m)), torch.zeros(B, 4, dtype=torch.bool)
        past = form(normal(B, d_out or 6))
        state = mask, form(starts), memory, takes_part, past, 2, torch.arange(m)
        by = weights(d_out=d_out, d_query=past.shape[1] if decoding else 6)
        above = None if thresholds is None else torch.full(thresholds, 0.1)
        yield *given, *state, list(map(form, by.tensors())), K, 2, decoding, [], above


def calls(name: str, B: int, T: int, form: Callable[[Tensor], Tensor]) -> Iterator[tuple[object, ...]]:
    """Arguments of an operator, for B windows of T positions that lie as `form` has them."""
    by, x, (values, indices) = Weights(*map(form, weights().tensors())), form(normal(B, T, 6)), encoded(B, T)
    n = B * T
    if name in ("topk_encode", "encode_wide"):
        yield x, by.W_enc, by.b_enc, K
    elif name == "topk_encode_backward":
        for needed in ((True, True, True), (False, True, False), (True, False, False), (False, False, True)):
            yield form(normal(B, T, K)), values, indices, x, by.W_enc, *needed
    elif name == "with_encode_gradient":
        yield x, by.W_enc, by.b_enc, form(values), indices
    elif name == "encode_and_keep":
        yield x, by.W_enc, by.b_enc, K
    elif name == "encode_again":
        yield normal(n, 11), form(normal(B, T, 4)), form(normal(11, 4)), K
    elif name == "round_table":
        yield form(normal(1600, 130)), normal(1600), K
    elif name == "encode_by_table":
        table = _round_table(normal(1600, 130), normal(1600), K)
        for last in (None, torch.zeros(2, n)):
            yield form(normal(B, T, 130)), form(normal(1600, 130)), normal(1600), K, table, last
    elif name.startswith(("threshold_", "near_")):
        for threshold in (torch.tensor(0.5), form(normal(11))):
            encoder = by.W_enc, by.b_enc, threshold
            if name == "threshold_encode_again":
                yield normal(n, 11), form(normal(B, T, 4)), form(normal(11, 4)), threshold, K
            elif name in ("near_threshold", "threshold_and_near"):
                yield x, *encoder, 0.7, K
            elif name not in ("threshold_table", "threshold_encode_by_table"):
                yield x, *encoder, K
        for threshold in (torch.tensor(20.0), form(normal(1600) + 20)):
            wide = form(normal(1600, 130)), normal(1600), threshold, K
            if name == "threshold_table":
                yield wide
            elif name == "threshold_encode_by_table":
                yield form(normal(B, T, 130)), *wide, _threshold_table(*wide)
    elif name.startswith("batch_"):
        for guess in (None, torch.tensor(0.5)):
            mask = None if guess is None else normal(n) > -1
            if name == "batch_encode_again":
                yield normal(n, 11), form(normal(B, T, 4)), form(normal(11, 4)), 2, K, mask, guess
            else:
                yield x, by.W_enc, by.b_enc, 2, K, mask, guess
    elif name == "decode_steps":
        yield form(torch.zeros(B, T, K)), values, indices, by.W_dec
    elif name == "sparse_decode":
        yield form(values), form(indices), by.W_dec
    elif name == "sparse_decode_backward":
        for needed in ((True, True), (False, True), (True, False)):
            yield form(normal(B, T, 6)), form(values), form(indices), by.W_dec, *needed
    elif name in ("lookback_attention", "lookback_attention_backward"):
        q, k, v = form(normal(B, T, 2, 3)), form(normal(B, T, 2, 3, seed=1)), form(normal(B, T, 2, 4))
        for bounds in ((None, None), (normal(B, T) > 0, torch.zeros(B, T, dtype=torch.int32))):
            given = q, k, v, by.slope, by.null, *bounds
            if name == "lookback_attention":
                yield given
            else:
                yield form(normal(B, T, 2, 4, seed=2)), *given, *torch.ops.csae.lookback_attention(*given)
    elif name in ("scale_heads", "scale_heads_backward"):
        for gain in (None, by.gain):
            heads = form(normal(B, T, 2, 4))
            if name == "scale_heads":
                yield heads, gain, 1e-6, 1.0
            else:
                scale = torch.ops.csae.scale_heads(heads, gain, 1e-6, 1.0)[1]
                yield form(normal(B, T, 2, 4, seed=1)), heads, gain, scale, 1.0
    elif name == "fvu":
        for c in (None, form(normal(B, T, 6, seed=2))):
            yield form(x), form(normal(B, T, 6, seed=1)), c, by.b_dec, torch.ones(B, T)
    elif name == "fvu_backward":
        yield torch.tensor(0.3), torch.tensor(7.0), form(x), torch.ones(B, T), torch.float32
    elif name in ("active_features", "fired"):
        for mask in (None, normal(B, T) > -1):
            code = form(normal(B, T, K)), form(indices), mask
            yield (*code, 11) if name == "active_features" else (torch.arange(11), *code)
    elif name == "over_scale":
        for mask in (None, normal(B, T) > -1):
            yield x, torch.tensor(3.0), mask
    elif name == "adam_numbers":
        for lr in (None, torch.tensor(0.1)):
            yield torch.rand(3, 6, dtype=torch.float64), torch.tensor(3.0), lr, 0.2
    elif name == "multiply":
        yield form(normal(n, 6)), form(normal(6, 9))
    elif name == "recur":
        yield from of_the_recurrence(B, T, form)
    elif name == "sort_codes":
        codes = indices.flatten(0, 1)
        yield [form(codes), form(codes.flip(-1))], [0, 1, 0], [2, 1], 11
    elif name in ("sort_pairs", "feature_sums", "adam_rows"):
        tokens = torch.arange(n).repeat_interleave(K)
        if name == "sort_pairs":
            yield form(indices.flatten()), form(tokens), 11
            return
        pairs = torch.ops.csae.sort_pairs(indices.flatten(), tokens, 11)
        factors = [values.flatten()] * 2, [form(normal(n, 6)), torch.ones(n, 1)]
        if name == "feature_sums":
            yield *pairs, *factors
            return
        hyper, seed = torch.tensor([1e-3, 1.5, 1e-8, 0.1, 0.999, 0.001]), torch.ones(1, dtype=torch.int64)
        for lazy, moments in ((False, torch.float32), (True, torch.bfloat16)):
            tables = [normal(11, 6), normal(11, 1)]
            averages = [[torch.zeros_like(table, dtype=moments) for table in tables] for _ in range(2)]
            copies = [False, True], [tables[1].bfloat16()]
            yield *pairs, tables, *averages, *factors, [True, False], hyper, seed, lazy, 0, *copies
    else:
        raise AssertionError(f"{name}: an operator without a check; give its arguments here")


NAMES = sorted(name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("csae::"))
SIZES = {"two windows": (2, 3), "one position": (1, 1), "nothing": (0, 3), "no positions": (2, 0)}
# Those with a gradient.
DIFFERENTIABLE = ["topk_encode", "with_encode_gradient", "sparse_decode", "lookback_attention", "scale_heads"]
DIFFERENTIABLE += ["multiply", "threshold_encode", "batch_topk_encode", "decode_steps"]


@pytest.fixture(autouse=True)
def coarsely(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of rounded weights is made, whether or not this CPU has units for it."""
    if cpu.available():
        monkeypatch.setattr(library, "multiplies_bfloat16", lambda: True)
        monkeypatch.setattr(topk_coarse, "LEAST_SAMPLED", 4)


def operator(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.csae, name).default


def given_to(name: str, size: str, form: str) -> Iterator[tuple[object, ...]]:
    if name.endswith("_table") and not cpu.available():
        pytest.skip(str(cpu.why_not()))
    return calls(name, *SIZES[size], FORMS[form])


def test_all_operators_are_known() -> None:
    assert {"recur", "scale_heads", "multiply", "topk_encode", "adam_rows"} <= set(NAMES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, size: str, form: str) -> None:
    for given in given_to(name, size, form):
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator(name), given, test_utils=utils)


def leaves(given: tuple[object, ...]) -> list[Tensor]:
    """The floating tensors, lists included."""
    flat = [of for one in given for of in (one if isinstance(one, list) else [one])]
    return [of for of in flat if isinstance(of, Tensor) and of.is_floating_point()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "needed"),
    [*((name, "none") for name in NAMES), *itertools.product(DIFFERENTIABLE, ["all", "first", "last"])],
)
def test_opcheck_with_gradients_and_dynamic_shapes(name: str, needed: str) -> None:
    for given in given_to(name, "two windows", "apart"):
        floats = leaves(given)
        for tensor in {"none": [], "all": floats, "first": floats[:1], "last": floats[-1:]}[needed]:
            tensor.requires_grad_()
        torch.library.opcheck(operator(name), given)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", NAMES)
def test_a_traced_graph_does_what_the_operator_does(name: str, mode: str) -> None:
    """The numbers of the trace are not in the graph."""
    for given in given_to(name, "two windows", "apart"):
        flat, where = torch.utils._pytree.tree_flatten(given)
        tensors = [number for number, of in enumerate(flat) if isinstance(of, Tensor)]

        def run(*own: Tensor, flat: list[object] = flat, where: object = where, tensors: list[int] = tensors) -> object:
            full = list(flat)
            for number, tensor in zip(tensors, own, strict=True):
                full[number] = tensor
            out = operator(name)(*torch.utils._pytree.tree_unflatten(full, where))
            return [out, *own]  # what it wrote to as well

        graph = make_fx(run, tracing_mode=mode)(*(flat[number].clone() for number in tensors))
        others = [flat[number] * 2 if flat[number].is_floating_point() else flat[number].clone() for number in tensors]
        found, wanted = graph(*(of.clone() for of in others)), run(*(of.clone() for of in others))
        torch.testing.assert_close(found, wanted, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_gives_the_same_or_raises(name: str) -> None:
    for given in given_to(name, "two windows", "contiguous"):
        if isinstance(given[0], list) or any(isinstance(of, list) for of in given):
            continue  # vmap takes no lists of tensors for one
        tensors = [of for of in given if isinstance(of, Tensor)]
        twice = [torch.stack([of, of]) for of in tensors]

        def run(*own: Tensor, given: tuple[object, ...] = given) -> object:
            left = iter(own)
            return operator(name)(*(next(left) if isinstance(of, Tensor) else of for of in given))

        try:
            found = torch.vmap(run)(*twice)
        except (RuntimeError, ValueError):
            continue
        wanted = run(*tensors)
        for got, want in zip(*(torch.utils._pytree.tree_leaves(of) for of in (found, wanted)), strict=True):
            torch.testing.assert_close(got, torch.stack([want, want]))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_torch_func_gives_the_same_gradient_or_raises(name: str) -> None:
    for given in given_to(name, "two windows", "contiguous"):

        def loss(first: Tensor, rest: tuple[object, ...] = given[1:]) -> Tensor:
            out = operator(name)(first, *rest)
            return (out[0] if isinstance(out, tuple) else out).square().sum()

        first = given[0].clone().requires_grad_()
        (wanted,) = torch.autograd.grad(loss(first), first)
        try:
            found = torch.func.grad(loss)(given[0])
        except RuntimeError:
            continue
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", sorted(set(DIFFERENTIABLE) - {"multiply"}))
def test_a_second_derivative_is_refused(name: str) -> None:
    for given in given_to(name, "two windows", "contiguous"):
        first = given[0].clone().requires_grad_()
        out = operator(name)(first, *given[1:])
        out = out[0] if isinstance(out, tuple) else out
        (gradient,) = torch.autograd.grad(out.square().sum(), first, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice; needed a first derivative only"):
            gradient.sum().backward()


@pytest.mark.parametrize("name", ["topk_encode", "lookback_attention", "scale_heads", "multiply", "recur"])
def test_autocast_does_not_reach_inside(name: str) -> None:
    for given in given_to(name, "two windows", "contiguous"):
        own = [of.clone() if isinstance(of, Tensor) else of for of in given]
        wanted = operator(name)(*given)
        with torch.autocast("cpu", torch.bfloat16):
            found = operator(name)(*own)
        for got, want in zip(*(torch.utils._pytree.tree_leaves(of) for of in (found, wanted)), strict=True):
            assert torch.equal(got, want)
