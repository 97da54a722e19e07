"""The numbers that the FedLoRA paper prints, in per cent: best round, mean and standard deviation
over 3 seeds.

Wu et al., "FedLoRA: When Personalized Federated Learning Meets Low-Rank Adaptation", ICLR 2024
submission (see ``algorithms/fedlora.py``), Tables 1 to 6. Its Figures 4, 6 and 7 print no numbers.
At the end what the pFedLoRA paper says of itself.
"""

from math import nan
from typing import NamedTuple


class V(NamedTuple):
    """Accuracy of one setting, per cent; ``std`` is NaN where none is printed."""

    mean: float
    std: float


ALPHAS = (0.1, 0.5, 1.0)  # of Table 1; Tables 2 to 5 have 0.1
RATIOS = (20, 40, 60, 80, 100)  # per cent, of Table 2

TABLE1: dict[str, dict[str, tuple[V, ...]]] = {  # method -> data set -> one per alpha
    "fedavg": {
        "cifar10": (V(60.39, 1.46), V(60.41, 1.36), V(60.91, 0.72)),
        "cifar100": (V(34.91, 0.86), V(32.78, 0.23), V(33.94, 0.39)),
        "tiny_imagenet": (V(21.26, 1.28), V(20.32, 0.91), V(17.20, 0.54)),
    },
    "local": {
        "cifar10": (V(81.91, 3.09), V(60.15, 0.86), V(52.24, 0.41)),
        "cifar100": (V(47.61, 0.96), V(22.65, 0.51), V(18.76, 0.63)),
        "tiny_imagenet": (V(24.07, 0.62), V(8.75, 0.30), V(6.87, 0.28)),
    },
    "fedamp": {
        "cifar10": (V(84.99, 1.82), V(68.26, 0.79), V(64.87, 0.95)),
        "cifar100": (V(46.68, 1.06), V(24.74, 0.58), V(18.22, 0.41)),
        "tiny_imagenet": (V(27.85, 0.71), V(10.70, 0.32), V(7.13, 0.21)),
    },
    "fedrep": {
        "cifar10": (V(84.59, 1.58), V(67.69, 0.86), V(60.52, 0.72)),
        "cifar100": (V(51.25, 1.37), V(26.97, 0.33), V(20.63, 0.42)),
        "tiny_imagenet": (V(30.83, 1.05), V(12.14, 0.28), V(8.37, 0.25)),
    },
    "fedbn": {
        "cifar10": (V(83.55, 2.32), V(66.79, 1.08), V(62.20, 0.67)),
        "cifar100": (V(54.35, 0.63), V(36.94, 0.94), V(33.67, 0.12)),
        "tiny_imagenet": (V(33.34, 0.71), V(19.61, 0.35), V(16.57, 0.44)),
    },
    "fedper": {
        "cifar10": (V(84.43, 0.47), V(68.80, 0.49), V(64.92, 0.66)),
        "cifar100": (V(51.38, 0.94), V(28.25, 1.03), V(21.53, 0.50)),
        "tiny_imagenet": (V(32.33, 0.31), V(12.69, 0.42), V(8.67, 0.40)),
    },
    "fedrod": {
        "cifar10": (V(86.23, 2.12), V(72.34, 1.77), V(68.45, 1.94)),
        "cifar100": (V(60.19, 0.64), V(38.54, 1.12), V(33.67, 0.48)),
        "tiny_imagenet": (V(44.25, 0.40), V(27.02, 0.64), V(22.07, 0.79)),
    },
    "pfedsd": {
        "cifar10": (V(86.34, 2.61), V(71.97, 2.07), V(67.21, 1.89)),
        "cifar100": (V(54.14, 0.77), V(41.06, 0.83), V(38.27, 0.20)),
        "tiny_imagenet": (V(39.31, 0.19), V(19.25, 1.80), V(15.91, 0.33)),
    },
    "pfedgate": {
        "cifar10": (V(87.25, 1.91), V(71.98, 1.61), V(67.85, 0.87)),
        "cifar100": (V(48.54, 0.39), V(27.47, 0.79), V(22.98, 0.03)),
        "tiny_imagenet": (V(37.59, 0.39), V(24.09, 0.67), V(19.69, 0.14)),
    },
    "fedcac": {
        "cifar10": (V(86.82, 1.18), V(69.83, 0.46), V(65.39, 0.51)),
        "cifar100": (V(57.22, 1.52), V(38.64, 0.63), V(32.59, 0.32)),
        "tiny_imagenet": (V(40.19, 1.20), V(23.70, 0.28), V(18.58, 0.62)),
    },
    "fedlora": {
        "cifar10": (V(85.47, 2.06), V(72.78, 1.23), V(69.09, 1.14)),
        "cifar100": (V(63.65, 0.53), V(45.96, 1.19), V(42.98, 0.64)),
        "tiny_imagenet": (V(44.22, 0.55), V(28.25, 1.24), V(25.55, 0.13)),
    },
}

