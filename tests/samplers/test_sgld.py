"""The SGLD optimizer: each row of the paper's tables against its equation, state, groups, refusals."""

import copy
import io
import logging

import pytest
import torch
from torch import nn

from lightning_lpsgld.ops import quantize, quantize_variance_corrected
from lightning_lpsgld.random import DrawKey, Role, normals, stream_id
from lightning_lpsgld.samplers import SGHMC, SGLD, SVRG, CyclicalStepSize, PreconditionedSGLD

VARIANTS = {
    "sgld": {},
    "sgldlp-f": {"weight_format": "fixed8.5", "gradient_format": "fixed8.8", "accumulator": "full"},
    "naive": {"weight_format": "bfp8", "gradient_format": "fixed8.2", "variance_corrected": False},
    "vc": {"weight_format": "bfp8", "gradient_format": "fixed8.2"},
    "vc-fixed": {"weight_format": "fixed8.6"},
    "sgdlp-l": {"weight_format": "bfp8", "temperature": 0.0},
}


def network(seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return net


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator)


def train(net, opt, steps, scheduler=None):
    x, y = batch()
    for _ in range(steps):

        def closure():
            opt.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        opt.step(closure)
        if scheduler is not None:
            scheduler.step()
    return net


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_step_is_the_written_equation_with_the_named_draws(variant):
    """Coupled: the new weight is recomputed here from the equation and the same draws.

    Gradients are rounded so coarsely that it shows: with the gradient as it was, other weights would come out.
    """
    options = {"temperature": 0.5, "weight_decay": 0.1, **VARIANTS[variant]}
    torch_state = torch.get_rng_state()
    theta = torch.linspace(-1.0, 1.0, 24).reshape(4, 6)
    grad = torch.linspace(2.0, -1.0, 24).reshape(4, 6).sin()
    param = nn.Parameter(theta.clone())
    param.grad = grad.clone()
    opt = SGLD([param], lr=0.1, num_data=50, seed=11, backend="reference", **options)
    opt.step()

    key = DrawKey(seed=11, step=0)
    weight_key, gradient_key = key.at(stream=stream_id(Role.WEIGHT, 0)), key.at(stream=stream_id(Role.GRADIENT, 0))
    v = 2 * 0.1 * options["temperature"] / 50

    def moved_along(grad, rounded=True):
        mean = theta - 0.1 * (grad + 0.1 * theta)
        noisy = mean + v**0.5 * normals(mean.shape, weight_key).float()
        if variant == "sgld" or not rounded:
            return noisy
        if variant in ("sgldlp-f", "naive"):
            return quantize(noisy, options["weight_format"], key=weight_key, backend="reference")
        return quantize_variance_corrected(mean, v, options["weight_format"], key=weight_key, backend="reference")

    exact = grad
    if "gradient_format" in options:
        grad = quantize(grad, options["gradient_format"], key=gradient_key, backend="reference")
        assert int((moved_along(grad) != moved_along(exact)).sum()) >= 6, "rounding the gradient would go unnoticed"
    assert torch.equal(param.detach(), moved_along(grad))
    if variant == "sgldlp-f":
        assert torch.equal(opt.state[param]["accumulator"], moved_along(grad, rounded=False))
    assert torch.equal(torch.get_rng_state(), torch_state), "a sampler must not touch the global generator"


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(variant):
    def build():
        net = network()
        user = torch.optim.SGD(net.parameters(), lr=0.2, weight_decay=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(user, 3, gamma=0.5)
        schedule = CyclicalStepSize(5, 2, noise_in="sampling-stage")
        opt = SGLD.from_optimizer(user, num_data=100, seed=5, schedule=schedule, **VARIANTS[variant])
        opt.round_parameters_()
        return net, opt, scheduler

    whole, opt, scheduler = build()
    train(whole, opt, 12, scheduler)

    half, opt, scheduler = build()
    train(half, opt, 7, scheduler)
    file = io.BytesIO()
    torch.save([half.state_dict(), opt.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    resumed, opt, scheduler = build()
    for target, state in zip((resumed, opt, scheduler), torch.load(file, weights_only=True)):
        target.load_state_dict(state)
    train(resumed, opt, 5, scheduler)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    assert opt.steps == 12


@pytest.mark.parametrize("variant", ["naive", "vc", "vc-fixed", "sgdlp-l"])
def test_on_grid_weights_never_move_at_temperature_zero_and_zero_gradient(variant):
    options = {**VARIANTS[variant], "temperature": 0.0}
    net = network()
    opt = SGLD(net.parameters(), lr=0.5, num_data=10, **options)
    opt.round_parameters_()
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(50):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


@pytest.mark.parametrize("variant", ["naive", "vc", "sgldlp-f"])
def test_weights_are_on_the_grid_after_every_step(variant):
    net = network()
    opt = SGLD(net.parameters(), lr=0.2, num_data=100, **VARIANTS[variant])
    for _ in range(3):
        train(net, opt, 1)
        for p in net.parameters():
            assert torch.equal(quantize(p, opt.weight_format, rounding="nearest"), p)


def test_low_precision_bfloat16_parameters_keep_a_float32_accumulator_through_a_checkpoint():
    param = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4).bfloat16())
    opt = SGLD([param], lr=0.1, num_data=10, weight_format="bfp8", accumulator="full")
    param.grad = torch.ones_like(param)
    opt.step()
    saved = opt.state[param]["accumulator"].clone()
    assert saved.dtype == torch.float32
    other = SGLD([param], lr=0.1, num_data=10, weight_format="bfp8", accumulator="full")
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert torch.equal(other.state[param]["accumulator"], saved)
    assert other.state[param]["accumulator"].dtype == torch.float32


def test_param_groups_are_shared_with_the_source_optimizer_also_after_loading():
    net = network()
    groups = [
        {"params": net[0].parameters(), "lr": 0.1},
        {"params": net[2].parameters(), "lr": 0.01, "weight_decay": 0.5},
    ]
    user = torch.optim.SGD(groups, lr=1.0)
    opt = SGLD.from_optimizer(user, num_data=10)
    assert opt.param_groups is user.param_groups
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.01]
    assert [g["weight_decay"] for g in opt.param_groups] == [0.0, 0.5]
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.param_groups is user.param_groups
    user.param_groups[1]["lr"] = 0.25
    assert opt.step_size(opt.param_groups[1]) == 0.25


