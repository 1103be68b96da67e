"""Two real ranks: replicas stay one chain whatever users do, and a fork is stopped and named."""

import pytest
import torch
from helpers.models import SyntheticData, make_trainer, small_mlp
from helpers.processes import run_ranks
from lightning.pytorch.callbacks import Callback

from lightning_lpsgld import LowPrecisionSGLD
from lightning_lpsgld.distributed import ForkedReplicasError, checksum
from lightning_lpsgld.samplers import SGLD

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


class Recorder(Callback):
    """Checksums of all parameters after every step; rank 0 draws numbers that the others do not; may interfere."""

    def __init__(self, interfere=None):
        self.rows, self.interfere = [], interfere

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_rank == 0:
            torch.rand(3)
        self.rows.append([int(checksum(p)) for p in module.parameters()])
        if self.interfere is not None and trainer.global_step == 10:
            self.interfere(trainer, module)

    def on_train_start(self, trainer, module):
        if self.interfere is see_cast:
            self.interfere(trainer, module)


def other_seed(trainer, module):
    trainer.optimizers[0].param_groups[0]["seed"] += trainer.global_rank


def other_bias(trainer, module):
    with torch.no_grad():
        module.net[3].bias[1] += 0.5 * trainer.global_rank


def see_cast(trainer, module):
    """The cast activation of a layer and the cast error that comes back to it, of one input on equal weights."""
    plugin, seen = trainer.precision_plugin, []
    handle = module.net[0].register_forward_hook(lambda m, inputs, out: seen.append(out))
    x = torch.linspace(-1, 1, 60).view(10, 6)
    with torch.enable_grad(), plugin.forward_context():
        out = module(x.requires_grad_())
    handle.remove()
    (error,) = torch.autograd.grad(out.sin().sum(), x)
    plugin.seen = {"activation": seen[0].tolist(), "error": error.tolist(), "weight": module.net[0].weight.tolist()}


def own_sampler(rank):
    module = small_mlp()
    module.configure_optimizers = lambda: SGLD(module.parameters(), 0.1, num_data=640, weight_format="bfp8", seed=rank)
    return module


def grouped(rank):
    """One parameter group on rank 0, two on rank 1."""
    module = small_mlp()
    weights, biases = [[p for n, p in module.named_parameters() if n.endswith(end)] for end in ("weight", "bias")]
    groups = [{"params": weights}, {"params": biases}] if rank else [{"params": weights + biases}]
    module.configure_optimizers = lambda: torch.optim.SGD(groups, 0.1)
    return module


def fit(module, steps, interfere=None, **options):
    recorder, plugin = Recorder(interfere), LowPrecisionSGLD(**options)
    trainer = make_trainer(
        max_epochs=-1, max_steps=steps, devices=2, strategy="ddp", plugins=[plugin], callbacks=[recorder],
        limit_val_batches=0,
    )  # fmt: skip
    message = None
    try:
        trainer.fit(module, datamodule=SyntheticData(n_train=640))
    except ForkedReplicasError as error:
        message = str(error)
    return recorder.rows, message, plugin, trainer


def scenarios():
    """On each rank: user seeds, initial weights, dropout masks and extra draws differ."""
    import os

    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    os.environ["PL_GLOBAL_SEED"] = str(rank)
    rows, message, plugin, trainer = fit(small_mlp(seed=rank, dropout=0.5), 200)
    result = {
        "protected": rows,
        "message": message,
        "weight_seed": trainer.optimizers[0].param_groups[0]["seed"],
        "card_seed": plugin.card.seed,
    }
    torch.manual_seed(0)
    result["cast"] = fit(small_mlp(), 2, see_cast, seed=1)[2].seen
    result["unwatched"] = fit(small_mlp(), 60, other_seed, seed=1, check_replicas=0)[0]
    result["watched"] = fit(small_mlp(), 60, other_seed, seed=1)[:2]
    result["bias"] = fit(small_mlp(), 60, other_bias, seed=1, check_replicas=15)[1]
    result["own"] = fit(own_sampler(rank), 60)[:2]
    result["settings"] = [
        fit(small_mlp(), 3, seed=1, **changed)[1]
        for changed in (
            {"temperature": 0.1 * (rank + 1), "num_data": 640 + rank},
            {"weights": "bfp8" if rank else "fixed8.6", "accumulator": "full" if rank else "low"},
            {"activations": "bfp8" if rank else "bfp6"},
            {"check_replicas": 7 * rank},
            {"temperature": 0.1 * (rank + 1), "check_replicas": 0},
        )
    ]
    result["groups"] = fit(grouped(rank), 3)[1]
    return result


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(scenarios)


