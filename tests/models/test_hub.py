"""The hub's refusals in one line, the teacher's licence in the student's card, and what is uploaded."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from diffusers import DiffusionPipeline
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.cli import main
from fewstep.distill.errors import UserError
from fewstep.distill.models import hub
from fewstep.distill.models.hub import push
from fewstep.distill.models.teacher import load_pipeline
from fewstep.distill.planning import known_teachers
from fewstep.distill.settings import TeacherSettings
from fewstep.distill.training import licence
from fewstep.distill.training.card_head import front_matter
from fewstep.distill.training.licence import licence_of
from fewstep.distill.training.model_card import Made, training_table
from fewstep.pipelines.export import Export
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

CARD = """---
license: other
license_name: flux-1-dev
license_link: LICENSE.md
---
# A model
"""


LCD = Export(None, sampling={"1": {}})


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            GatedRepoError("401", response=response(401)),
            r"owner/name is gated; accept its terms at https://hugg",
        ),
        (
            RepositoryNotFoundError("404", response=response(404)),
            r"the hub has no owner/name, or it is private",
        ),
        (OSError("no route"), r"could(| not) be (fetched|reached)|cannot be reached on the hub"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_the_hub_does_not_give(
    wrapped: bool, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers wraps some errors in others; with and without the configurations known beforehand."""

    def refuse(*_: Any, **__: Any) -> None:
        if wrapped:
            raise OSError("Cannot load model owner/name") from error
        raise error

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    for call in (
        lambda: load_pipeline("owner/name"),
        lambda: known_teachers.blueprint(TeacherSettings("owner/name")),
    ):
        with pytest.raises(UserError, match=rf"teacher\.path: .*{message}") as caught:
            call()
        assert "\n" not in str(caught.value)


def tree(teacher: str, **changes: Any) -> Any:
    return load_config(
        {
            "output_dir": "none",
            "teacher": {"path": teacher, **changes},
            "data": {"name": "emoji"},
            "method": {"name": "lcd"},
        }
    )


def test_the_licence_of_a_folder_goes_into_the_card(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "teacher")
    assert licence_of(TeacherSettings(str(folder))) == {}
    config = tree(str(folder))
    assert yaml.safe_load(front_matter(config, LCD).split("---")[1]) == {
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["fewstep", "few-step", "lcd"]
    }  # fmt: skip
    assert "| licence of the teacher | not stated in its model card |" in training_table(config, Made(1))
    (folder / "README.md").write_text(CARD)
    entries = yaml.safe_load(front_matter(config, LCD, adapter=True).split("---")[1])
    assert entries["license"] == "other" and entries["license_name"] == "flux-1-dev"
    assert entries["license_link"] == "LICENSE.md" and "base_model" not in entries
    assert entries["tags"][-1] == "lora"
    assert "| licence of the teacher | flux-1-dev |" in training_table(config, Made(1))
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence_of(TeacherSettings(str(folder))) == {}
    assert licence_of(TeacherSettings("emoji-sd")) == {"license": "apache-2.0"}


def test_the_licence_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "card.md").write_text(CARD)
    asked: list[Any] = []

    def download(path: str, file: str, revision: str | None) -> str:
        asked.append((path, file, revision))
        return str(tmp_path / "card.md")

    monkeypatch.setattr(licence, "hf_hub_download", download)
    config = tree("owner/name", revision="v1")
    entries = yaml.safe_load(front_matter(config, LCD).split("---")[1])
    assert entries["license_name"] == "flux-1-dev" and entries["base_model"] == "owner/name"
    assert asked == [("owner/name", "README.md", "v1")]
    lora = tree("owner/name", lora="owner/style/style.safetensors")
    assert "| licence of the teacher | flux-1-dev; that of its LoRA holds too |" in training_table(
        lora, Made(1)
    )

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(licence, "hf_hub_download", offline)
    assert licence_of(TeacherSettings("owner/name")) == {}


class Api:
    """The hub's side of an upload."""

    def __init__(self, error: Exception | None = None):
        self.error, self.calls = error, []  # type: ignore[var-annotated]

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        if self.error is not None:
            raise self.error
        self.calls.append(("create", repo_id, private, exist_ok))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        files = {
            str(p.relative_to(folder_path)): p.read_bytes() for p in folder_path.rglob("*") if p.is_file()
        }
        self.calls.append(("upload", repo_id, files, commit_message))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "mine"
    for name in ("lora", "pipeline", "kohya"):
        (run / name).mkdir(parents=True)
        (run / name / f"{name}.safetensors").write_bytes(name.encode())
    for name in ("lora", "pipeline"):
        (run / name / "samples.png").write_bytes(b"pictures")
        (run / name / "config.yaml").write_text("seed: 0\n")
    (run / "lora" / "README.md").write_text('pipe.load_lora_weights("lora")\n')
    (run / "pipeline" / "README.md").write_text('DiffusionPipeline.from_pretrained("pipeline")\n')
    return run


def test_a_lora_is_uploaded_with_its_other_layout(run: Path) -> None:
    api = Api()
    assert push(run, "me/mine", private=True, api=api) == "https://huggingface.co/me/mine"
    created, (_, repo, files, message) = api.calls
    assert created == ("create", "me/mine", True, True) and repo == "me/mine" and "lora of mine" in message
    assert files == {
        "lora.safetensors": b"lora",
        "samples.png": b"pictures",
        "config.yaml": b"seed: 0\n",
        "kohya/kohya.safetensors": b"kohya",
        "README.md": b'pipe.load_lora_weights("me/mine")\n',
    }
    assert 'load_lora_weights("lora")' in (run / "lora" / "README.md").read_text()


def test_a_pipeline_is_uploaded_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "lora")
    api = Api()
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    assert main(["push-to-hub", str(run), "me/mine"]) == 0
    assert capsys.readouterr().out == "https://huggingface.co/me/mine\n"
    assert api.calls[0] == ("create", "me/mine", False, True)
    assert set(api.calls[1][2]) == {"pipeline.safetensors", "README.md", "samples.png", "config.yaml"}
    assert api.calls[1][2]["README.md"] == b'DiffusionPipeline.from_pretrained("me/mine")\n'


def test_an_upload_that_fails(run: Path, tmp_path: Path) -> None:
    for error in (HfHubHTTPError("403 Forbidden", response=response(403)), OSError("no network")):
        with pytest.raises(UserError, match=r"me/mine: cannot be written .*run `hf auth login`.*push-to-hub"):
            push(run, "me/mine", api=Api(error))
    with pytest.raises(UserError, match=r"none: holds no export to upload; finish the run"):
        push(tmp_path / "none", "me/mine", api=Api())


def test_turbo_uploads_what_it_made(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("red cat\n")
    api = Api()
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    call = [
        "turbo",
        str(tiny_pipeline),
        "--prompts",
        "prompts.txt",
        "--output_dir",
        "mine",
        "--push_to_hub",
        "me/it",
    ]
    call += ["--student.rank", "2", "--max_train_steps", "1", "--data.num_inference_steps", "2"]
    call += ["--data.images_per_prompt", "2", "--validation_steps", "0"]
    assert main([*call, "--dry_run"]) == 0 and not api.calls
    assert main(call) == 0
    files = api.calls[1][2]
    assert {"pytorch_lora_weights.safetensors", "kohya/mine.safetensors", "scheduler_config.json"} <= set(
        files
    )
    card = files["README.md"].decode()
    assert 'pipe.load_lora_weights("me/it")' in card and 'LCMScheduler.from_pretrained("me/it")' in card
    assert '("lora")' not in card
