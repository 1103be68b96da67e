"""What others offer, at the cost of one row of the study: same data, network, batches and number of steps.

::

    pip install torch-uncertainty laplace-torch posteriors     # in an environment of its own
    python examples/study/peers.py --data-dir FOLDER --seeds 5
    python examples/study/tables.py

Lines go to the study's ``rows.csv``, of the last weights and of the average, as those of ``run.py`` do; what is stored
is not run again. Every peer is used as its documentation shows: nothing is tuned, neither here nor for our rows.

======================  =========================================================================================
``swa``                 ``torch.optim.swa_utils``: mean of the weights after each epoch of the second half, at
                        0.3 of the first learning rate; batch-norm statistics measured anew
``swag``                torch-uncertainty's SWAG over the same epochs, rank 20, 30 draws, statistics measured anew
``mc-dropout``          dropout (0.1) before the last layer and between blocks, 30 passes
``laplace``             laplace-torch, last layer, full covariance, prior by marginal likelihood, probit
``torch-uncertainty``   its SGLD with the noise factor that it ships (0.01), 30 samples as in our rows
``posteriors-sghmc``    its SGHMC with our time steps, friction and temperature, 30 samples as in our rows
======================  =========================================================================================
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from fashion import NAMES, Fashion, resnet8
from rows import paper_decay
from run import COLUMNS, EPOCHS, RESULTS, WEIGHT_DECAY, environment, remember, store, stored
from scores import scores_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["PEERS", "run_peer"]

_LEARNING_RATE, _TEMPERATURE, _SAMPLES = 0.1, 1e-3, 30
#: Learning rate of the epochs that are averaged, over the first one.
_AVERAGED_RATE = 0.3
_DROPOUT = 0.1
#: Of SGHMC, as in the study's own rows.
_FRICTION, _TIME_STEP = 1.0, 0.1
_TU_NOISE_FACTOR = 0.01

Result = tuple[Tensor, Tensor, float, float]
"""Probabilities of the last weights and of the average, T_eff, megabytes of what is stored."""


class Run:
    """One training: network, data, steps, and what is measured after it."""

    def __init__(self, data: Fashion, epochs: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.data, self.epochs, self.net = data, epochs, resnet8()
        self.steps = epochs * (data.size // data.batch_size)
        self.tested = DataLoader(TensorDataset(*data.test), 500)
        self.seen = DataLoader(TensorDataset(*data.train), 500)  # for batch-norm statistics and Laplace's Hessian

    def batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(step, images, labels) of the whole run."""
        step = 0
        for _ in range(self.epochs):
            for images, labels in self.data.train_dataloader():
                yield step, images, labels
                step += 1

    def train(
        self,
        optimizer: torch.optim.Optimizer,
        after_step: Callable[[int], None] = lambda step: None,
        factor: Callable[[float], float] = paper_decay,
    ) -> None:
        """Mean cross entropy over all batches; ``factor`` of the progress multiplies the learning rate."""
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / self.steps))
        self.net.train()
        for step, images, labels in self.batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(images), labels).backward()
            optimizer.step()
            schedule.step()
            after_step(step)

    def sgd(self) -> torch.optim.SGD:
        """Plain SGD, as in the study's first row."""
        return torch.optim.SGD(self.net.parameters(), lr=_LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    @torch.no_grad()
    def predict(self, net: nn.Module | None = None) -> Tensor:
        """Probabilities of the test images, shape (n, 10), by a network in evaluation mode."""
        net = (self.net if net is None else net).eval()
        return torch.cat([net(images).softmax(1) for images, _ in self.tested])

    def sampled(self, step: int) -> bool:
        """Whether a sample is due after this step: thirty over the last two fifths."""
        every, begin = max(1, round(0.4 * self.steps / _SAMPLES)), round(0.6 * self.steps)
        return step >= begin and (step + 1 - begin) % every == 0


def _megabytes(net: nn.Module, copies: float = 1.0) -> float:
    return copies * sum(p.numel() * p.element_size() for p in net.parameters()) / 1e6


def _average_of(run: Run, states: list[dict[str, Tensor]]) -> Tensor:
    other, total = deepcopy(run.net), torch.zeros(())
    for state in states:
        other.load_state_dict(state)
        total = total + run.predict(other).double()
    return total / len(states)


def _averaged_rate(progress: float) -> float:
    """Constant to one half, then falling to the rate at which weights are averaged, and there from six tenths on."""
    return max(_AVERAGED_RATE, 1.0 - (1.0 - _AVERAGED_RATE) * max(0.0, progress - 0.5) / 0.1)


def swa(run: Run) -> Result:
    """Stochastic weight averaging (Izmailov et al., 2018)."""
    mean, an_epoch = AveragedModel(run.net), run.steps // run.epochs

    def after_step(step: int) -> None:
        if (step + 1) % an_epoch == 0 and step >= run.steps // 2:
            mean.update_parameters(run.net)

    run.train(run.sgd(), after_step, _averaged_rate)
    update_bn(run.seen, mean)
    return run.predict(), run.predict(mean), 0.0, _megabytes(run.net)


def swag(run: Run) -> Result:
    """SWA-Gaussian (Maddox et al., 2019)."""
    from torch_uncertainty.methods import SWAG

    rank, an_epoch = 20, run.steps // run.epochs
    half = run.epochs // 2
    posterior = SWAG(run.net, cycle_start=half, cycle_length=1, max_num_models=rank, num_estimators=_SAMPLES)

    def after_step(step: int) -> None:
        if (step + 1) % an_epoch == 0:
            posterior.update_wrapper((step + 1) // an_epoch)

    run.train(run.sgd(), after_step, _averaged_rate)
    posterior.bn_update(run.seen, "cpu")
    average = torch.stack([run.predict(sample) for sample in posterior.samples]).double().mean(0)
    return run.predict(), average, 0.0, _megabytes(run.net, 2 + rank)


def mc_dropout(run: Run) -> Result:
    """Monte Carlo dropout (Gal & Ghahramani, 2016)."""
    blocks: list[nn.Module] = []
    for layer in run.net:
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "BasicBlock":
            blocks.append(nn.Dropout(_DROPOUT))
        blocks.append(layer)
    run.net = nn.Sequential(*blocks)
    run.train(run.sgd())
    last, total = run.predict(), torch.zeros(())
    with torch.no_grad():
        for _ in range(_SAMPLES):
            run.net.eval()
            for layer in run.net:
                layer.train(isinstance(layer, nn.Dropout))
            total = total + torch.cat([run.net(images).softmax(1) for images, _ in run.tested]).double()
    return last, total / _SAMPLES, 0.0, _megabytes(run.net)


def laplace(run: Run) -> Result:
    """Laplace's approximation of the last layer (Daxberger et al., 2021)."""
    from laplace import Laplace

    run.train(run.sgd())
    last = run.predict()
    posterior = Laplace(run.net, "classification", subset_of_weights="last_layer", hessian_structure="full")
    posterior.fit(run.seen)
    posterior.optimize_prior_precision(method="marglik")
    average = torch.cat([posterior(images, link_approx="probit") for images, _ in run.tested]).detach()
    covariance = 4 * posterior.n_params**2 / 1e6
    return last, average.double(), 1.0, _megabytes(run.net) + covariance


def torch_uncertainty(run: Run) -> Result:
    """SGLD of torch-uncertainty. Its noise has variance 2 lr f^2, which is that of T = f^2 N."""
    from torch_uncertainty.optim import SGLD

    states: list[dict[str, Tensor]] = []

    def after_step(step: int) -> None:
        if run.sampled(step):
            states.append(deepcopy(run.net.state_dict()))

    run.train(SGLD(run.net.parameters(), lr=_LEARNING_RATE, weight_decay=WEIGHT_DECAY), after_step)
    temperature = _TU_NOISE_FACTOR**2 * run.data.size
    return run.predict(), _average_of(run, states), temperature, _megabytes(run.net, len(states))


def posteriors_sghmc(run: Run) -> Result:
    """SGHMC of posteriors, of the mean log posterior at temperature T / N."""
    from posteriors.sgmcmc import sghmc
    from torch.func import functional_call

    params = {name: p.detach().clone() for name, p in run.net.named_parameters()}
    buffers = dict(run.net.named_buffers())

    def log_posterior(params: Any, batch: Any) -> tuple[Tensor, Any]:
        images, labels, statistics = batch
        moved = {name: b.clone() for name, b in statistics.items()}  # batch norm writes into them
        logits = functional_call(run.net, params | moved, (images,))
        decay = sum(p.square().sum() for p in params.values())
        return -nn.functional.cross_entropy(logits, labels) - 0.5 * WEIGHT_DECAY * decay, moved

    sampler = sghmc.build(
        log_posterior, lr=lambda step: _TIME_STEP * paper_decay(float(step) / run.steps) ** 0.5, alpha=_FRICTION,
        temperature=_TEMPERATURE / run.data.size, momenta=0.0,
    )  # fmt: skip
    state, states = sampler.init(params), []
    run.net.train()
    for step, images, labels in run.batches():
        state, buffers = sampler.update(state, (images, labels, buffers))
        if run.sampled(step) or step + 1 == run.steps:
            states.append({n: t.detach().clone() for n, t in (state.params | buffers).items()})
    run.net.load_state_dict(states[-1])
    states = states[:_SAMPLES]
    return run.predict(), _average_of(run, states), _TEMPERATURE, _megabytes(run.net, len(states))


PEERS: dict[str, tuple[float, Callable[[Run], Result]]] = {
    "swa": (0.0, swa),
    "swag": (0.0, swag),
    "mc-dropout": (0.0, mc_dropout),
    "laplace": (0.0, laplace),
    "torch-uncertainty": (_TEMPERATURE, torch_uncertainty),
    "posteriors-sghmc": (_TEMPERATURE, posteriors_sghmc),
}
"""Name -> temperature in its key (that of the samplers is what the row asks for), and how it is run."""


def run_peer(name: str, data: Fashion, epochs: int, seed: int) -> list[dict[str, Any]]:
    """The two lines of a peer."""
    temperature, method = PEERS[name]
    began = time.perf_counter()
    last, average, t_eff, megabytes = method(Run(data, epochs, seed))
    seconds = time.perf_counter() - began
    common = {"data": data.name, "size": data.size, "method": name, "format": "fp32"}
    common |= {"temperature": temperature, "seed": seed, "t_eff": t_eff, "seconds": seconds}
    several = name not in ("swa", "laplace")
    kinds = (("last", last, 1, 0.0), ("ensemble", average, _SAMPLES if several else 1, megabytes))
    return [
        common | {"of": of, "samples": count, "sample_mb": size} | scores_of(probabilities, data.test[1])
        for of, probabilities, count, size in kinds
    ]


def _versions(name: str) -> dict[str, str]:
    """Of the package that a peer comes from."""
    package = {"swag": "torch-uncertainty", "laplace": "laplace-torch", "posteriors-sghmc": "posteriors"}.get(
        name, name
    )
    return {package: version(package)} if package in ("torch-uncertainty", "laplace-torch", "posteriors") else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--data", choices=NAMES, default=NAMES[0])
    parser.add_argument("--size", type=int, default=5_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="by default those of run.py")
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--test-images", type=int, help="only the first of them (a quick look)")
    parser.add_argument("--out", type=Path, default=RESULTS / "rows.csv")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data = Fashion(args.data_dir, args.size, test=args.test_images, name=args.data)
    data.setup("fit")
    for seed in range(args.seeds):
        for name in args.only:
            key = (args.data, str(args.size), name, "fp32", f"{PEERS[name][0]:.6g}", str(seed))
            if key in stored(args.out):
                continue
            lines = run_peer(name, data, args.epochs or EPOCHS[args.size], seed)
            store(args.out, [{column: line[column] for column in COLUMNS} for line in lines])
            remember(args.out, "-".join((*key[:4], f"T{key[4]}", f"s{seed}")), environment("cpu") | _versions(name))
            print(name, seed, *(f"{e['of']} {100 * e['error']:.2f} {e['nll']:.4f}" for e in lines), flush=True)


if __name__ == "__main__":
    main()
