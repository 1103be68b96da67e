"""Transformers of Hugging Face and adapters of peft in the Trainer: part or whole, two ranks, resume, both banks."""

import copy

import lightning as L
import pytest
import torch
from helpers.processes import run_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_lpsgld import EnsembleEvaluation, LowPrecisionSGLD, SampleBank, SampleCollector
from lightning_lpsgld.ops import quantize

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
WORDS, LENGTH, CLASSES = 30, 7, 3


class Sentences(Dataset):
    """Batches as a tokenizer gives them; the class is that of the first word."""

    def __init__(self, count=48, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, WORDS, (count, LENGTH), generator=draw)
        self.lengths = torch.randint(3, LENGTH + 1, (count,), generator=draw)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        mask = (torch.arange(LENGTH) < self.lengths[index]).long()
        return {"input_ids": self.ids[index] * mask, "attention_mask": mask, "labels": self.ids[index, 0] % CLASSES}


def loader(ranks=1):
    """The order is that of the data, so that an epoch that is resumed is the one that was begun."""
    return DataLoader(Sentences(), 16 // ranks)


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=LENGTH, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def with_adapters():
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], lora_dropout=0.0)
    return peft.get_peft_model(bert(), settings)


def with_head():
    model = bert()
    model.bert.requires_grad_(False)
    return model


MODELS = {
    "adapters": (with_adapters, ("*lora*",), 2 * 2 * 2 * 4 * 16),
    "head": (with_head, ("*classifier*",), 16 * CLASSES + CLASSES),
    "whole": (bert, None, None),
}


