"""Checks whether a run can be private; each refusal names a key of the ``privacy`` block."""

from collections.abc import Sequence

import torch

from ..aggregation.flat_layout import Layout
from ..algorithm import Algorithm, LocalTraining, Variables
from ..core.names import display_name
from ..core.tree import Tree, tmap
from ..models.network import Model
from .accountant import check_library
from .masks import MIN_COHORT
from .settings import Privacy


def check_settings(
    privacy: Privacy, participation: float, reduce: str, uplink: str, tasks: bool
) -> None:
    """Raise ValueError if other settings of a config conflict with the ``privacy`` block.

    tasks: whether the config has any.
    """
    if privacy == Privacy():
        return
    if uplink == "gather":
        raise ValueError(
            "uplink = gather: shows the server every upload, which privacy prevents; choose auto "
            "or sum"
        )
    if privacy.is_differential and tasks:
        raise ValueError(
            f"privacy.clip = {privacy.clip}: does not go with data.tasks, where the data say who "
            "can take part; leave out one of them"
        )
    if privacy.secure_aggregation and reduce != "exact":
        raise ValueError(
            f"reduce = {reduce}: masks cancel in integers alone; choose exact for secure "
            "aggregation"
        )
    if privacy.secure_aggregation and privacy.samples_poisson and participation < 1:
        raise ValueError(
            "privacy.sampling = poisson: cohorts may be of one or two clients, whose uploads a "
            "sum reveals; choose fixed for secure aggregation, or participation = 1"
        )


def check_run(
    privacy: Privacy,
    name: str,
    cohort: int,
    has_mixes: bool,
    kinds: Sequence[tuple[Algorithm, Model, Variables]],
    train: LocalTraining,
) -> None:
    """Raise ValueError if the method or the federation cannot be private.

    name: of the method; cohort: the fewest clients of a round; has_mixes: whether clients reveal
    more than the terms of the sum. kinds: for each type of client the method, the network and the
    variables before round 1.
    """
    if privacy == Privacy():
        return
    key = f"clip = {privacy.clip}" if privacy.is_differential else "secure_aggregation = true"
    if has_mixes:
        raise ValueError(
            f"{key}: {name} makes a mix of its own for every client, which takes single uploads"
        )
    if privacy.secure_aggregation and cohort < MIN_COHORT:
        raise ValueError(
            f"secure_aggregation = true: a cohort has {cohort} clients, of which a sum hides "
            f"nothing; it needs at least {MIN_COHORT}: raise participation"
        )
    if not privacy.is_differential:
        return
    check_library(privacy)
    for method, model, initial in kinds:
        if reason := _unfit_reason(method, model, initial, train):
            raise ValueError(f"{key}: {name} {reason}")
    updates = [untrained_contribution(method, first, first.shared) for method, _, first in kinds]
    if any(not torch.equal(update, updates[0]) for update in updates):
        raise ValueError(
            f"{key}: clients of {name} would send other variables than each other without "
            "training, so their updates have no common start"
        )


def untrained_contribution(method: Algorithm, initial: Variables, shared: Tree) -> torch.Tensor:
    """What a client that has not trained would add to the sum, [D]. Updates are measured from it.

    initial: its variables before round 1; shared: the server's current ones.
    """
    v = initial._replace(shared=method.download(shared))
    term = method.expand(method.upload(v, v), shared, 1)
    return Layout.of(term).pack(term)


def _unfit_reason(
    method: Algorithm, model: Model, initial: Variables, train: LocalTraining
) -> str | None:
    """The reason why uploads are not updates that can be clipped and noised, or None."""
    v = initial._replace(shared=method.download(initial.shared))
    upload = method.upload(v, v)
    if not upload:
        return "sends nothing"
    if method.sums:
        return "sends sums over the clients of a class, no updates of shared variables"
    if not torch.equal(
        Layout.of(upload).pack(upload), untrained_contribution(method, initial, initial.shared)
    ):
        return (
            "has a server that makes something else of uploads before their mean, so that to clip "
            "them bounds nothing; of LoRA's methods fedit, ffa_lora and rolora can be private, "
            "with one rank for all"
        )
    if statistics := [leaf for leaf in upload if model.role(leaf) == "stats"]:
        return (
            f"shares running statistics of BatchNorm ({statistics[0]}), which noise can make "
            "negative; choose algorithm=fedbn, algorithm.bn_stats=local where there is one, or a "
            "network without BatchNorm"
        )
    steps = [
        step
        for round_ in (0, 1)
        for phase in method.phases(model, train, round_)
        for step in phase.steps
    ]
    ones = Variables(*(tmap(torch.ones_like, half) for half in v[:2]))
    changes = method.upload(ones, ones)  # zero for an untrained client, whatever its variables
    for leaf in upload:
        if not any(step.trains(leaf) for step in steps) and changes[leaf].any():
            return (
                f"sends {display_name(leaf)}, which SGD has not moved from what the server sent: "
                "there is no update to clip"
            )
    return None
