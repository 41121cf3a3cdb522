"""The redundancy of activations, on processes whose redundancy is known, and against a direct regression."""

from __future__ import annotations

import pytest
import torch
from given_windows import GivenWindows
from torch import Tensor

from csae.bench.evidence import redundancy
from csae.errors import UserError

N, T, D = 240, 64, 6


def whole(acts: Tensor) -> GivenWindows:
    """Windows of one document each, with every position in the mask."""
    mask = torch.ones(acts.shape[:2], dtype=torch.bool)
    return GivenWindows(acts.float(), mask, torch.zeros(mask.shape, dtype=torch.int64))


def mixed(independent: Tensor) -> Tensor:
    """The same processes, seen in a skewed basis with a mean: [N, T, D] either way."""
    torch.manual_seed(5)
    return independent @ torch.randn(D, D) + 3


def r2_of(source: GivenWindows) -> dict[str, float]:
    return redundancy.predicted(source, range(200), range(200, N))["r2"]


def test_an_autoregressive_process_is_predicted_by_its_last_position():
    torch.manual_seed(0)
    rho = 0.8
    x = torch.randn(N, T, D)
    for t in range(1, T):
        x[:, t] = rho * x[:, t - 1] + (1 - rho**2) ** 0.5 * x[:, t]
    r2 = r2_of(whole(mixed(x)))
    for name in ("previous", "last_1", "last_16", "last_16_and_mean"):
        assert r2[name] == pytest.approx(rho**2, abs=0.02), name
    assert 0 < r2["mean"] < rho**2 / 2


def test_a_moving_average_is_predicted_better_the_further_one_looks():
    torch.manual_seed(1)
    e = torch.randn(N, T + 1, D)
    r2 = r2_of(whole(mixed(e[:, 1:] + e[:, :-1])))
    for m in redundancy.LAGS:
        # x_t = e_t + e_{t-1}: the best predictor from m positions leaves (m + 2) / (m + 1) of a variance of 2.
        assert r2[f"last_{m}"] == pytest.approx(1 - (m + 2) / (2 * (m + 1)), abs=0.02), m
    assert r2["previous"] == pytest.approx(r2["last_1"], abs=1e-3)


def test_independent_tokens_are_not_predicted():
    torch.manual_seed(2)
    assert all(abs(r2) < 0.02 for r2 in r2_of(whole(mixed(torch.randn(N, T, D)))).values())


def test_what_lasts_is_predicted_by_the_mean_of_the_past():
    torch.manual_seed(3)
    x = torch.randn(N, 1, D) + torch.randn(N, T, D)
    r2 = r2_of(whole(x))
    # From n positions x = u + e is known up to a variance of 1 + 1 / (n + 1) of 2, here with n from 16 to 63.
    n = torch.arange(16, T)
    assert r2["mean"] == pytest.approx(float((1 - (1 + 1 / (n + 1)) / 2).mean()), abs=0.03)
    assert r2["last_1"] == pytest.approx(0.25, abs=0.04)


def test_only_positions_with_a_whole_past_count():
    torch.manual_seed(4)
    source = whole(mixed(torch.randn(60, T, D).cumsum(dim=1) / 4))
    source.mask[:, 0] = False
    source.mask[::3, 20] = False
    source.documents[:, 40:] = 7
    source.acts[~source.mask] = 1e4
    found = redundancy.predicted(source, range(40), range(40, 60))

    def pairs(windows: range) -> tuple[Tensor, Tensor, Tensor]:
        before, means, here = [], [], []
        for w in windows:
            for t in range(T):
                past = range(t - 16, t + 1)
                if t < 16 or not all(
                    source.mask[w, j] and source.documents[w, j] == source.documents[w, t] for j in past
                ):
                    continue
                seen = [j for j in range(t) if source.mask[w, j] and source.documents[w, j] == source.documents[w, t]]
                before.append(source.acts[w, t - 1])
                means.append(source.acts[w, seen].mean(dim=0))
                here.append(source.acts[w, t])
        return torch.stack(before).double(), torch.stack(means).double(), torch.stack(here).double()

    fit, score = pairs(range(40)), pairs(range(40, 60))
    assert found["tokens_fit"] == len(fit[0])
    assert found["tokens_score"] == len(score[0])
    for at, name in ((0, "previous"), (1, "mean")):
        ones = [torch.cat([part[at], torch.ones(len(part[at]), 1)], dim=1) for part in (fit, score)]
        weights = torch.linalg.lstsq(ones[0], fit[2]).solution
        residual = (score[2] - ones[1] @ weights).square().sum()
        variance = (score[2] - score[2].mean(dim=0)).square().sum()
        assert found["r2"][name] == pytest.approx(1 - float(residual / variance), abs=5e-3), name


