"""Weights held as codes are moved in the backward pass, by the steps that floats would have made, bit for bit."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from lightning_lpsgld.ops import CodedTensor, code_parameters_, float_parameters_, quantize
from lightning_lpsgld.samplers import SGHMC, SGLD, CyclicalStepSize, PreconditionedSGLD


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8200), nn.ReLU(),
        nn.Linear(8200, 3),
    )  # fmt: skip


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 2, 4, 4, generator=generator), torch.randint(0, 3, (4,), generator=generator)


def chain(coded, fmt="bfp8", steps=3, watch=lambda opt: None, **options):
    net = network()
    if coded:
        code_parameters_(net, fmt, finer=options.get("accumulator"))
    options = {"lr": 0.1, "num_data": 100, "seed": 3, "weight_decay": 1e-2, "gradient_format": fmt, **options}
    opt = SGLD(net.parameters(), weight_format=fmt, **options)
    opt.name_parameters(net.named_parameters())
    opt.round_parameters_()
    watch(opt)
    for step in range(steps):
        loss = step_on(net, opt, step)
    return net, opt, loss


def step_on(net, opt, step):
    """A step on the batch of that number; its loss."""
    x, y = batch(step)

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return opt.step(closure)


def bits(net):
    return [p.detach().view(torch.int32) + 0 for p in float_parameters_(copy.deepcopy(net)).parameters()]


def assert_same(mine, theirs):
    assert all(torch.equal(a, b) for a, b in zip(bits(mine), bits(theirs), strict=True))


CASES = {
    "bfp8": {},
    "one exponent": {"fmt": "bfp8-tensor"},
    "runs": {"fmt": "bfp8b32"},
    "fixed": {"fmt": "fixed8.6"},
    "float": {"fmt": "e4m3"},
    "microscaling": {"fmt": "mxint8"},
    "sixteen bits": {"fmt": "bfp16"},
    "four bits": {"fmt": "bfp4"},
    "three bits, rows that share bytes": {"fmt": "bfp3", "gradient_format": "bfp8"},
    "six bits, microscaling": {"fmt": "mxfp6e3m2", "gradient_format": "bfp8"},
    "four bits, naive": {"fmt": "fixed4.2", "variance_corrected": False},
    "sums of sixteen bits": {"accumulator": "bfp16"},
    "fixed-point sums beside four bits": {"fmt": "fixed4.2", "accumulator": "fixed16.14", "gradient_format": "bfp8"},
    "one exponent, sums of one": {"fmt": "bfp8-tensor", "accumulator": "bfp16-tensor"},
    "sums in runs": {"accumulator": "mxint16"},
    "sums of six bits beside three": {"fmt": "bfp3", "accumulator": "bfp6", "gradient_format": "bfp8"},
    "naive sums": {"accumulator": "bfp16", "variance_corrected": False},
    "sums, reference": {"accumulator": "bfp16", "backend": "reference", "steps": 1},
    "naive": {"variance_corrected": False},
    "temperature 0": {"temperature": 0.0},
    "cyclical": {"schedule": CyclicalStepSize(cycle_length=2, sampling_steps=1)},
    "gradients of other blocks": {"gradient_format": "bfp8-tensor"},
    "gradients as they are": {"gradient_format": None},
    "lattice": {"fmt": "fixed8.6", "variant": "lattice", "steps": 1},
    "reference": {"backend": "reference", "steps": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_the_chain_is_that_of_floats_bit_for_bit(case):
    net, opt, loss = chain(coded=True, **CASES[case])
    floats, theirs, their_loss = chain(coded=False, **CASES[case])
    assert all(isinstance(p, CodedTensor) for p in net.parameters())
    assert_same(net, floats)
    for p, q in zip(net.parameters(), floats.parameters()):
        mine, whole = opt.accumulator_of(p), theirs.accumulator_of(q)
        assert isinstance(mine, CodedTensor)
        assert mine.nbytes_stored == opt.sum_format_of(p).stored_bytes(p.shape)
        assert torch.equal(mine.decoded(), whole.detach())
    assert torch.equal(loss, their_loss)
    assert opt.saturation_counts() == theirs.saturation_counts()
    assert list(opt.saturation_counts()) == list(theirs.saturation_counts())


def test_gradients_are_let_go_one_by_one():
    """When a weight moves, no other coded weight has a gradient, and none is left after the step."""
    seen = []

    def watch(opt):
        def observe(group, params, grads):
            held = [p for g in opt.param_groups for p in g["params"] if p.grad is not None]
            seen.append([opt.name_of(p) for p in held])
            assert [opt.name_of(p) for p in params] == seen[-1]

        opt.gradient_observers.append(observe)

    net, *_ = chain(coded=True, steps=1, watch=watch)
    assert sorted(name for names in seen for name in names) == sorted(name for name, _ in net.named_parameters())
    assert all(p.grad is None for p in net.parameters())


def test_no_float_of_a_weights_size_outlives_a_step():
    net, _, loss = chain(coded=True, steps=2)
    del loss
    gc.collect()
    sizes = {p.numel() for p in net.parameters() if p.numel() > 1000}
    floats = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.is_floating_point() and t.numel() in sizes]
    assert not floats


def test_measurements_and_observers_see_the_same():
    measured = []
    for coded in (True, False):
        _, opt, _ = chain(coded, watch=lambda opt: (opt.keep_gradients(), opt.measure()), steps=1)
        measured.append([(s.name, s) for s in opt.measured])
    assert [name for name, _ in measured[0]] == [name for name, _ in measured[1]]
    for (_, mine), (_, theirs) in zip(*measured):
        assert repr(mine) == repr(theirs)


def backward(net, number):
    x, y = batch(number)
    loss = nn.functional.cross_entropy(net(x), y) / 2
    loss.backward()
    return loss


def test_gradients_that_were_there_are_added_as_before():
    """Accumulation: backward passes before ``step`` leave gradients; that within it completes and moves."""
    nets = []
    for coded in (True, False):
        net = network()
        if coded:
            code_parameters_(net, "bfp8")
        opt = SGLD(net.parameters(), lr=0.1, num_data=100, weight_format="bfp8", gradient_format="bfp8")
        opt.round_parameters_()
        for step in range(2):
            opt.zero_grad()
            backward(net, step)
            assert all(p.grad is not None for p in net.parameters())
            opt.step(lambda net=net, step=step: backward(net, 10 + step))
        nets.append(net)
    assert_same(*nets)


def test_without_a_closure_the_step_is_made_of_the_gradients_there_are():
    nets = []
    for coded in (True, False):
        net = network()
        if coded:
            code_parameters_(net, "bfp8")
        opt = SGLD(net.parameters(), lr=0.1, num_data=100, weight_format="bfp8")
        opt.round_parameters_()
        x, y = batch(0)
        nn.functional.cross_entropy(net(x), y).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        opt.step()
        nets.append(net)
    assert_same(*nets)


def test_gradient_transforms_come_before_the_step():
    clipped = chain(coded=True, watch=lambda opt: opt.gradient_transforms.append(lambda g: g.clamp_(-1e-3, 1e-3)))[0]
    net = network()
    opt = SGLD(
        net.parameters(), lr=0.1, num_data=100, seed=3, weight_decay=1e-2, weight_format="bfp8", gradient_format="bfp8"
    )
    opt.round_parameters_()
    for step in range(3):
        opt.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(net(x), y).backward()
        torch.nn.utils.clip_grad_value_(net.parameters(), 1e-3)
        opt.step()
    assert_same(clipped, net)


@pytest.mark.parametrize(("mine", "accumulators"), [(True, True), (True, False), (False, True)])
def test_sums_are_saved_and_go_on_in_either_storage(mine, accumulators):
    """Saved beside codes or floats, loaded beside floats or codes; the saved state stays as it is."""
    whole, *_ = chain(coded=False, steps=4, accumulator="bfp16")
    first, saved, _ = chain(coded=mine, steps=2, accumulator="bfp16")
    state = saved.state_dict()
    kept = copy.deepcopy(state)
    assert state["state"][0]["accumulator"]["codes"].dtype == torch.int16
    twin = code_parameters_(network(), "bfp8", finer="bfp16") if accumulators else network()
    twin.load_state_dict(first.state_dict())
    options = {"weight_format": "bfp8", "gradient_format": "bfp8", "accumulator": "bfp16"}
    again = SGLD(twin.parameters(), lr=0.1, num_data=100, seed=3, weight_decay=1e-2, **options)
    again.load_state_dict(state)
    for step in (2, 3):
        step_on(twin, again, step)
    assert_same(twin, whole)
    sums = [again.state[p]["accumulator"] for p in twin.parameters()]
    assert all(isinstance(total, CodedTensor) == accumulators for total in sums)
    if accumulators:
        assert all(p.cell.finer is None for p in twin.parameters()), "what a sum begins at is not kept beside it"
    for number, entry in kept["state"].items():
        assert torch.equal(entry["accumulator"]["codes"], state["state"][number]["accumulator"]["codes"])


def test_a_sum_from_another_grid_is_floats_until_its_weight_moves():
    """As beside float weights, where its values stay what they were until then."""
    results = []
    for coded in (True, False):
        first, saved, _ = chain(coded=False, steps=2, accumulator="bfp12")
        net = code_parameters_(network(), "bfp8") if coded else network()
        net.load_state_dict(first.state_dict())
        options = {"weight_format": "bfp8", "gradient_format": "bfp8", "accumulator": "fixed16.14"}
        opt = SGLD(net.parameters(), lr=0.1, num_data=100, seed=3, **options)
        opt.load_state_dict(saved.state_dict())
        step_on(net, opt, 2)
        results.append((net, [opt.accumulator_of(p) for p in net.parameters()]))
    (mine, sums), (theirs, floats) = results
    assert_same(mine, theirs)
    assert all(isinstance(total, CodedTensor) for total in sums)
    assert all(torch.equal(a.decoded(), b) for a, b in zip(sums, floats))


def test_sums_begin_at_the_values_that_weights_had_before_they_were_rounded():
    net = network()
    values = [p.detach().clone() for p in net.parameters()]
    code_parameters_(net, "bfp4", finer="bfp16")
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin[4].weight.copy_(3 * values[4])  # set before the sampler is made
    for each, begin in ((net, values), (twin, [*values[:4], 3 * values[4], *values[5:]])):
        opt = SGLD(each.parameters(), lr=0.1, num_data=100, weight_format="bfp4", accumulator="bfp16")
        opt.round_parameters_()
        for param, value in zip(each.parameters(), begin):
            assert torch.equal(opt.accumulator_of(param).decoded(), quantize(value, "bfp16", rounding="nearest"))


def test_state_is_saved_and_the_chain_goes_on():
    net, opt, _ = chain(coded=True, steps=4)
    floats, *_ = chain(coded=False, steps=4)
    first, saved, _ = chain(coded=False, steps=2)
    twin = code_parameters_(network(), "bfp8")
    twin.load_state_dict(first.state_dict())
    again = SGLD(
        twin.parameters(), lr=0.1, num_data=100, seed=3, weight_decay=1e-2, weight_format="bfp8", gradient_format="bfp8"
    )
    again.load_state_dict(saved.state_dict())
    for step in (2, 3):
        step_on(twin, again, step)
    assert_same(twin, floats)
    assert_same(net, floats)
    assert again.state_dict()["param_groups"] == opt.state_dict()["param_groups"]


def step_with(net, opt, change):
    """One step whose closure calls ``change(loss)`` after the backward pass."""
    x, y = batch(0)

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return change(loss) or loss

    return opt.step(closure)


def coded_pair(**options):
    net = code_parameters_(network(), "bfp8")
    opt = SGLD(net.parameters(), lr=0.1, num_data=100, weight_format="bfp8", **options)
    opt.name_parameters(net.named_parameters())
    return net, opt


def test_a_setting_that_changes_after_a_step_was_made_with_it_is_refused():
    net, opt = coded_pair()
    with pytest.raises(RuntimeError, match="`lr` of parameter group 0 was set to"):
        step_with(net, opt, lambda loss: opt.param_groups[0].update(lr=0.5))
    with pytest.raises(FloatingPointError, match="between two states"):
        opt.state_dict()


def test_a_second_backward_pass_within_a_step_is_refused():
    net, opt = coded_pair()

    def again(loss):
        x, y = batch(1)
        nn.functional.cross_entropy(net(x), y).backward()

    with pytest.raises(RuntimeError, match="second backward pass within one step reaches 6"):
        step_with(net, opt, again)


def test_a_bad_first_gradient_is_refused_before_anything_moves():
    net, opt = coded_pair()
    before = bits(net)
    net[6].bias.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FloatingPointError, match=r"gradient of 6\.bias is NaN or infinite at step 0"):
        step_with(net, opt, lambda loss: None)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(net)))
    opt.state_dict()  # nothing stands


def test_a_bad_gradient_after_others_moved_stands_until_a_state_is_loaded():
    net, opt = coded_pair()
    saved = opt.state_dict()
    net[0].weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match=r"0\.weight is NaN or infinite at step 0"):
        step_with(net, opt, lambda loss: None)
    for use in (opt.state_dict, opt.settle, lambda: step_with(net, opt, lambda loss: None)):
        with pytest.raises(FloatingPointError, match=r"broken off after \d+ weights held as codes had moved"):
            use()
    opt.load_state_dict(saved)
    opt.settle()


def test_an_infinite_loss_with_finite_gradients_stands_too():
    net, opt = coded_pair()
    with pytest.raises(FloatingPointError, match="The loss is inf"):
        step_with(net, opt, lambda loss: loss + float("inf"))
    with pytest.raises(FloatingPointError, match="between two states"):
        opt.state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SGLD(p, 0.1, num_data=10, weight_format="fixed8.6"), "must be that format, got fixed8.6"),
        (lambda p: SGLD(p, 0.1, num_data=10), "must be that format, got None"),
        (lambda p: SGLD(p, 0.1, num_data=10, weight_format="bfp8", full_precision=p), "it is in `full_precision`"),
        (lambda p: SGLD(p, 0.1, num_data=10, weight_format="bfp8", accumulator="full"), "'full' keeps a float"),
        (lambda p: SGLD(p, 0.1, num_data=10, weight_format="bfp8", prior_mean="initial"), "keeps a float mean"),
        (lambda p: SGHMC(p, 0.1, friction=1.0, num_data=10, weight_format="bfp8"), "SGHMC keeps floats beside"),
        (lambda p: PreconditionedSGLD(p, 0.1, num_data=10, weight_format="bfp8"), "Use SGLD, or storage='float'"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused_when_it_is_made(make, message):
    net = code_parameters_(nn.Linear(3, 2), "bfp8")
    with pytest.raises((TypeError, ValueError), match=message):
        make(list(net.parameters()))


def test_a_step_without_a_closure_after_one_with_is_refused_whole():
    net, opt = coded_pair()
    step_with(net, opt, lambda loss: None)
    before = bits(net)
    x, y = batch(1)
    nn.functional.cross_entropy(net(x), y).backward()
    net[0].weight.grad.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="no parameter was changed"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, bits(net)))
    opt.state_dict()
