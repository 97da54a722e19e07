"""The accuracies that the FedLoRA paper prints, in per cent: best round, mean and standard
deviation over 3 seeds.

Wu et al., "FedLoRA: When Personalized Federated Learning Meets Low-Rank Adaptation", ICLR 2024
submission (see ``algorithms/fedlora.py``), Tables 1 to 6. Its Figures 4, 6 and 7 print no numbers.
The claims of the FedHL and pFedLoRA papers stand at the end.
"""

from math import nan
from typing import NamedTuple


class Accuracy(NamedTuple):
    """The accuracy of one setting, in per cent. ``std`` is NaN where none is printed."""

    mean: float
    std: float


ALPHAS = (0.1, 0.5, 1.0)  # in Table 1; Tables 2 to 5 have 0.1
RATIOS = (20, 40, 60, 80, 100)  # in Table 2, per cent

TABLE1: dict[str, dict[str, tuple[Accuracy, ...]]] = {  # method -> data set -> one per alpha
    "fedavg": {
        "cifar10": (Accuracy(60.39, 1.46), Accuracy(60.41, 1.36), Accuracy(60.91, 0.72)),
        "cifar100": (Accuracy(34.91, 0.86), Accuracy(32.78, 0.23), Accuracy(33.94, 0.39)),
        "tiny_imagenet": (Accuracy(21.26, 1.28), Accuracy(20.32, 0.91), Accuracy(17.20, 0.54)),
    },
    "local": {
        "cifar10": (Accuracy(81.91, 3.09), Accuracy(60.15, 0.86), Accuracy(52.24, 0.41)),
        "cifar100": (Accuracy(47.61, 0.96), Accuracy(22.65, 0.51), Accuracy(18.76, 0.63)),
        "tiny_imagenet": (Accuracy(24.07, 0.62), Accuracy(8.75, 0.30), Accuracy(6.87, 0.28)),
    },
    "fedamp": {
        "cifar10": (Accuracy(84.99, 1.82), Accuracy(68.26, 0.79), Accuracy(64.87, 0.95)),
        "cifar100": (Accuracy(46.68, 1.06), Accuracy(24.74, 0.58), Accuracy(18.22, 0.41)),
        "tiny_imagenet": (Accuracy(27.85, 0.71), Accuracy(10.70, 0.32), Accuracy(7.13, 0.21)),
    },
    "fedrep": {
        "cifar10": (Accuracy(84.59, 1.58), Accuracy(67.69, 0.86), Accuracy(60.52, 0.72)),
        "cifar100": (Accuracy(51.25, 1.37), Accuracy(26.97, 0.33), Accuracy(20.63, 0.42)),
        "tiny_imagenet": (Accuracy(30.83, 1.05), Accuracy(12.14, 0.28), Accuracy(8.37, 0.25)),
    },
    "fedbn": {
        "cifar10": (Accuracy(83.55, 2.32), Accuracy(66.79, 1.08), Accuracy(62.20, 0.67)),
        "cifar100": (Accuracy(54.35, 0.63), Accuracy(36.94, 0.94), Accuracy(33.67, 0.12)),
        "tiny_imagenet": (Accuracy(33.34, 0.71), Accuracy(19.61, 0.35), Accuracy(16.57, 0.44)),
    },
    "fedper": {
        "cifar10": (Accuracy(84.43, 0.47), Accuracy(68.80, 0.49), Accuracy(64.92, 0.66)),
        "cifar100": (Accuracy(51.38, 0.94), Accuracy(28.25, 1.03), Accuracy(21.53, 0.50)),
        "tiny_imagenet": (Accuracy(32.33, 0.31), Accuracy(12.69, 0.42), Accuracy(8.67, 0.40)),
    },
    "fedrod": {
        "cifar10": (Accuracy(86.23, 2.12), Accuracy(72.34, 1.77), Accuracy(68.45, 1.94)),
        "cifar100": (Accuracy(60.19, 0.64), Accuracy(38.54, 1.12), Accuracy(33.67, 0.48)),
        "tiny_imagenet": (Accuracy(44.25, 0.40), Accuracy(27.02, 0.64), Accuracy(22.07, 0.79)),
    },
    "pfedsd": {
        "cifar10": (Accuracy(86.34, 2.61), Accuracy(71.97, 2.07), Accuracy(67.21, 1.89)),
        "cifar100": (Accuracy(54.14, 0.77), Accuracy(41.06, 0.83), Accuracy(38.27, 0.20)),
        "tiny_imagenet": (Accuracy(39.31, 0.19), Accuracy(19.25, 1.80), Accuracy(15.91, 0.33)),
    },
    "pfedgate": {
        "cifar10": (Accuracy(87.25, 1.91), Accuracy(71.98, 1.61), Accuracy(67.85, 0.87)),
        "cifar100": (Accuracy(48.54, 0.39), Accuracy(27.47, 0.79), Accuracy(22.98, 0.03)),
        "tiny_imagenet": (Accuracy(37.59, 0.39), Accuracy(24.09, 0.67), Accuracy(19.69, 0.14)),
    },
    "fedcac": {
        "cifar10": (Accuracy(86.82, 1.18), Accuracy(69.83, 0.46), Accuracy(65.39, 0.51)),
        "cifar100": (Accuracy(57.22, 1.52), Accuracy(38.64, 0.63), Accuracy(32.59, 0.32)),
        "tiny_imagenet": (Accuracy(40.19, 1.20), Accuracy(23.70, 0.28), Accuracy(18.58, 0.62)),
    },
    "fedlora": {
        "cifar10": (Accuracy(85.47, 2.06), Accuracy(72.78, 1.23), Accuracy(69.09, 1.14)),
        "cifar100": (Accuracy(63.65, 0.53), Accuracy(45.96, 1.19), Accuracy(42.98, 0.64)),
        "tiny_imagenet": (Accuracy(44.22, 0.55), Accuracy(28.25, 1.24), Accuracy(25.55, 0.13)),
    },
}

