"""Settings as typed, frozen dataclasses."""
from functools import partial
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

settings = partial(dataclass, frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
