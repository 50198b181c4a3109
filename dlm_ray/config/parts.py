"""The base class of all configuration trees, and their number types."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class ConfigNode(BaseModel):
    """A node of a configuration tree: immutable; refuses unknown keys, and infinity, NaN or `true` for numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans_for_numbers(cls, value: object, info: ValidationInfo) -> object:
        """Refuse `yes` and `on`, which YAML reads as true and pydantic would take as the number 1."""
        if isinstance(value, bool):
            annotation = cls.model_fields[str(info.field_name)].annotation
            if not {bool, Any} & {annotation, *get_args(annotation)} and {int, float} & set(_leaves(annotation)):
                raise PydanticCustomError("number_expected", "Input should be a number, not true or false")
        return value


def _leaves(annotation: object) -> tuple[object, ...]:
    """Return the plain types in an annotation such as `Annotated[int, ...] | Elastic`."""
    arguments = get_args(annotation)
    return tuple(leaf for part in arguments for leaf in _leaves(part)) if arguments else (annotation,)
