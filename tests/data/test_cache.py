"""Latent and prompt caches: what is read back, resuming, damage, several processes, unwritable places."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
import torch
from fewstep.distill.data import records
from fewstep.distill.data.cache import LatentCache, PromptCache, SampledLatents, cache_directory
from fewstep.distill.data.records import Records
from fewstep.distill.data.sources import load_data
from fewstep.distill.errors import UserError

WEIGHT = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture(scope="module")
def data():
    return load_data("emoji-noto", split="score", resolution=32)


def encode(images):
    assert images.dtype == torch.float32 and images.min() >= -1 and images.max() <= 1
    return torch.nn.functional.conv2d(images, WEIGHT, stride=4)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".rows", ".json")}


class Interrupted(Exception):
    pass


def failing_after(calls, function):
    left = [calls]

    def wrapped(argument):
        if not left[0]:
            raise Interrupted
        left[0] -= 1
        return function(argument)

    return wrapped


def counting(function):
    def wrapped(argument):
        wrapped.rows += len(argument)
        return function(argument)

    wrapped.rows = 0
    return wrapped


def test_latents_are_the_encoders_in_float16(data, tmp_path):
    seen = []
    cache = LatentCache.build(
        data, encode, key="vae", directory=tmp_path, batch_size=50, progress=lambda *a: seen.append(a)
    )
    rows = [161, 0, 7, 7]
    expected = encode(data.images(rows).float() / 127.5 - 1).half().float()
    assert len(cache) == 162 and cache[rows].shape == (4, 8, 8, 8)
    torch.testing.assert_close(cache[rows], expected, atol=2e-3, rtol=1e-3)
    assert seen == [(50, 162), (100, 162), (150, 162), (162, 162)]


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_interrupted_build_goes_on_to_the_same_file(data, tmp_path, calls):
    LatentCache.build(data, encode, key="vae", directory=tmp_path / "whole", batch_size=40)
    with pytest.raises(Interrupted):
        LatentCache.build(
            data, failing_after(calls, encode), key="vae", directory=tmp_path / "cut", batch_size=40
        )
    rest = counting(encode)
    LatentCache.build(data, rest, key="vae", directory=tmp_path / "cut", batch_size=40)
    assert rest.rows == 162 - 40 * calls
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    again = counting(encode)
    LatentCache.build(data, again, key="vae", directory=tmp_path / "cut")
    assert again.rows == 0


def test_killed_build_goes_on(data, tmp_path):
    code = f"""
import os, pathlib, signal, torch
from fewstep.distill.data.cache import (LatentCache)
from fewstep.distill.data.sources import (load_data)
torch.set_num_threads(1)
weight = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.1
def progress(done, total):
    if done >= 80:
        os.kill(os.getpid(), signal.SIGKILL)
data = load_data("emoji-noto", split="score", resolution=32)
encode = lambda x: torch.nn.functional.conv2d(x, weight, stride=4)
folder = pathlib.Path({str(tmp_path / "cut")!r})
LatentCache.build(data, encode, key="vae", directory=folder, batch_size=40, progress=progress)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    rest = counting(encode)
    cut = LatentCache.build(data, rest, key="vae", directory=tmp_path / "cut", batch_size=40)
    whole = LatentCache.build(data, encode, key="vae", directory=tmp_path / "whole", batch_size=40)
    assert rest.rows == 82 and torch.equal(cut[range(162)], whole[range(162)])


def test_rows_beyond_the_index_are_written_again(data, tmp_path):
    with pytest.raises(Interrupted):
        LatentCache.build(data, failing_after(2, encode), key="vae", directory=tmp_path, batch_size=40)
    rows = next(tmp_path.glob("*.rows"))
    with open(rows, "ab") as f:
        f.write(b"\x7f" * 999)
    LatentCache.build(data, encode, key="vae", directory=tmp_path, batch_size=40)
    LatentCache.build(data, encode, key="vae", directory=tmp_path / "whole", batch_size=40)
    assert rows.read_bytes() == next((tmp_path / "whole").glob("*.rows")).read_bytes()


def cut_rows(folder):
    rows = next(folder.glob("*.rows"))
    os.truncate(rows, rows.stat().st_size - 1)


def cut_index(folder):
    index = next(folder.glob("*.json"))
    index.write_text(index.read_text()[:-5])


def other_key(folder):
    index = next(folder.glob("*.json"))
    index.write_text(json.dumps({**json.loads(index.read_text()), "key": "latents of something else"}))


