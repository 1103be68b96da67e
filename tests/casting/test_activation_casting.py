"""Coupled: a cast network equals the one written out with `cast` and the documented keys."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_lpsgld.casting.cast as cast_module
from lightning_lpsgld.casting import ActivationCasting
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.ops.autograd import cast
from lightning_lpsgld.random import DrawKey, Role, derive_seed, stream_id

FORMAT = "bfp8"


def _keys(index: int, *, seed: int = 7, rank: int = 0, step: int = 0) -> dict[str, DrawKey]:
    private = derive_seed(seed, "rank", rank)
    return {
        "activation_key": DrawKey(private, step, stream_id(Role.ACTIVATION, index)),
        "error_key": DrawKey(private, step, stream_id(Role.ERROR, index)),
    }


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))


def _written_out(net: nn.Sequential, x: Tensor, casts: int = 4, **where: int) -> Tensor:
    for index, layer in enumerate(net):
        x = layer(x)
        if index < casts:
            x = cast(x, FORMAT, FORMAT, **_keys(index, **where))
    return x


def _gradients(net: nn.Module) -> list[Tensor]:
    found = [p.grad for p in net.parameters()]
    for p in net.parameters():
        p.grad = None
    return found


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("rank", [0, 3])
def test_outputs_and_gradients_are_those_of_the_network_written_out(batch, rank, context):
    net = _mlp()
    casting = ActivationCasting(net, seed=7, rank=rank).attach()
    for step in range(3):
        if context:
            with casting.forward_context():
                out = net(batch)
        else:
            out = net(batch)
        out.square().sum().backward()
        got = _gradients(net)
        casting._session.active = False
        expected = _written_out(net, batch, rank=rank, step=step)
        expected.square().sum().backward()
        casting._session.active = True
        assert torch.equal(out, expected)
        assert _same(got, _gradients(net))
    assert casting.state_dict()["forwards"] == 3


def test_formats_may_be_none_in_either_direction(batch):
    for activations, errors in ((None, "bfp8"), ("e4m3", None)):
        net = _mlp()
        casting = ActivationCasting(net, activations, errors, seed=7).attach()
        out = net(batch)
        casting.remove()
        x = batch
        for index, layer in enumerate(net):
            x = layer(x)
            if index < 4:
                x = cast(x, activations, errors, **_keys(index))
        assert torch.equal(out, x)
        out.sum().backward()
        got = _gradients(net)
        x.sum().backward()
        assert _same(got, _gradients(net))


class _Functional(nn.Module):
    """The same network, with its activations called as functions."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.function = nn.Linear(4, 8), nn.Linear(8, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


def _inplace(x: Tensor) -> Tensor:
    x.relu_()
    return x


FUNCTIONS = [
    F.relu,
    torch.relu,
    Tensor.relu,
    lambda x: F.relu(x, inplace=True),
    lambda x: F.relu(x, True),
    _inplace,
    F.gelu,
    torch.tanh,
    F.hardswish,
    lambda x: x.sigmoid(),
    lambda x: F.leaky_relu(x, 0.2),
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.Hardtanh(),
]


