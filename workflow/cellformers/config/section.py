"""What all parts of the config have in common."""

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

T = TypeVar("T")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]


def _once(values: list[T]) -> list[T]:
    """The list; ValueError where it names something twice."""
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"names {value!r} twice")
    return values


Once = AfterValidator(_once)


class Section(BaseModel):
    """A part of the config: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
