"""A teacher of one's own: train-teacher from a folder of pictures that is named once, and what it refuses."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from fewstep.distill.catalog.configuration import with_overrides
from fewstep.distill.cli import main
from fewstep.distill.commands import train_teacher
from fewstep.distill.commands.teacher_stages import network_of, shared_of, stages_of
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.errors import UserError
from fewstep.distill.pretrain.settings import TextEncoderSettings
from fewstep.distill.pretrain.text_encoder import training_phrases

from ..pictures import write_pictures

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    "--network.block_out_channels=[16,16]",
    "--stages.autoencoder.method.block_out_channels=[16,16,16]",
    "--stages.text_encoder.method.hidden_size=16",
    "--stages.text_encoder.method.num_layers=1",
    "--stages.autoencoder.max_train_steps=2",
    "--stages.text_encoder.max_train_steps=2",
    "--stages.diffusion.max_train_steps=2",
    "--stages.autoencoder.train_batch_size=4",
    "--stages.text_encoder.train_batch_size=4",
    "--stages.diffusion.train_batch_size=4",
    "--stages.diffusion.validation_steps=2",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


def test_one_key_names_the_data_of_every_stage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pictures(tmp_path / "shapes" / "train", 12, side=40).parent
    write_pictures(data / "holdout", 8, side=40, seed=1)
    output = tmp_path / "shapes-sd"
    command = ["train-teacher", str(CONFIGS / "emoji" / "teacher.yaml"), "--data.name", str(data)]
    command += ["--resolution", "24", "--license", "cc-by-4.0", "--output_dir", str(output), *SMALL]
    with caplog.at_level(logging.WARNING):
        assert main(command) == 0, capsys.readouterr().err
    for stage in ("autoencoder", "text_encoder", "diffusion"):
        assert read_yaml(output / stage / "config.yaml")["data"]["name"] == str(data)
    assert "training phrases from 12 distinct captions" in caplog.text
    pipeline = output / "pipeline"
    assert json.loads((pipeline / "unet" / "config.json").read_text())["sample_size"] == 6

    report = json.loads((pipeline / "report.json").read_text())
    references = {s["protocol"]["reference"] for row in report["rows"] for s in row["scores"]}
    assert any("train" in r for r in references) and any("holdout" in r for r in references)
    assert {row["steps"] for row in report["rows"]} == {50}

    card = (pipeline / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-4.0" and "\n# shapes-sd\n" in card
    assert not any(word in card.lower() for word in ("emoji", "apple", str(tmp_path)))
    code = card.split("```python\n")[1].split("```")[0]
    assert any(f'pipe("{text.read_text()}"' in code for text in (data / "train").glob("*.txt"))
    names: dict[str, Any] = {}
    exec(code.replace('("pipeline"', f'("{pipeline}"'), names)
    assert names["image"].size == (24, 24)


def test_the_recipes_say_data_and_resolution_once_and_mean_what_they_meant() -> None:
    emoji = read_yaml(CONFIGS / "emoji" / "teacher.yaml")
    stages = stages_of(emoji)
    assert {s.data.name for s in stages.values()} == {"emoji"}
    assert [s.resolution for s in stages.values()] == [32, 32, None]
    assert network_of(emoji, stages)["sample_size"] == 8
    pixels = stages_of(read_yaml(CONFIGS / "fashion" / "teacher.yaml"))["pixels"]
    assert (pixels.data.name, pixels.resolution) == ("fashion-mnist", 32)
    assert pixels.student.network is not None and pixels.student.network["sample_size"] == 32


def test_a_configuration_that_names_the_data_in_every_stage_is_read_as_before() -> None:
    tree = read_yaml(CONFIGS / "emoji" / "teacher.yaml")
    wanted = stages_of(tree)
    for name, stage in tree["stages"].items():
        stage["data"] = tree["data"]
        if name != "diffusion":
            stage["resolution"] = tree["resolution"]
    del tree["data"], tree["resolution"]
    tree["network"]["sample_size"] = 8
    shared_of(tree)
    assert stages_of(tree) == wanted
    assert network_of(tree, wanted)["sample_size"] == 8


def test_a_stage_may_have_its_own_keys_of_the_data() -> None:
    tree = read_yaml(CONFIGS / "emoji" / "teacher.yaml")
    tree = with_overrides(
        tree, ["--data.name", "x", "--data.split", "a", "--stages.text_encoder.data.split", "b"]
    )
    assert [(s.data.name, s.data.split) for s in stages_of(tree).values()] == [
        ("x", "a"),
        ("x", "b"),
        ("x", "a"),
    ]
    squeezed = with_overrides(tree, ["--data.center_crop", "false"])  # no key of a stage without pictures
    assert [s.data.center_crop for s in stages_of(squeezed).values()] == [False, True, False]


def test_the_side_of_the_latents_follows_from_the_autoencoder() -> None:
    tree = with_overrides(read_yaml(CONFIGS / "emoji" / "teacher.yaml"), ["--resolution", "96"])
    assert network_of(tree, stages_of(tree))["sample_size"] == 24
    flags = ["--stages.autoencoder.method.block_out_channels", "[16, 16, 16, 16]"]
    deeper = with_overrides(tree, flags)
    assert network_of(deeper, stages_of(deeper))["sample_size"] == 12


@pytest.mark.parametrize(("count", "fewest", "most"), [(4, 100, 160), (24, 600, 930)])
def test_the_number_of_phrases_fits_the_captions(count: int, fewest: int, most: int) -> None:
    captions = [f"shape{i} red" for i in range(count)]
    phrases = training_phrases([*captions, *captions, ""], TextEncoderSettings())
    assert fewest < len(phrases) < most and set(captions) < set(phrases) and "" not in phrases
    assert len(phrases) == len(set(phrases))


BAD = {
    "--resolution 30": "resolution: 30 is not divisible by 4, as the autoencoder needs; take 28 or 32",
    "--resolution 2": "resolution: 2 is not divisible by 4, as the autoencoder needs; take 4",
    "--resolution null": "resolution: missing; write `resolution: 32`",
    "--resolution 32.5": "resolution: 32.5 does not fit",
    "--data null": "data: missing; write `data: {name: ...}`",
    "--data.nam x": "data.nam: no such key; the nearest is name",
    "--data.name ./none": "./none: no such folder",
    "--data.name wordless": "data.name: the data have no captions",
    "--data.caption_column null": "data.name: the data have no captions",
    "--data.split trian": "has no split 'trian'",
    "--network.sample_size 16": "network.sample_size: 16 is not 8, the side of the latents at resolution 32",
    "--stages.diffusion.resolution 64": "stages.diffusion.resolution: 64 is not 32",
    "--stages.autoencoder.learning_rat 1": "stages.autoencoder.learning_rat: no such key; the nearest is learning_rate",
    "--stages.decoder.seed 1": "stages.decoder: no such key; the nearest is autoencoder",
    "--licence mit": "licence: no such key; the nearest is license",
    "--name true": "name: True does not fit",
}


@pytest.mark.parametrize("flags", BAD)
def test_a_mistake_is_one_line_before_any_training(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "wordless", 3, captions=False)
    command = [
        "train-teacher",
        str(CONFIGS / "emoji" / "teacher.yaml"),
        "--output_dir",
        "out",
        *flags.split(),
    ]
    assert main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and BAD[flags] in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_a_shared_key_that_no_stage_reads_is_refused() -> None:
    tree = read_yaml(CONFIGS / "emoji" / "teacher.yaml")
    for key in ("data", "resolution"):
        own = copy.deepcopy(tree)
        for stage in own["stages"].values():
            stage[key] = own[key]
        with pytest.raises(UserError, match=f"^{key}.*: has no effect, since every stage has its own"):
            stages_of(own)


def test_a_network_of_pixels_is_told_what_its_levels_divide() -> None:
    tree = read_yaml(CONFIGS / "fashion" / "teacher.yaml")
    assert stages_of(with_overrides(tree, ["--resolution", "28"]))["pixels"].resolution == 28
    with pytest.raises(
        UserError, match="resolution: 30 is not divisible by 4, as the network needs; take 28 or 32"
    ):
        stages_of(with_overrides(tree, ["--resolution", "30"]))


def test_the_pictures_of_another_resolution_are_encoded_in_parts(tmp_path: Path, monkeypatch: Any) -> None:
    """The latents' scale is the same whether all pictures pass the autoencoder at once or a few."""
    data = write_pictures(tmp_path / "shapes", 6, side=16)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -30.0  # no noise
    vae.save_pretrained(tmp_path / "root" / "autoencoder" / "pipeline")
    method = {"name": "autoencoder", "block_out_channels": [16]}
    tree = {"output_dir": str(tmp_path / "root"), "data": {"name": str(data)}, "resolution": 16,
            "stages": {"autoencoder": {"method": method}}}  # fmt: skip
    config = stages_of(tree)["autoencoder"]
    found = []
    for pixels in (16**2, 4 * 16**2, 10**9):
        monkeypatch.setattr(train_teacher, "PIXELS_AT_ONCE", pixels)
        found.append(train_teacher.unit_scale(vae, config))
    assert found[0] == found[1] == found[2] > 0
