"""What does privacy cost in a round? The quick start, and 40 clients of 80,000 parameters, on one
core.

    python benchmarks/privacy.py [--rounds 10] [--clients 40]

Seconds per round (the least of some, without evaluation), FedAvg in one process: plain; updates
clipped, with noise of the server; all pairs of the cohort masked; masks with 8 neighbours each. The
second federation is the two-convolution CNN with about 80,000 parameters on the digits, 20 images a
client, one epoch. First: masks change no bit.
"""

from pathlib import Path

from report import arguments, tell

from fedlora_mpi.config import read
from fedlora_mpi.core.tree import Tree
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.mpi.comm import Solo

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
WAYS = {
    "plain": [],
    "clip and noise": ["privacy.clip=1", "privacy.noise_multiplier=1"],
    "masks, all pairs": ["privacy.secure_aggregation=true"],
    "masks, 8 neighbours": ["privacy.secure_aggregation=true", "privacy.neighbours=8"],
}


def seconds(overrides: list[str], rounds: int) -> tuple[int, float, Tree]:
    """Numbers of an upload, the least seconds of a round after the first, and the shared variables
    in the end.
    """
    built = build(
        read(CONFIG, ["algorithm=fedavg", "engine.device=cpu", *overrides]), str(CONFIG), Solo()
    )
    state, found = initial_state(built), []
    for _ in range(rounds + 1):
        state, row, _ = run_round(built.federation, state, evaluate=False, stop=False)
        found.append(row["seconds_train"] + row["seconds_exchange"])
    return built.federation.aggregator.terms.size, min(found[1:]), state.shared


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clients", type=int, default=40)
    asked, rows = parser.parse_args(), []
    partition = f"data.partition={{kind: iid, clients: {asked.clients}, train: 20, test: 5}}"
    crowd = [partition, "train.epochs=1", "model.hidden=564"]
    for title, overrides in (("quick start", []), (f"{asked.clients} clients", crowd)):
        plain = None
        for way, block in WAYS.items():
            size, found, end = seconds([*overrides, *block], asked.rounds)
            plain = plain or (found, end)
            if "mask" in way:
                assert all(v.equal(plain[1][n]) for n, v in end.items()), (
                    f"{title}, {way}: other bits than without"
                )
            rows.append(
                {
                    "federation": title,
                    "numbers": size,
                    "way": way,
                    "s per round": found,
                    "of plain": found / plain[0],
                }
            )
    tell(asked, rows)


if __name__ == "__main__":
    main()
