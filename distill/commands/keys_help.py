"""`fewstep distill --help`: every key in groups, with type, default, meaning, and the value that a file gives it."""

import argparse
from typing import Any

from ..catalog.configuration import is_search, with_overrides
from ..catalog.methods import METHODS, SEARCHES, settings_of
from ..catalog.recipes import find
from ..config.keys import Key, keys_of
from ..config.run import RunConfig
from ..config.search import SearchConfig
from ..config.tree import method_name, read_yaml
from ..errors import UserError
from ..settings import plain
from .arguments import Parser, Verb, usage_of

ABSENT = object()


def keys_help(verb: Verb, arguments: list[str]) -> str:
    """The help of `distill [CONFIG] [--key value ...]`, with the keys of the method that these name.

    Raises UserError for a configuration that cannot be read and for a method that there is not.
    """
    tree: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        tree = read_yaml(find(arguments[0]))
        if "stages" in tree:
            raise UserError(f"{arguments[0]} trains a teacher in stages; use `fewstep train-teacher --help`")
        arguments = arguments[1:]
    tree = with_overrides(tree, [a for a in arguments if a != "--dry_run"])
    named = method_name(tree) if tree.get("method") else None
    searches = is_search(tree)
    parser = Parser(
        verb,
        usage=usage_of(verb),
        epilog="`CONFIG --help` also shows the keys of its method and the values of the file."
        if named is None
        else None,
    )
    parser.add_argument(
        "CONFIG", help="YAML file of the keys below; each is a flag too, which goes before the file"
    )
    parser.add_argument("--dry_run", action="store_true", help="print what it would take, and do nothing")
    groups: dict[str, Any] = {}
    keys: dict[str, list[Key]] = {}
    for key in all_keys(SearchConfig if searches else RunConfig, named):
        keys.setdefault(key.name, []).append(key)
    for same in keys.values():
        title = same[0].group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups[title], same, tree)
    if named is None:
        note = "its own keys: `fewstep distill --method.name NAME --help`"
        groups["method"].add_argument("--method.*", metavar="...", help=note)
    return parser.format_help().rstrip()


def all_keys(cls: type, method: str | None) -> list[Key]:
    """The keys of a run's or a search's configuration that take a value, those of `method` last."""
    found: list[Key] = []
    for key in keys_of(cls):
        if key.name == "method":
            names = ", ".join(METHODS if cls is RunConfig else SEARCHES)
            chosen = Key("method.name", f"one of {names}", "required", key.meaning, key.group)
        elif key.type != "section":
            found.append(key)
    own = [] if method is None else keys_of(settings_of(method), "method.")
    return [*found, chosen, *(Key(**{**vars(k), "group": chosen.group}) for k in own if k.type != "section")]


def stages_help(verb: Verb) -> str:
    """The help of train-teacher, whose stages are runs of their own."""
    parser = Parser(verb, usage=usage_of(verb))
    parser.add_argument(
        "CONFIG", help="YAML file of the keys below; each is a flag too, which goes before the file"
    )
    group = parser.add_argument_group("keys")
    for name, meaning in (
        ("output_dir", "folder of the stages and of the finished pipeline (required)"),
        ("stages.STAGE.KEY", "STAGE: autoencoder, text_encoder and diffusion, or pixels alone; KEY: any that "
         "`fewstep distill --help` lists, but output_dir"),
        ("network.KEY", "argument of UNet2DConditionModel, beside the stage diffusion"),
        ("scheduler.KEY", "argument of DDIMScheduler, beside the stage diffusion"),
    ):  # fmt: skip
        group.add_argument(f"--{name}", metavar="VALUE", help=meaning)
    return parser.format_help().rstrip()


def _add(group: argparse._ArgumentGroup, same: list[Key], tree: dict[str, Any]) -> None:
    """A flag of one key, or of those of one name that a section's `name` chooses among."""
    given = _value(tree, same[0].name)
    here = "" if given is ABSENT else f"; here: {_short(given)}"
    texts = []
    for key in same:
        default = (
            key.default if key.default == "required" else f"default: {key.default or 'on, as its keys say'}"
        )
        texts.append(f"{key.meaning} ({default}{here})")
    group.add_argument(f"--{same[0].name}", metavar=same[0].type, help="; ".join(texts).replace("%", "%%"))


def _value(tree: Any, name: str) -> Any:
    for part in name.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return ABSENT
        tree = tree[part]
    return tree


def _short(value: Any) -> str:
    text = f"{{{', '.join(value)}}}" if isinstance(value, dict) else plain(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
