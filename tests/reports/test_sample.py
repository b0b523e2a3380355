"""A folder of samples: the pictures that `evaluate` would see, readable as data, of captions or of prompts."""

import resource
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from fewstep.distill.cli import main
from fewstep.distill.data.sources import load_data
from fewstep.distill.metrics.reference import captions_of
from fewstep.distill.reports.inputs import Inputs
from fewstep.distill.reports.opening import open_source
from fewstep.distill.training.run_lock import locked
from peft import LoraConfig, get_peft_model_state_dict


def test_samples_are_a_data_set(
    tiny_pipeline: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    call = ["sample", str(tiny_pipeline), "--data", str(data_folder), "--steps", "1", "--num_images", "14"]
    call += ["--batch_size", "5", "--guidance_scale", "1.0", "--output", str(out)]
    assert main(call) == 0
    captions = captions_of(str(data_folder), "train")
    captions = [captions[i % 12] for i in range(14)]
    source = open_source(str(tiny_pipeline), torch.device("cpu"))
    arguments = source.calls([1], 1, 1.0, 14)[1]
    expected, _ = source.pictures(range(14), Inputs.of_captions(captions), 1000, arguments)
    made = load_data(str(out), resolution=16)
    assert made.captions == captions and torch.equal(made.images(), expected)
    first, last = out / "00000.png", out / "00013.png"
    before = first.stat().st_mtime_ns
    last.unlink()
    assert main(call) == 0
    assert last.is_file() and first.stat().st_mtime_ns == before
    capsys.readouterr()
    for other in ([*call, "--seed_block", "3"], [*call, "--output", str(data_folder)]):
        assert main(other) == 2
        assert (
            "holds other files or the pictures of another call; name a new folder" in capsys.readouterr().err
        )


def test_a_call_that_made_no_picture_leaves_the_folder_to_the_next(
    tiny_pipeline: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    call = ["sample", str(tiny_pipeline), "--data", str(data_folder), "--steps", "1", "--num_images", "2"]
    call += ["--guidance_scale", "1.0", "--output", str(out)]
    with suppress(Exception):  # a seed beyond 64 bits
        main([*call, "--seed_block", str(10**20)])
    assert not out.exists()
    out.mkdir()
    (out / "sample.json").write_text("{}")  # of a call that was ended before its first picture
    with locked(out):
        assert main(call) == 2
    assert f"output: {out} is in use by process" in capsys.readouterr().err
    assert main(call) == 0
    names = ["00000.png", "00001.png", "metadata.jsonl", "sample.json"]
    assert sorted(p.name for p in out.iterdir()) == names


def test_pictures_of_prompts_by_a_model_with_a_lora(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The LoRA's scale is in the weights, and prompts come again with other noise."""
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    torch.manual_seed(0)
    pipe.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    pipe.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    style = tmp_path / "pytorch_lora_weights.safetensors"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red cat\ndog\n")
    call = [
        "sample",
        f"{tiny_pipeline}+{style}",
        "--prompts",
        str(prompts),
        "--steps",
        "2",
        "--num_images",
        "3",
    ]
    assert main([*call, "--output", str(tmp_path / "made" / "train")]) == 0
    made = load_data(str(tmp_path / "made"), resolution=16)
    assert made.captions == ["red cat", "dog", "red cat"]
    assert (made.images([0]) != made.images([2])).any()
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    drawn = pipe("dog", generator=torch.Generator().manual_seed(10**9 + 1), **arguments).images[0]
    assert torch.allclose(made.images([1])[0] / 255, drawn, atol=0.0025)  # rounded
    pipe.unet.disable_adapters()
    bare = pipe("dog", generator=torch.Generator().manual_seed(10**9 + 1), **arguments).images[0]
    assert (bare - drawn).abs().max() > 0.03
    styled, plain = (open_source(p, torch.device("cpu")) for p in (call[1], str(tiny_pipeline)))
    assert styled.identity() != plain.identity()
    assert styled.describe()["pipeline"] == plain.describe()["pipeline"] + f"+{style.name}"
    capsys.readouterr()
    for pipeline, message in (
        (f"{tiny_pipeline}+{tmp_path}/none.safetensors", "none.safetensors"),
        (f"{tmp_path / 'made' / 'train'}+{style}", "a folder of images takes no LoRA"),
        ("fashion-edm", "prompts: "),
    ):
        out = str(tmp_path / "other")
        assert main(["sample", pipeline, "--prompts", str(prompts), "--steps", "2", "--output", out]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_places_and_numbers_that_cannot_be(
    tiny_pipeline: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in the folder's place, below a file, a note that is damaged, a full disk, noise beyond 64 bits."""
    call = ["sample", str(tiny_pipeline), "--data", str(data_folder), "--steps", "1", "--num_images", "2"]
    call += ["--guidance_scale", "1.0"]

    def refused(output: Path, *flags: str) -> str:
        assert main([*call, "--output", str(output), *flags]) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("fewstep: error: ")

    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert refused(output).startswith(f"output: {output} could not be written (")
    out = tmp_path / "out"
    for block in ("-1", str(2**63), str(10**13)):
        assert refused(out, "--seed_block", block).startswith(
            f"argument --seed_block: {block} is outside 0 to"
        )
    assert not out.exists()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (650, before[1]))
    try:
        line = refused(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (
        line.startswith(f"output: {out}/")
        and "(File too large); free space or choose another --output" in line
    )
    assert not list(out.glob(".*.partial"))
    assert main([*call, "--output", str(out)]) == 0 and len(list(out.glob("*.png"))) == 2
    capsys.readouterr()
    for content in (b"", b"\xff", b"[" * 100_000, b"null"):
        (out / "sample.json").write_bytes(content)
        assert "holds other files or the pictures of another call" in refused(out)
