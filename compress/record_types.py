"""What all typed records share: they are closed and never change, and a count is never negative."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]


class Typed(BaseModel):
    """A record: a field that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
