"""The windows that were trained on are recorded, and recognised later."""

import numpy as np
import pytest
import torch

from csae.data.seen import WINDOWS, log, open_log, read_seen, settle, window_hashes
from csae.errors import UserError

TOKENS = torch.arange(60).view(6, 10)
ACTS = torch.randn(6, 10, 4, generator=torch.Generator().manual_seed(0))


def log_batch(file, tokens, acts):
    log(file, window_hashes(tokens, acts).tobytes(), by_tokens=tokens is not None)


@pytest.mark.parametrize("tokens", [TOKENS, None], ids=["tokens", "activations"])
def test_windows_are_recognised_in_any_order_and_batch(tokens, tmp_path):
    with open_log(tmp_path, 0) as file:
        for chosen in ([0, 3], [4, 0]):
            log_batch(file, None if tokens is None else tokens[chosen], ACTS[chosen])
    settle(tmp_path)
    seen = read_seen(tmp_path)
    assert seen.by_tokens == (tokens is not None)
    assert len(seen.hashes) == 3
    assert (tmp_path / WINDOWS).stat().st_size == 8 + 3 * 8
    assert seen.among(window_hashes(tokens, ACTS)).tolist() == [True, False, False, True, True, False]


def test_a_change_of_one_token_or_of_the_last_activation_is_another_window():
    tokens, acts = TOKENS.clone(), ACTS.clone()
    tokens[2, 5] += 1
    acts[3, -1, 0] += 1
    assert (window_hashes(tokens, ACTS) != window_hashes(TOKENS, ACTS)).tolist() == [i == 2 for i in range(6)]
    assert (window_hashes(None, acts) != window_hashes(None, ACTS)).tolist() == [i == 3 for i in range(6)]
    assert np.array_equal(window_hashes(TOKENS.int(), ACTS), window_hashes(TOKENS, ACTS))


def test_a_log_goes_on_where_the_checkpoint_was(tmp_path):
    with open_log(tmp_path, 0) as file:
        log_batch(file, TOKENS[:2], ACTS[:2])
        log_batch(file, TOKENS[2:4], ACTS[2:4])
    with open_log(tmp_path, 2) as file:
        log_batch(file, TOKENS[4:], ACTS[4:])
    assert read_seen(tmp_path).among(window_hashes(TOKENS, ACTS)).tolist() == [True, True, False, False, True, True]
    with open_log(tmp_path, 0) as file:
        log_batch(file, None, ACTS[:1])
    assert not read_seen(tmp_path).by_tokens


def test_a_run_of_an_earlier_version_stays_without(tmp_path):
    with open_log(tmp_path, 10) as file:
        log_batch(file, TOKENS, ACTS)
    assert read_seen(tmp_path) is None


def test_a_damaged_file_is_one_line_and_a_cut_one_is_read(tmp_path):
    with open_log(tmp_path, 0) as file:
        log_batch(file, TOKENS, ACTS)
    content = (tmp_path / WINDOWS).read_bytes()
    (tmp_path / WINDOWS).write_bytes(content[:-3])
    assert len(read_seen(tmp_path).hashes) == 5
    (tmp_path / WINDOWS).write_bytes(b"something else")
    with pytest.raises(UserError, match="damaged"):
        read_seen(tmp_path)
    (tmp_path / WINDOWS).write_bytes(b"")
    assert not read_seen(tmp_path).among(window_hashes(TOKENS, ACTS)).any()
