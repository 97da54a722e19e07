"""From how many ranks on a config is no faster, and why: arithmetic on what ``plan`` measured."""

from ..core.units import format_seconds
from ..experiment.assembly import Assembly
from ..experiment.engine_choice import worker_ranks
from .forecast import Costs, Machine, Seconds, forecast

_GAIN = 1.1  # more ranks must be so many times as fast to count


def scaling_text(assembly: Assembly, costs: Costs, ranks: int, machine: Machine) -> str:
    """How many times as fast as one rank a round is on up to ``ranks`` ranks, and what stops it.

    Tried are 1, ``ranks``, and numbers with 2, 4, 8, ... workers between them. "" for fewer than 3
    ranks.
    """
    if ranks < 3:
        return ""
    seconds: dict[int, Seconds] = {}
    workers = 1
    while (tried := _ranks_with(assembly, workers)) < ranks:
        seconds[tried] = _forecast(assembly, costs, tried, machine)
        workers *= 2
    alone = _forecast(assembly, costs, 1, machine)
    seconds = {1: alone} | seconds | {ranks: _forecast(assembly, costs, ranks, machine)}
    fastest = min(round_.round for round_ in seconds.values())
    enough = min(r for r, round_ in seconds.items() if round_.round <= _GAIN * fastest)
    text = f"{alone.round / seconds[ranks].round:.1f} times as fast as one rank"
    if enough == ranks:
        return text
    more = min(r for r in seconds if r > enough)
    reason = _what_limits(assembly, enough, seconds[more], machine)
    some = "one rank is as fast" if enough == 1 else f"{enough} ranks are as fast"
    if seconds[ranks].round > _GAIN * fastest:
        some = f"{enough} rank{'s' * (enough > 1)}: {alone.round / seconds[enough].round:.1f} times"
    return f"{text}; {some}; more are not worth it: {reason}"


def _ranks_with(assembly: Assembly, workers: int) -> int:
    """The fewest ranks that have so many workers."""
    return workers + (not assembly.config.server_hosts_clients and workers > 1)


def _forecast(assembly: Assembly, costs: Costs, ranks: int, machine: Machine) -> Seconds:
    workers = list(worker_ranks(assembly.config, ranks))
    return forecast(assembly, costs, workers, ranks, machine)


def _what_limits(assembly: Assembly, enough: int, with_more: Seconds, machine: Machine) -> str:
    """Why more than ``enough`` ranks gain little. with_more: a round of the next number tried."""
    workers = len(worker_ranks(assembly.config, enough))
    groups, threads = len(assembly.federation.placement.groups), assembly.config.engine.threads
    if with_more.exchange >= max(with_more.train, with_more.evaluate):
        return f"the exchange takes {format_seconds(with_more.exchange)}"
    if workers >= groups:
        return f"there are {groups} groups of clients (a smaller engine.group_size makes more)"
    if workers * threads >= machine.cores:
        return f"{machine.cores:g} cores are busy"
    return (
        f"one worker trains {format_seconds(with_more.train)}, and on average they are "
        f"{with_more.busy_fraction:.0%} as busy"
    )
