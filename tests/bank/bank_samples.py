"""Small modules on a grid, and banks filled with them: the same content for the same step, always."""

import json

import torch
from torch import nn

from lightning_lpsgld.bank import SampleBank, module_tensors
from lightning_lpsgld.bank.manifest import body_checksum
from lightning_lpsgld.ops import quantize


class Net(nn.Module):
    """Convolution, BatchNorm, a tied linear pair, an integer buffer: everything a sample can hold."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.fc.weight
        self.register_buffer("labels", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(5), persistent=False)

    def forward(self, x):
        return self.tied(self.fc(self.norm(self.conv(x)).mean((2, 3))))


def fill(module, step, fmt="bfp8"):
    """Give ``module`` the content of ``step``; parameters on the grid of ``fmt``, buffers anywhere."""
    generator = torch.Generator().manual_seed(1000 + step)
    with torch.no_grad():
        for param in module.parameters():
            values = torch.randn(param.shape, generator=generator) * 0.4
            param.copy_(values if fmt is None else quantize(values, fmt, rounding="nearest"))
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator))
            else:
                buffer.fill_(step)
    return module


def contents(module):
    """Copies of everything that a sample stores."""
    return {name: tensor.detach().clone() for name, tensor in module_tensors(module).items()}


def expected(step, fmt="bfp8"):
    """What a sample of ``step`` must load."""
    return contents(fill(Net(), step, fmt))


def filled_bank(path, steps, **options):
    """A bank with one sample per step."""
    bank = SampleBank(path, **options)
    for step in steps:
        bank.add(fill(Net(), step), step=step, formats="bfp8", lr=0.1, temperature=1.0, metrics={"loss": step / 8})
    return bank


def assert_holds(bank, steps, clamped=()):
    """The bank has exactly these steps, in this order, each with the bits that were added.

    ``clamped`` are the steps whose weights version 1 rounded, which held the largest of a block below powers of two.
    """
    assert bank.steps == list(steps)
    module = Net()
    for index, step in enumerate(steps):
        bank.load_into(module, index)
        loaded, wanted = contents(module), expected(step, "bfp8-clamp" if step in clamped else "bfp8")
        assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def resealed(manifest):
    """A manifest, altered at will, with the checksum that makes it look genuine."""
    body = {name: value for name, value in manifest.items() if name != "checksum"}
    return {**body, "checksum": body_checksum(body)}


def rewrite_manifest(path, change):
    """Apply ``change`` to the manifest in ``path`` and seal it again."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(resealed(manifest)))