# data set -> a row for each R_l, a column for each R_c
TABLE2: dict[str, tuple[tuple[Accuracy, ...], ...]] = {
    "cifar10": (
        (
            Accuracy(84.72, 2.07),
            Accuracy(84.97, 1.74),
            Accuracy(84.73, 2.33),
            Accuracy(84.80, 2.03),
            Accuracy(84.99, 2.19),
        ),
        (
            Accuracy(84.84, 2.19),
            Accuracy(84.96, 1.87),
            Accuracy(85.27, 2.04),
            Accuracy(84.97, 1.86),
            Accuracy(85.39, 2.01),
        ),
        (
            Accuracy(84.92, 1.90),
            Accuracy(85.35, 1.96),
            Accuracy(85.47, 2.06),
            Accuracy(85.07, 2.26),
            Accuracy(85.38, 1.76),
        ),
        (
            Accuracy(84.70, 1.98),
            Accuracy(85.05, 1.66),
            Accuracy(85.25, 2.00),
            Accuracy(85.01, 1.90),
            Accuracy(85.13, 1.95),
        ),
        (
            Accuracy(85.09, 1.95),
            Accuracy(85.23, 1.89),
            Accuracy(85.15, 1.66),
            Accuracy(84.88, 1.77),
            Accuracy(85.21, 1.62),
        ),
    ),
    "cifar100": (
        (
            Accuracy(62.00, 0.60),
            Accuracy(62.66, 0.37),
            Accuracy(61.99, 0.97),
            Accuracy(62.48, 0.30),
            Accuracy(62.70, 0.83),
        ),
        (
            Accuracy(61.70, 0.28),
            Accuracy(62.49, 0.77),
            Accuracy(62.70, 0.59),
            Accuracy(63.65, 0.53),
            Accuracy(62.73, 0.60),
        ),
        (
            Accuracy(61.71, 0.30),
            Accuracy(62.88, 0.33),
            Accuracy(62.46, 0.53),
            Accuracy(63.12, 0.38),
            Accuracy(63.24, 0.66),
        ),
        (
            Accuracy(60.76, 0.14),
            Accuracy(62.54, 0.56),
            Accuracy(62.74, 0.54),
            Accuracy(62.15, 0.38),
            Accuracy(62.70, 0.57),
        ),
        (
            Accuracy(59.54, 0.98),
            Accuracy(60.97, 0.35),
            Accuracy(61.86, 0.74),
            Accuracy(61.96, 0.55),
            Accuracy(62.58, 0.51),
        ),
    ),
    "tiny_imagenet": (
        (
            Accuracy(40.77, 0.10),
            Accuracy(42.71, 0.59),
            Accuracy(43.27, 0.43),
            Accuracy(43.78, 0.70),
            Accuracy(43.88, 0.16),
        ),
        (
            Accuracy(40.14, 0.36),
            Accuracy(42.74, 0.46),
            Accuracy(43.82, 0.46),
            Accuracy(44.22, 0.55),
            Accuracy(43.72, 0.24),
        ),
        (
            Accuracy(39.39, 0.26),
            Accuracy(42.75, 0.46),
            Accuracy(43.44, 0.43),
            Accuracy(43.85, 0.90),
            Accuracy(44.16, 0.48),
        ),
        (
            Accuracy(36.90, 0.30),
            Accuracy(41.94, 0.29),
            Accuracy(42.75, 0.49),
            Accuracy(43.21, 0.41),
            Accuracy(43.28, 0.36),
        ),
        (
            Accuracy(33.90, 0.91),
            Accuracy(40.55, 0.15),
            Accuracy(41.75, 0.81),
            Accuracy(42.16, 0.41),
            Accuracy(42.75, 0.31),
        ),
    ),
}