@pytest.mark.parametrize("damage", [cut_rows, cut_index, other_key])
def test_damaged_cache_is_built_anew_with_one_line(data, tmp_path, caplog, damage):
    LatentCache.build(data, encode, key="vae", directory=tmp_path)
    before = files(tmp_path)
    damage(tmp_path)
    with caplog.at_level(logging.WARNING):
        LatentCache.build(data, encode, key="vae", directory=tmp_path)
    assert files(tmp_path) == before
    (notice,) = [r.getMessage() for r in caplog.records]
    assert str(tmp_path) in notice and "anew" in notice and "\n" not in notice


def flip(path, place):
    with open(path, "r+b") as f:
        f.seek(place)
        byte = f.read(1)[0]
        f.seek(place)
        f.write(bytes([byte ^ 0x40]))


def test_flipped_bytes_are_named_and_their_rows_made_again(data, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(records, "BLOCK", 10 * 1024 + 1)  # 10 rows of 1 KiB
    LatentCache.build(data, encode, key="vae", directory=tmp_path, batch_size=7)
    before, path = files(tmp_path), next(tmp_path.glob("*.rows"))
    index = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert index["checksums"] == [
        zlib.crc32(path.read_bytes()[i : i + 10240]) for i in range(0, 165888, 10240)
    ]
    for place in (25 * 1024, 29 * 1024, 161 * 1024 + 1023):
        flip(path, place)
    counted = counting(encode)
    with caplog.at_level(logging.WARNING):
        cache = LatentCache.build(data, counted, key="vae", directory=tmp_path, batch_size=7)
    assert counted.rows == 12
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: rows 20 to 29, 160 to 161 are damaged: making them anew"
    ]
    expected = encode(data.images([25, 161]).float() / 127.5 - 1).half().float()
    torch.testing.assert_close(cache[[25, 161]], expected, atol=2e-3, rtol=1e-3)
    caplog.clear()
    again = counting(encode)
    LatentCache.build(data, again, key="vae", directory=tmp_path, batch_size=7)
    assert again.rows == 0 and not caplog.records and files(tmp_path).keys() == before.keys()


def test_damage_before_the_place_where_a_build_goes_on(data, tmp_path, monkeypatch):
    """The last block was open when the build stopped, and is damaged since."""
    monkeypatch.setattr(records, "BLOCK", 64 * 1024)
    with pytest.raises(Interrupted):
        LatentCache.build(
            data, failing_after(2, encode), key="vae", directory=tmp_path / "cut", batch_size=40
        )
    flip(next((tmp_path / "cut").glob("*.rows")), 70 * 1024)
    rest = counting(encode)
    LatentCache.build(data, rest, key="vae", directory=tmp_path / "cut", batch_size=40)
    LatentCache.build(data, encode, key="vae", directory=tmp_path / "whole", batch_size=40)
    assert rest.rows == 82 + 16
    assert [json.loads(p.read_text())["done"] for p in tmp_path.glob("*/*.json")] == [162, 162]
    again = counting(encode)
    LatentCache.build(data, again, key="vae", directory=tmp_path / "cut")
    assert again.rows == 0


def without_checksums(folder):
    index = next(folder.glob("*.json"))
    kept = {k: v for k, v in json.loads(index.read_text()).items() if k not in ("block", "checksums")}
    index.write_text(json.dumps(kept))


