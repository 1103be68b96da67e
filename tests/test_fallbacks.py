"""Every fallback of a CPU, forced by what forces it: the same chain and the same ensemble, by other kernels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.processes import start
from torch import nn

import lightning_lpsgld

PACKAGE = Path(lightning_lpsgld.__file__).parent
CPU, THREADS, ARITHMETIC = (f"LIGHTNING_LPSGLD_{name}" for name in ("CPU", "THREADS", "ARITHMETIC"))
#: What is set -> what it leaves, as far as the machine has it. The self check of kernels made on a device has its own
#: tests (``tests/ops/test_self_check.py``), linear models too (``tests/linear``).
FORCED = {
    "as it is": {},
    "reference ops": {CPU: "0"},
    "baseline": {CPU: "baseline"},
    "AVX2": {CPU: "avx2"},
    "AVX-512": {CPU: "avx512"},
    "threads of its own": {THREADS: "own"},
    "no integer kernels": {ARITHMETIC: "no-onednn"},
    "sums of 16 bits": {ARITHMETIC: "no-vnni"},
    "no kernels at all": {CPU: "0", ARITHMETIC: "no-onednn"},
}


def outcome():
    """A short chain with rounded activations and errors, integers in forward; its average over samples; who did it."""
    from lightning_lpsgld import SampleBank
    from lightning_lpsgld.arithmetic import capability, layers
    from lightning_lpsgld.casting import ActivationCasting
    from lightning_lpsgld.ops import cpu
    from lightning_lpsgld.predictive import bayesian_model_average, layer_arithmetic
    from lightning_lpsgld.samplers import SGLD

    layers._WORTHWHILE = 0
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip
    x, y = torch.randn(64, 3, 8, 8), torch.randint(0, 3, (64,))
    sampler = SGLD(net.parameters(), 0.05, num_data=64, weight_format="bfp8", gradient_format="bfp8", seed=1)
    sampler.round_parameters_()
    casting, bank = ActivationCasting(net, seed=1).attach(), SampleBank()
    with layer_arithmetic(net, "auto") as running:
        for step in range(6):
            sampler.zero_grad()
            with casting.forward_context():
                loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            sampler.step()
            if step >= 3:
                bank.add(net, step=step, formats={name: "bfp8" for name, _ in net.named_parameters()})
        trained = running.report()
    with casting.forward_context():
        result = bayesian_model_average(bank, net, [(x, y)], arithmetic="auto")
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    who = {"cpu": cpu.unavailable() or cpu.instruction_set(), "onednn": capability().onednn, "vnni": capability().vnni}
    return weights, result.scores, trained, who


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outcomes")
    files = {name: folder / f"{number}.pt" for number, name in enumerate(FORCED)}
    processes = [start(outcome, result=files[name], environment=env) for name, env in FORCED.items()]
    for process in processes:
        process.join(300)
    found = {name: torch.load(file, weights_only=False) for name, file in files.items()}
    assert all(kind == "returned" for kind, _ in found.values()), found
    return {name: value for name, (_, value) in found.items()}


@pytest.mark.parametrize("name", [name for name in FORCED if name != "as it is"])
def test_a_forced_fallback_gives_the_chain_and_the_ensemble(name, outcomes):
    """Float32 steps of the kernels and float64 ones of the reference differ where a draw lies between, 1 in 10^5."""
    expected, scores, _, best = outcomes["as it is"]
    weights, found, trained, who = outcomes[name]
    wanted = FORCED[name]
    if wanted.get(CPU) == "0":
        assert "turned off" in who["cpu"]
    elif CPU in wanted and "turned off" not in best["cpu"]:
        order = ["baseline", "avx2", "avx512"]
        assert who["cpu"] == min(wanted[CPU], best["cpu"], key=order.index)
    if ARITHMETIC in wanted:
        mask = wanted[ARITHMETIC][3:]
        assert not who[mask]
        assert mask != "onednn" or "integer" not in trained.values()
    if CPU in wanted and wanted[CPU] != "0":
        assert torch.equal(weights, expected)
    assert (weights == expected).double().mean() >= 0.98
    for score in ("accuracy", "nll"):
        assert found[score] == pytest.approx(scores[score], abs=1e-3), score


def test_every_variable_of_the_package_is_forced_somewhere():
    found = {
        word for path in PACKAGE.rglob("*.py") for word in re.findall(r"LIGHTNING_LPSGLD_[A-Z_]+", path.read_text())
    }
    assert found == {CPU, THREADS, ARITHMETIC, "LIGHTNING_LPSGLD_SELF_CHECK"}
