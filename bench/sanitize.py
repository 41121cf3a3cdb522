"""Every kernel on small, awkward cases, to be run under compute-sanitizer.

    compute-sanitizer --tool memcheck python -m csae.bench.sanitize [WORDS]      cases with all WORDS in their names

On a machine without a GPU, with TRITON_INTERPRET=1, the same cases run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from csae.kernels.pairs import Table

# n, d_in, d_sae, k: no multiple of any block; widths in 16 bytes and not.
SHAPES = ((5, 24, 67, 3), (9, 7, 40, 40), (130, 136, 300, 17))
# Rows too long for a program to hold, in 16 bytes and not. The interpreter would take a minute.
LONG = ((6, 8200, 20, 3), (5, 2051, 20, 3))
# For the products alone: loads of 16 bytes, TMA with many tiles a program and a last block of d_in that is not full,
# several ranges, and enough features for topk_threshold.py's own kernels. Too large for the interpreter.
WIDE = ((4096, 64, 16384, 17), (4096, 200, 16384, 17))
WINDOWS = ((1, 3, 1, 5, 7), (2, 70, 2, 16, 8), (1, 130, 1, 72, 40))  # B, T, H, d_head, d_value
LOWEST = torch.iinfo(torch.int64).min


def cases(
    device: torch.device, dtypes: tuple[torch.dtype, ...], large: bool = True
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each case with its name. large: those of WIDE and LONG too."""
    names = (
        "topk_encode", "topk_threshold", "threshold_encode", "sparse_decode", "feature_rows", "lookback_attention",
        "activity", "scaling", "fvu", "scaled_heads", "adam_numbers",
    )  # fmt: skip
    topk, threshold, above, sums, rows, look_back, activity, scaling, fvu, heads, numbers = (
        import_module(f"csae.kernels.triton.{name}") for name in names
    )

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for dtype in dtypes:
        for n, d_in, d_sae, k in WIDE if large else ():
            named = f"{str(dtype).removeprefix('torch.')} n={n} d_in={d_in} d_sae={d_sae} k={k}"
            x, W_enc, b_enc = normal(n, d_in, dtype=dtype), normal(d_sae, d_in, dtype=dtype), normal(d_sae, dtype=dtype)
            yield f"topk_encode {named}", partial(topk.topk_encode, x, W_enc, b_enc, k)
            yield f"topk_threshold {named}", partial(threshold.topk_encode, x, W_enc, b_enc, k)
            misled = b_enc.clone()
            misled[: d_sae // threshold.SAMPLE] += 1000  # the sample has all of the largest: every row falls back
            yield f"topk_threshold, misled {named}", partial(threshold.topk_encode, x, W_enc, misled, k)
            for said, at in (("", 2.5), (", which overflows", 0.0)):
                thresholds = torch.full((d_sae,), at * d_in**0.5, device=device)
                yield f"threshold_encode{said} {named}", partial(above.threshold_encode, x, W_enc, b_enc, thresholds, k)
            a, W_a = normal(n, d_in, dtype=dtype), normal(d_sae, d_in, dtype=dtype)
            yield f"second encode {named}", partial(_twice, topk, (x, W_enc, b_enc), a, W_a, k)
        for n, d_in, d_sae, k in (*SHAPES, *LONG) if large else SHAPES:
            named = f"{str(dtype).removeprefix('torch.')} n={n} d_in={d_in} d_sae={d_sae} k={k}"
            x, W_enc, b_enc = normal(n, d_in, dtype=dtype), normal(d_sae, d_in, dtype=dtype), normal(d_sae, dtype=dtype)
            yield f"topk_encode {named}", partial(topk.topk_encode, x, W_enc, b_enc, k)
            yield f"topk_threshold {named}", partial(threshold.topk_encode, x, W_enc, b_enc, k)
            given = (x, W_enc, b_enc, torch.ones((), device=device))
            yield f"threshold_encode {named}", partial(above.threshold_encode, *given, k)
            yield f"near_threshold {named}", partial(above.near_threshold, *given, 1.0, k)
            a, W_a = normal(n, 12, dtype=dtype), normal(d_sae, 12, dtype=dtype)
            yield f"second encode {named}", partial(_twice, topk, (x, W_enc, b_enc), a, W_a, k)
            # One index is outside the table: it must not be followed.
            values, indices = normal(n, k, dtype=dtype), torch.randint(d_sae, (n, k), device=device)
            indices[0, 0], indices[-1, -1] = d_sae, LOWEST
            yield f"gather_sum {named}", partial(sums.gather_sum, values, indices, W_enc)
            yield f"gather_dot {named}", partial(sums.gather_dot, x, values, indices, W_enc)
            mask = torch.rand(n, device=device) > 0.2
            yield f"active_features {named}", partial(activity.active_features, values, indices, mask, d_sae)
            since = torch.ones(d_sae, dtype=torch.int64, device=device)
            yield f"fired {named}", partial(activity.fired, since, values, indices.clone(), mask)
            yield f"over_scale {named}", partial(scaling.over_scale, x, torch.ones((), device=device), mask)

            def missed(x=x, mask=mask, d_in=d_in) -> object:
                weight, bias = mask.float(), normal(d_in)
                share, of_x, residual = fvu.fvu(x.float(), x, x, bias, weight)
                return fvu.fvu_backward(share, of_x, residual, weight, x.dtype)

            if dtype != torch.float16:
                yield f"fvu {named}", missed
            indices[1:, 0] = 1  # a long run
            features, tokens = indices.flatten(), torch.arange(n, device=device).repeat_interleave(k)
            weights = values.float().flatten()

            def gradients(features=features, tokens=tokens, weights=weights, x=x, d_sae=d_sae) -> object:
                pairs = rows.sort_pairs(features, tokens, d_sae)
                return rows.feature_sums(pairs, [weights, weights], [x, 2 * x])

            yield f"feature_sums {named}", gradients
            of_codes = [of.clamp(0, d_sae) for of in (indices, indices.flip(0))]
            yield f"sort_codes {named}", partial(rows.sort_codes, of_codes, [[0, 1], [0]], d_sae)

            def adam(features=features, tokens=tokens, weights=weights, x=x, d_sae=d_sae) -> None:
                pairs = rows.sort_pairs(features, tokens, d_sae)
                hyper = torch.tensor([1e-3, 1.0, 1e-8, 0.1, 0.999, 0.001], device=device)
                seed = torch.ones(1, dtype=torch.int64, device=device)
                for moments in dict.fromkeys((torch.float32, dtypes[-1])):
                    param, *moment = (torch.rand(d_sae, x.shape[1], device=device) for _ in range(3))
                    exp_avg, exp_avg_sq = (of.to(moments) for of in moment)
                    bias, bias_avg, bias_avg_sq = (torch.rand(d_sae, 1, device=device) for _ in range(3))
                    ones = torch.ones(x.shape[0], 1, device=device)
                    for lazy in (False, True):
                        tables = [
                            Table(param, exp_avg, exp_avg_sq, weights, x, lazy, rounded=param.bfloat16()),
                            Table(bias, bias_avg, bias_avg_sq, weights, ones, False),
                        ]
                        rows.adam_rows(pairs, tables, hyper, seed, lazy)

            if dtype != torch.float16:
                yield f"adam_rows {named}", adam
        constants = torch.tensor([[1, 1, 1e-8, 0.1, 1, 1], [0.9, 0.999, 0, 0, 0, 0], [-1, -0.5, 1, 1, 1, 1]])
        given_numbers = constants.double().to(device), torch.ones((), device=device), None, 1e-3
        yield f"adam_numbers {str(dtype).removeprefix('torch.')}", partial(numbers.adam_numbers, *given_numbers)
        for B, T, H, d_head, d_value in WINDOWS:
            q, k_, v = (normal(B, T, H, d, dtype=dtype) for d in (d_head, d_head, d_value))
            slope, null = normal(H, dtype=dtype).abs(), normal(H, dtype=dtype)
            mask = torch.rand(B, T, device=device) > 0.2
            starts = (torch.arange(T, device=device) // 33 * 33).expand(B, T)

            def look(arguments=(q, k_, v, slope, null, mask, starts)) -> object:
                out, lse = look_back.forward(*arguments)
                return look_back.backward(torch.ones_like(out), *arguments, out, lse)

            def scaled(q=q, gain=slope) -> object:
                out, scale = heads.scale_heads(q, gain, 0.0, 1.0)
                return heads.scale_heads_backward(out, q, gain, scale, 1.0)

            yield f"heads {str(dtype).removeprefix('torch.')} B={B} T={T} H={H} d={d_head}", scaled
            yield f"look-back {str(dtype).removeprefix('torch.')} B={B} T={T} H={H} d={d_head}, {d_value}", look


def _twice(topk: Any, arguments: tuple[Tensor, ...], a: Tensor, W_a: Tensor, k: int) -> object:
    return topk.encode_again(topk.encode_and_keep(*arguments, k)[2], a, W_a, k)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    # Triton's interpreter can't compute with bfloat16.
    dtypes = (torch.float32, torch.bfloat16) if cuda else (torch.float32,)
    done = 0
    for name, run in cases(device, dtypes, large=cuda):
        if all(word in name for word in words):
            print(name, flush=True)
            run()
            if cuda:
                torch.cuda.synchronize()
            done += 1
    print(f"{done} cases ran")
    return 0 if done else 2


if __name__ == "__main__":
    sys.exit(main())
