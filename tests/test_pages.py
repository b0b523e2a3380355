"""Every command of the pages runs, in order, with small numbers, in a folder that holds nothing but configs/."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fewstep.distill.cli import main
from fewstep.distill.teachers import EMBEDDED

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRAINING = ["--max_train_steps=2", "--train_batch_size=2", "--validation_steps=0"]
SCORES = ["--num_images", "8", "--seeds", "1"]
SMALL = {
    "distill": TRAINING,
    "evaluate": SCORES,
    "compare": SCORES,
    "sample": ["--num_images", "8"],
    "demo": [*TRAINING, *SCORES],
    "turbo": [*TRAINING, "--data.num_inference_steps=2", "--lr_warmup_steps=0"],
    "train-teacher": [
        "--network.block_out_channels=[16,16]",
        "--stages.autoencoder.method.block_out_channels=[16,16,16]",
        "--stages.text_encoder.method.num_layers=1",
        "--stages.text_encoder.train_batch_size=4",
        *(f"--stages.{stage}.max_train_steps=2" for stage in ("autoencoder", "text_encoder", "diffusion")),
        "--stages.autoencoder.train_batch_size=2",
        "--stages.diffusion.train_batch_size=2",
        "--stages.diffusion.validation_steps=0",
    ],
}
# What no test runs from a page: the word that tells it, and why.
ELSEWHERE = {
    "venv": "every test stands in an environment that was made so",
    "activate": "as above",
    "pip": "as above",
    "accelerate": "tests of two processes launch runs",
    "prepare-data": "needs a network",
    "verify-metrics": "needs a network",
    "--protocol": "needs the files of a protocol",
}
TRAINED = [["distill", "emoji/lcd"], ["distill", "emoji/lcd_lora"]]
# Commands before those of the page, and what the page leaves behind.
PAGES: dict[str, tuple[list[list[str]], str]] = {
    "README.md": ([], "red_apple.png"),
    "configs/README.md": ([], "runs/mine/pipeline/model_index.json"),
    "configs/own_pictures.md": ([], "runs/shapes/comparison/compare.html"),
    "configs/emoji/turbo.md": ([], "runs/turbo_comparison/compare.html"),
    "distill/reports/README.md": (TRAINED, "runs/comparison/compare.html"),
    "pipelines/README.md": (TRAINED[:1], "runs/emoji/lcd/pipeline/model_index.json"),
}


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced block, in order."""
    for found in BLOCK.finditer(page):
        yield found[1], found[2]


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command of a bash block: of one line, or of several in quotes or with a backslash."""
    text = ""
    for line in block.splitlines(keepends=True):
        text += line
        if text.endswith("\\\n"):
            continue
        try:
            words = shlex.split(text.replace("\\\n", " "), comments=True)
        except ValueError:  # quotes are open
            continue
        text = ""
        if words:
            yield words
    assert not text, f"no end of {text!r}"


def run(words: list[str]) -> None:
    """`fewstep VERB ...` with the small numbers of its verb, `scripts/demo`, `python -c CODE` or `cp A B`."""
    if any(word.rpartition("/")[2] in ELSEWHERE for word in words):
        return
    if words[:2] == ["python", "-c"]:
        exec(words[2], {})
        return
    if words[0] == "cp":
        shutil.copy(*words[1:])
        return
    if words[0] == "scripts/demo":
        words = ["fewstep", "demo"]
    assert words[0] == "fewstep", f"a page's command that this test cannot run: {shlex.join(words)}"
    small = [] if "--dry_run" in words else SMALL.get(words[1], [])
    assert main([*words[1:], *small]) == 0, shlex.join(words)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "pipeline").symlink_to(EMBEDDED["emoji-sd"])  # another's, in a page's example
    before, left = PAGES[page]
    for words in before:
        run(["fewstep", *words])
    count = 0
    for language, block in blocks((ROOT / page).read_text()):
        if language == "bash":
            for words in commands(block):
                run(words)
                count += 1
        elif language == "python":
            exec(block, {})
            count += 1
    assert count > 0 and (tmp_path / left).is_file()


def test_commands_are_told_apart() -> None:
    block = "a b \\\n  c  # a note\n\npython -c \"\nx = '#'\n\"\n# only a note\nd 'e f'\n"
    assert list(commands(block)) == [["a", "b", "c"], ["python", "-c", "\nx = '#'\n"], ["d", "e f"]]
