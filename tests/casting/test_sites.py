"""Exact: which submodules are chosen, and what is refused."""

from __future__ import annotations

import pytest
import torchmetrics
from torch import nn

from lightning_lpsgld.casting import ActivationCasting, matching_modules
from lightning_lpsgld.casting.sites import find_sites


class _Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU())
        self.rnn = nn.LSTM(4, 4)
        self.cell = nn.GRUCell(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.drop = nn.Dropout()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Sequential(nn.Linear(4, 2), nn.LogSoftmax(1))
        self.loss = nn.CrossEntropyLoss()
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=2)


ALL = ["stem.0", "stem.2", "rnn", "cell", "attention", "head.0"]


def test_default_sites_are_layers_and_activations():
    plan = find_sites(_Mixed())
    assert list(plan.sites) == ALL
    assert [plan.sites[name].kind for name in ALL] == ["layer", "activation", *["layer"] * 4]
    assert plan.containers == ["", "stem", "head"]
    assert {"loss", "accuracy"} <= set(plan.excluded)


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["stem"], ["rnn", "cell", "attention", "head.0"]),
        (["stem.*"], ["rnn", "cell", "attention", "head.0"]),
        ([nn.ReLU, nn.LSTM], ["stem.0", "cell", "attention", "head.0"]),
        ([nn.Sequential], ["rnn", "cell", "attention"]),
        (["attention", "*.0"], ["stem.2", "rnn", "cell"]),
    ],
)
def test_exclude_takes_types_and_patterns_with_all_below(exclude, left):
    assert list(find_sites(_Mixed(), exclude=exclude).sites) == left


@pytest.mark.parametrize(
    ("sites", "chosen"), [(["stem"], ["stem.0", "stem.2"]), ([nn.Linear], ["head.0"]), ([nn.Dropout], ["drop"])]
)
def test_sites_replace_the_default(sites, chosen):
    assert list(find_sites(_Mixed(), sites=sites).sites) == chosen


def test_a_rule_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"`exclude` has 'fc', which matches no submodule.*'stem'"):
        find_sites(_Mixed(), exclude=["fc"])
    with pytest.raises(ValueError, match=r"`sites` has .*Conv3d"):
        find_sites(_Mixed(), sites=[nn.Conv3d])
    with pytest.raises(TypeError, match=r"`exclude` takes module types and name patterns, got 3"):
        find_sites(_Mixed(), exclude=[3])


def test_nothing_left_to_cast_is_refused():
    with pytest.raises(ValueError, match="matched no submodule of Sequential"):
        ActivationCasting(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()))
    with pytest.raises(ValueError, match="matched no submodule of _Mixed"):
        find_sites(_Mixed(), exclude=["*"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": None, "errors": None}, "both None"),
        ({"eval_rounding": "up"}, "`eval_rounding`"),
        ({"saved_activations": "half"}, "`saved_activations`"),
        ({"activations": None, "saved_activations": "codes"}, "needs rounded activations"),
        ({"backend": "qtorch", "saved_activations": "codes"}, "backend that encodes"),
        ({"activations": "bfp9000"}, "word_length"),
    ],
)
def test_options_are_checked_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        ActivationCasting(nn.Linear(2, 2), **options)


def test_a_module_with_two_names_is_one_site_and_excluded_by_either():
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.Tanh(), shared)
    assert list(find_sites(net).sites) == ["0", "1"]
    assert list(find_sites(net, exclude=["2"]).sites) == ["1"]
    assert matching_modules(net, ["2"]) == {"0", "2"}


def test_a_single_layer_is_a_site_by_itself():
    assert list(find_sites(nn.Linear(2, 2)).sites) == [""]
