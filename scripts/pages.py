"""Writes what the pages take from the code: configs/REFERENCE.md, the tables of configs/README.md and of
distill/methods/README.md.

    python scripts/pages.py              write them, the memory column as it stands
    python scripts/pages.py --memory     compute that column anew: `--dry_run` of every recipe, some minutes
    python scripts/pages.py --check      write nothing, exit 1 where a page is stale
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fewstep.distill.catalog.configuration import is_search, load_config, load_search
from fewstep.distill.catalog.described import DESCRIBED
from fewstep.distill.catalog.methods import METHODS, SEARCHES
from fewstep.distill.config.keys import Key, keys_of
from fewstep.distill.config.run import RunConfig
from fewstep.distill.config.search import SearchConfig
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.methods.published import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
REFERENCE = CONFIGS / "REFERENCE.md"
RECIPES = CONFIGS / "README.md"
METHOD_PAGE = ROOT / "distill" / "methods" / "README.md"

NEEDS = {"always": "a teacher", "to_start": "a teacher, or data alone", "never": "data alone"}
# The benchmark that a recipe has the data and the network of.
NUMBERS = {
    "cifar10/ict": ("ict", "CIFAR-10"),
    "cifar10/meanflow": ("meanflow", "CIFAR-10"),
    "cifar10/scm": ("rcm", "CIFAR-10, unconditional, sCT"),
    "imagenet64/ict": ("ict", "ImageNet 64"),
    "imagenet256/meanflow_xl": ("meanflow", "ImageNet 256"),
    "celebahq256/lct": ("lct", "CelebA-HQ"),
    "ffhq256/lct": ("lct", "FFHQ"),
    "lsun_church256/lct": ("lct", "LSUN Church"),
    "sd15/scott": ("scott", "COCO 2017"),
    "sd15/nct_canny": ("nct", "Canny"),
    "sd15/nct_superres": ("nct", "super-resolution"),
    "sd15/nct_image": ("nct", "image prompt"),
    "wan/rcm": ("rcm", "Wan2.1 1.3B"),
}
# Results that do not stand below a recipe's own name.
RESULTS = {
    "emoji/lcd_v": "emoji/results/prediction/compare.md",
    "emoji/interlcm": "emoji/results/restoration/restoration.md",
    "emoji/style_lora": "emoji/turbo.md",
    "emoji/teacher": "../distill/teachers/emoji_sd/README.md",
    "emoji/scorers": "../distill/scorers/heads/README.md",
    "fashion/teacher": "../distill/teachers/fashion_edm/README.md",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def filled(text: str, name: str, content: str) -> str:
    """A page with `content` between its comments `<!-- name -->` and `<!-- end -->`."""
    pattern = re.compile(rf"(<!-- {name} -->\n)(?:.*?\n)??(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the page has no comments <!-- {name} --> and <!-- end -->")
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def reference() -> str:
    """Every key of a run, of a search and of each method."""
    parts = [
        "# Every key",
        "Written by `python scripts/pages.py` out of the settings classes; do not edit it by hand.\n"
        "A key in a section is a dotted flag too: `method: {w_max: 8}` is `--method.w_max 8`. A key that would change "
        "nothing\nbeside the others is refused.",
        "- [Runs](#runs)\n- [Searches](#searches)\n"
        + "\n".join(f"- [`{name}`](#{name})" for name in [*METHODS, *SEARCHES]),
        *keys_section("Runs", RunConfig),
        *keys_section("Searches", SearchConfig),
        *(
            part
            for name, e in (METHODS | SEARCHES).items()
            for part in keys_section(name, e.settings, "method.")
        ),
    ]
    return "\n\n".join(parts) + "\n"


def keys_section(title: str, settings: type, prefix: str = "") -> list[str]:
    found = keys_of(settings, prefix)
    groups = dict.fromkeys(key.group for key in found)
    parts = [f"## {title}"]
    for group in groups:
        parts += [f"### {group.capitalize()}"] if group else []
        parts.append(keys_table(key for key in found if key.group == group))
    return parts


def keys_table(keys: Iterable[Key]) -> str:
    rows = ([f"`{k.name}`", k.type, f"`{k.default}`" if k.default else "", k.meaning] for k in keys)
    return table(("key", "type", "default", "meaning"), rows)


def methods() -> str:
    rows = []
    for name, d in DESCRIBED.items():
        kind = (METHODS | SEARCHES)[name].settings
        teacher = "no training" if name in SEARCHES else NEEDS[kind.needs_teacher]
        papers = kind.origin.all_papers() if kind.origin else []
        linked = ", ".join(f"{p.name} [{p.arxiv}]({p.url})" for p in papers) or "none"
        made = [f"[{r}](../../configs/{r}.yaml)" for r, tree in recipes().items() if method_of(tree) == name]
        needs = f"{teacher}; {d.data}"
        rows.append([f"[`{name}`](#{name})", linked, kind.idea, needs, d.switches, d.export, ", ".join(made)])
    return table(("method", "paper", "idea", "needs", "switches", "exported as", "recipes"), rows)


def recipes() -> dict[str, dict[str, Any]]:
    """The tree of every YAML file below configs/, by its path without the ending."""
    return {
        str(p.relative_to(CONFIGS).with_suffix("")): read_yaml(p) for p in sorted(CONFIGS.glob("*/*.yaml"))
    }


def method_of(tree: dict[str, Any]) -> str:
    return str(tree["method"]["name"]) if "method" in tree else ""


def recipe_table(memory: dict[str, str]) -> str:
    rows = []
    for recipe, tree in recipes().items():
        teacher, data, method, work = facts(tree)
        rows.append([f"[{recipe}]({recipe}.yaml)", teacher, data, method, memory.get(recipe, ""), work,
                     paper_numbers(recipe), result(recipe)])  # fmt: skip
    head = (
        "recipe",
        "teacher",
        "data",
        "method",
        "memory, GiB",
        "pictures: steps x batch",
        "paper's number",
        "was it run",
    )
    return table(head, rows)


def facts(tree: dict[str, Any]) -> tuple[str, str, str, str]:
    """Teacher, data, method and amount of work of a recipe."""
    if "stages" in tree:
        stages = tree["stages"]
        names = ", ".join(
            dict.fromkeys({"data": tree.get("data"), **s}["data"]["name"] for s in stages.values())
        )
        steps = ", ".join(
            f"{count(int(s['max_train_steps']), int(s['train_batch_size']))}" for s in stages.values()
        )
        return (
            "trains one",
            names,
            f"`train-teacher`: {', '.join(method_of(s) for s in stages.values())}",
            steps,
        )
    if "scorers" in tree:
        return "none", str(tree["data"]), "image-text scorers", f"{tree['epochs']} epochs"
    if is_search(tree):
        s = load_search(tree)
        work = f"none trained: {s.max_candidates} candidates x {s.num_images} drawn"
        return f"`{s.student.path}`", f"`{s.data.name}`", f"`{s.method['name']}`", work
    c = load_config(tree)
    teacher = f"`{c.teacher.path}`" if c.teacher else f"none; autoencoder `{c.vae.path}`" if c.vae else "none"
    batch = c.train_batch_size * c.gradient_accumulation_steps
    return teacher, f"`{c.data.name}`", f"`{c.method['name']}`", count(c.max_train_steps, batch)


def count(steps: int, batch: int) -> str:
    return f"{steps * batch:,} = {steps:,} x {batch}"


def paper_numbers(recipe: str) -> str:
    if recipe not in NUMBERS:
        return ""
    name, benchmark = NUMBERS[recipe]
    found = [p for p in PUBLISHED[name] if p.benchmark.startswith(benchmark)]
    if not found:
        raise ValueError(f"{recipe}: no published number of {name} is for {benchmark}")
    texts = []
    for benchmark, metric in dict.fromkeys((p.benchmark, p.metric) for p in found):
        own = sorted(
            (p for p in found if (p.benchmark, p.metric) == (benchmark, metric)), key=lambda p: p.steps
        )
        steps = " / ".join(str(p.steps) for p in own)
        values = " / ".join(f"{p.value:g}" for p in own)
        texts.append(f"{metric} {values} at {steps} step{'s' if steps != '1' else ''} ({benchmark})")
    return "; ".join(texts)


def result(recipe: str) -> str:
    """A link to the committed result of a recipe, or no."""
    folder, name = recipe.split("/")
    places = [
        f"{folder}/results/reports/{name}.json",
        f"{folder}/results/searches/{name}.md",
        f"{folder}/results/{name}.md",
    ]
    places = [RESULTS[recipe]] if recipe in RESULTS else places
    found = next((p for p in places if (CONFIGS / p).is_file()), None)
    return f"[yes]({found})" if found else "no"


def memory_of_page(text: str) -> dict[str, str]:
    """The memory column as a page has it."""
    lines = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| [")
    ]
    return {re.sub(r"\[(.*?)\].*", r"\1", cells[0]): cells[4] for cells in lines}


def memory() -> dict[str, str]:
    """Per device, as `--dry_run` prints it, of every recipe of a run."""
    found = {}
    for recipe, tree in recipes().items():
        if "method" in tree and not is_search(tree):
            found[recipe] = memory_of(load_config(tree))
            print(recipe, found[recipe], file=sys.stderr)
    return found


def memory_of(config: RunConfig) -> str:
    from fewstep.distill.errors import UserError
    from fewstep.distill.planning.dry_run import gib
    from fewstep.distill.planning.plan import planned

    try:
        plan = planned(config)
    except UserError as error:  # it starts from another run, which is not here
        if str(error).startswith("teacher.path"):
            return "needs its teacher's folder"
        raise
    if plan.memory is None:
        return f"over {gib(sum(plan.held.values()))}"
    low, high = map(gib, plan.memory)
    return high if low == high else f"{low} to {high}"


def pages(*, anew: bool = False) -> dict[Path, str]:
    """The text that each page should have."""
    old = RECIPES.read_text()
    known = memory() if anew else memory_of_page(old)
    return {
        REFERENCE: reference(),
        RECIPES: filled(old, "recipes", recipe_table(known)),
        METHOD_PAGE: filled(METHOD_PAGE.read_text(), "methods", methods()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", action="store_true", help="compute the memory column anew")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is stale")
    args = parser.parse_args()
    stale = 0
    for path, text in pages(anew=args.memory).items():
        if not path.is_file() or path.read_text() != text:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'stale' if args.check else 'written'}")
            if not args.check:
                path.write_text(text)
    return int(args.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
