"""What the Python interface of `csae.data` is given by mistake: refused by name, never taken for something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from some_shards import some_tensors, write

from csae.data.activations import ModelActivations, sink_mask
from csae.data.language_model import LanguageModel
from csae.data.packing import TokenWindows
from csae.data.shard_activations import ShardActivations
from csae.errors import UserError

IDS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (IDS[0], ValueError, r"tokens: given shape \[6\]; needed \[B, T\]"),
        (IDS[:0], ValueError, r"given shape \[0, 6\]"),
        (IDS[:, :0], ValueError, r"given shape \[2, 0\]"),
        (IDS.float(), TypeError, r"tokens: given torch.float32; needed a tensor of integers"),
        (IDS > 3, TypeError, r"given torch.bool"),
        ([[1, 2]], TypeError, r"given list"),
    ],
)
def test_tokens(tokens, error: type[Exception], message: str, tiny_lm: LanguageModel) -> None:
    for use in (lambda: tiny_lm.activations(tokens, 1), lambda: tiny_lm.cross_entropy(tokens)):
        with pytest.raises(error, match=message):
            use()


@pytest.mark.parametrize(
    ("windows", "error", "message"),
    [
        (TokenWindows(IDS, IDS[:, :5]), ValueError, r"documents are \[2, 5\]; needed \[2, 6\], as tokens"),
        (TokenWindows(IDS, IDS, IDS[:1] > 3), ValueError, r"special are \[1, 6\]"),
        (TokenWindows(IDS[0], IDS[0]), ValueError, r"tokens are \[6\]; needed \[N, T\]"),
        (TokenWindows(IDS.float(), IDS), TypeError, "tokens are torch.float32; needed integers"),
        (TokenWindows(IDS, IDS.float()), TypeError, "documents are torch.float32"),
    ],
)
def test_windows(windows: TokenWindows, error: type[Exception], message: str, tiny_lm: LanguageModel) -> None:
    with pytest.raises(error, match=f"token_windows: {message}"):
        ModelActivations(tiny_lm, 1, windows)


@pytest.mark.parametrize(("window", "error"), [(-1, IndexError), (4, IndexError), (0.5, TypeError), ("0", TypeError)])
def test_numbers_of_windows(window, error: type[Exception], tiny_lm: LanguageModel, tmp_path: Path) -> None:
    write(tmp_path, some_tensors(4))
    ids = torch.arange(24).reshape(4, 6)
    for source in (ModelActivations(tiny_lm, 1, TokenWindows(ids, torch.zeros_like(ids))), ShardActivations(tmp_path)):
        for use in (source.read, source.tokens):
            with pytest.raises(error, match=r"window: given|interpreted as an integer"):
                use([0, window])
        assert torch.equal(source.read(torch.tensor([3, 1])).acts, source.read([3, 1]).acts)


@pytest.mark.parametrize("replace", [lambda acts: None, lambda acts: acts.long(), lambda acts: acts.tolist()])
def test_what_a_replacement_gives(replace, tiny_lm: LanguageModel) -> None:
    with pytest.raises(TypeError, match=r"replace: gave .*; needed a floating-point tensor"):
        tiny_lm.cross_entropy(IDS, 1, replace)


def test_complex_activations_have_no_mask() -> None:
    with pytest.raises(TypeError, match=r"acts: given torch.complex64; needed real numbers"):
        sink_mask(torch.zeros(1, 2, 3, dtype=torch.complex64))


def test_digits_of_other_alphabets_are_no_blocks(tiny_lm: LanguageModel) -> None:
    with pytest.raises(UserError, match="has no such place"):
        tiny_lm.hook("mlp.out:\u0661")
