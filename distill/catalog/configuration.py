"""Configurations of runs and searches: a YAML tree with overrides becomes typed settings, or one line."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ..config.method import ChosenMethod
from ..config.run import RunConfig
from ..config.search import SearchConfig
from ..config.tree import method_name, parse_text, parse_value
from ..config.validation import numbers, options_of, settings_in, shown, validate
from ..errors import UserError
from ..readers import Unreadable
from ..settings import Idle
from .effects import RUN, SEARCH, check_effects
from .methods import METHODS, SEARCHES, load, method_named, settings_of


def with_overrides(tree: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """`--key.sub value` (or `--key.sub=value`) set in a copy of the tree; of a flag given twice the last counts.

    Values are read as YAML, those of keys that want text (`takes_text`) as they are written.
    """
    tree = copy.deepcopy(tree)
    items = list(arguments)
    while items:
        item = items.pop(0)
        name, equals, value = item[2:].partition("=")
        if not item.startswith("--") or not name:
            raise UserError(f"unexpected argument {shown(item)}; overrides are written --key.sub value")
        bare = not equals and (not items or items[0].startswith("--"))
        if bare and takes_text(name):
            raise UserError(f"--{name}: its value is missing; write --{name} TEXT")
        if not equals:
            value = "true" if bare else items.pop(0)
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise UserError(f"--{name}: {parent} is a single value, it has no key {last}")
        try:
            node[last] = parse_text(value) if takes_text(name) else parse_value(value, written=True)
        except Unreadable as error:
            raise UserError(f"--{name}: {shown(value)} {error}; write text as '\"...\"'") from None
    return tree


def takes_text(name: str) -> bool:
    """Whether the key `name` holds text: of a run, a search, a method or a stage of train-teacher's."""
    parts = name.split(".")
    if parts[0] == "stages":
        parts = parts[2:]
    if parts == ["method", "name"]:
        return True
    owners: list[Any] = [RunConfig, SearchConfig]
    if parts[:1] == ["method"]:
        owners, parts = [e.settings for e in (*METHODS.values(), *SEARCHES.values())], parts[1:]
    kinds: list[Any] = []
    for part in parts:
        kinds = [f.type for o in owners for f in dataclasses.fields(o) if f.name == part]
        owners = [owner for kind in kinds for owner in settings_in(kind)]
    return any(str in options_of(kind) for kind in kinds)


def fitted(tree: dict[str, Any], ready: dict[str, Any]) -> dict[str, Any]:
    """`tree` without those values of `ready` that the caller left alone and whose effect he took away.

    Without `use_ema` there is no ema_decay, with a constant rate no warm-up, and where a run was cut short what would
    begin or end after it does so in a twentieth of it. What `ready` itself has in vain stays, and is refused.
    """
    out = copy.deepcopy(tree)

    def lost(key: str, idle: Callable[[dict[str, Any]], bool]) -> bool:
        return key in out and out[key] == ready.get(key) and idle(out) and not idle(ready)

    if lost("ema_decay", lambda t: not t.get("use_ema") or t.get("ema_std") is not None):
        del out["ema_decay"]
    if lost("lr_warmup_steps", lambda t: t.get("lr_scheduler", "constant") == "constant"):
        del out["lr_warmup_steps"]
    for key in _bounded_by_the_run(out):
        owner, here, there = key.split(".")[:-1], _number(out, key), _number(ready, key)
        total, whole = (_number(t, "max_train_steps") or 1000 for t in (out, ready))
        if here is not None and here == there and total < here <= whole:
            _section(out, owner)[key.split(".")[-1]] = total // 20
    return out


def _bounded_by_the_run(tree: dict[str, Any]) -> list[str]:
    """The keys of steps that have no effect beyond max_train_steps."""
    try:
        rows = (*RUN, *settings_of(method_name(tree)).idle)
    except UserError:  # told when the tree is checked
        rows = RUN
    return [key for row in rows if row.longer for key in row.keys.split()]


def _section(tree: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """The section of a tree that was not checked yet, {} where there is none."""
    for part in parts:
        tree = tree.get(part, {})
        if not isinstance(tree, dict):
            return {}
    return tree


def _number(tree: dict[str, Any], key: str) -> int | None:
    """The integer at a dotted key of a tree that was not checked yet, None where there is none."""
    *owner, last = key.split(".")
    value = numbers(_section(tree, owner).get(last))
    return value if isinstance(value, int) else None


def load_config(tree: dict[str, Any], prefix: str = "") -> RunConfig:
    """The resolved configuration of a run.

    prefix: put before the keys in what a UserError says. Raises it also for keys that would have no effect.
    """
    name = method_name(tree, prefix)
    try:
        kind = method_named(name)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None
    config: RunConfig = resolved(RunConfig, tree, RUN, prefix)
    from_weights = kind.needs_teacher == "to_start" and config.student.init == "teacher"
    if config.teacher is None and (kind.needs_teacher == "always" or from_weights):
        raise UserError(f"{prefix}teacher: missing; this method needs `teacher: {{path: ...}}`")
    return config


def load_search(tree: dict[str, Any]) -> SearchConfig:
    """As `load_config`, of a search. UserError for a key of training, and for a report on what was searched with."""
    known, of_training = (set(inspect.signature(c).parameters) for c in (SearchConfig, RunConfig))
    for key in tree:
        if key in of_training - known:
            name = tree["method"]["name"]
            raise UserError(
                f"{key}: belongs to training; {name} is a search and trains nothing; leave it out"
            )
    config: SearchConfig = resolved(SearchConfig, tree, SEARCH)
    if config.report is not None:
        d, r = config.data, config.report
        if (r.name or d.name, r.split) == (d.name, d.split):
            raise UserError(
                f"report.split: {r.split} is what the search itself sees; report on another split"
            )
    return config


def is_search(tree: dict[str, Any]) -> bool:
    """Whether method.name names a search."""
    return isinstance(tree.get("method"), dict) and str(tree["method"].get("name")) in SEARCHES


def resolved(cls: Any, tree: dict[str, Any], rows: Sequence[Idle] | None, prefix: str = "") -> Any:
    """The configuration of class `cls`, `method` with the settings of the one that it names; refuses the keys that are
    idle by `rows`, by the method's own rows, or that the method ignores; with rows None nothing is."""
    name = method_name(tree, prefix)
    config = validate(cls, tree, prefix)
    kind = settings_of(name)
    chosen = validate(kind, {k: v for k, v in tree["method"].items() if k != "name"}, f"{prefix}method.")
    try:
        if rows is not None:
            whole = dataclasses.replace(config, method=chosen)
            check_effects(whole, (*rows, *kind.idle), kind.ignores, name)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None
    return dataclasses.replace(config, method=ChosenMethod(name, chosen, lambda: load(name)))