def test_scheduler_of_the_source_optimizer_gives_no_step_order_warning(recwarn):
    net = network()
    user = torch.optim.Adam(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(user, 0.5)
    opt = SGLD.from_optimizer(user, num_data=10)
    train(net, opt, 2, scheduler)
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]
    assert opt.param_groups[0]["lr"] == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True), "momentum, nesterov"),
        (lambda ps: torch.optim.AdamW(ps, lr=0.1), "betas"),
        (lambda ps: torch.optim.SGD(ps, lr=0.1), None),
    ],
)
def test_what_is_ignored_is_said(make, words, caplog):
    with caplog.at_level(logging.WARNING):
        SGLD.from_optimizer(make(network().parameters()), num_data=10)
    if words is None:
        assert not caplog.records
    else:
        (record,) = caplog.records
        assert words in record.getMessage()


def test_frozen_missing_and_exempt_parameters():
    net = network()
    net[0].bias.requires_grad_(False)
    exempt = net[2].weight
    frozen = net[0].bias.detach().clone()
    opt = SGLD(net.parameters(), lr=0.1, num_data=10, weight_format="bfp4", full_precision=[exempt])
    train(net, opt, 2)
    assert torch.equal(net[0].bias, frozen)
    assert not torch.equal(quantize(exempt, "bfp4", rounding="nearest"), exempt)
    assert opt.format_of(exempt) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_refuses_the_step_and_names_the_parameter(bad):
    net = network()
    opt = SGLD(net.parameters(), lr=0.1, num_data=10)
    opt.name_parameters(net.named_parameters())
    before = copy.deepcopy(net.state_dict())
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net[2].weight.grad[1, 2] = bad
    with pytest.raises(FloatingPointError, match=r"gradient of 2\.weight is NaN or infinite at step 0"):
        opt.step()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert opt.steps == 0


def test_non_finite_loss_refuses_the_step():
    net = network()
    opt = SGLD(net.parameters(), lr=0.1, num_data=10)
    with pytest.raises(FloatingPointError, match="loss is nan at step 0; no parameter was changed"):
        opt.step(lambda: torch.tensor(float("nan")))