class Language(L.LightningModule):
    """A user's module around any of these models; the loss is the model's own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


def trainer(folder, sampled, callbacks, max_steps=6, **options):
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    return L.Trainer(
        plugins=[LowPrecisionSGLD(sampled=sampled, temperature=0.5, seed=1, check_replicas=1)],
        callbacks=[saver, *callbacks], max_epochs=-1, max_steps=max_steps, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip


def fit(folder, name, max_steps=6, ckpt=None, bank=None, ranks=1, base="stored"):
    build, sampled, _ = MODELS[name]
    module, collector = Language(build()), SampleCollector(bank, start=1, base=base)
    strategy = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
    run = trainer(folder, sampled, [collector], max_steps, **strategy)
    run.fit(module, loader(ranks), ckpt_path=ckpt)
    return module, run, collector.bank


def on_grid(param):
    return torch.equal(quantize(param.detach(), "bfp8", rounding="nearest"), param.detach())


def sample_values(bank):
    return [(sample.step, {name: value.clone() for name, value in sample.tensors.items()}) for sample in bank]


def same_values(first, second):
    return [step for step, _ in first] == [step for step, _ in second] and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for (_, a), (_, b) in zip(first, second)
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_from_fit_to_test(tmp_path, name):
    """Only what is asked for is sampled, what is frozen keeps its bits, and the average is that of the samples."""
    build, _, count = MODELS[name]
    before = copy.deepcopy(build().state_dict())
    module, run, bank = fit(tmp_path, name)
    plugin = run.precision_plugin
    chosen = set(plugin.run.parts.sampled)
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    assert plugin.card.frozen == sum(module.get_parameter(n).numel() for n in frozen)
    if count is not None:
        assert plugin.card.sampled == count
    for param_name, param in module.named_parameters():
        moved = not torch.equal(param, before[param_name.removeprefix("model.")])
        assert moved == (param_name not in frozen), param_name
        if param_name in chosen and moved:
            assert on_grid(param), param_name
    trained = [p for n, p in module.named_parameters() if n not in chosen | frozen]
    assert not any(map(on_grid, trained))
    assert len(bank) == 5
    evaluation = EnsembleEvaluation(bank=bank, stages="test")
    run.callbacks.append(evaluation)
    run.test(module, DataLoader(Sentences(seed=1), 16), verbose=False)
    other, total = Language(build()).eval(), 0.0
    batch = next(iter(DataLoader(Sentences(seed=1), 48)))
    for number in range(len(bank)):
        bank.load_into(other, number)
        with torch.no_grad():
            total = total + other(**batch).logits.double().softmax(1) / len(bank)
    accuracy = (total.argmax(1) == batch["labels"]).double().mean().item()
    assert evaluation.scores["ensemble/size"] == 5
    assert evaluation.scores["ensemble/accuracy"] == pytest.approx(accuracy, abs=1 / 48 + 1e-9)  # activations are cast


@pytest.mark.parametrize("name", ["adapters", "head"])
def test_frozen_layers_are_not_cast(tmp_path, name):
    seen = []

    class Look(L.Callback):
        def on_train_start(self, trainer, module):
            seen.extend(site["name"] for site in trainer.precision_plugin.casting.describe())

    build, sampled, _ = MODELS[name]
    trainer(tmp_path, sampled, [Look()], 1).fit(Language(build()), loader())
    assert seen
    assert all("lora_" in site or "classifier" in site for site in seen), seen


@pytest.mark.parametrize(
    ("name", "where", "base"),
    [
        ("adapters", "memory", "stored"),
        ("adapters", "disk", "stored"),
        ("adapters", "disk", "reference"),
        ("whole", "disk", "stored"),
    ],
)
def test_resume_equals_uninterrupted_bitwise(tmp_path, name, where, base):
    banks = [None if where == "memory" else tmp_path / which / "bank" for which in ("whole", "halves")]
    module, _, bank = fit(tmp_path / "whole", name, bank=banks[0], base=base)
    fit(tmp_path / "halves", name, 3, bank=banks[1], base=base)
    ckpt = tmp_path / "halves" / "step=3.ckpt"
    resumed, _, again = fit(tmp_path / "halves", name, ckpt=ckpt, bank=banks[1], base=base)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), resumed.parameters()))
    assert len(bank) == 5
    assert same_values(sample_values(bank), sample_values(again))


def two_ranks(folder):
    """Adapters on two ranks, whole and resumed."""
    options = {"ranks": 2, "base": "reference"}
    module, _, _ = fit(folder / "whole", "adapters", bank=folder / "bank", **options)
    fit(folder / "halves", "adapters", 3, bank=folder / "other", **options)
    ckpt = folder / "halves" / "step=3.ckpt"
    resumed, _, _ = fit(folder / "halves", "adapters", ckpt=ckpt, bank=folder / "other", **options)
    return [[p.detach().clone() for p in found.parameters()] for found in (module, resumed)]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_stay_bit_identical_and_resume(tmp_path):
    (first, again), (second, other) = run_ranks(two_ranks, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, other))
    bank, resumed = (SampleBank.open(tmp_path / name, base=Language(with_adapters())) for name in ("bank", "other"))
    assert bank.steps == [2, 3, 4, 5, 6]
    assert same_values(sample_values(bank), sample_values(resumed))
    module = Language(with_adapters())
    bank.load_into(module, -1)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), first))


class NextWord(Language):
    """A causal language model; what a position predicts is the word after it."""

    def forward(self, input_ids, **rest):
        return self.model(input_ids=input_ids)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch["input_ids"], labels=words(batch)).loss

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.model(input_ids=batch["input_ids"], labels=words(batch)).loss)


def words(batch):
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def next_words(module, batch):
    return module(batch["input_ids"]).logits[:, :-1], words(batch)[:, 1:]


def test_a_causal_language_model_is_scored_by_the_word(tmp_path):
    """Tokens, -100 where there is no word: the score is the mean over words, as the model's own loss counts them."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    module = NextWord(transformers.GPT2LMHeadModel(config))
    evaluation = EnsembleEvaluation(stages="test", logits=next_words)
    collector = SampleCollector(start=5)
    run = trainer(tmp_path, ("*ln_*", "*attn*"), [collector, evaluation])
    run.fit(module, loader())
    run.test(module, DataLoader(Sentences(seed=1), 48), verbose=False)
    assert evaluation.scores["ensemble/size"] == 1
    assert evaluation.scores["ensemble/nll"] == pytest.approx(run.callback_metrics["test_loss"].item(), rel=1e-3)
    assert isinstance(module.model.transformer.h[0].ln_1, nn.LayerNorm)
