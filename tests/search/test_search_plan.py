"""Configurations of the searches, their dry run, and the student that they start from."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, TCDScheduler
from fewstep.distill.catalog.configuration import load_search
from fewstep.distill.cli import main
from fewstep.distill.config.search import StudentFolder
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.errors import UserError
from fewstep.distill.search.plan import describe
from fewstep.distill.search.student_folder import StudentFiles, located
from safetensors.torch import save_file

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = ("sdxl_turbo/q_sched", "flux/q_sched", "sd15/q_sched_lcm", "sd15/q_sched_pcm")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_pass_a_dry_run_offline(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", str(CONFIGS / f"{name}.yaml"), "--dry_run"]) == 0
    text = capsys.readouterr().out
    config = load_search(read_yaml(CONFIGS / f"{name}.yaml"))
    assert f"\n  {config.student.path} " in text and "hpsv2" in text and "2 x hpsv2" in text
    assert ("searched             quantised, then full" in text) == (name != "flux/q_sched")


def test_counts_of_a_dry_run() -> None:
    """2 subjects x (101 candidates x 20 pictures + 7 x 100 finalists) x 4 steps."""
    text = describe(load_search(read_yaml(CONFIGS / "sd15" / "q_sched_lcm.yaml")))
    assert f"about {2 * (101 * 20 + 7 * 100) * 4:,}" in text


@pytest.mark.parametrize("name", ["q_sched_lcd", "q_sched_meanflow", "lcsc", "mwa"])
def test_emoji_configurations_name_the_command_that_makes_their_student(name: str) -> None:
    path = CONFIGS / "emoji" / f"{name}.yaml"
    config = load_search(read_yaml(path))
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line[0] == "#")
    made = head if name != "mwa" else (CONFIGS / "emoji" / "lcsc.yaml").read_text()
    assert "fewstep distill configs/emoji/" in made
    student = config.student.path
    trained = [c for c in (CONFIGS / "emoji").glob("*.yaml") if read_yaml(c).get("output_dir") == student]
    assert f"--output_dir {student}" in made or f"configs/emoji/{trained[0].name}" in made
    with pytest.raises(UserError, match=f"no folder {student}_lost; make the student first"):
        located(f"{student}_lost")


def test_students(tiny_pipeline: Path, tmp_path: Path) -> None:
    assert located(str(tiny_pipeline)) == StudentFiles(tiny_pipeline, None)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    (run / "pipeline").symlink_to(tiny_pipeline)
    assert located(str(run)) == StudentFiles(run / "pipeline", run)
    assert located(str(run / "pipeline")) == StudentFiles(run / "pipeline", run)
    assert located("owner/name") is None
    with pytest.raises(UserError, match="holds no pipeline"):
        located(str(tmp_path))
    for path in ("runs/none", "./x/y", "a/b/c", str(tmp_path / "none")):
        with pytest.raises(UserError, match="no folder"):
            located(path)


def test_a_lora_and_another_scheduler(tiny_pipeline: Path, tmp_path: Path) -> None:
    """W + B A with alpha = rank, and TCD on the student's betas; made once."""
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    unet = StableDiffusionPipeline.from_pretrained(tiny_pipeline).unet
    weight = unet.get_submodule(name).weight.detach()
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    file = tmp_path / "lora.safetensors"
    save_file({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, file)
    student = StudentFolder(path=str(tiny_pipeline), lora=str(file), scheduler="TCDScheduler")
    found = StudentFiles.find(student, tmp_path / "search")
    assert found == StudentFiles(tmp_path / "search" / "student", None)
    pipe = StableDiffusionPipeline.from_pretrained(found.pipeline)
    torch.testing.assert_close(pipe.unet.get_submodule(name).weight, weight + up @ down, rtol=1e-4, atol=1e-5)
    assert type(pipe.scheduler) is TCDScheduler and pipe.scheduler.config.timestep_spacing == "trailing"
    own = DDIMScheduler.from_pretrained(tiny_pipeline, subfolder="scheduler")
    assert torch.equal(pipe.scheduler.betas, own.betas)
    file.unlink()
    assert StudentFiles.find(student, tmp_path / "search") == found
    for wrong, message in (
        ({"scheduler": "Sampler"}, r"student\.scheduler: diffusers has no 'Sampler'"),
        ({"lora": str(tiny_pipeline / "model_index.json")}, r"student\.lora: .* cannot be added"),
    ):
        with pytest.raises(UserError, match=message):
            StudentFiles.find(StudentFolder(path=str(tiny_pipeline), **wrong), tmp_path / "other")
