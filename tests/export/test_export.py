"""Exported files answer as PyTorch does, at a quarter of the size, for any number of rows."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_lpsgld import PosteriorEnsemble
from lightning_lpsgld.bank import BankError, SampleBank
from lightning_lpsgld.export import export_onnx, export_program, pack
from lightning_lpsgld.ops import quantize


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def bank_of(net, fmt="bfp8", count=3):
    bank, generator = SampleBank(), torch.Generator().manual_seed(1)
    for step in range(count):
        with torch.no_grad():
            for param in net.parameters():
                values = torch.randn(param.shape, generator=generator) * 0.2
                param.copy_(quantize(values, fmt, rounding="nearest"))
            for name, buffer in net.named_buffers():
                if "running" in name:
                    buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        bank.add(net, step=step, formats=fmt)
    return bank


def images(n):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def write(kind, *args, **options):
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        return export_onnx(*args, **options)
    return export_program(*args, **options)


def answers(path, inputs):
    if path.suffix == ".pt2":
        return {name: value.numpy() for name, value in torch.export.load(str(path)).module()(inputs).items()}
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, {"input": inputs.numpy()})))


@pytest.mark.parametrize("fmt", ["bfp8", "fixed8.6", "bfp8-tensor", "e4m3"])
def test_codes_and_scales_are_the_weights(fmt):
    net = nn.Linear(40, 30)
    bank = bank_of(net, fmt)
    for tensor in pack(bank):
        expected = torch.stack([sample.state_dict()[tensor.name] for sample in bank])
        assert torch.equal(tensor.decoded(), expected)
    weight = pack(bank)[0]
    assert (weight.scales is None) == (fmt == "e4m3")
    if fmt != "e4m3":
        assert weight.values.dtype == torch.int8
        assert bool((torch.frexp(weight.scales)[0] == 0.5).all())  # powers of two


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_answers_like_pytorch(tmp_path, kind):
    """A bar of 1e-5 for numbers of order one: float32 sums of up to 256 products in another order."""
    net = convnet()
    bank, path = bank_of(net), tmp_path / f"posterior.{kind}"
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    outcome = write(kind, net, bank, path, (images(6), torch.zeros(6)))
    assert outcome.largest_difference < 1e-5
    assert (outcome.samples, outcome.bytes, outcome.points) == (3, path.stat().st_size, 6)
    assert set(outcome.difference) == {"mean", "predictive_entropy", "mutual_information"}
    expected = PosteriorEnsemble(net, bank)(images(11)).tensors()  # another number of rows than at export
    for name, value in answers(path, images(11)).items():
        assert value.shape == tuple(expected[name].shape)
        assert np.abs(value - expected[name].numpy()).max() < 1e-5
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    assert "largest difference from PyTorch on 6 inputs" in str(outcome)


def test_onnx_holds_the_network_once_and_codes(tmp_path):
    onnx = pytest.importorskip("onnx")
    outcome = write("onnx", convnet(), bank_of(convnet(), count=6), tmp_path / "a.onnx", images(4))
    model = onnx.load(str(tmp_path / "a.onnx"))
    assert outcome.bytes < 0.32 * outcome.bytes_fp32
    assert [f.name for f in model.functions].count("OneSample") == 1
    assert sum(node.op_type == "OneSample" for node in model.graph.node) == 6
    assert not any(node.op_type in ("Conv", "Gemm", "MatMul") for node in model.graph.node)
    codes = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert len(codes) == 18  # three matrices, six samples
    assert "opset 18" in str(outcome)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_regression(tmp_path, kind):
    build = lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))  # noqa: E731
    bank, x = bank_of(build()), torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    outcome = write(kind, build(), bank, tmp_path / f"r.{kind}", x, task="regression")
    assert set(outcome.difference) == {"mean", "epistemic"}
    assert outcome.largest_difference < 1e-5


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_refusals(tmp_path, kind):
    net, path = nn.Linear(5, 3), tmp_path / f"x.{kind}"
    bank, x = bank_of(net), torch.zeros(4, 5)
    for args, options, error, message in (
        ((net, SampleBank(), path, x), {}, ValueError, "has no usable sample"),
        ((net, tmp_path / "none", path, x), {}, BankError, "There is no sample bank"),
        ((nn.Linear(4, 3), bank, path, torch.zeros(4, 4)), {}, BankError, "`weight` is"),
        ((net, bank, path, x[:1]), {}, ValueError, "a batch of two rows or more, got 1 rows"),
        ((net, bank, path, {"x": [1.0]}), {}, ValueError, "takes modules of one input tensor"),
        ((net, bank, path, x), {"task": "multilabel"}, ValueError, "got task='multilabel'"),
    ):
        with pytest.raises(error, match=message):
            write(kind, *args, **options)
    assert not path.exists()
