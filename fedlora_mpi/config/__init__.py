"""The config of a run: YAML files and ``key=value`` arguments become frozen dataclasses."""

from .blocks import ConfigError
from .experiment import Config, ModelBlock, Network
from .reading import (
    CHOICES,
    COMMAND_LINE,
    FREE_ON_RESUME,
    algorithm_name,
    annotated_yaml,
    checksummed_yaml,
    digest,
    flatten,
    from_dict,
    partition_kind,
    read,
    read_recorded,
    read_recorded_rounds,
    resolved_dict,
    resolved_yaml,
)

__all__ = [
    "CHOICES",
    "COMMAND_LINE",
    "FREE_ON_RESUME",
    "Config",
    "ConfigError",
    "ModelBlock",
    "Network",
    "algorithm_name",
    "annotated_yaml",
    "digest",
    "flatten",
    "from_dict",
    "partition_kind",
    "read",
    "read_recorded",
    "read_recorded_rounds",
    "resolved_dict",
    "resolved_yaml",
    "checksummed_yaml",
]
