"""Networks of timm and torchvision as they come: classified, segmented, detected; trained, banked, averaged."""

import lightning as L
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_lpsgld import EnsembleEvaluation, LowPrecisionSGLD, PosteriorEnsemble, SampleBank, SampleCollector
from lightning_lpsgld.ops import quantize


class Pictures(Dataset):
    """Noise with targets: a class, a class per pixel, or boxes."""

    def __init__(self, size, kind, count=8):
        self.size, self.kind, self.count = size, kind, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, self.size, self.size, generator=generator)
        if self.kind == "class":
            return image, torch.tensor(index % 3)
        if self.kind == "pixels":
            return image, torch.randint(3, (self.size, self.size), generator=generator)
        low = torch.rand(2, generator=generator) * self.size / 2
        box = torch.cat([low, low + self.size / 3])
        return image, {"boxes": box.unsqueeze(0), "labels": torch.tensor([1 + index % 2])}


class Trained(L.LightningModule):
    """A network and its loss; nothing in it knows of the package."""

    def __init__(self, net, kind):
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, x):
        out = self.net(x)
        return out["out"] if self.kind == "pixels" else out

    def training_step(self, batch, batch_idx):
        if self.kind == "boxes":
            return sum(self.net(*batch).values())
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def timm_net(name, **options):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, pretrained=False, num_classes=3, **options)


def detector(name, **options):
    build = getattr(torchvision.models.detection, name)
    return build(weights=None, weights_backbone=None, num_classes=3, **options)


def segmenter(name):
    return getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=3)


#: kind of target, size of the pictures, how the network is built
NETS = {
    "timm resnet": ("class", 32, lambda: timm_net("resnet10t")),
    "timm mobilenet": ("class", 32, lambda: timm_net("mobilenetv3_small_050")),
    "timm vision transformer": (
        "class", 32, lambda: timm_net("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48)
    ),
    "torchvision segmentation": ("pixels", 64, lambda: segmenter("lraspp_mobilenet_v3_large")),
    "torchvision detection, ssdlite": (
        "boxes", 64, lambda: detector("ssdlite320_mobilenet_v3_large", detections_per_img=5)
    ),
    "torchvision detection, faster r-cnn": (
        "boxes", 64, lambda: detector("fasterrcnn_mobilenet_v3_large_320_fpn", min_size=64, max_size=64)
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if "r-cnn" in n else n for n in NETS], ids=lambda n: n
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_networks_as_they_come(tmp_path, name):
    kind, size, build = NETS[name]
    torch.manual_seed(0)
    module = Trained(build(), kind)
    together = (lambda rows: tuple(map(list, zip(*rows)))) if kind == "boxes" else None
    loader = DataLoader(Pictures(size, kind), 4, collate_fn=together)
    callbacks = [SampleCollector(start=0.0, every=1, path=tmp_path / "bank")]
    callbacks += [EnsembleEvaluation()] if kind != "boxes" else []
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[LowPrecisionSGLD(seed=0)], callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, loader)
    for weight in module.parameters():
        assert torch.equal(quantize(weight.detach(), "bfp8", rounding="nearest"), weight.detach())
    bank = SampleBank.open(tmp_path / "bank")
    assert len(bank) == 2
    again = Trained(build(), kind)
    bank.load_into(again, 1)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), module.state_dict().values()))
    x = next(iter(loader))[0]
    if kind == "boxes":  # boxes of two samples are no two views of one box: each sample is asked for its own
        found = again.eval()(x)
        assert {"boxes", "scores", "labels"} <= found[0].keys()
        return
    trainer.test(module, loader, verbose=False)
    assert trainer.callback_metrics["ensemble/nll"].isfinite()
    shape = (4, 3) if kind == "class" else (4, 3, size, size)
    assert PosteriorEnsemble(again, bank)(x).mean.shape == shape
