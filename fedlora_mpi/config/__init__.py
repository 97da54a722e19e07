"""The config of a run: YAML files and ``key=value`` arguments become frozen dataclasses."""

from .blocks import ConfigError
from .building import method_for
from .experiment import Config, ModelBlock, Network
from .layers import (
    CHOICES,
    COMMAND_LINE,
    override_text,
    parse_override,
    parse_tree,
    source_of,
    tree_yaml,
)
from .reading import (
    annotated_yaml,
    from_dict,
    from_recorded,
    has_placeholder,
    output_pattern,
    read,
    read_recorded,
    read_recorded_rounds,
)
from .writing import (
    FREE_ON_RESUME,
    algorithm_name,
    all_settings,
    checksummed_yaml,
    digest,
    flatten,
    partition_kind,
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
    "all_settings",
    "annotated_yaml",
    "digest",
    "flatten",
    "from_dict",
    "has_placeholder",
    "method_for",
    "output_pattern",
    "from_recorded",
    "partition_kind",
    "read",
    "read_recorded",
    "read_recorded_rounds",
    "resolved_dict",
    "resolved_yaml",
    "override_text",
    "parse_override",
    "parse_tree",
    "source_of",
    "tree_yaml",
    "checksummed_yaml",
]