# data set -> a row for each R_l, a column for each R_c
TABLE2: dict[str, tuple[tuple[V, ...], ...]] = {
    "cifar10": (
        (V(84.72, 2.07), V(84.97, 1.74), V(84.73, 2.33), V(84.80, 2.03), V(84.99, 2.19)),
        (V(84.84, 2.19), V(84.96, 1.87), V(85.27, 2.04), V(84.97, 1.86), V(85.39, 2.01)),
        (V(84.92, 1.90), V(85.35, 1.96), V(85.47, 2.06), V(85.07, 2.26), V(85.38, 1.76)),
        (V(84.70, 1.98), V(85.05, 1.66), V(85.25, 2.00), V(85.01, 1.90), V(85.13, 1.95)),
        (V(85.09, 1.95), V(85.23, 1.89), V(85.15, 1.66), V(84.88, 1.77), V(85.21, 1.62)),
    ),
    "cifar100": (
        (V(62.00, 0.60), V(62.66, 0.37), V(61.99, 0.97), V(62.48, 0.30), V(62.70, 0.83)),
        (V(61.70, 0.28), V(62.49, 0.77), V(62.70, 0.59), V(63.65, 0.53), V(62.73, 0.60)),
        (V(61.71, 0.30), V(62.88, 0.33), V(62.46, 0.53), V(63.12, 0.38), V(63.24, 0.66)),
        (V(60.76, 0.14), V(62.54, 0.56), V(62.74, 0.54), V(62.15, 0.38), V(62.70, 0.57)),
        (V(59.54, 0.98), V(60.97, 0.35), V(61.86, 0.74), V(61.96, 0.55), V(62.58, 0.51)),
    ),
    "tiny_imagenet": (
        (V(40.77, 0.10), V(42.71, 0.59), V(43.27, 0.43), V(43.78, 0.70), V(43.88, 0.16)),
        (V(40.14, 0.36), V(42.74, 0.46), V(43.82, 0.46), V(44.22, 0.55), V(43.72, 0.24)),
        (V(39.39, 0.26), V(42.75, 0.46), V(43.44, 0.43), V(43.85, 0.90), V(44.16, 0.48)),
        (V(36.90, 0.30), V(41.94, 0.29), V(42.75, 0.49), V(43.21, 0.41), V(43.28, 0.36)),
        (V(33.90, 0.91), V(40.55, 0.15), V(41.75, 0.81), V(42.16, 0.41), V(42.75, 0.31)),
    ),
}

TABLE3: dict[str, dict[str, V]] = {  # order -> data set
    "simultaneous": {
        "cifar10": V(85.45, 1.83),
        "cifar100": V(61.18, 1.05),
        "tiny_imagenet": V(19.61, 0.58),
    },
    "alternating": {
        "cifar10": V(85.47, 2.06),
        "cifar100": V(63.65, 0.53),
        "tiny_imagenet": V(44.22, 0.55),
    },
}

TABLE4: dict[str, dict[str, V]] = {  # method -> data set; the paper has no Tiny ImageNet here
    "local": {"cifar10": V(81.91, 3.09), "cifar100": V(47.61, 0.96)},
    "local_lora": {"cifar10": V(81.97, 2.62), "cifar100": V(47.64, 0.79)},
    "fedavg": {"cifar10": V(60.39, 1.46), "cifar100": V(34.91, 0.86)},
    "fedavg_lora": {"cifar10": V(60.91, 0.53), "cifar100": V(35.91, 0.70)},
}

TABLE5: dict[float, dict[str, V]] = {  # participation -> data set
    1.0: {"cifar10": V(85.47, 2.06), "cifar100": V(63.65, 0.53), "tiny_imagenet": V(44.22, 0.55)},
    0.9: {"cifar10": V(85.38, 1.62), "cifar100": V(63.01, 0.10), "tiny_imagenet": V(44.13, 0.70)},
    0.7: {"cifar10": V(85.25, 1.67), "cifar100": V(63.21, 0.18), "tiny_imagenet": V(44.10, 0.26)},
    0.5: {"cifar10": V(85.36, 1.67), "cifar100": V(63.13, 1.05), "tiny_imagenet": V(43.99, 0.62)},
}

TABLE6: dict[str, dict[str, V]] = {  # method -> data set; the paper prints no deviations here
    "fedavg": {"ag_news": V(89.36, nan), "imagenet_subset": V(18.55, nan)},
    "fedper": {"ag_news": V(90.76, nan), "imagenet_subset": V(29.37, nan)},
    "fedrod": {"ag_news": V(91.38, nan), "imagenet_subset": V(32.45, nan)},
    "fedlora": {"ag_news": V(91.79, nan), "imagenet_subset": V(35.67, nan)},
}

CLAIMS = {  # what the paper says of its figures
    "fig4": "accuracy rises with E_lora, then falls; E_lora = 0 is close to FedAvg, E_lora = E below "
    "Local",
    "fig6": "alternating training keeps the clients' sigma_i closer together than simultaneous "
    "training",
    "fig7": "no client is worse off with FedLoRA than with FedAvg or with Local",
}

# Yi et al., "pFedLoRA" (see ``algorithms/pfedlora.py``), the abstract: against the best baseline.
# Its tables could not be had.
# percentage points ahead of "several state-of-the-art methods": Peng et al., the abstract
FEDHL = "1 to 3"
PFEDLORA = {"accuracy": 1.35, "flops": 11.81, "bytes": 7.41}  # percentage points ahead; times less
