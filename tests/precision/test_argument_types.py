"""Arguments of the plugin and of the collector that are of the wrong type are named, with what to write instead."""

import functools

import pytest
from torch import nn

from lightning_lpsgld import LowPrecisionSGLD, SampleCollector
from lightning_lpsgld.samplers import SGHMC, CyclicalStepSize


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": "1"}, "`temperature` must be a number, got '1'"),
        ({"temperature": None}, "`temperature` must be a number, got None"),
        ({"temperature": float("nan")}, "`temperature` must be finite, got nan"),
        ({"temperature": float("inf")}, "`temperature` must be finite, got inf"),
        ({"cycles": "3"}, "`cycles` must be an int, got '3'"),
        ({"cycles": 2.5}, "`cycles` must be an int, got 2.5"),
        ({"sampler": "SGLD"}, r"`sampler` must be a class of .*samplers.*got 'SGLD'. Write sampler=SGLD"),
        ({"sampler": nn.Linear}, "`sampler` must be a class of"),
        ({"sampler": functools.partial(nn.Linear, 3)}, "`sampler` must be a class of"),
        ({"schedule": 5}, r"`schedule` must be a step-size schedule with `factor\(step\)`.*got 5"),
        ({"schedule": CyclicalStepSize}, "`schedule` must be a step-size schedule"),
        ({"seed": 1.5}, r"`seed` must be an int in \[0, 2\*\*64\), got 1.5"),
        ({"seed": "7"}, r"`seed` must be an int in \[0, 2\*\*64\), got '7'"),
        ({"seed": True}, "`seed` must be an int"),
        ({"seed": 2**70}, r"got 1180591620717411303424. Fold a larger or negative one with `seed % 2\*\*64`"),
        ({"seed": -1}, r"`seed` must be an int in \[0, 2\*\*64\), got -1"),
        ({"num_data": "50000"}, "`num_data` must be 'auto' or an int >= 1, got '50000'"),
        ({"num_data": True}, "`num_data` must be 'auto' or an int >= 1, got True"),
        ({"variance_corrected": "no"}, "`variance_corrected` must be True or False, got 'no'"),
        ({"compress_gradients": 1}, "`compress_gradients` must be True or False, got 1"),
        ({"exclude": 5}, r"`exclude` must hold names of submodules \(patterns\) or module types, got 5"),
        ({"sites": [nn.Linear(1, 1)]}, "`sites` must hold names of submodules"),
        ({"weights": "ｂfp8"}, "No number format is called"),
        ({"weights": "bfp８"}, "No number format is called"),
        ({"weights": 8}, "A number format must be"),
    ],
)
def test_the_plugin_names_the_argument_the_rule_and_the_value(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        LowPrecisionSGLD(**options)


def test_what_is_right_passes():
    plugin = LowPrecisionSGLD(
        temperature=1, seed=2**64 - 1, sampler=functools.partial(SGHMC, friction=2.0), exclude=nn.Linear, sites="head*"
    )
    assert plugin.exclude == (nn.Linear,)
    assert plugin.sites == ("head*",)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": "3"}, "`start` must be an int >= 0 .*got '3'"),
        ({"start": float("nan")}, "`start` must be an int >= 0 .*got nan"),
        ({"per_cycle": "2"}, "`per_cycle` must be an int >= 1, got '2'"),
        ({"per_cycle": 1, "cycle_length": 2.5}, "`cycle_length` must be an int >= 1, got 2.5"),
        ({"chain": "a"}, "`chain` must be an int >= 0, got 'a'"),
    ],
)
def test_the_collector_does_so_too(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        SampleCollector(**options)
