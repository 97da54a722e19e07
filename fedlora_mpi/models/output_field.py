"""Take the logits out of the output of a network that returns a tuple, a dict or an object.

A forward hook on the whole network does so. It changes no name of a leaf, and every pass, also of
an exported module, returns the logits alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

Field = str | int


@dataclass(frozen=True)
class TakeField:
    """A forward hook that returns one field of the output.

    A tensor is returned as it is: some networks return a tuple in one mode only.
    """

    field: Field

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return output if isinstance(output, Tensor) else _values(output, self.field)[self.field]


def find_field(
    outputs: Sequence[Any], expected: list[int], requested: Field | None
) -> Field | None:
    """Return the field that holds the logits in every output that is no tensor; None if all are.

    ``outputs`` are those for two samples in each mode. Without a request it is the only field of
    the shape ``expected``, or that of these with the name logits. Raises ValueError that lists the
    fields if this is undecided, or if there is no such field.
    """
    structured = [output for output in outputs if not isinstance(output, Tensor)]
    if requested is not None and not structured:
        raise ValueError(f"output = {requested}: the model returns a tensor; leave the key out")
    found = {_logits_field(output, expected, requested) for output in structured}
    if len(found) > 1:
        descriptions = " in training and ".join(map(describe_output, structured))
        raise ValueError(f"name: the model returns {descriptions} in evaluation; make them agree")
    return found.pop() if found else None


def describe_output(output: Any) -> str:
    """Return an output as text: its shape, or its type with the shapes of its fields."""
    if isinstance(output, Tensor):
        return str(list(output.shape))
    values = [f"{name} {_shape_text(value)}" for name, value in _values(output).items()]
    return type(output).__name__ + (f" with {', '.join(values)}" if values else "")


def _logits_field(output: Any, expected: list[int], requested: Field | None) -> Field:
    """Return the field of one output, see ``find_field``."""
    if requested is not None:
        if requested not in _values(output, requested):
            raise ValueError(
                f"output = {requested}: is no field; the model returns {describe_output(output)}"
            )
        return requested
    fitting = [
        name
        for name, value in _values(output).items()
        if isinstance(value, Tensor) and list(value.shape) == expected
    ]
    if len(fitting) == 1 or "logits" in fitting:
        return "logits" if "logits" in fitting else fitting[0]
    text = f"name: the model gives {describe_output(output)} for 2 samples"
    if fitting:
        raise ValueError(f"{text}; name the field of the logits, such as model.output={fitting[0]}")
    raise ValueError(f"{text}, none of which is {expected}")


def _values(output: Any, number: Field | None = None) -> dict[Any, Any]:
    """Return the fields of an output that are not None by name, or by number if they have no names.

    number: a number that fields with names have as well, if it is one.
    """
    named: Mapping
    if isinstance(output, Mapping):  # that of Hugging Face's models too
        named = output
    elif is_dataclass(output):
        named = {f.name: getattr(output, f.name) for f in fields(output)}
    elif hasattr(output, "_asdict"):
        named = output._asdict()
    elif isinstance(output, list | tuple):
        named = dict(enumerate(output))
    else:
        named = getattr(output, "__dict__", {})
    values = {name: value for name, value in named.items() if value is not None}
    if isinstance(number, int) and -len(values) <= number < len(values):
        values.setdefault(number, [*values.values()][number])
    return values


def _shape_text(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
