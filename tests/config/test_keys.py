"""The keys of settings as help and reference show them."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import pytest
from fewstep.distill.catalog.methods import METHODS, SEARCHES
from fewstep.distill.config.keys import Key, keys_of, meanings_of
from fewstep.distill.config.run import RunConfig
from fewstep.distill.config.search import SearchConfig
from fewstep.distill.config.validation import settings_in
from fewstep.distill.settings import settings
from pydantic import Field


@settings
class Round:
    """name    which
    radius  in pixels"""

    name: Literal["round"] = "round"
    radius: float = Field(1.5, gt=0, lt=9)


@settings
class Square:
    """The other one.

    name  which
    side  in pixels
    """

    name: Literal["square"] = "square"
    side: int = Field(ge=1, le=9)


@settings
class Base:
    """seed  of the noise"""

    seed: Annotated[int, Field(ge=0, lt=2**63)]


@settings
class Whole(Base):
    """Prose with a row: no.

    seed: is no row either.

    shapes:
    shape       what is drawn,
                and how
    low, high   ends of a range

    text:
    names       who
    free        anything
    """

    shape: Annotated[Round | Square, Field(discriminator="name")]
    one: Round | None = None
    low: float | None = Field(None, ge=-1, le=1)
    high: tuple[float, int] = (0.5, 2)
    names: tuple[str, ...] = ("a", "b")
    mode: Literal["no"] | Literal["x", "y"] = "no"
    on: bool = True
    free: dict[str, int] | None = None
    kept: ClassVar[int] = 1


def test_the_keys_of_settings() -> None:
    assert keys_of(Whole, "p.") == [
        Key("p.seed", "int >= 0", "required", "of the noise"),
        Key("p.shape", "section with a name: round, square", "required", "what is drawn, and how", "shapes"),
        Key("p.shape.radius", "float > 0, < 9", "1.5", "round: in pixels", "shapes"),
        Key("p.shape.side", "int 1..9", "required", "square: in pixels", "shapes"),
        Key("p.one", "section or null", "null", ""),
        Key("p.one.name", "one of round", "round", "which"),
        Key("p.one.radius", "float > 0, < 9", "1.5", "in pixels"),
        Key("p.low", "float -1..1 or null", "null", "ends of a range", "shapes"),
        Key("p.high", "[float, int]", "[0.5, 2]", "ends of a range", "shapes"),
        Key("p.names", "list of text", "[a, b]", "who", "text"),
        Key("p.mode", "one of no, x, y", "no", ""),
        Key("p.on", "true or false", "true", ""),
        Key("p.free", "section or null", "null", "anything", "text"),
    ]


def all_settings() -> Iterator[type]:
    """Every class of settings that a configuration can hold."""
    waiting: list[type] = [RunConfig, SearchConfig, *(e.settings for e in (METHODS | SEARCHES).values())]
    seen: set[type] = set()
    while waiting:
        cls = waiting.pop()
        if cls not in seen:
            seen.add(cls)
            yield cls
            waiting += [s for f in cls.__pydantic_fields__.values() for s in settings_in(f.annotation)]


@pytest.mark.parametrize("cls", sorted(all_settings(), key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_every_key_has_a_meaning_and_every_meaning_a_key(cls: type) -> None:
    fields, meanings = cls.__pydantic_fields__, meanings_of(cls)  # type: ignore[attr-defined]
    assert meanings.keys() == fields.keys()
    for meaning, _ in meanings.values():
        assert len(meaning) > 3 and not meaning.endswith(".")


@pytest.mark.parametrize("cls", [RunConfig, SearchConfig])
def test_every_key_of_a_configuration_is_in_a_group(cls: type) -> None:
    assert all(key.group for key in keys_of(cls))


def test_every_method_says_its_paper_and_idea() -> None:
    kinds = [entry.settings for entry in (METHODS | SEARCHES).values()]
    assert all(10 < len(kind.idea) <= 70 for kind in kinds)
    assert len({kind.idea for kind in kinds}) == len(kinds)
    papers = [kind.origin.paper.arxiv for kind in kinds if kind.origin]
    assert len(set(papers)) == len(papers) == len(kinds) - 1  # the text encoder's stage is of no paper
