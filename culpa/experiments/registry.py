"""Every experiment by name, in the order in which ``make reproduce`` runs them."""

from __future__ import annotations

from importlib import import_module

from culpa.errors import OptionError
from culpa.experiments.frame.experiment import Experiment

MODULES = {
    "mnist-insert": "culpa.experiments.mnist_insert",
    "mnist-mislabel": "culpa.experiments.mnist_mislabel",
    "mnist-shift": "culpa.experiments.mnist_shift",
    "mnist-optimizer": "culpa.experiments.mnist_optimizer",
    "table1": "culpa.experiments.table1",
    "celeba": "culpa.experiments.celeba",
    "civilcomments": "culpa.experiments.civilcomments",
    "xray": "culpa.experiments.xray",
    "backdoor": "culpa.experiments.backdoor",
    "cost": "culpa.experiments.cost",
    "scaling": "culpa.experiments.scaling",
    "theorem": "culpa.experiments.theorem",
    "regimes": "culpa.experiments.regimes",
}
"""Imported when asked for: some need packages that others do not."""


def experiment(name: str) -> Experiment:
    """The experiment by that name.

    Raises:
        OptionError: listing those that exist.
    """
    if name not in MODULES:
        raise OptionError(f"there is no experiment {name!r}; there are {', '.join(MODULES)}.")
    found: Experiment = import_module(MODULES[name]).EXPERIMENT
    return found
