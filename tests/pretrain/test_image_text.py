"""Training of the offline scorers' heads: batches, loss, retrieval, and that no name leaks."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fewstep.distill.commands.train_scorer import main
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.data.images import ImageData
from fewstep.distill.data.sources import load_data
from fewstep.distill.errors import UserError
from fewstep.distill.pretrain import scorers as image_text
from fewstep.distill.pretrain.scorers import (
    Pairs,
    ScorersSettings,
    batches,
    features,
    retrieval,
    retrieval_of,
    train_heads,
    train_scorers,
)
from fewstep.distill.scorers.lite_minilm import HEADS, SHIPPED, LiteMiniLM
from safetensors import safe_open
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "emoji" / "scorers.yaml"


def network(width: int = 6) -> Any:
    """The heads of a scorer over features of `width` numbers: random image head, text head the identity."""
    text = nn.Linear(width, width, bias=False)
    nn.init.eye_(text.weight)
    return SimpleNamespace(
        visual=SimpleNamespace(head=nn.Linear(width, width)),
        text=SimpleNamespace(proj=text),
        logit_scale=nn.Parameter(torch.tensor(2.66)),
    )


def rotated(n: int, width: int = 6) -> Pairs:
    """Two pictures of each of n texts: the text's vector under one fixed rotation, with a little noise."""
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(3)))[0]
    texts = torch.randn(n, width).repeat(2, 1)
    pictures = texts @ turn + 0.05 * torch.randn(2 * n, width)
    return Pairs(pictures, texts, [f"name {i}" for i in range(n)] * 2, ["noto"] * n + ["twemoji"] * n)


def settings(**values: Any) -> ScorersSettings:
    return ScorersSettings(output_dir="unused", scorers={}, **values)


def test_an_epoch_sees_every_row_once_and_no_caption_twice_in_a_batch() -> None:
    captions = ["a", "b", "c", "a", "b", "c", "d", "a"]
    generator = torch.Generator().manual_seed(0)
    epochs = [list(batches(captions, 3, generator)) for _ in range(20)]
    for epoch in epochs:
        rows = [i for batch in epoch for i in batch]
        assert len(rows) == len(set(rows)) and set(rows) <= set(range(8))
        assert all(len({captions[i] for i in batch}) == len(batch) > 1 for batch in epoch)
    assert {i for epoch in epochs for batch in epoch for i in batch} == set(range(8))
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) > 10


def test_training_finds_the_rotation_for_unseen_names() -> None:
    data, unseen = rotated(60), rotated(40)
    net = network()
    before = retrieval_of(net, unseen)
    losses = train_heads(net, data, settings(epochs=60, batch_size=32, learning_rate=0.02))
    after = retrieval_of(net, unseen)
    assert losses[-1] < 0.3 * losses[0]
    for style in ("noto", "twemoji"):
        assert before[style]["R@1"] < 0.3 and after[style]["R@1"] > 0.7
    assert abs(float(net.logit_scale.detach()) - 2.66) > 0.01
    assert (net.text.proj.weight - torch.eye(6)).abs().max() > 0.1


def test_the_loss_is_symmetric_info_nce_at_the_learned_temperature() -> None:
    net, data = network(), rotated(10)
    half = Pairs(data.pictures[:10], data.texts[:10], data.captions[:10], data.styles[:10])
    with torch.no_grad():
        pictures = F.normalize(net.visual.head(half.pictures), dim=1)
        texts = F.normalize(half.texts, dim=1)
        logits = net.logit_scale.exp() * pictures @ texts.T
        both = (logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    (loss,) = train_heads(net, half, settings(epochs=1, batch_size=10))
    assert loss == pytest.approx(-float(both), rel=1e-5)


def test_training_is_the_same_for_a_seed() -> None:
    data, nets = rotated(20), []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        nets.append(network())
        train_heads(nets[-1], data, settings(epochs=2, batch_size=8, seed=seed))
    first, same, other = (n.visual.head.weight for n in nets)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_recalls_by_hand() -> None:
    texts = torch.eye(12)
    pictures = texts.clone()
    pictures[0] = torch.tensor([0.8, 0.9] + [0.0] * 10)
    pictures[1] = torch.tensor([0.9, 0.1, *[0.2 + 0.01 * k for k in range(10)]])
    captions = [str(i) for i in range(12)]
    got = retrieval(pictures, texts, captions)
    assert got["R@1"] == pytest.approx(10 / 12) and got["R@5"] == got["R@10"] == pytest.approx(11 / 12)
    assert got["pairwise"] == pytest.approx(1 - (1 / 11 + 11 / 11) / 12)
    assert (got["chance"], got["N"]) == (1 / 12, 12)


def test_pictures_of_one_caption_share_it() -> None:
    texts = torch.eye(3)[[0, 1, 1, 2]]
    got = retrieval(texts, texts, ["a", "b", "b", "c"])
    assert (got["R@1"], got["chance"], got["N"]) == (1.0, 1 / 3, 4)


def test_the_shipped_splits_share_no_name_with_each_other_or_the_holdout() -> None:
    tree = read_yaml(CONFIG)
    seen = [heads["splits"] for heads in tree["scorers"].values()]
    names = [
        {c for split in splits for c in load_data("emoji", split=split, resolution=32).captions}
        for splits in [*seen, [tree["holdout"]]]
    ]
    assert [len(n) for n in names] == [1160, 248, 227]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])


