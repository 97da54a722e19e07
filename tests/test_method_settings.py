"""Every setting of every method is explained, and the range that is said is the one that is kept."""

from dataclasses import dataclass

import pytest

from fedlora_mpi import algorithms
from fedlora_mpi.algorithm import Algorithm
from fedlora_mpi.config import method_settings as module
from fedlora_mpi.config.method_settings import method_settings
from fedlora_mpi.core.bounds import bounded

METHODS = [algorithms.find_algorithm(name) for name in algorithms.algorithm_names()]


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_every_method_is_explained(method):
    for setting in method_settings(method):
        place = f"{method.__name__}.{setting.name}"
        assert setting.meaning, f"{place}: its comment says no meaning"
        assert setting.source, f"{place}: its comment says not where {setting.default} comes from"
        if "number" in setting.allowed or "integer" in setting.allowed:
            assert setting.unit, f"{place}: its comment says no [unit]"
            assert setting.allowed not in ("a number", "an integer"), f"{place}: has no bounds"


@pytest.mark.parametrize("method", METHODS)
def test_a_value_outside_the_range_that_is_said_is_refused(method):
    settings = {setting.name: setting for setting in method_settings(method)}
    for name, interval in module._intervals(method).items():
        low, high = map(float, interval[1:-1].split(", "))
        outside = [
            low if interval[0] == "(" else low - 1,
            high if interval[-1] == ")" else high + 1,
        ]
        for value in outside:
            value = (value,) if isinstance(settings[name].default, tuple) else value
            if value not in (float("inf"), (float("inf"),)):
                with pytest.raises(
                    ValueError, match=f"{name} = .* must be {settings[name].allowed}"
                ):
                    method(**{name: value})


def test_conv_rank_says_of_what():
    (setting,) = (
        s for s in method_settings(algorithms.find_algorithm("fedlora")) if s[0] == "conv_rank"
    )
    assert setting.unit == "share of min(I, O) K"
    assert "Table 2" in setting.source and setting.allowed == "a number above 0 and at most 1"


@dataclass(frozen=True)
class Base(Algorithm):
    """A method with both forms of comments."""

    # [rounds] time until
    # the end; default: Table 1
    end: int = 3
    on: bool = True  # whether it is on; default: our choice
    silent: str = "x"  # a comment of another kind

    def __post_init__(self) -> None:
        bounded(self, end="[1, 9)")


@dataclass(frozen=True)
class Derived(Base):
    """One that says where its default comes from, and one that does not."""

    end: int = 4  # default: Table 2
    on: bool = False


def test_a_comment_is_above_or_after_a_field():
    end, on, silent = method_settings(Base)
    assert end == (
        "end",
        3,
        "an integer from 1 to below 9",
        "rounds",
        "time until the end",
        "Table 1",
    )
    assert on == ("on", True, "true or false", "", "whether it is on", "our choice")
    assert silent == ("silent", "x", "text", "", "", "")


def test_another_default_has_another_source_and_the_inherited_meaning():
    end, on, _ = method_settings(Derived)
    assert end == (
        "end",
        4,
        "an integer from 1 to below 9",
        "rounds",
        "time until the end",
        "Table 2",
    )
    assert on.meaning == "whether it is on" and on.source == ""
