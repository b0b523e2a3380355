"""Bringing a named protocol's files to this machine, and opening it from them without a network."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserError
from ..metrics.extractor import Extractor
from ..metrics.features import make_extractor
from ..metrics.inception import ADDRESS, FILE, RESIZES, SHA256, find_weights, sha256_of, weights_folder
from .archives import all_pictures, zip_pictures
from .fetched_files import PUBLISHED, LocalFile, RemoteFile, Store, protocols_folder
from .moments_file import (
    Statistics,
    extractor_id,
    import_statistics,
    moments_of,
    published_inception_id,
    read_statistics,
    save_statistics,
)
from .published_numbers import CHECKS
from .standards import PROMPT_RULES, Standard, mjhq_names
from .table import STANDARDS, get_standard

WEIGHTS = RemoteFile(
    FILE, ADDRESS, "code toshas/torch-fidelity feature_extractor_inceptionv3.py", SHA256, "--weights"
)
GIVEN_STATISTICS = RemoteFile("given_statistics.npz", None, "given in the pictures' stead")


@dataclass(frozen=True)
class OpenStandard:
    """A protocol ready to score: its recipe, network, reference and captions (empty without)."""

    standard: Standard
    network: Extractor
    reference: Statistics
    prompts: list[str]


def prepare_data(
    name: str,
    *,
    statistics: Path | None = None,
    pictures: Path | None = None,
    prompts: Path | None = None,
    weights: Path | None = None,
    directory: Path | None = None,
    progress: bool = True,
) -> list[LocalFile]:
    """The files of a protocol, a check of verify-metrics, or "inception" (the weights alone), fetched or given.

    statistics, pictures, prompts, weights   local copies, taken instead of the addresses
    directory                                by default $FEWSTEP_CACHE/protocols

    What is there already is checked and kept. Raises UserError on an unknown name, an option that the name has no
    use for, and whatever `Store` refuses; files that came before the error stay.
    """
    root = directory or protocols_folder()
    if name not in (*STANDARDS, *CHECKS, "inception"):
        available = ", ".join((*STANDARDS, *CHECKS, "inception"))
        raise UserError(f"prepare-data: no {name!r}; available: {available}")
    standard, store = STANDARDS.get(name), Store(root / name)
    wanted = standard.files if standard else CHECKS[name].files if name in CHECKS else ()
    given = {"--statistics": statistics, "--pictures": pictures, "--prompts": prompts}
    useful = {file.option for file in wanted} | ({"--statistics"} if standard else set())
    for option, path in given.items():
        if path is not None and option not in useful:
            raise UserError(f"{option} {path}: {name} has no use for it; leave it out")
    if statistics is not None and pictures is not None:
        raise UserError(f"--statistics {statistics}: --pictures gives the reference too; leave one out")
    here, missing = [], []
    for file in wanted:
        path = given[file.option]
        if standard and file == standard.reference.value:
            if statistics is not None:
                _import(statistics, standard)
            if file.option == "--pictures":
                if path is not None:
                    store.drop(GIVEN_STATISTICS)
                elif statistics is not None or store.find(GIVEN_STATISTICS) is not None:
                    file, path = GIVEN_STATISTICS, statistics
        if path is None:
            missing.append(file)
        else:
            here.append(store.place(file, path))
    if weights is not None:
        here.append(Store(weights_folder(root)).place(WEIGHTS, weights))
    fetched = [store.fetch(file, progress=progress) for file in missing]
    return [*here, *fetched, *([] if weights else [_fetch_weights(root, progress)])]


def open_standard(
    name: str,
    *,
    device: torch.device | str = "cpu",
    directory: Path | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> OpenStandard:
    """A prepared protocol. Raises UserError, with the command that mends it, if something is not prepared."""
    standard = get_standard(name)
    network = make_extractor(standard.extractor.value).to(device)
    reference = load_reference(
        standard, network, directory=directory, batch_size=batch_size, progress=progress
    )
    return OpenStandard(standard, network, reference, load_prompts(standard, directory))


def load_prompts(standard: Standard, directory: Path | None = None) -> list[str]:
    """The protocol's captions in order, num_images of them; empty if it has none."""
    if standard.prompts is None or standard.prompts_rule is None:
        return []
    file = _prepared(standard, standard.prompts.value, directory)
    return PROMPT_RULES[standard.prompts_rule.value](file.path, standard.num_images.value)