def test_the_shipped_heads_say_what_they_saw() -> None:
    tree = read_yaml(CONFIG)
    assert list(tree["scorers"]) == list(SHIPPED)
    for name, heads in tree["scorers"].items():
        with safe_open(HEADS / f"{name}.safetensors", "pt") as file:
            record = json.loads(file.metadata()["training"])
        assert record == {"scorer": name, "data": "emoji", "splits": heads["splits"], "seed": 0}


@pytest.mark.parametrize(
    ("scorers", "message"),
    [
        (
            {"lite0-minilm": {"splits": ["train", "holdout"]}},
            r"lite0-minilm.splits: .* belongs to holdout too",
        ),
        (
            {"lite0-minilm": {"splits": ["train", "reward"]}, "lite2-minilm": {"splits": ["reward"]}},
            r"lite2-minilm.splits: .* belongs to lite0-minilm too",
        ),
        ({"lite1-minilm": {"splits": ["train"]}}, "unknown name 'lite1-minilm'; available: lite0-minilm"),
        ({"lite0-minilm": {"splits": []}}, r"splits: \[\] .* at least 1 item"),
        ({"lite0-minilm": {"split": ["train"]}}, "split"),
        ({"lite0-minilm": {"splits": ["test"]}}, "has no split 'test'"),
    ],
)
def test_leaks_and_typing_errors_are_refused(tmp_path: Path, scorers: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_scorers({"output_dir": str(tmp_path / "out"), "scorers": scorers})
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 6 + 3 pictures of one colour each, named after it."""
    from PIL import Image

    root = tmp_path_factory.mktemp("colours")
    names = ["red", "green", "blue", "white", "black", "yellow", "orange", "purple", "grey"]
    for split, own in (("train", names[:6]), ("holdout", names[6:])):
        (root / split).mkdir()
        for name in own:
            Image.new("RGB", (16, 16), name).save(root / split / f"{name}.png")
        lines = [json.dumps({"file_name": f"{n}.png", "text": n}) for n in own]
        (root / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_a_run_writes_heads_that_load_and_repeats_to_the_byte(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {
        "output_dir": str(tmp_path),
        "data": str(small),
        "resolution": 16,
        "epochs": 3,
        "scorers": {"lite0-minilm": {"splits": ["train"]}},
    }
    (figures,) = train_scorers(tree)
    path = tmp_path / "lite0-minilm.safetensors"
    content = path.read_bytes()
    assert json.loads((tmp_path / "lite0-minilm.json").read_text()) == figures
    assert (figures["names"], figures["pictures"], figures["splits"]) == (6, 6, ["train"])
    assert figures["retrieval"]["all"]["N"] == 3
    scorer = LiteMiniLM("lite0-minilm", path)
    with torch.no_grad():
        red = scorer.encode_images(torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(1, 3, 16, 16))
    assert int((red @ scorer.encode_texts(["red", "green", "blue", "white"]).T).argmax()) == 0

    def no_image_network(*_: Any) -> None:
        raise AssertionError("features were computed again")

    monkeypatch.setattr(image_text, "sentences", no_image_network)
    path.unlink()
    train_scorers(tree)
    assert path.read_bytes() == content


def test_kept_features_belong_to_pictures_and_image_network(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_text, "sentences", lambda network, texts: torch.eye(6)[: len(texts)])
    train, unseen = (load_data(str(small), split=s, resolution=16) for s in ("train", "holdout"))

    def pooled(scale: float, trunk: str, rows: ImageData) -> torch.Tensor:
        mean = SimpleNamespace(visual=SimpleNamespace(trunk=lambda x: scale * x.mean((2, 3))))
        return features(mean, trunk, rows, tmp_path).pictures

    first = pooled(1.0, "a", train)
    assert first.shape == (6, 3)
    assert torch.equal(pooled(2.0, "a", train), first)
    assert torch.equal(pooled(2.0, "b", train), 2 * first)
    assert pooled(1.0, "a", unseen).shape == (3, 3)


def test_the_script_reports_a_mistake_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_scorer.py"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / "train_scorer.py"), run_name="__main__")
    assert stopped.value.code == 2 and "which configuration?" in capsys.readouterr().err
    assert main([str(CONFIG), "--epoch", "3", "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "epoch" in error and error.count("\n") == 1
