"""The Hugging Face Hub: what it refuses in one line, and uploads of finished runs."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ...pipelines.export import KOHYA
from ..errors import UserError


def refusal(path: str, error: BaseException) -> str | None:
    """Why the hub does not give a model, and what to do about it; None where that is not what failed."""
    kinds = [type(e) for e in causes(error)]
    if any(issubclass(k, GatedRepoError) for k in kinds):
        return f"{path} is gated; accept its terms at https://huggingface.co/{path}, then run `hf auth login`"
    if any(issubclass(k, RepositoryNotFoundError) for k in kinds):
        return f"the hub has no {path}, or it is private; check the name, or run `hf auth login`"
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def check_name(repo_id: str) -> None:
    """UserError for what no repository can be called."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{repo_id[:60]!r}: is no name of a repository ({reason}); write OWNER/NAME"
        ) from None


def push(run: Path, repo_id: str, *, private: bool = False, api: Any = None) -> str:
    """Uploads the LoRA of a finished run, with its kohya/ file, or else its pipeline; returns the address.

    The card's loading lines then name the repository. Raises UserError for a run without an export, and where the hub
    does not take it.
    """
    check_name(repo_id)
    name = next((n for n in ("lora", "pipeline") if (run / n / "README.md").is_file()), None)
    if name is None:
        raise UserError(f"{run}: holds no export to upload; finish the run")
    with TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(run / name, Path(scratch) / "upload"))
        if name == "lora" and (run / KOHYA).is_dir():
            shutil.copytree(run / KOHYA, folder / KOHYA)
        card = folder / "README.md"
        card.write_text(card.read_text().replace(f'("{name}"', f'("{repo_id}"'))
        api = HfApi() if api is None else api
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"{name} of {run.name}, by fewstep"
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{repo_id}: cannot be written ({reason}); run `hf auth login` with a token that may write there, then "
                f"`fewstep push-to-hub {run} {repo_id}`"
            ) from error
    return str(url)