def test_a_cache_without_checksums_is_taken_with_one_line_but_for_what_is_not_finite(
    data, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(records, "BLOCK", 50 * 1024)
    LatentCache.build(data, encode, key="vae", directory=tmp_path)
    before, path = files(tmp_path), next(tmp_path.glob("*.rows"))
    without_checksums(tmp_path)
    counted = counting(encode)
    LatentCache.build(data, counted, key="vae", directory=tmp_path)
    assert counted.rows == 0 and files(tmp_path) == before
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith(f"{path}: was made without checksums")
    without_checksums(tmp_path)
    with open(path, "r+b") as f:
        f.seek(110 * 1024)
        f.write(torch.tensor([torch.nan]).half().numpy().tobytes())
    cache = LatentCache.build(data, counted, key="vae", directory=tmp_path)
    assert counted.rows == 50 and cache[range(162)].isfinite().all()
    assert f"{path}: rows 100 to 149 are damaged" in caplog.text


def test_the_rows_are_on_the_disk_before_the_index_counts_them(data, tmp_path, monkeypatch):
    seen = []
    plain = os.fsync, Path.replace

    def fsync(descriptor):
        seen.append(("rows", os.fstat(descriptor).st_size))
        plain[0](descriptor)

    def replace(self, target):
        seen.append(("index", json.loads(self.read_text())["done"]))
        return plain[1](self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    LatentCache.build(data, encode, key="vae", directory=tmp_path, batch_size=100)
    assert seen == [("rows", 102400), ("index", 100), ("rows", 165888), ("index", 162)]


@pytest.mark.parametrize(
    "change",
    [
        {"done": 200},
        {"done": -1},
        {"checksums": [1]},
        {"block": 0},
        {"fields": {"latents": ["floot16", [8, 8, 8]]}},
        {"fields": {"latents": "float16"}},
        {"fields": {}},
        {"rows": "many"},
    ],
)
def test_an_index_that_makes_no_sense_is_built_anew(data, tmp_path, caplog, monkeypatch, change):
    monkeypatch.setattr(records, "BLOCK", 50 * 1024)
    LatentCache.build(data, encode, key="vae", directory=tmp_path)
    before, index = files(tmp_path), next(tmp_path.glob("*.json"))
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    LatentCache.build(data, encode, key="vae", directory=tmp_path)
    assert files(tmp_path) == before
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith(str(index)) and line.endswith("building the cache anew")


def test_two_fresh_builds_of_one_cache(tmp_path):
    """The first one's rows stay readable while the second makes the file anew."""
    begun, out = threading.Barrier(2), {}

    def run(name):
        cache = Records(tmp_path / "features", "key", 60)
        begun.wait(30)
        made = {"x": torch.arange(60.0)[:, None] + 1000 * name}
        cache.build(
            lambda a, b: {k: v[a:b] for k, v in made.items()}, 3, None, True, lambda: None, fresh=True
        )
        begun.wait(30)
        out[name] = cache.read(range(60))["x"][:, 0]

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    for name, found in out.items():
        assert torch.equal(found, torch.arange(60.0) + 1000 * name)
    assert len(out) == 2


def test_rows_deleted_under_the_index_are_built_anew(data, tmp_path):
    LatentCache.build(data, encode, key="vae", directory=tmp_path)
    before = files(tmp_path)
    next(tmp_path.glob("*.rows")).unlink()
    LatentCache.build(data, encode, key="vae", directory=tmp_path)
    assert files(tmp_path) == before


def test_other_data_or_encoder_is_another_cache(data, tmp_path):
    LatentCache.build(data, encode, key="vae", directory=tmp_path)
    for key, other in (("other", data), ("vae", load_data("emoji-twemoji", split="score", resolution=32))):
        counted = counting(encode)
        LatentCache.build(other, counted, key=key, directory=tmp_path)
        assert counted.rows == 162
    assert len(list(tmp_path.glob("*.rows"))) == 3


def test_one_process_builds_and_the_others_wait(data, tmp_path):
    gate, out = threading.Barrier(2), {}

    def other():
        forbidden = failing_after(0, encode)
        cache = LatentCache.build(
            data, forbidden, key="vae", directory=tmp_path, is_main=False, barrier=lambda: gate.wait(30)
        )
        out["latents"] = cache[[5, 6]]

    waiting = threading.Thread(target=other)
    waiting.start()
    main = LatentCache.build(data, encode, key="vae", directory=tmp_path, barrier=lambda: gate.wait(30))
    waiting.join(30)
    assert torch.equal(out["latents"], main[[5, 6]])


def test_two_runs_share_one_build(data, tmp_path, caplog):
    inside, counted, out = threading.Event(), counting(encode), []

    def slow(images):
        inside.set()
        while not caplog.records:
            pass
        return encode(images)

    first = threading.Thread(
        target=lambda: out.append(LatentCache.build(data, slow, key="vae", directory=tmp_path))
    )
    first.start()
    assert inside.wait(30)
    second = LatentCache.build(data, counted, key="vae", directory=tmp_path)
    first.join(30)
    assert counted.rows == 0 and "waiting" in caplog.text
    assert torch.equal(second[[3]], out[0][[3]])


def test_what_is_not_finite_names_the_row_and_the_file(data, tmp_path):
    """Latents that overflow float16 among them."""

    def broken(images):
        out = encode(images)
        out[5, 0, 0, 0] *= 1e9
        return out

    builds = {
        "latents": lambda: LatentCache.build(data, broken, key="vae", directory=tmp_path),
        "sampled": lambda: SampledLatents.made(
            data, lambda a, b: broken(data.images(range(a, b)) / 255), key="vae", directory=tmp_path
        ),
        "prompts": lambda: PromptCache.build(
            [f"{i} cats" for i in range(9)],
            lambda c: {"h": torch.full((len(c), 2), torch.nan)},
            key="clip",
            directory=tmp_path,
            batch_size=9,
        ),
    }
    for stem, build in builds.items():
        with pytest.raises(UserError) as caught:
            build()
        (path,) = tmp_path.glob(f"{stem}-*.rows")
        row = 0 if stem == "prompts" else 5
        assert f"of row {row} in {path} are not finite (" in str(caught.value)
        assert ("'0 cats'" if stem == "prompts" else "row 5 of emoji-noto") in str(caught.value)
        assert path.stat().st_size == 0


def states(captions):
    g = torch.Generator()
    hidden = torch.stack([torch.randn(5, 6, generator=g.manual_seed(len(c))) for c in captions])
    mask = torch.tensor([[i < len(c) for i in range(5)] for c in captions])
    return {
        "encoder_hidden_states": hidden.bfloat16(),
        "mask": mask,
        "length": torch.tensor([len(c) for c in captions]),
    }


def test_prompts_are_encoded_once_each_in_their_precision(tmp_path):
    captions = ["cat", "a dog", "", "cat", "cat", "é!"]
    counted = counting(states)
    cache = PromptCache.build(captions, counted, key="clip", directory=tmp_path, batch_size=3)
    assert counted.rows == len(cache) == 4
    batch = cache[["a dog", "cat", "cat", ""]]
    expected = states(["a dog", "cat", "cat", ""])
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype and torch.equal(batch[name], tensor)
    again = counting(states)
    PromptCache.build(captions[::-1], again, key="clip", directory=tmp_path)
    assert again.rows == 0
    PromptCache.build([*captions, "new"], again, key="clip", directory=tmp_path)
    assert again.rows == 5
    with pytest.raises(KeyError, match="bird"):
        cache[["bird"]]


def test_prompt_build_resumes(tmp_path):
    captions = [f"caption {'x' * i}" for i in range(10)]
    with pytest.raises(Interrupted):
        PromptCache.build(captions, failing_after(2, states), key="clip", directory=tmp_path, batch_size=3)
    rest = counting(states)
    cache = PromptCache.build(captions, rest, key="clip", directory=tmp_path, batch_size=3)
    assert rest.rows == 4
    assert torch.equal(cache[captions]["encoder_hidden_states"], states(captions)["encoder_hidden_states"])


def test_prompts_of_unequal_shape_are_a_mistake(tmp_path):
    with pytest.raises(AssertionError, match="rows 1 to 1"):
        PromptCache.build(
            ["a", "bb"], lambda c: {"h": torch.zeros(1, len(c[0]))}, key="k", directory=tmp_path, batch_size=1
        )


def test_default_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "here"))
    PromptCache.build(["a"], states, key="clip")
    assert cache_directory() == tmp_path / "here" and len(list((tmp_path / "here").glob("*.rows"))) == 1
    monkeypatch.delenv("FEWSTEP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "fewstep"


def test_a_file_in_the_way_of_the_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="FEWSTEP_CACHE"):
        PromptCache.build(["a"], states, key="clip", directory=tmp_path / "file" / "cache")


def test_a_full_disk_is_one_line_and_what_was_written_is_kept(data, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(UserError) as caught:
            LatentCache.build(data, encode, key="vae", directory=tmp_path, batch_size=40)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(tmp_path) in str(caught.value) and "FEWSTEP_CACHE" in str(caught.value)
    rest = counting(encode)
    LatentCache.build(data, rest, key="vae", directory=tmp_path, batch_size=40)
    LatentCache.build(data, encode, key="vae", directory=tmp_path / "whole", batch_size=40)
    assert rest.rows == 162 - 80 and files(tmp_path) == files(tmp_path / "whole")


def test_a_read_only_directory(tmp_path):
    folder = Path("/sys/fewstep") if os.geteuid() == 0 else tmp_path / "locked" / "cache"
    if os.geteuid() == 0 and not Path("/sys").is_dir():
        pytest.skip("root may write everywhere here")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written"):
        PromptCache.build(["a"], states, key="clip", directory=folder)