TABLE3: dict[str, dict[str, Accuracy]] = {  # order -> data set
    "simultaneous": {
        "cifar10": Accuracy(85.45, 1.83),
        "cifar100": Accuracy(61.18, 1.05),
        "tiny_imagenet": Accuracy(19.61, 0.58),
    },
    "alternating": {
        "cifar10": Accuracy(85.47, 2.06),
        "cifar100": Accuracy(63.65, 0.53),
        "tiny_imagenet": Accuracy(44.22, 0.55),
    },
}

TABLE4: dict[
    str, dict[str, Accuracy]
] = {  # method -> data set; the paper has no Tiny ImageNet here
    "local": {"cifar10": Accuracy(81.91, 3.09), "cifar100": Accuracy(47.61, 0.96)},
    "local_lora": {"cifar10": Accuracy(81.97, 2.62), "cifar100": Accuracy(47.64, 0.79)},
    "fedavg": {"cifar10": Accuracy(60.39, 1.46), "cifar100": Accuracy(34.91, 0.86)},
    "fedavg_lora": {"cifar10": Accuracy(60.91, 0.53), "cifar100": Accuracy(35.91, 0.70)},
}

TABLE5: dict[float, dict[str, Accuracy]] = {  # participation -> data set
    1.0: {
        "cifar10": Accuracy(85.47, 2.06),
        "cifar100": Accuracy(63.65, 0.53),
        "tiny_imagenet": Accuracy(44.22, 0.55),
    },
    0.9: {
        "cifar10": Accuracy(85.38, 1.62),
        "cifar100": Accuracy(63.01, 0.10),
        "tiny_imagenet": Accuracy(44.13, 0.70),
    },
    0.7: {
        "cifar10": Accuracy(85.25, 1.67),
        "cifar100": Accuracy(63.21, 0.18),
        "tiny_imagenet": Accuracy(44.10, 0.26),
    },
    0.5: {
        "cifar10": Accuracy(85.36, 1.67),
        "cifar100": Accuracy(63.13, 1.05),
        "tiny_imagenet": Accuracy(43.99, 0.62),
    },
}

TABLE6: dict[
    str, dict[str, Accuracy]
] = {  # method -> data set; the paper prints no deviations here
    "fedavg": {"ag_news": Accuracy(89.36, nan), "imagenet_subset": Accuracy(18.55, nan)},
    "fedper": {"ag_news": Accuracy(90.76, nan), "imagenet_subset": Accuracy(29.37, nan)},
    "fedrod": {"ag_news": Accuracy(91.38, nan), "imagenet_subset": Accuracy(32.45, nan)},
    "fedlora": {"ag_news": Accuracy(91.79, nan), "imagenet_subset": Accuracy(35.67, nan)},
}

CLAIMS = {  # what the paper says about its figures
    "fig4": "accuracy rises with E_lora, then falls; E_lora = 0 is close to FedAvg, "
    "E_lora = E below Local",
    "fig6": "alternating training keeps the clients' sigma_i closer together than simultaneous "
    "training",
    "fig7": "no client is worse off with FedLoRA than with FedAvg or with Local",
}

# Peng et al. (see ``algorithms/fedhl.py``), the abstract: percentage points ahead of "several
# state-of-the-art methods"
FEDHL = "1 to 3"
# Yi et al., "pFedLoRA" (see ``algorithms/pfedlora.py``), the abstract: against the best baseline,
# percentage points of accuracy ahead, and how many times fewer FLOPs and bytes. The paper's tables
# were not available.
PFEDLORA = {"accuracy": 1.35, "flops": 11.81, "bytes": 7.41}
