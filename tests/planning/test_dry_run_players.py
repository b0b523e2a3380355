"""--dry_run of methods with several players or a reward: nothing is loaded, every part is counted and named."""

from pathlib import Path

import pytest
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.cli import main
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.planning import dry_run

from .test_dry_run import CONFIGS, rows

STUDENT, DISCRIMINATOR = 859_602_884, 39_984_577


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def described(name: str, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["distill", str(CONFIGS / f"{name}.yaml"), "--dry_run", *flags]) == 0
    return capsys.readouterr().out


def test_scott_for_stable_diffusion(capsys: pytest.CaptureFixture[str]) -> None:
    text = described("sd15/scott", capsys)
    counts = rows(text, "parameters")
    assert counts["all players"] == counts["trained"] == f"{STUDENT + DISCRIMINATOR:,}"
    assert counts["trained as student"] == f"{STUDENT:,}"
    assert counts["trained as discriminator"] == f"{DISCRIMINATOR:,}"
    memory = rows(text, "memory")
    assert memory["the optimiser's two moments"] == dry_run.gib(8 * (STUDENT + DISCRIMINATOR))
    low, high = (float(memory["activations, estimate"].split()[i]) for i in (0, 2))
    assert 10 < high < 40 and low == pytest.approx(high / 2, abs=0.01)


def test_rg_lcd_for_stable_diffusion(capsys: pytest.CaptureFixture[str]) -> None:
    text = described("sd15/rg_lcd", capsys)
    assert rows(text, "parameters")["trained"] == f"{STUDENT:,}"
    assert rows(text, "memory")["activations"].startswith("not estimated")
    assert "reward hpsv2" in rows(text, "must be downloaded")


def test_the_proxy_for_stable_diffusion_has_the_official_towers_size(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = described("sd15/rg_lcd", capsys, "--method.lrm.pretrain_steps", "5000")
    counts = {k: int(v.replace(",", "")) for k, v in rows(text, "parameters").items()}
    assert counts["trained as student"] == STUDENT
    assert 70e6 < counts["trained as latent_clip"] < 80e6  # 38.5 M of vision, five blocks of width 768
    assert counts["trained as lrm"] < counts["trained as latent_clip"] - 30e6  # all but one vision block stay


@pytest.mark.parametrize("name", ["rg_lcd", "rg_lcd_lrm", "rg_lcd_ctrl_u", "scott"])
def test_emoji_recipes_pass(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = described(f"emoji/{name}", capsys)
    assert load_config(read_yaml(CONFIGS / "emoji" / f"{name}.yaml")).method["name"] == name[: len("rg_lcd")]
    needed = rows(text, "must be downloaded")
    assert set(needed) == ({"nothing"} if name == "scott" else {"reward lite2-minilm"})


def test_a_control_is_what_trains_and_no_student(capsys: pytest.CaptureFixture[str]) -> None:
    text = described("emoji/nct_canny", capsys, "--teacher.path", "emoji-sd")
    assert "\ntrained     control\n" in text and "student" not in text
    counts = rows(text, "parameters")
    assert counts["control"] == counts["trained"] == "2,821,776"
