"""The config of a run: YAML files and ``key=value`` arguments become frozen dataclasses."""

from .blocks import ConfigError
from .experiment import Config, ModelBlock, Network
from .reading import (
    COMMAND_LINE,
    FREE_ON_RESUME,
    SELECTORS,
    algorithm_name,
    checksummed_yaml,
    digest,
    flatten,
    from_dict,
    read,
    read_recorded,
    read_recorded_rounds,
    resolved_dict,
    resolved_yaml,
)

__all__ = [
    "COMMAND_LINE",
    "FREE_ON_RESUME",
    "SELECTORS",
    "Config",
    "ConfigError",
    "ModelBlock",
    "Network",
    "algorithm_name",
    "digest",
    "flatten",
    "from_dict",
    "read",
    "read_recorded",
    "read_recorded_rounds",
    "resolved_dict",
    "resolved_yaml",
    "checksummed_yaml",
]