def load_reference(
    standard: Standard,
    network: Extractor,
    *,
    directory: Path | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Statistics:
    """The reference's moments in the network's features.

    Published or given statistics are imported under the id that the record states, for the network that it names
    only. Those of pictures are computed under the crop, for any network, and kept under their id.
    """
    store = Store((directory or protocols_folder()) / standard.name)
    published = standard.reference.value if standard.keys else GIVEN_STATISTICS
    file = store.find(published)
    if file is None and standard.keys is None:
        return _from_pictures(standard, network, store, directory, batch_size, progress)
    if extractor_id(network) != published_inception_id(_rule(standard)):
        raise UserError(
            f"protocol {standard.name}: its statistics are of extractor {standard.extractor.value}, not of "
            f"{network.name}; use that one"
        )
    return _import(_prepared(standard, published, directory).path, standard)


def statistics_id(standard: Standard, network_id: str, pictures_sha256: str = "") -> str:
    """What reference statistics are of: protocol, file, crop, extractor and, if computed here, the pictures."""
    reference = standard.reference.value.name + (f" {pictures_sha256[:12]}" if pictures_sha256 else "")
    return f"{standard.name} | {reference} | crop {standard.crop.value} | {network_id}"


def _from_pictures(
    standard: Standard,
    network: Extractor,
    store: Store,
    directory: Path | None,
    batch_size: int,
    progress: bool,
) -> Statistics:
    assert standard.members is not None
    archive = _prepared(standard, standard.reference.value, directory)
    wanted_id = statistics_id(standard, extractor_id(network), archive.sha256)
    path = store.folder / f"statistics-{hashlib.sha256(wanted_id.encode()).hexdigest()[:12]}.npz"
    if path.is_file():
        return read_statistics(path, wanted_id)
    choose = all_pictures(standard.members.value)
    if standard.members.value == "mjhq":
        assert standard.prompts is not None
        listed = mjhq_names(_prepared(standard, standard.prompts.value, directory).path, standard.n_ref.value)

        def choose(names: list[str]) -> list[str]:
            by_stem = {Path(name).stem: name for name in names}
            return [by_stem.get(stem, stem) for stem in listed]

    pictures = zip_pictures(archive.path, choose, standard.crop.value)
    moments = moments_of(network, pictures, batch_size=batch_size, progress=progress)
    if moments.n != standard.n_ref.value:
        raise UserError(
            f"{archive.path}: {moments.n} pictures, protocol {standard.name} has {standard.n_ref.value}; give "
            "--pictures PATH"
        )
    return save_statistics(path, moments, wanted_id)


def _fetch_weights(root: Path, progress: bool) -> LocalFile:
    try:
        found = find_weights(root)
        if sha256_of(found) == WEIGHTS.sha256:
            return LocalFile(FILE, found, sha256_of(found), PUBLISHED)
    except UserError:
        pass
    return Store(weights_folder(root)).fetch(WEIGHTS, progress=progress)


def _prepared(standard: Standard, file: RemoteFile, directory: Path | None) -> LocalFile:
    found = Store((directory or protocols_folder()) / standard.name).find(file)
    if found is None:
        raise UserError(
            f"protocol {standard.name}: {file.name} is not prepared; run `fewstep prepare-data {standard.name}`"
        )
    return found


def _import(path: Path, standard: Standard) -> Statistics:
    stated_id = statistics_id(standard, published_inception_id(_rule(standard)))
    keys = standard.keys or ("mu", "sigma")
    statistics = import_statistics(path, stated_id=stated_id, n=standard.n_ref.value, keys=keys)
    if statistics.moments.dim != 2048:
        raise UserError(
            f"{path}: statistics of {statistics.moments.dim} features, pool3 has 2048; give others"
        )
    return statistics


def _rule(standard: Standard) -> str:
    return next((r for r in RESIZES if standard.extractor.value.endswith(f"-{r}")), "tf1")
