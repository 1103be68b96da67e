"""What Lightning gives becomes one frozen description; a sampler of the user's own fulfils a written contract."""

import dataclasses
import functools
import inspect

import pytest
import torch
from helpers.toy_sampler import FloatToy, GridToy
from test_compatibility import Module, fit, loader, on_grid

from lightning_lpsgld import LowPrecisionSGLD, SampleCollector
from lightning_lpsgld.distributed import RunsChains, Topology, topology_of
from lightning_lpsgld.random import derive_seed
from lightning_lpsgld.samplers import HALP, SGHMC, SGLD, SVRG, CyclicalStepSize, LangevinOptimizer, PreconditionedSGLD
from lightning_lpsgld.samplers.options import GridOptions, SamplerOptions, accepted_options
from lightning_lpsgld.strategies import ParallelChainsStrategy

UNROUNDED = {"weights": None, "gradients": None, "activations": None, "errors": None}


# ----------------------------------------------------------------------------------------------------- the description


def test_a_run_is_described_once_and_for_all(tmp_path):
    module = Module(optimizer=lambda m: torch.optim.SGD(m.net[2].parameters(), lr=0.1))
    plugin = LowPrecisionSGLD(seed=5, cycles=2, exclude=["net.2"], errors=None)
    fit(tmp_path, module, plugin)
    run = plugin.run
    assert (run.num_data, run.seed, run.chain_seed, run.topology) == (48, 5, 5, Topology())
    assert (run.replicated, run.automatic, run.accumulate, run.device) == (False, True, 1, torch.device("cpu"))
    assert run.parts.sampled == run.parts.exempt == ("net.2.weight", "net.2.bias")
    assert run.parts.frozen == ("net.0.weight", "net.0.bias")
    assert run.schedule == CyclicalStepSize.spread(6, 2, sampling_steps=1)
    assert {role: str(fmt) for role, fmt in run.formats.items()} == {
        "weights": "bfp8", "gradients": "bfp8", "activations": "bfp8", "errors": "None",
    }  # fmt: skip
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.num_data = 1
    with pytest.raises(TypeError):
        run.formats["weights"] = None


def test_the_place_of_a_rank_follows_from_its_strategy():
    strategy = ParallelChainsStrategy(chains=2)
    assert isinstance(strategy, RunsChains), "the strategy no longer says what the rest of the package asks of it"
    strategy._local_rank, strategy.parallel_devices = 0, [torch.device("cpu")] * 4
    strategy.set_world_ranks()
    place = topology_of(strategy, 4)
    assert (place.chain, place.chains, place.replicas) == (0, 2, 2)
    assert place.seed_of(3) == derive_seed(3, "chain", 0)
    assert topology_of(object(), 4) == Topology(replicas=4)
    assert topology_of(object(), 4).seed_of(3) == 3


