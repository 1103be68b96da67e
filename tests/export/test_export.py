"""Exported files answer as PyTorch does, at a quarter of the size, for any number of rows."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_lpsgld import PosteriorEnsemble
from lightning_lpsgld.bank import BankError, SampleBank
from lightning_lpsgld.export import export_onnx, export_program, pack
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.predictive import Multiclass, Regression


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
    if isinstance(inputs, dict):
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
    if path.suffix == ".pt2":
        return {name: value.numpy() for name, value in torch.export.load(str(path)).module()(inputs).items()}
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    named = inputs if isinstance(inputs, dict) else {"input": inputs}
    feed = {name: value.numpy() for name, value in named.items()}
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feed)))


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


class Values(nn.Module):
    """Mean and variance in one of the ways that modules give them."""

    def __init__(self, form):
        super().__init__()
        self.form, self.net = form, nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x):
        mean, second = self.net(x).chunk(2, dim=1)
        if self.form == "pair":
            return mean, nn.functional.softplus(second)
        return {"mean": mean, "log_variance": second} if self.form == "named" else torch.cat([mean, second], 1)


class Tagger(nn.Module):
    """Classes of tokens, classes last, from integers and a mask."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 16), nn.Linear(16, 5)

    def forward(self, input_ids, attention_mask):
        mixed = self.embedding(input_ids).cumsum(1) * attention_mask.unsqueeze(-1)
        return {"logits": self.head(mixed.tanh())}


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def features(n, seed=3):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


def tokens(n, length=6):
    ids = torch.randint(11, (n, length), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "attention_mask": (ids > 2).long(), "labels": ids}


def mlp(out):
    return lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, out))


TASKS = {
    "values": (mlp(1), features, {"task": "regression"}),
    "values with known noise": (mlp(2), features, {"task": "regression", "noise_std": 0.3}),
    "noise of the task": (mlp(1), features, {"task": Regression(noise_variance=0.7)}),
    "pair of mean and variance": (lambda: Values("pair"), features, {}),
    "named mean and log variance": (lambda: Values("named"), features, {}),
    "halves": (lambda: Values("halves"), features, {"task": Regression("mean_log_variance")}),
    "one logit": (mlp(1), features, {"task": "binary"}),
    "labels": (mlp(3), features, {"task": "multilabel"}),
    "classes of pixels": (lambda: nn.Conv2d(1, 3, 3, padding=1), images, {}),
    "yes or no of pixels": (lambda: nn.Conv2d(1, 1, 3, padding=1), images, {"task": "binary"}),
    "values of pixels": (lambda: nn.Conv2d(1, 1, 3, padding=1), images, {"task": "regression"}),
    "classes of tokens": (Tagger, tokens, {"task": Multiclass(class_dim=-1)}),
    "language model": (bert, tokens, {}),
    "picked by a function": (
        lambda: Values("named"), features, {"task": "multilabel", "forward": lambda m, x: m(x)["mean"]}
    ),
}  # fmt: skip


#: ONNX takes seconds a network: by default those whose way through the file differs.
QUICK = ("pair of mean and variance", "one logit", "labels", "classes of pixels")


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "pt2") for name in TASKS if name != "language model"]
    + [(name, "onnx") for name in QUICK]
    + [pytest.param(name, "onnx", marks=pytest.mark.slow) for name in TASKS if name not in QUICK]
    + [pytest.param("language model", "pt2", marks=pytest.mark.slow)],
)
def test_any_task_answers_like_pytorch(tmp_path, kind, name):
    """For another number of rows than at export, every output that the ensemble has, of its shape."""
    build, batch, options = TASKS[name]
    bank, path = bank_of(build()), tmp_path / f"r.{kind}"
    outcome = write(kind, build(), bank, path, batch(4), **options)
    numbers = {"mean", "epistemic", "aleatoric"}
    classes = {"mean", "predictive_entropy", "mutual_information"}
    assert set(outcome.difference) in (numbers, classes)
    assert outcome.largest_difference < 1e-5
    expected = PosteriorEnsemble(build(), bank, **options)(batch(7)).tensors()
    found = answers(path, batch(7))
    assert numbers <= expected.keys() or classes <= expected.keys()
    for output, value in found.items():
        assert value.shape == tuple(expected[output].shape), output
        assert np.abs(value - expected[output].numpy()).max() < 1e-5, output
    assert all(np.ptp(value) > 0 for name, value in found.items() if name not in ("aleatoric",))


@pytest.mark.parametrize(
    ("build", "options", "kind"),
    [
        (Tagger, {"task": Multiclass(class_dim=-1)}, "onnx"),
        (Tagger, {"task": Multiclass(class_dim=-1)}, "pt2"),
        pytest.param(bert, {}, "onnx", marks=pytest.mark.slow),
        pytest.param(bert, {}, "pt2", marks=pytest.mark.slow),
    ],
)
def test_sequences_of_any_length(tmp_path, build, options, kind):
    """Shorter and longer than those of the export, which itself looks at half their length too."""
    bank, path = bank_of(build()), tmp_path / f"r.{kind}"
    outcome = write(kind, build(), bank, path, tokens(4), max_length=16, **options)
    assert outcome.largest_difference < 1e-5
    ensemble = PosteriorEnsemble(build(), bank, **options)
    for length in (2, 5, 9):
        expected, found = ensemble(tokens(3, length)).tensors(), answers(path, tokens(3, length))
        for output, value in found.items():
            assert value.shape == tuple(expected[output].shape), output
            assert np.abs(value - expected[output].numpy()).max() < 1e-5, output


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_length_that_cannot_be_free_is_refused(tmp_path, kind):
    """By a network whose weights have the length, by inputs that are too short to tell, or of two lengths."""
    fixed, path = nn.Sequential(nn.Flatten(), nn.Linear(30, 3)), tmp_path / f"x.{kind}"
    for net, batch, message in (
        (fixed, torch.zeros(4, 6, 5), "any length up to 8: .*Make `max_length` smaller"),
        (nn.Linear(3, 2), torch.zeros(4, 3), r"from 4 to 8, got input \(4, 3\)"),
        (Tagger(), tokens(4, 9), r"from 4 to 8, got input_ids \(4, 9\)"),
        (Tagger(), {**tokens(4), "attention_mask": torch.ones(4, 9)}, r"the same in all, .*attention_mask \(4, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            write(kind, net, bank_of(net), path, batch, max_length=8)
    assert not path.exists()


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
        ((net, bank, path, x), {"task": "binary"}, ValueError, r"got task='binary' and \(4, 3\)"),
        ((net, bank, path, x), {"task": "ranking"}, ValueError, "`task` must be"),
        ((net, bank, path, x), {"forward": lambda m, x: m(x)[:, 0]}, ValueError, "say task='binary'"),
        ((net, bank, path, {"input_ids": x, "attention_mask": x[:2]}), {}, ValueError, "got 2, 4 rows"),
    ):
        with pytest.raises(error, match=message):
            write(kind, *args, **options)
    assert not path.exists()
