"""What every configuration tree is made of: a strict immutable node, and the number types."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class ConfigNode(BaseModel):
    """A node of a configuration tree: immutable; an unknown key is an error, and so is a number that is infinite, none, or `true`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, which would be the number 1."""
        if isinstance(value, bool):
            annotation = cls.model_fields[str(info.field_name)].annotation
            if not {bool, Any} & {annotation, *get_args(annotation)} and {int, float} & set(_leaves(annotation)):
                raise PydanticCustomError("number_expected", "Input should be a number, and this is a switch")
        return value


def _leaves(annotation: Any) -> tuple[Any, ...]:
    """The plain types in an annotation such as `Annotated[int, ...] | Elastic`."""
    found = get_args(annotation)
    return tuple(leaf for part in found for leaf in _leaves(part)) if found else (annotation,)
