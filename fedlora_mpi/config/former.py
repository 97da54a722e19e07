"""A method's block as it was before: values that have another name now, and keys that are new.

A config of an earlier version is read as it was meant, and its digest is the same as it was then.
"""

from collections.abc import Mapping
from typing import Any

# {method: {key: {former name of a value: its name now}}}
RENAMED_VALUES: dict[str, dict[str, dict[str, str]]] = {
    "fedhl": {"weight_mode": {"paper": "fedhera", "both": "fedhera_samples"}},
}
# {method: {key: value}}: a recorded config without the key is of a run that began before the key
# existed, and this value is what that run does.
_TUNING_METHODS = (
    "aggregation_broadcast",
    "fed_rac_lora",
    "fed_talora",
    "fedex_lora",
    "fedhl",
    "fedit",
    "fedsa_lora",
    "ffa_lora",
    "flexlora",
    "flora",
    "hetlora",
    "raflora",
    "rolora",
)
_TUNING_VALUES = {"merge": True}
VALUES_BEFORE_KEYS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_TUNING_METHODS, _TUNING_VALUES),
    "fedamp": {"cloud_alpha": "previous"},
    "fedhl": {"tau": 0.3} | _TUNING_VALUES,
}


def rename_values(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the method ``name`` with today's names of their values."""
    renamed = RENAMED_VALUES.get(name, {})
    return {
        key: renamed[key].get(value, value) if key in renamed and isinstance(value, str) else value
        for key, value in options.items()
    }


def add_missing_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded config ``tree`` with the keys that its method did not have yet."""
    block = tree.get("algorithm")
    if not isinstance(block, Mapping):
        return dict(tree)
    return {**tree, "algorithm": VALUES_BEFORE_KEYS.get(str(block.get("name")), {}) | {**block}}


def restore_former_block(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved ``algorithm`` block as an earlier version would have resolved it.

    Keys whose value is that of the time before them are left out, and values have their former
    names. Two methods that differ still have different blocks.
    """
    added = VALUES_BEFORE_KEYS.get(block["name"], {})
    former_names = {
        key: {now: former for former, now in names.items()}
        for key, names in RENAMED_VALUES.get(block["name"], {}).items()
    }
    return {
        key: former_names[key].get(value, value) if key in former_names else value
        for key, value in block.items()
        if not (key in added and value == added[key])
    }
