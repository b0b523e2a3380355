"""A number keeps its protocol, and numbers of different protocols are never put together."""

import json
import os
import subprocess
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from fewstep.distill.errors import UserError
from fewstep.distill.metrics.protocol import (
    Protocol,
    Score,
    comparable,
    hash_pictures,
    hash_prompts,
    same_protocol,
)
from fewstep.distill.reports.report import read_report
from fewstep.distill.reports.table import markdown_table, rows_of
from fewstep.distill.writers import check_writable, write_report

PROTOCOL = Protocol(
    metric="KID",
    definition="unbiased",
    extractor="efflite0-128",
    extractor_weights_sha256="57",
    input="uint8",
    resize="128",
    layer="pool",
    dim=1280,
    reference="emoji/train",
    reference_sha256="ab",
    n_ref=1996,
    n_gen=500,
    prompts_sha256="cd",
    conditioning="caption",
    seed_rule="i",
    image_size=32,
)


def score(value: float = 0.5, sd: float | None = None, **changes: object) -> Score:
    protocol = replace(PROTOCOL, **changes)
    return Score(f"{protocol.metric}-{protocol.extractor}", value, sd, protocol)


def row(model: str, steps: int | None, scores: list[Score], **changes: object) -> dict:
    report = {
        "device": "cpu: x",
        "batch_size": 64,
        "rows": [{"steps": steps, "seeds": 1, "seconds_per_image": 0.25}],
    }
    report["rows"][0] |= {"scores": [s.to_json() for s in scores]} | changes
    return rows_of(model, report)[0]


@pytest.mark.parametrize("field", [f.name for f in fields(Protocol)])
def test_every_field_is_part_of_the_id_and_named_when_it_differs(field: str) -> None:
    other = score(**{field: 7 if isinstance(getattr(PROTOCOL, field), int) else "other"})
    assert other.protocol.id != PROTOCOL.id
    assert same_protocol([score(0.1), score(0.2)]) == PROTOCOL
    with pytest.raises(UserError, match=rf"{field} differs"):
        same_protocol([score(), score(), other])


def test_id_is_the_hash_of_the_sorted_fields() -> None:
    reordered = json.dumps(dict(sorted(asdict(PROTOCOL).items(), reverse=True)))
    assert Protocol(**json.loads(reordered)).id == PROTOCOL.id == "97282c5e1403"


def test_score_survives_json() -> None:
    for s in (score(0.25, 0.5), replace(score(-1e-4), interval=(0.25, 0.75))):
        assert Score.from_json(json.loads(json.dumps(s.to_json()))) == s


def test_an_edited_or_broken_score_is_refused() -> None:
    record = score().to_json()
    record["protocol"]["n_gen"] = 50_000
    with pytest.raises(UserError, match="protocol_id"):
        Score.from_json(record)
    with pytest.raises(UserError, match="not a score"):
        Score.from_json({"name": "KID", "value": 1.0})


def test_hashes_see_pixels_shape_captions_and_order() -> None:
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    hashes = {
        hash_pictures([images], tuple(images.shape), ["a", "b"]),
        hash_pictures([images.flip(0)], tuple(images.shape), ["a", "b"]),
        hash_pictures([images], tuple(images.shape), ["b", "a"]),
        hash_pictures([images.view(2, 3, 1, 4)], (2, 3, 1, 4), ["a", "b"]),
    }
    assert len(hashes) == 4
    assert hash_prompts(["a", "b"]) != hash_prompts(["b", "a"]) != hash_prompts([]) == ""


def test_table_puts_each_score_in_its_column() -> None:
    def scores(kid: float, sd: float | None) -> list[Score]:
        holdout = score(2 * kid, sd, reference="emoji/holdout", n_ref=456)
        return [score(kid, sd), holdout, score(100 * kid, metric="FD")]

    rows = [row("teacher", 50, scores(0.01, 0.001), seeds=3), row("a|b", 1, scores(0.02, None))]
    lines = markdown_table(rows).splitlines()
    assert lines[0] == (
        "| model | steps | KID-efflite0-128 | KID-efflite0-128 hold-out | FD-efflite0-128 | s/image |"
    )
    assert lines[2] == "| teacher | 50 | 0.0100 ± 0.0010 | 0.0200 ± 0.0010 | 1.0 | 0.25 |"
    assert lines[3] == r"| a\|b | 1 | 0.0200 | 0.0400 | 2.0 | 0.25 |"
    assert "500 pictures" in lines[5] and "1 to 3 seeds" in lines[5] and PROTOCOL.id in lines[5]
    assert "FID" not in "".join(lines)


def test_table_refuses_other_protocols_and_names_other_machines() -> None:
    def scores(**changes: object) -> list[Score]:
        return [score(**changes), score(metric="FD", **changes)]

    rows = [row("a", 1, scores()), row("b", 1, scores(n_gen=100))]
    with pytest.raises(UserError, match="n_gen differs: 500 and 100"):
        markdown_table(rows)
    rows = [row("a", 1, scores()), {**row("b", None, scores(), seconds_per_image=None), "device": "cuda: y"}]
    assert "| 0.25 (cpu: x, batch 64) |" in markdown_table(rows)
    assert markdown_table(rows).splitlines()[3].endswith("| - |")


ROW = {**row("a", 1, [score(metric="FD")]), "nfe": 1, "peak_memory": {"bytes": None}, "arguments": {}}
SMALL = json.loads(json.dumps({"device": "cpu", "versions": {}, "batch_size": 1, "rows": [ROW]}))


def test_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    check_writable(path)
    write_report(SMALL, path)
    assert read_report(path) == SMALL
    with pytest.raises(ValueError):
        write_report({**SMALL, "rows": [float("nan")]}, path)
    assert read_report(path) == SMALL
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path, own = tmp_path / "a[1].json", os.getpid()
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (
        f".a[1].json.{dead.pid}.part",
        f".a[1].json.{own}.part",
        ".a[1].json.x.part",
        ".a1.json.1.part",
    ):
        (tmp_path / name).touch()
    write_report(SMALL, path)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".a1.json.1.part", ".a[1].json.x.part", "a[1].json"]


def test_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_report(SMALL, path)

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"report\.json: cannot be written \(No space left on device\)"):
        write_report({**SMALL, "rows": [2]}, path)
    assert read_report(path) == SMALL
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_places_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{")
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(tmp_path / "file" / "report.json")
    with pytest.raises(UserError, match="this is a folder"):
        check_writable(tmp_path)
    with pytest.raises(
        UserError, match=r"file: is not JSON .*: give the file that evaluate wrote, or evaluate again"
    ):
        read_report(tmp_path / "file")
    (tmp_path / "file").write_text("[]")
    with pytest.raises(UserError, match="file: its value: input should be a valid dictionary: give the file"):
        read_report(tmp_path / "file")


def test_what_pictures_are_made_from_may_differ_and_nothing_else() -> None:
    plain = score(0.1)
    canny = Score("KID", 0.2, None, replace(PROTOCOL, conditioning="caption, canny()"))
    classes = Score("KID", 0.2, None, replace(PROTOCOL, conditioning="class", prompts_sha256="other"))
    comparable([plain, canny, classes, plain])
    other = Score("KID", 0.2, None, replace(PROTOCOL, prompts_sha256="other"))
    with pytest.raises(UserError, match="not comparable, prompts_sha256 differs"):
        comparable([plain, canny, other])
    fewer = Score("KID", 0.2, None, replace(canny.protocol, n_gen=7))
    for scores in ([plain, fewer], [plain, canny, fewer]):
        with pytest.raises(UserError, match="not comparable, n_gen differs"):
            comparable(scores)