def test_sparse_gradients_and_gradscaler_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    opt = SGLD(table.parameters(), lr=0.1, num_data=10)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="dense gradients"):
        opt.step()
    net = network()
    opt = SGLD(net.parameters(), lr=0.1, num_data=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x, y = batch()
    scaler.scale(nn.functional.cross_entropy(net(x), y)).backward()
    with pytest.raises(TypeError, match="GradScaler"):
        scaler.step(opt)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_data": 0}, "`num_data` must be an int >= 1"),
        ({"temperature": -1.0}, "`temperature` must be finite and >= 0"),
        ({"lr": -0.1}, "`lr` must be finite and >= 0"),
        ({"weight_decay": -0.1}, "`weight_decay` must be finite and >= 0"),
        ({"accumulator": "half"}, "`accumulator` must be 'low', 'full' or a number format"),
        ({"weight_format": "fixed99"}, "No number format is called"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, match):
    with pytest.raises(ValueError, match=match):
        SGLD(network().parameters(), **{"lr": 0.1, "num_data": 10, **options})


def test_format_wider_than_the_parameter_is_refused():
    with pytest.raises(ValueError, match=r"wider than torch\.bfloat16"):
        SGLD([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], lr=0.1, num_data=10, weight_format="fixed16.8")


def test_a_state_that_no_sampler_saved_is_refused():
    net = network()
    state = torch.optim.SGD(net.parameters(), lr=0.1).state_dict()
    with pytest.raises(ValueError, match="not saved by a sampler"):
        SGLD(net.parameters(), lr=0.1, num_data=10).load_state_dict(state)


def test_draws_do_not_depend_on_which_parameters_have_gradients():
    """A parameter's draws are those of its own stream, whatever happens to the others."""
    results = []
    for skip_first in (False, True):
        net = network()
        opt = SGLD(net.parameters(), lr=0.1, num_data=10, weight_format="bfp8")
        for p in list(net.parameters())[int(skip_first) :]:
            p.grad = torch.ones_like(p)
        opt.step()
        results.append(net[2].weight.detach().clone())
    assert torch.equal(*results)


def test_measure_reports_the_noise_of_the_next_step():
    net = network()
    opt = SGLD(net.parameters(), lr=0.1, num_data=10, weight_format="fixed8.4", temperature=1e-6)
    opt.name_parameters(net.named_parameters())
    train(net, opt, 1)
    assert opt.measured == []
    opt.measure()
    train(net, opt, 1)
    first = opt.measured[0]
    assert first.name == "0.weight"
    assert first.count == first.numel == 48
    assert first.target == pytest.approx(2 * 0.1 * 1e-6 / 10)
    assert first.achieved > 10 * first.target, "rounding alone is far warmer than T = 1e-6 on this grid"
    assert first.high == 0.0
    assert first.low + first.unreachable == pytest.approx(1.0)
    assert opt.saturation_counts() == {"0.weight": 0, "0.bias": 0, "2.weight": 0, "2.bias": 0}


def test_huge_but_finite_gradients_are_no_reason_to_refuse():
    """Their sum of squares overflows float32; the elements are finite."""
    param = nn.Parameter(torch.zeros(4))
    opt = SGLD([param], lr=1e-30, num_data=10, temperature=0.0)
    param.grad = torch.full((4,), 1e30)
    opt.step()
    assert torch.equal(param.detach(), torch.full((4,), -1.0))


def test_measuring_a_part_where_blocks_of_weight_and_gradient_differ():
    """Rows of the weight can be measured by themselves, those of a gradient with one exponent cannot: all are taken."""
    param = torch.nn.Parameter(torch.linspace(-1, 1, 64).view(16, 4))
    param.grad = torch.ones_like(param)
    opt = SGLD([param], 0.1, num_data=100, weight_format="bfp8", gradient_format="bfp8-tensor")
    opt.measure(max_elements=8)
    opt.step()
    assert opt.measured[0].count == 64


@pytest.mark.parametrize("cls", [SGLD, PreconditionedSGLD, SGHMC, SVRG])
def test_gradients_of_parameters_exempt_from_rounding_are_not_rounded(cls):
    """The exempt one moves as without any format, to the bit; the other one does not."""
    options = {SGHMC: {"friction": 1.0}}.get(cls, {})
    moved = []
    for formats in ({"weight_format": "bfp8", "gradient_format": "fixed8.1"}, {}):
        params = [nn.Parameter(torch.linspace(-0.4, 0.4, 12).reshape(3, 4)) for _ in range(2)]
        exempt = {"full_precision": params[:1]} if formats else {}
        opt = cls(params, 0.1, num_data=10, temperature=0.0, **options, **formats, **exempt)

        def closure(params=params):
            for param in params:
                param.grad = torch.linspace(0.11, 0.77, 12).reshape(3, 4)

        if cls is SVRG:
            opt.recentre(closure)
        for _ in range(2):
            opt.step(closure)
        moved.append([param.detach().clone() for param in params])
    (exempt, rounded), (plain, _) = moved
    assert torch.equal(exempt, plain)
    assert not torch.allclose(rounded, plain, atol=1e-3)
