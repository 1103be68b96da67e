"""Lightning's averaging callbacks beside a sampler: averages of the chain's own weights, or a refusal."""

import lightning.pytorch.callbacks as pl_callbacks
import pytest
import torch
from test_compatibility import Module, fit, loader, on_grid, trainer

from lightning_lpsgld import LowPrecisionSGLD, SampleBank, SampleCollector

NAMES = ("StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging")


def averaging(name):
    if not hasattr(pl_callbacks, name):
        pytest.skip(f"this lightning has no {name}")
    options = {
        "StochasticWeightAveraging": {"swa_lrs": 0.1, "swa_epoch_start": 2},
        "EMAWeightAveraging": {"decay": 0.5},
    }
    return getattr(pl_callbacks, name)(**options.get(name, {}))


@pytest.mark.parametrize("name", NAMES)
def test_the_average_is_that_of_the_chain(tmp_path, name):
    """Every weight of the chain is on the grid and in the bank; the module ends with the callback's average of them."""
    bank, module = SampleBank(), Module()
    plugin = LowPrecisionSGLD(seed=0, accumulator="low")
    collector = SampleCollector(start=0.0, every=1)
    fit(tmp_path, module, plugin, max_epochs=4, callbacks=[averaging(name), collector])
    bank = collector.bank
    assert len(bank) == 12
    states = [sample.state_dict() for sample in bank]
    assert all(on_grid(state.values()) for state in states)
    weights = torch.stack([state["net.0.weight"] for state in states])
    if name == "WeightAveraging":
        expected = weights.mean(0)
    elif name == "EMAWeightAveraging":
        expected = weights[0]
        for value in weights[1:]:
            expected = 0.5 * expected + 0.5 * value
    else:
        expected = weights[[2, 5, 8]].mean(0)  # when the second, third and fourth epoch begin
    assert torch.allclose(module.net[0].weight, expected, atol=1e-6)
    assert not on_grid([module.net[0].weight])


@pytest.mark.parametrize("name", NAMES)
def test_averages_of_rounded_views_are_refused(tmp_path, name):
    plugin = LowPrecisionSGLD(accumulator="full")
    with pytest.raises(RuntimeError, match=f"{name} averages `parameters\\(\\)`.*accumulator='low'"):
        trainer(tmp_path, plugin, callbacks=[averaging(name)]).fit(Module(), loader())


def test_deepspeed_is_refused_by_its_name(tmp_path):
    """By the name of the strategy, so that the package is not needed to refuse it."""
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class DeepSpeedStrategy(SingleDeviceStrategy):
        pass

    run = trainer(tmp_path, strategy=DeepSpeedStrategy("cpu"))
    with pytest.raises(RuntimeError, match=r"does not run under DeepSpeedStrategy.*ModelParallelStrategy"):
        run.fit(Module(), loader())
