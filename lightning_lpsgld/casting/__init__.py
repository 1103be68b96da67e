"""Activation and error casting: which submodules are rounded, put there by hooks, taken off again without a trace."""

from lightning_lpsgld.casting.activation_casting import ActivationCasting
from lightning_lpsgld.casting.carried import carried_codes
from lightning_lpsgld.casting.sites import ModuleRule, Site, find_sites, matching_modules

__all__ = ["ActivationCasting", "ModuleRule", "Site", "carried_codes", "find_sites", "matching_modules"]