def test_replicas_are_bit_identical_after_every_step(ranks):
    first, second = ranks
    assert first["message"] is None
    assert len(first["protected"]) == 200
    assert first["protected"] == second["protected"]
    assert len({tuple(row) for row in first["protected"]}) == 200, "weights did not move"
    assert first["weight_seed"] == second["weight_seed"] == first["card_seed"] == 0


def test_without_the_protection_the_same_run_forks(ranks):
    first, second = (result["unwatched"] for result in ranks)
    assert first[:10] == second[:10]
    assert all(a != b for a, b in zip(first[11:], second[11:]))
    assert len(first) == 60


def test_the_checksum_stops_the_forked_run_on_all_ranks(ranks):
    for result in ranks:
        rows, message = result["watched"]
        assert len(rows) == 49, "the check after step 50 raises before the batch ends"
        assert "after step 50, net.0.weight on rank 1 differs from rank 0 (4 of 4 tensors" in message


def test_the_message_names_the_first_tensor_that_differs(ranks):
    for result in ranks:
        assert "after step 15, net.3.bias on rank 1 differs from rank 0 (1 of 4 tensors" in result["bias"]


def test_a_sampler_with_a_seed_of_its_own_per_rank_is_refused_before_the_first_step(ranks):
    for result in ranks:
        rows, message = result["own"]
        assert rows == []
        assert message.startswith("`seed` is not the same on all ranks")


def test_ranks_with_other_settings_are_told_all_of_them_before_the_first_step(ranks):
    """Also where no weights are compared, and where ranks would not agree on when to compare them."""
    wanted = [
        ["`num_data`, `temperature` are not", "temperature: 0.1 on rank 0, 0.2 on rank 1", "num_data: 640 on rank 0"],
        ["`weights`, `accumulator` are not", "weights: 'fixed8.6' on rank 0, 'bfp8' on rank 1"],
        ["`activations` is not the same", "activations: 'bfp6' on rank 0, 'bfp8' on rank 1"],
        ["`check_replicas` is not the same", "check_replicas: 0 on rank 0, 7 on rank 1"],
        ["`temperature` is not the same"],
    ]
    for result in ranks:
        for message, words in zip(result["settings"], wanted, strict=True):
            assert all(word in message for word in words), message
        assert "missing on rank 0" in result["groups"]


def test_activation_and_error_rounding_is_private_to_each_rank(ranks):
    first, second = (result["cast"] for result in ranks)
    assert first["weight"] == second["weight"]
    assert first["activation"] != second["activation"]
    assert first["error"] != second["error"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_checksum_sees_one_changed_bit_and_the_order(dtype):
    """Exact: flipping any single bit, or swapping unequal neighbours, changes it; across a chunk border too."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
        torch.empty(0, dtype=dtype).element_size()
    ]
    x = torch.arange(2**20 + 5).to(dtype)
    before = int(checksum(x))
    assert int(checksum(x.clone())) == before
    for position in (0, 1, 2**20 - 1, 2**20, 2**20 + 4):
        for bit in (0, x.element_size() * 8 - 2):
            y = x.clone()
            y.view(integer)[position] ^= 1 << bit
            assert int(checksum(y)) != before
    swapped = x.clone()
    swapped[:2] = x[:2].flip(0)
    assert int(checksum(swapped)) != before


def test_checksum_of_nothing_and_of_strided_tensors():
    assert int(checksum(torch.zeros(0))) == 0
    x = torch.arange(6.0).view(2, 3)
    assert int(checksum(x.T)) == int(checksum(x.T.contiguous())) != int(checksum(x))
