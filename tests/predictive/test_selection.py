"""Which samples to keep: greedy steps equal exhaustive ones, Stein's identity holds, losses are told."""

import itertools

import pytest
import torch
from torch import nn

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.predictive import PosteriorEnsemble
from lightning_lpsgld.predictive.selection import (
    greedy_selection,
    member_probabilities,
    posterior_scores,
    stein_kernel,
    stein_thinning,
)


def likelihoods(samples=6, points=20):
    return torch.rand(samples, points, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_every_greedy_step_is_the_best_one():
    p = likelihoods()
    chosen = []
    for size in range(1, 7):
        best = min((i for i in range(6) if i not in chosen), key=lambda i: -p[[*chosen, i]].mean(0).log().mean().item())
        chosen.append(best)
        found = greedy_selection(p, size)
        assert found.indices == tuple(chosen)
        assert found.score == pytest.approx(-p[chosen].mean(0).log().mean().item())
    assert found.score == pytest.approx(found.full)


def test_the_choice_beats_even_spacing_and_says_what_it_costs():
    p = likelihoods()
    found = greedy_selection(p, 2)
    best = min(-p[list(pair)].mean(0).log().mean().item() for pair in itertools.combinations(range(6), 2))
    assert best <= found.score <= found.even
    assert found.even == pytest.approx(-p[[2, 5]].mean(0).log().mean().item())
    assert f"{found.score - found.full:+.2g} lost" in str(found)


def test_stein_kernel_is_the_formula_by_autograd():
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    s = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scale = float((x[0] - x[1]).square().sum())

    def k(a, b):
        return (1 + (a - b).square().sum() / scale) ** -0.5

    for i, j in itertools.product(range(2), range(2)):
        a, b = x[i].clone().requires_grad_(), x[j].clone().requires_grad_()
        (da,) = torch.autograd.grad(k(a, b), a, create_graph=True)
        (db,) = torch.autograd.grad(k(a, b), b, create_graph=True)
        mixed = sum(torch.autograd.grad(da[n], b, retain_graph=True)[0][n] for n in range(3))
        expected = mixed + da @ s[j] + db @ s[i] + k(a, b) * (s[i] @ s[j])
        assert stein_kernel(x, s)[i, j].item() == pytest.approx(expected.item(), rel=1e-9)


def test_stein_thinning_leaves_out_what_is_far_from_the_mode():
    points = torch.randn(30, 2, generator=torch.Generator().manual_seed(4)) * 0.7
    points[:5] += 8.0
    found = stein_thinning(points, -points, 10)
    assert not {0, 1, 2, 3, 4} & set(found.indices)
    assert found.score < found.full
    assert "Stein discrepancy" in str(found)


def half_square(module, batch):
    return 0.5 * module(batch).square().mean()


def test_scores_of_a_linear_model():
    net, bank = nn.Linear(2, 1, bias=False).double(), SampleBank()
    for step in range(3):
        bank.add(net, step=step)
        with torch.no_grad():
            net.weight.add_(0.5)
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    before = net.weight.detach().clone()
    points, scores = posterior_scores(
        bank,
        net,
        [x[:4], x[4:]],
        lambda m, b: 0.5 * m(b).square().mean(),
        num_data=8,
        temperature=0.5,
        weight_decay=0.1,
    )
    theta = torch.stack([sample.state_dict()["weight"].flatten() for sample in bank])
    expected = -8 / 0.5 * (theta @ (x.T @ x / 8) + 0.1 * theta)
    torch.testing.assert_close(points, theta.float())
    torch.testing.assert_close(scores, expected.float())
    assert torch.equal(net.weight, before)


def test_member_likelihoods():
    net, bank = nn.Linear(3, 4), SampleBank()
    for step in range(2):
        bank.add(nn.Linear(3, 4), step=step)
    x, y = torch.randn(6, 3), torch.randint(4, (6,))
    ensemble = PosteriorEnsemble(net, bank)
    found = member_probabilities(ensemble, [(x[:2], y[:2]), (x[2:], y[2:])])
    rows = torch.stack([out.double().softmax(1)[torch.arange(6), y] for out in ensemble.outputs(x)])
    torch.testing.assert_close(found, rows, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="a batch has no targets"):
        member_probabilities(ensemble, [x])
    with pytest.raises(ValueError, match="no batch of held-out data"):
        member_probabilities(ensemble, [])


def test_refusals():
    with pytest.raises(ValueError, match="`k` must be between 1 and the 6 samples, got 7"):
        greedy_selection(likelihoods(), 7)
    with pytest.raises(ValueError, match=r"must have shape \(samples, points\)"):
        greedy_selection(likelihoods()[0], 1)
    with pytest.raises(ValueError, match=r"must be \(K, d\)"):
        stein_thinning(torch.zeros(3, 2), torch.zeros(3, 1), 1)


def test_a_refusal_leaves_gradients_and_modes_as_they_were():
    """Members compute without gradients in evaluation mode, and what stops them gives both back."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout()).train()
    bank = SampleBank()
    for step in range(2):
        bank.add(module, step=step)
    ensemble = PosteriorEnsemble(module, bank, members="streamed")
    ensemble.train()
    with pytest.raises(ValueError, match="target 9 is no class of 3"):
        member_probabilities(ensemble, [(torch.ones(1, 2), torch.tensor([9]))])
    assert torch.is_grad_enabled()
    assert module[1].training
    for _ in ensemble.outputs(torch.ones(1, 2)):
        assert torch.is_grad_enabled(), "only the member computes without gradients"
