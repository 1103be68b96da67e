# %% [markdown]
# # Digits: from a classifier to an ensemble that knows when it does not know
#
# What this page is for: to see one run from data to answers, with everything it prints: 8-bit sampling of a small
# classifier, its ensemble, and where
# its uncertainty comes from.

# %%
import logging
import warnings

import lightning as L
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_lpsgld import EnsembleEvaluation, LowPrecisionSGLD, PosteriorEnsemble, SampleBank, SampleCollector

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
train, held_out, test = random_split(data, [997, 200, 600], torch.Generator().manual_seed(0))

# %% [markdown]
# The module is a plain LightningModule. Nothing in it knows of sampling or of 8 bits.


# %%
class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=5e-4)


# %% [markdown]
# One line makes it sample: the plugin. One callback keeps samples in a bank, one scores their average. The table
# has the ensemble, the mean of the single
# samples' scores, and the last weights.

# %%
L.seed_everything(0, verbose=False)
trainer = L.Trainer(
    max_epochs=40,
    accelerator="cpu",
    plugins=[LowPrecisionSGLD(temperature=1e-3, accumulator="bfp16")],
    callbacks=[SampleCollector("bank", start=0.5, every="epoch"), EnsembleEvaluation()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model := Digits(), DataLoader(train, 32, shuffle=True))
scores = trainer.test(model, DataLoader(test, 600), verbose=False)[0]
for name in ("accuracy", "nll", "ece"):
    print(f"{name:9}", *(f"{kind} {scores[f'{kind}/{name}']:.4f}  " for kind in ("ensemble", "single", "current")))

# %% [markdown]
# What is in the bank, and how large it is:

# %%
bank = SampleBank.open("bank")
print(f"{len(bank)} samples of {len(bank.spec.entries)} tensors, {bank.nbytes / bank.nbytes_fp32:.3f} of float32")

# %% [markdown]
# The ensemble as a module. The predictive entropy is all the uncertainty there is; the mutual information is the
# part on which the samples disagree.

# %%
ensemble = PosteriorEnsemble.from_bank(Digits(), "bank")
x, y = test[:]
answer = ensemble(x)
wrong = answer.labels != y
print(f"wrong: {int(wrong.sum())} of {len(y)}")
print(f"mutual information where right {answer.mutual_information[~wrong].mean():.4f}, ", end="")
print(f"where wrong {answer.mutual_information[wrong].mean():.4f}")

figure, axes = plt.subplots(1, 6, figsize=(7, 1.7))
for axis, index in zip(axes, answer.predictive_entropy.argsort(descending=True)):
    axis.imshow(x[index].reshape(8, 8), cmap="gray_r")
    axis.set_title(f"{answer.labels[index]} at {answer.confidence[index]:.0%},\nis {y[index]}", fontsize=8)
    axis.axis("off")

# %% [markdown]
# Prediction sets that hold the truth with the probability asked for, calibrated on held-out digits:

# %%
ensemble.calibrate(DataLoader(held_out, 200), coverage=0.98)
sets = ensemble(x).sets
covered = sets[torch.arange(len(y)), y].float().mean()
sizes = sets.sum(1)
print(f"covered {covered:.1%}, classes in a set: {sizes.float().mean():.2f} on average, {int(sizes.max())} at most")
