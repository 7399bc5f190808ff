"""data.py on a folder of good and bad clips, and what train.py reads of it."""

import json
import shutil

import numpy as np
import pytest
import torch

from cli import UserError
from data import Clips, face_travel
from model import ASSETS
from sample import read_video, to_tensor, write_video
from tests.test_cli import run
from weights import load_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A set made from two good clips and one of each kind that is refused."""
    folder = tmp_path_factory.mktemp("data")
    clips = folder / "clips"
    clips.mkdir()
    good = sorted((ASSETS / "clips/heldout").glob("*_0.mp4"))[:2]
    for path in good:
        for suffix in (".mp4", ".txt"):
            shutil.copy(path.with_suffix(suffix), clips)
    frames, fps = read_video(good[0])

    def add(name, frames, caption="a man nods"):
        write_video(clips / f"{name}.mp4", frames, fps)
        if caption is not None:
            (clips / f"{name}.txt").write_text(caption)

    add("faceless", np.full_like(frames, 90))
    add("short", frames[:9])
    add("wordless", frames, None)
    add("endless", frames, "a man nods and " * 40)
    add("close", read_video(ASSETS / "clips/heldout/10000_1.mp4")[0])
    add("latin", frames)
    (clips / "latin.txt").write_bytes("a man with a moustache à la Dalí nods".encode("latin-1"))
    (clips / "torn.mp4").write_bytes(good[0].read_bytes()[:700])
    (clips / "torn.txt").write_text("a man nods")
    done = run("data.py", clips, "--out", folder / "set", "--split", 0.5, "--max_face", 90, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, good


def test_every_refused_clip_is_listed_with_its_reason(made):
    folder, _ = made
    rejected = {r["clip"]: r["reason"] for r in map(json.loads, (folder / "set/rejected.jsonl").open())}
    assert "a face in 0%" in rejected["faceless.mp4"]
    assert "9 frames, 17 are needed" in rejected["short.mp4"]
    assert "wordless.txt" in rejected["wordless.mp4"]
    assert "tokens" in rejected["endless.mp4"]
    assert "torn.mp4" in rejected["torn.mp4"]
    assert "px, at most 90 are allowed" in rejected["close.mp4"]
    assert "latin.txt is not UTF-8" in rejected["latin.mp4"]
    assert len(rejected) == 7


def test_the_cache_holds_what_the_networks_give(made):
    folder, good = made
    rows = [json.loads(line) for line in (folder / "set/index.jsonl").open()]
    assert {r["clip"] for r in rows} >= {p.stem for p in good}
    row = next(i for i, r in enumerate(rows) if r["clip"] == good[0].stem)
    clips = Clips(folder / "set", rows[row]["split"])
    row = [r["clip"] for r in clips.rows].index(good[0].stem)
    batch, wan = clips.batch([row]), load_model("tiny")
    frames, _ = read_video(good[0])
    assert np.array_equal(clips.video(row), frames)
    first = wan.vae.encode(to_tensor(frames[:1]))
    context = wan.encode_text(batch["caption"])
    assert (batch["first"] - first).abs().max() < 5e-3  # the cache is fp16
    length = batch["context"].shape[1]
    assert (batch["context"] - context[:, :length]).abs().max() < 5e-3 and not context[:, length:].any()
    assert batch["pool"].shape == (1, 17, 512) and batch["pool_mask"].all()
    unit = torch.nn.functional.normalize(batch["pool"][0], dim=-1)
    assert (unit @ unit.T).mean() > 0.5  # one person


def test_the_clips_that_move_furthest_are_chosen_and_a_set_that_does_not_say_is_named(made):
    folder, _ = made
    every = Clips(ASSETS / "data", "train")
    moving = Clips(ASSETS / "data", "train", moving=0.25)
    left = [row["travel"] for row in every.rows if row not in moving.rows]
    assert len(moving) == pytest.approx(len(every) / 4, abs=2)
    assert min(row["travel"] for row in moving.rows) > max(left)
    old = folder / "old"
    old.mkdir()
    rows = map(json.loads, (folder / "set/index.jsonl").open())
    lines = [json.dumps({k: v for k, v in row.items() if k != "travel"}) + "\n" for row in rows]
    (old / "index.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match="make it anew"):
        Clips(old, "train", moving=0.5)


def test_a_face_s_travel_is_its_distance_from_its_first_place_in_its_own_size():
    boxes, points = torch.zeros(1, 4, 4), torch.rand(1, 1, 5, 2).repeat(1, 4, 1, 1)
    boxes[..., 2:] = torch.tensor([40.0, 10.0])  # a size of 20
    points[..., 0] += torch.tensor([9.0, 3, 5, 3])[:, None]
    info = dict(boxes=boxes, landmarks=points, mask=torch.tensor([[False, True, True, True]]))
    assert face_travel(info) == pytest.approx((0 + 2 + 0) / 3 / 20)
    assert face_travel(info | dict(mask=torch.zeros(1, 4, dtype=torch.bool))) == 0


def test_clips_of_one_file_name_have_a_cache_each_and_a_stray_one_is_refused(tmp_path):
    people = sorted((ASSETS / "clips/heldout").glob("*_0.mp4"))[:2]
    for path, name in zip(people, ("train/a/b_c", "train/a_b/c")):
        for suffix in (".mp4", ".txt"):
            target = (tmp_path / "clips" / name).with_suffix(suffix)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path.with_suffix(suffix), target)
    assert run("data.py", "clips", "--out", "set", cwd=tmp_path).returncode == 0
    clips = Clips(tmp_path / "set", "train")
    a, b = (clips.batch([row])["pool"][0].mean(0) for row in (0, 1))
    assert len(clips) == 2 and torch.cosine_similarity(a, b, dim=0) < 0.6  # two people
    shutil.copy(people[0], tmp_path / "clips/stray.mp4")
    done = run("data.py", "clips", "--out", "another", cwd=tmp_path)
    assert done.returncode == 2 and "stray.mp4" in done.stderr and not (tmp_path / "another").exists()


def test_a_set_for_another_model_is_named():
    with pytest.raises(UserError, match="made for tiny.*--model wan5b"):
        Clips(ASSETS / "data", "train", model="wan5b")


def test_a_folder_that_is_no_set_is_named(tmp_path):
    with pytest.raises(UserError, match=r"python data\.py CLIPS"):
        Clips(tmp_path, "train")