# --------------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize("cls", [SGLD, SGHMC, PreconditionedSGLD, SVRG, HALP])
def test_common_options_are_in_every_signature_though_written_once(cls):
    shown = inspect.signature(cls).parameters
    common = set((SamplerOptions if cls in (SVRG, HALP) else GridOptions).__annotations__)
    assert common <= {name for name, p in shown.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert list(shown)[:2] == ["params", "lr"]
    written = set(inspect.signature(cls.__init__).parameters)
    assert not common - {"weight_format"} & written, "a sampler repeats an option of its base"
    with pytest.raises(TypeError, match="no_such_option"):
        cls([torch.nn.Parameter(torch.zeros(2))], 0.1, no_such_option=1, **REQUIRED.get(cls, {"num_data": 1}))


REQUIRED = {SVRG: {}, HALP: {"mu": 1.0}, SGHMC: {"num_data": 1, "friction": 1.0}}


def test_the_command_line_lists_the_common_options():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(SGHMC, "sampler", skip={"params"})
    options = {action.dest for action in parser._actions}
    assert {f"sampler.{name}" for name in GridOptions.__annotations__} <= options
    given = ["--sampler.lr=0.1", "--sampler.num_data=3", "--sampler.friction=2", "--sampler.accumulator=full"]
    assert parser.parse_args(given).sampler.accumulator == "full"
    with pytest.raises(SystemExit):
        parser.parse_args([*given, "--sampler.backend=wide"])
    with pytest.raises(ValueError, match="wide"):  # any format is an accumulator, so the sampler itself refuses
        SGHMC([torch.nn.Parameter(torch.zeros(2))], 0.1, num_data=3, friction=2.0, accumulator="wide")


# ------------------------------------------------------------------------------------------- a sampler of one's own


def test_a_sampler_of_ones_own_runs_under_the_plugin(tmp_path):
    """Learning rate, N, T, seed and schedule reach it; its chain is that of the same steps without a Trainer."""
    plugin = LowPrecisionSGLD(
        sampler=functools.partial(FloatToy, memory=0.25), temperature=0.5, seed=3,
        schedule=CyclicalStepSize(3, sampling_steps=1), **UNROUNDED,
    )  # fmt: skip
    torch.manual_seed(0)
    module, bare = Module(), Module()
    bare.load_state_dict(module.state_dict())
    collector = SampleCollector()
    run = fit(tmp_path, module, plugin, callbacks=[collector])
    (sampler,) = run.optimizers
    assert type(sampler) is FloatToy
    assert sampler.memory == 0.25
    assert (plugin.card.sampler, plugin.card.num_data, plugin.card.temperature) == ("FloatToy", 48, 0.5)
    assert len(collector.bank) == 6
    alone = FloatToy(
        bare.parameters(), 0.1, num_data=48, temperature=0.5, seed=3, memory=0.25, schedule=CyclicalStepSize(3, 1)
    )
    for _ in range(2):
        for number, batch in enumerate(loader()):
            alone.zero_grad()
            bare.training_step(batch, number).backward()
            alone.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), bare.parameters()))


def test_a_sampler_of_ones_own_keeps_its_weights_on_a_grid(tmp_path):
    module, collector = Module(), SampleCollector()
    plugin = LowPrecisionSGLD("fixed8.6", None, None, None, sampler=GridToy, seed=0)
    fit(tmp_path, module, plugin, callbacks=[collector])
    assert on_grid(module.parameters(), "fixed8.6")
    assert plugin.card.formats == {"weights": "fixed8.6"}
    assert plugin.card.bits_per_weight == 8
    copy = Module()
    collector.bank.load_into(copy, -1)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), copy.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "bfp8"}, r"takes no `weight_format`.*bfp8.*`weights=None`"),
        ({"gradients": "bfp8"}, r"takes no `gradient_format`.*`gradients=None`"),
        ({"accumulator": "full"}, r"takes no `accumulator`, so accumulator='full'"),
        (
            {"sampler": GridToy, "weights": "bfp8", "exclude": ["net.0"]},
            r"no `full_precision`.*<2 parameters>.*`exclude=",
        ),
    ],
)
def test_what_a_sampler_of_ones_own_does_not_do_is_refused(tmp_path, options, message):
    with pytest.raises(TypeError, match=message):
        fit(tmp_path, Module(), LowPrecisionSGLD(**{**UNROUNDED, "sampler": FloatToy, **options}))


def test_a_sampler_that_rounds_nothing_runs_beside_excluded_activations(tmp_path):
    plugin = LowPrecisionSGLD(**{**UNROUNDED, "activations": "bfp8"}, exclude=["net.2"], sampler=FloatToy)
    assert fit(tmp_path, Module(), plugin).global_step == 6


def test_options_that_ask_for_nothing_are_left_out():
    class Closed(LangevinOptimizer):
        def __init__(self, params, lr, *, num_data, temperature, seed):
            defaults = {"lr": lr, "weight_decay": 0.0, "temperature": temperature, "seed": seed}
            super().__init__(params, defaults, num_data=num_data)

        def update(self, group, params, grads): ...

    neutral = {
        "weight_format": None, "gradient_format": None, "accumulator": "low", "variance_corrected": True,
        "backend": "auto", "schedule": None, "full_precision": [],
    }  # fmt: skip
    assert accepted_options(Closed, {"seed": 1, **neutral}) == {"seed": 1}
    assert accepted_options(SGLD, neutral) == neutral
    with pytest.raises(TypeError, match="takes no `schedule`"):
        accepted_options(Closed, {"schedule": CyclicalStepSize(3, 1)})
    with pytest.raises(TypeError, match="num_dat"):
        SGLD.from_optimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1), num_dat=3)
