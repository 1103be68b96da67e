# %% [markdown]
# # Regression: an interval for what the data do not say
#
# What this page is for: to see an 8-bit posterior of a regression from data to intervals, with everything it
# prints: noise that the network predicts, and doubt where
# there are no data.

# %%
import logging
import warnings

import lightning as L
import matplotlib.pyplot as plt
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld import EnsembleEvaluation, LowPrecisionSGLD, PosteriorEnsemble, SampleCollector

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def measured(count, seed):
    """Noise grows with x; beyond -2 and 2 nothing was measured."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, generator=generator) * 4 - 2
    noise = (0.1 + 0.05 * (x + 2)) * torch.randn(count, 1, generator=generator)
    return TensorDataset(x, torch.sin(2 * x) + noise)


train, held_out, test = measured(600, 1), measured(500, 2), measured(1000, 3)

# %% [markdown]
# The network gives a mean and the logarithm of a variance, and is trained by the Gaussian likelihood. That loss is
# a mean of negative log likelihoods, so T = 1 would be the posterior;
# a tenth of that is asked for here, and the accumulator has two bytes, which carry it.


# %%
class Curve(L.LightningModule):
    def __init__(self):
        super().__init__()
        width = 50
        self.net = torch.nn.Sequential(
            torch.nn.Linear(1, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, 2),
        )

    def forward(self, x):
        mean, log_variance = self.net(x).chunk(2, dim=1)
        return {"mean": mean, "log_variance": log_variance}

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        return torch.nn.functional.gaussian_nll_loss(out["mean"], batch[1], out["log_variance"].exp())

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.03, weight_decay=1e-4)


L.seed_everything(0, verbose=False)
trainer = L.Trainer(
    max_epochs=1200,
    accelerator="cpu",
    plugins=[LowPrecisionSGLD(temperature=0.1, accumulator="bfp16")],
    callbacks=[SampleCollector("bank", start=0.5, every=120), EnsembleEvaluation()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model := Curve(), DataLoader(train, 200, shuffle=True))
scores = trainer.test(model, DataLoader(test, 500), verbose=False)[0]
for name in ("rmse", "nll", "crps", "coverage_90"):
    print(f"{name:12}", *(f"{kind} {scores[f'{kind}/{name}']:.4f}  " for kind in ("ensemble", "single", "current")))

# %% [markdown]
# The two parts of the variance: *aleatoric* is noise that all samples expect, *epistemic* is what they do not agree
# on.

# %%
ensemble = PosteriorEnsemble.from_bank(Curve(), "bank")
x = torch.linspace(-4, 4, 400).unsqueeze(1)
answer = ensemble(x)
mean, line = answer.mean.squeeze(1), x.squeeze(1)

figure, axis = plt.subplots(figsize=(6.5, 3.2))
for part, colour, label in ((answer.variance, "0.85", "all"), (answer.epistemic, "tab:orange", "samples disagree")):
    reach = 2 * part.squeeze(1).sqrt()
    axis.fill_between(line, mean - reach, mean + reach, color=colour, alpha=0.7, label=f"two sd: {label}")
axis.plot(*(part.squeeze(1) for part in train.tensors), ".", ms=2, color="tab:blue")
axis.plot(line, mean, color="black")
axis.legend(fontsize=8)
far, near = (answer.epistemic.squeeze(1)[part].mean().sqrt() for part in (line.abs() > 2.5, line.abs() < 2))
print(f"epistemic sd: {near:.3f} where there are data, {far:.3f} where there are none")

# %% [markdown]
# Intervals with a coverage that was checked on held-out points:

# %%
ensemble.calibrate(DataLoader(held_out, 500), coverage=0.9)
inputs, truth = test.tensors
answer = ensemble(inputs)
inside = ((truth >= answer.lower) & (truth <= answer.upper)).float().mean()
print(f"inside: {inside:.1%} of {len(truth)} test points")
