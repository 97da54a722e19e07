"""The config of a run: YAML files and ``key=value`` from the command line, to frozen dataclasses."""

from .blocks import ConfigError
from .experiment import Config, ModelBlock, Network
from .reading import (
    COMMAND_LINE,
    FREE_ON_RESUME,
    SELECTORS,
    algorithm_name,
    digest,
    flat,
    from_dict,
    read,
    recorded,
    recorded_rounds,
    resolved_dict,
    resolved_yaml,
    sealed_yaml,
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
    "flat",
    "from_dict",
    "read",
    "recorded",
    "recorded_rounds",
    "resolved_dict",
    "resolved_yaml",
    "sealed_yaml",
]