@pytest.mark.parametrize("codes", ["full", "codes"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_activation_is_cast_exactly_once_however_it_is_called(batch, function, codes):
    net = _Functional(function)
    casting = ActivationCasting(net, seed=7, saved_activations=codes).attach()
    with casting.forward_context():
        out = net(batch)
    out.square().sum().backward()
    got = _gradients(net)
    casting.remove()
    hidden = cast(net.first(batch), FORMAT, FORMAT, **_keys(0))
    expected = net.second(cast(function(hidden), FORMAT, FORMAT, **_keys(1)))
    expected.square().sum().backward()
    assert torch.equal(out, expected)
    assert _same(got, _gradients(net))


def test_functions_can_be_left_alone(batch):
    net = _Functional(F.relu)
    casting = ActivationCasting(net, seed=7, functional=False).attach()
    with casting.forward_context():
        out = net(batch)
    casting.remove()
    assert torch.equal(out, net.second(F.relu(cast(net.first(batch), FORMAT, FORMAT, **_keys(0)))))


def test_excluded_modules_are_left_alone_inside_too(batch):
    net = nn.Sequential(_Functional(F.relu), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    casting = ActivationCasting(net, seed=7, exclude=["0", "3"]).attach()
    with casting.forward_context():
        out = net(batch)
    casting.remove()
    x = cast(net[1](net[0](batch)), FORMAT, FORMAT, **_keys(0))
    x = cast(net[2](x), FORMAT, FORMAT, **_keys(1))
    assert torch.equal(out, net[4](net[3](x)))


def test_losses_and_metrics_are_not_cast(batch, monkeypatch):
    keys = _record_keys(monkeypatch)

    class Focal(nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return torch.sigmoid(logits).square().sum() + F.relu(logits).sum()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.focal, self.l1 = _mlp(), Focal(), nn.SmoothL1Loss()

    both = Both()
    casting = ActivationCasting(both, seed=7).attach()
    with casting.forward_context():
        out = both.net(batch)
        losses = both.focal(out), both.l1(out, out.detach() + 0.3), F.relu(0.1 - out).mean(), torch.tanh(out).sum()
    assert len(keys) == 5  # the five modules of the network and nothing else
    casting.remove()
    assert torch.equal(losses[0], both.focal(out))
    assert torch.equal(losses[1], both.l1(out, out.detach() + 0.3))
    assert torch.equal(losses[2], F.relu(0.1 - out).mean())
    assert torch.equal(losses[3], torch.tanh(out).sum())


def _record_keys(monkeypatch) -> list[DrawKey]:
    keys: list[DrawKey] = []

    def spy(x, fmt, *, key=None, **options):
        keys.append(key)
        return quantize(x, fmt, key=key, **options)

    monkeypatch.setattr(cast_module, "quantize", spy)
    return keys


def test_keys_never_repeat(batch, monkeypatch):
    keys = _record_keys(monkeypatch)
    shared = nn.ReLU()
    net = nn.Sequential(nn.Linear(4, 8), shared, nn.Linear(8, 8), shared, nn.Linear(8, 3))
    for rank in (0, 1):
        casting = ActivationCasting(net, seed=7, rank=rank, eval_rounding="stochastic").attach()
        for _ in range(3):
            with casting.forward_context():
                (net(batch) + net(2 * batch)).sum().backward()
            net.eval()
            for _ in range(2):
                net(batch).sum().backward()
            net.train()
        casting.remove()
    assert len(keys) == 2 * 3 * 4 * 8 + 2  # and the last layer once per rank, while it is being found
    assert len(set(keys)) == len(keys)


def test_evaluation_is_deterministic_and_does_not_disturb_training(batch):
    def run(evaluate: bool) -> Tensor:
        net = _mlp()
        casting = ActivationCasting(net, seed=7, eval_rounding="stochastic").attach()
        outs = []
        for _ in range(3):
            outs.append(net(batch))
            if evaluate:
                net.eval()
                net(batch)
                net.train()
                with torch.no_grad():
                    net(batch)
        casting.remove()
        return torch.stack(outs)

    assert torch.equal(run(False), run(True))


def test_evaluation_rounds_to_nearest_by_default_or_stochastically(batch):
    net = _mlp().eval()
    casting = ActivationCasting(net, seed=7).attach()
    first, second = net(batch), net(batch)
    casting.remove()
    x = batch
    for index, layer in enumerate(net):
        x = layer(x)
        x = quantize(x, FORMAT, rounding="nearest") if index < 4 else x
    assert torch.equal(first, x)
    assert torch.equal(second, x)
    casting = ActivationCasting(net, seed=7, eval_rounding="stochastic").attach()
    assert not torch.equal(net(batch), net(batch))
    casting.remove()


def test_resume_is_bitwise(batch):
    net = _mlp()
    casting = ActivationCasting(net, seed=7).attach()
    for _ in range(3):
        net(batch)
    state = casting.state_dict()
    expected = [net(batch) for _ in range(2)]
    casting.remove()
    fresh = _mlp()
    resumed = ActivationCasting(fresh, seed=7).attach()
    resumed.load_state_dict(torch.load(io.BytesIO(_saved(state)), weights_only=True))
    assert _same([fresh(batch) for _ in range(2)], expected)
    assert resumed.state_dict()["forwards"] == 5
    # Without what was learned about the outputs the draws are the same.
    again = _mlp()
    bare = ActivationCasting(again, seed=7).attach()
    bare.load_state_dict({**state, "outputs": {"places": [], "learned": []}})
    assert _same([again(batch) for _ in range(2)], expected)


def _saved(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_attaching_changes_neither_class_nor_state_and_removing_leaves_no_trace(batch):
    net = nn.Sequential(_mlp(), nn.BatchNorm1d(3), nn.Linear(3, 2))
    keys, before, kind = list(net.state_dict()), copy.deepcopy(net), type(net)
    plain = before(batch)
    slots = [dict(module.__dict__) for module in net.modules()]
    casting = ActivationCasting(net).attach()
    assert casting.attach() is casting
    assert list(net.state_dict()) == keys
    assert type(net) is kind
    assert not torch.equal(net(batch), plain)
    casting.remove()
    assert not casting.attached
    for module, slot in zip(net.modules(), slots, strict=True):
        assert module.__dict__.keys() == slot.keys()
        assert not any(len(value) for name, value in module.__dict__.items() if "hooks" in name)
    net.load_state_dict(before.state_dict())
    assert torch.equal(net(batch), before(batch))


def test_hooks_of_the_user_stay(batch):
    net = _mlp()
    seen = []
    net[0].register_forward_hook(lambda module, args, out: seen.append(out))
    ActivationCasting(net, seed=7).attach().remove()
    net(batch)
    assert len(seen) == 1


def test_deep_copies_cast_and_draw_on(batch):
    net = _mlp()
    casting = ActivationCasting(net, seed=7).attach()
    net(batch)
    twin = copy.deepcopy(net)
    part = copy.deepcopy(net[0])
    assert part(batch).shape == (6, 8)
    state = casting.state_dict()["forwards"]
    out = twin(batch)
    casting.remove()
    assert torch.equal(out, _written_out(net, batch, step=state))
    assert torch.equal(twin(batch), net(batch))  # removed: copies stop casting too


def test_a_pickled_module_goes_on_where_it_was(batch):
    net = _mlp()
    casting = ActivationCasting(net, seed=7).attach()
    net(batch)
    twin = pickle.loads(pickle.dumps(net))
    assert torch.equal(twin(batch), net(batch))
    casting.remove()


def test_the_module_is_not_kept_alive():
    net = _mlp()
    casting = ActivationCasting(net)
    del net
    gc.collect()
    with pytest.raises(ReferenceError, match="no longer exists"):
        casting.attach()


def test_a_forward_that_raises_leaves_the_casting_usable(batch):
    net = _mlp()
    casting = ActivationCasting(net, seed=7).attach()
    for context in (True, False):
        around = casting.forward_context() if context else contextlib.nullcontext()
        with pytest.raises(RuntimeError, match="mat1 and mat2"), around:
            net(batch[:, :2])
    out = net(batch)
    casting.remove()
    assert torch.equal(out, _written_out(net, batch, step=2))


def test_a_nested_context_is_one_context(batch):
    net = _Functional(F.relu)
    casting = ActivationCasting(net, seed=7, saved_activations="codes").attach()
    with casting.forward_context(), casting.forward_context():
        net(batch)
    assert casting._session.calls.last.index == 3
    assert not torch.overrides._get_current_function_mode_stack()


def test_recurrent_attention_and_packed_outputs():
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4)
    lstm = nn.LSTM(4, 4)
    casting = ActivationCasting(nn.Sequential(lstm), seed=7)
    net = nn.ModuleDict({"lstm": lstm, "attention": nn.MultiheadAttention(4, 2)})
    casting = ActivationCasting(net, seed=7).attach()
    casting._session.tracker.finish = lambda owner, training, output, note: output  # see what the hooks give
    out, (h, c) = net["lstm"](x)
    packed, _ = net["lstm"](nn.utils.rnn.pack_padded_sequence(x, [5, 4, 2]))
    attended, weights = net["attention"](x, x, x)
    casting.remove()
    raw, (raw_h, raw_c) = net["lstm"](x)
    for index, (got, plain) in enumerate([(out, raw), (h, raw_h), (c, raw_c)]):
        assert torch.equal(got, quantize(plain, FORMAT, key=_keys(index)["activation_key"]))
    plain, _ = net["lstm"](nn.utils.rnn.pack_padded_sequence(x, [5, 4, 2]))
    assert torch.equal(packed.data, quantize(plain.data, FORMAT, key=_keys(0, step=1)["activation_key"]))
    plain, plain_weights = net["attention"](x, x, x)
    assert torch.equal(attended, quantize(plain, FORMAT, key=_keys(0, step=2)["activation_key"]))
    assert torch.equal(weights, plain_weights)


def test_describe_names_sites_functions_and_outputs(batch):
    net = _Functional(F.relu)
    casting = ActivationCasting(net, "bfp8", "e5m2", seed=7).attach()
    with casting.forward_context():
        net(batch)
    assert casting.describe() == [
        {"name": "first", "type": "Linear", "activation": "bfp8", "error": "e5m2"},
        {"name": "second", "type": "Linear", "activation": "output", "error": "output"},
        {"name": "relu", "type": "function", "activation": "bfp8", "error": "e5m2"},
    ]
    casting.remove()


def test_scripted_submodules_are_named_in_a_warning(batch):
    net = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2))
    casting = ActivationCasting(net, seed=7)
    with pytest.warns(UserWarning, match=r"cannot see all of '1': it is scripted"):
        casting.attach()
    out = net(batch)
    casting.remove()
    assert torch.equal(out, net[2](net[1](cast(net[0](batch), FORMAT, FORMAT, **_keys(0)))))


def test_half_precision_and_integer_outputs_pass(batch):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).bfloat16()
    casting = ActivationCasting(net, seed=7).attach()
    assert net(batch.bfloat16()).dtype == torch.bfloat16
    casting.remove()
