"""``engine.path: measure``: what is compared, who wins, and that all ranks and a resume follow."""

from dataclasses import replace

import pytest
from runs import TINY, build_tiny, run_on_ranks, tiny_config

from fedlora_mpi import cli
from fedlora_mpi import config as configs
from fedlora_mpi.engine import speed as trial
from fedlora_mpi.engine.settings import Engine
from fedlora_mpi.engine.speed import (
    Speed,
    candidate_engines,
    fastest_speed,
    measure_engines,
    measure_speed,
)
from fedlora_mpi.experiment import assembly as building

MEASURE = Engine(device="cpu", path="measure")
loop, stack = (
    (lambda: Engine(path="loop", group_size=1)),
    (lambda size: Engine(path="stack", group_size=size)),
)


@pytest.mark.parametrize(
    "size, most, expected",
    [
        ("auto", 100, [("loop", 1), ("stack", 10), ("stack", 25), ("stack", 50)]),
        ("auto", 25, [("loop", 1), ("stack", 10), ("stack", 25)]),
        ("auto", 3, [("loop", 1), ("stack", 3)]),
        ("auto", 1, [("loop", 1)]),
        (7, 3, [("loop", 7), ("stack", 7)]),
    ],
)
def test_what_is_compared(size, most, expected):
    found = candidate_engines(replace(MEASURE, group_size=size), most)
    assert [(engine.path, engine.group_size) for engine in found] == expected


def test_on_a_gpu_streams_are_compared_too_also_where_no_stack_is_possible():
    on_gpu = replace(MEASURE, device="cuda")
    found = [(e.path, e.group_size) for e in candidate_engines(on_gpu, 30)]
    assert found == [("loop", 1), ("streams", 8), ("stack", 10), ("stack", 25), ("stack", 30)]
    found = [(e.path, e.group_size) for e in candidate_engines(on_gpu, 5, can_stack=False)]
    assert found == [("loop", 1), ("streams", 5)]


def test_the_fastest_wins_and_compiling_counts_twice():
    compiled = Speed(replace(loop(), compile=True), 0.5, compile_seconds=10.0)
    assert fastest_speed(
        [Speed(loop(), 1.0, 99.0), Speed(stack(4), 0.9, 99.0)], 10
    ).engine == stack(4)
    assert fastest_speed([Speed(loop(), 1.0), Speed(stack(4), 1.0)], 10).engine == loop()
    # 39 s against 19.5 + 20
    assert fastest_speed([Speed(loop(), 1.0), compiled], 39).engine == loop()
    assert fastest_speed([Speed(loop(), 1.0), compiled], 41).engine == compiled.engine


@pytest.mark.parametrize(
    "samples, there, tried", [(3600, True, False), (3601, True, True), (3601, False, False)]
)
def test_compiling_is_tried_on_long_runs_alone(samples, there, tried, monkeypatch):
    monkeypatch.setattr(
        trial,
        "measure_speed",
        lambda engine, _: Speed(engine, 1.0 if engine.path == "stack" else 1.1),
    )
    monkeypatch.setattr(trial, "find_compiler", lambda: "g++" if there else None)
    speeds = measure_engines(MEASURE, 3, samples, lambda engine: [])
    assert [s.engine.compile for s in speeds] == [False, False] + [True] * tried
    assert not tried or speeds[-1].engine == replace(
        MEASURE, path="stack", group_size=3, compile=True
    )


def test_a_trial_trains_copies_and_counts_samples(monkeypatch):
    federation = build_tiny().federation
    (client_type,), asked = federation.clients.types, []
    placement = federation.placement
    clients = placement.split_into_stacks(placement.groups[0], federation.clients)[0]
    before = {
        n: v.clone() for n, v in (client_type.initial.shared | client_type.initial.personal).items()
    }
    clock = iter([0, 5, 5, 7, 7, 10, 10, 13])  # the first of four repeats takes 5 s, the best 2
    monkeypatch.setattr(trial.time, "perf_counter", lambda: next(clock))
    own = type(client_type.trainer).train
    monkeypatch.setattr(
        type(client_type.trainer),
        "train",
        lambda self, ids, *rest: asked.append(ids) or own(self, ids, *rest),
    )
    found = measure_speed(stack(2), [(client_type.trainer, client_type.initial, clients)])
    samples = (
        sum(min(16, federation.clients.sizes[c]) for c in clients) * 3
    )  # two batches of 8, three epochs
    assert (found.sample_seconds, found.compile_seconds, asked) == (2 / samples, 3, [clients] * 4)
    assert all(
        (v == before[n]).all()
        for n, v in (client_type.initial.shared | client_type.initial.personal).items()
    )


@pytest.mark.parametrize("winner", ["loop", "stack"])
def test_the_first_worker_measures_and_all_ranks_follow(winner, monkeypatch, capsys):
    measuring = []

    def fake(engine, tried):
        measuring.append([len(clients) for _, _, clients in tried])
        return Speed(engine, 1.0 if engine.path == winner else 2.0)

    monkeypatch.setattr(trial, "measure_speed", fake)
    config = replace(tiny_config("engine.path=measure", "engine.group_size=auto"))
    engines = run_on_ranks(3, lambda comm: building.build(config, str(TINY), comm).config.engine)
    assert measuring == [[1], [2]]  # 4 clients a round, two workers
    assert {(e.path, e.group_size) for e in engines} == {
        ("loop", 1) if winner == "loop" else ("stack", 2)
    }
    said = capsys.readouterr().err
    assert (
        said.count(
            "engine.path = measure: client samples per second: loop 1; stacks of 2 0; taken:"
            if winner == "loop"
            else "loop 0; stacks of 2 1; taken: stacks of 2"
        )
        == 1
    )


def test_a_resume_keeps_what_was_measured(tmp_path, monkeypatch):
    asked = ["engine.path=measure", "engine.group_size=auto", f"output={tmp_path / 'run'}"]
    monkeypatch.setattr(
        trial,
        "measure_speed",
        lambda engine, _: Speed(engine, 1.0 if engine.path == "stack" else 2.0),
    )
    assert cli.main(["run", str(TINY), *asked, "rounds=1"]) == 0

    # under the checksum
    def lines():
        return (tmp_path / "run/config.yaml").read_text().splitlines()[1:]

    recorded = lines()
    assert configs.read(tmp_path / "run/config.yaml").engine == Engine("cpu", "stack", 2)
    monkeypatch.setattr(trial, "measure_speed", lambda *_: pytest.fail("measured again"))
    assert cli.main(["run", str(TINY), *asked, "rounds=2", "--resume"]) == 0
    assert lines() == [line.replace("rounds: 1", "rounds: 2") for line in recorded]