def test_windows_in_planes_of_their_own_have_the_dimension_of_the_plane():
    torch.manual_seed(6)
    n, d, plane = 256, 48, 5
    frames = torch.linalg.qr(torch.randn(60, d, plane)).Q  # a plane a window
    x = torch.randn(60, n, plane) @ frames.mT + 2
    found = redundancy.dimension(whole(x), range(60))
    # The eigenvalues of a sample covariance of n - 1 degrees of freedom: r n' / (n' + r + 1) in the mean.
    assert found["window"]["participation_ratio"] == pytest.approx(plane * 255 / (255 + plane + 1), rel=0.01)
    # Tokens of all windows: |x|^4 is plane (plane + 2) in the mean, and (x y)^2 of two of them tr(C^2).
    overlap = float((frames @ frames.mT).mean(dim=0).square().sum())
    expected = plane**2 / (plane * (plane + 2) / 255 + overlap)
    assert found["shuffled"]["participation_ratio"] == pytest.approx(expected, rel=0.02)
    assert found["window"]["components_90"] == plane
    assert 30 < found["shuffled"]["components_90"] < 0.9 * d
    assert found["window"]["two_nn"] == pytest.approx(plane, rel=0.1)
    assert found["windows"] == 60


def test_components_hold_the_variance_they_should():
    # A window whose centred covariance has the eigenvalues 8, 1.5 and 0.5: two hold 95%.
    axes = torch.diag(torch.tensor([8.0, 1.5, 0.5]).sqrt())
    x = torch.cat([axes, -axes])[None].repeat(2, 1, 1)
    found = redundancy.dimension(whole(x), range(2))["window"]
    assert found["participation_ratio"] == pytest.approx(100 / 66.5)
    assert found["components_90"] == 2


def test_masked_positions_have_no_part_in_the_dimension():
    torch.manual_seed(7)
    source = whole(torch.randn(4, T, D))
    expected = redundancy.dimension(
        GivenWindows(source.acts[:, 9:], source.mask[:, 9:], source.documents[:, 9:]), range(4)
    )
    source.mask[:, :9] = False
    source.acts[:, :9] = 1e3
    assert redundancy.dimension(source, range(4)) == expected


def test_all_together_is_json_and_the_same_again():
    torch.manual_seed(8)
    source = whole(torch.randn(12, 40, D))
    first, again = (redundancy.measure(source, range(8), range(8, 12)) for _ in range(2))
    assert first.pop("seconds") > 0
    again.pop("seconds")
    assert first == again
    assert first["predicted"]["components"] == D
    assert first["predicted"]["components_variance"] == pytest.approx(1)


def test_what_can_not_be_measured_is_said():
    short = whole(torch.randn(4, 16, D))
    with pytest.raises(UserError, match="16 positions of its document"):
        redundancy.predicted(short, range(2), range(2, 4))
    with pytest.raises(UserError, match="all the same"):
        redundancy.predicted(whole(torch.ones(4, 40, D)), range(2), range(2, 4))
    nothing = whole(torch.randn(4, 40, D))
    nothing.mask[:] = False
    with pytest.raises(UserError, match="leaves out every position"):
        redundancy.predicted(nothing, range(2), range(2, 4))
    with pytest.raises(UserError, match="fewer than 3 positions"):
        redundancy.dimension(nothing, range(4))
