"""Checks whether a run can be private; each refusal names a key of the ``privacy`` block."""

from collections.abc import Sequence

import torch

from ..aggregation.flat_layout import Layout
from ..algorithm import LocalTraining, Transport, Variables, phases_of
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
    types: Sequence[tuple[Transport, Model, Variables]],
    train: LocalTraining,
) -> None:
    """Raise ValueError if the method or the federation cannot be private.

    name: of the method; cohort: the fewest clients of a round; has_mixes: whether clients reveal
    more than the terms of the sum. types: for each type of client the transport, the network and
    the variables before round 1.
    """
    if privacy == Privacy():
        return
    key = f"clip = {privacy.clip}" if privacy.is_differential else "secure_aggregation = true"
    if has_mixes:
        raise ValueError(
            f"{key}: {name} makes a mix of its own for every client, which takes single uploads"
        )
    uploads = [transport.untrained_upload(first, first.shared) for transport, _, first in types]
    if any(upload.report is not None for upload in uploads):
        raise ValueError(
            f"{key}: clients of {name} report numbers one by one, which decide their weights; "
            "choose another method, such as fedavg"
        )
    if privacy.secure_aggregation and cohort < MIN_COHORT:
        raise ValueError(
            f"secure_aggregation = true: a cohort has {cohort} clients, of which a sum hides "
            f"nothing; it needs at least {MIN_COHORT}: raise participation"
        )
    if not privacy.is_differential:
        return
    check_library(privacy)
    for transport, model, initial in types:
        if reason := _unfit_reason(transport, model, initial, train):
            raise ValueError(f"{key}: {name} {reason}")
    updates = [
        _flat(transport.untrained_term(first, first.shared).mean) for transport, _, first in types
    ]
    if any(not torch.equal(update, updates[0]) for update in updates):
        raise ValueError(
            f"{key}: clients of {name} would send other variables than each other without "
            "training, so their updates have no common start"
        )


def _flat(tree: Tree) -> torch.Tensor:
    return Layout.of(tree).pack(tree)


def _unfit_reason(
    transport: Transport, model: Model, initial: Variables, train: LocalTraining
) -> str | None:
    """The reason why uploads are not updates that can be clipped and noised, or None."""
    method, shared = transport.method, initial.shared
    v = initial._replace(shared=transport.download(shared))
    upload, term = method.upload(v, v, 0), transport.untrained_term(initial, shared)
    if not upload.message:
        return "sends nothing"
    if upload.sum:
        return "sends sums over the clients of a class, no updates of shared variables"
    has_other_channels = term.sum or term.weights or term.metrics
    if has_other_channels or not torch.equal(_flat(upload.mean), _flat(term.mean)):
        return (
            "has a server that makes something else of uploads before their mean, so that to clip "
            "them bounds nothing; of LoRA's methods fedit, ffa_lora, fedsa_lora and rolora can be "
            "private, with one rank for all"
        )
    if statistics := [leaf for leaf in upload.mean if model.role(leaf) == "stats"]:
        return (
            f"shares running statistics of BatchNorm ({statistics[0]}), which noise can make "
            "negative; choose algorithm=fedbn, algorithm.bn_stats=local where there is one, or a "
            "network without BatchNorm"
        )
    steps = [
        step
        for round_ in (0, 1)
        for phase in phases_of(method.local(model, train, round_))
        for step in phase.steps
    ]
    ones = Variables(*(tmap(torch.ones_like, half) for half in v[:2]))
    changes = method.upload(
        ones, ones, 0
    ).mean  # zero for an untrained client, whatever its variables
    for leaf in upload.mean:
        if not any(step.trains(leaf) for step in steps) and changes[leaf].any():
            return (
                f"sends {display_name(leaf)}, which SGD has not moved from what the server sent: "
                "there is no update to clip"
            )
    return None
