"""data.py on what people's folders hold, and what train.py reads of a set. Every file is made here, by PyAV."""

import argparse
import base64
import csv
import dataclasses
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
from cli import UserError, lock_folder
from data import Clips, DataOptions, face_travel, filter_faces, list_items, prepare_file
from model import ASSETS
from reward import ArcFace
from sample import read_video, to_tensor
from tests.test_cli import REPO, run
from video import Refused, decode, find_cuts, read_span, resample, survey
from vlm import Unanswered, ask, yes_or_no
from weights import Wan

PEOPLE = sorted((ASSETS / "clips/heldout").glob("*_0.mp4"))
CAPTION = "a man nods"


def person(k, clip=0):
    """The frames of a held-out person's clip, uint8 [17, 128, 128, 3]."""
    return read_video(PEOPLE[k].with_name(PEOPLE[k].name.replace("_0", f"_{clip}")))[0]


def texture(height, width, seed=0):
    """A smooth random picture without a face."""
    coarse = np.random.default_rng(seed).integers(40, 200, (height // 16, width // 16, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))


def scene(frames, height, width, x, y, size, seed=0):
    """Frames of a person pasted, at a size and place, into a texture that stays."""
    ground = np.repeat(texture(height, width, seed)[None], len(frames), 0)
    for k, frame in enumerate(frames):
        ground[k, y : y + size, x : x + size] = np.asarray(Image.fromarray(frame).resize((size, size)))
    return ground


def write(path, frames, fps=8, caption=CAPTION, codec="libx264", pix_fmt="yuv420p", times=None, rotation=0, **options):
    """Write frames as a video, at `times` (seconds) where given; a codec's options by name; and the caption's file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for k, frame in enumerate(frames):
            shape = "rgba" if frame.shape[2] == 4 else "rgb24"
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=shape)
            if times is not None:
                picture.pts, picture.time_base = round(1000 * times[k]), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


@pytest.fixture(scope="module")
def networks():
    return data.Networks(DataOptions(), torch.device("cpu"))


@pytest.fixture
def prepared(networks, tmp_path):
    """prepare_file on the one video that a test has written: (kept, refused) lines."""

    def prepare(path, fps=None, **options):
        options = DataOptions(clips=str(path.parent), out=str(tmp_path / "out"), **options)
        preset = data.check_options(options)
        if fps:
            preset = dataclasses.replace(preset, fps=fps)
        return prepare_file(networks, data.Item(path, path.name), options, preset)

    return prepare


def program(monkeypatch, *arguments):
    """data.py in this process."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    data.main()


def rows(folder, name="index.jsonl"):
    return [json.loads(line) for line in (folder / name).open()]


def digest(folder):
    """Every file of a folder by its name, but the lock, which says who made it."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lock"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# ------------------------------------------------------------------------------------------- a folder of everything


@pytest.fixture(scope="module")
def troublemakers(tmp_path_factory):
    """A set made of one good clip and one of each kind of trouble; and what the program said."""
    folder = tmp_path_factory.mktemp("data")
    clips = folder / "clips"
    clips.mkdir()
    good = person(0)
    write(clips / "good.mp4", good, crf=12)
    for name, frames in dict(zero=good, short=good[:9], one=good[:1], wordless=good, long=good, latin=good).items():
        write(clips / f"{name}.mp4", frames, caption=None if name == "wordless" else CAPTION)
    (clips / "zero.mp4").write_bytes(b"")
    (clips / "long.txt").write_text("a man nods and " * 40)
    (clips / "latin.txt").write_bytes("a man à la Dalí nods".encode("latin-1"))
    (clips / "torn.mp4").write_bytes((clips / "good.mp4").read_bytes()[:700])
    (clips / "text.mp4").write_text("not a video at all")
    for name in ("torn", "text", "audio", "loop"):
        (clips / f"{name}.txt").write_text(CAPTION)
    write(clips / "cut_short.mkv", np.tile(good, (4, 1, 1, 1)), crf=8)
    cut = (clips / "cut_short.mkv").read_bytes()
    (clips / "cut_short.mkv").write_bytes(cut[: len(cut) // 2])
    with av.open(str(clips / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    write(clips / "ten_bit.mp4", good, pix_fmt="yuv420p10le")
    see_through = np.concatenate([good, np.full_like(good[..., :1], 9)], -1)
    write(clips / "alpha.mov", see_through, codec="qtrle", pix_fmt="argb")
    write(clips / 'it\'s a "name" ünd 名.mp4', good)
    (clips / "loop.mp4").symlink_to("loop.mp4")
    (clips / "around").symlink_to(clips)
    flipped = bytearray(write(clips / "flipped.mp4", good, crf=8).read_bytes())
    for k in np.random.default_rng(0).integers(len(flipped) // 5, len(flipped) * 4 // 5, 400):
        flipped[k] ^= 255
    (clips / "flipped.mp4").write_bytes(flipped)
    hdr = dict(pix_fmt="yuv420p10le", **{"x264-params": "colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"})
    write(clips / "hdr.mp4", good, **hdr)
    film = [np.tile(person(k), (15, 1, 1, 1))[:240] for k in (1, 2, 3, 1, 4, 2)]
    write(clips / "three_minutes.mp4", np.concatenate(film), crf=14)
    late = scene(good, 256, 256, 60, 60, 170)
    late[:8] = late[0] * 0 + texture(256, 256)
    write(clips / "late.mp4", late)
    late[:12] = texture(256, 256)
    write(clips / "too_late.mp4", late)
    write(clips / "close.mp4", person(0, 1))
    shutil.copy(PEOPLE[2].with_name("10002_3.mp4"), clips / "two.mp4")
    (clips / "two.txt").write_text(CAPTION)
    write(clips / "nobody.mp4", np.repeat(texture(128, 128)[None], 17, 0))
    done = run("data.py", clips, "--out", folder / "set", "--max_face", 690, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


REASONS = {
    "zero.mp4": "not a readable video", "torn.mp4": "not a readable video", "text.mp4": "not a readable video",
    "loop.mp4": "not a readable video", "audio.mp4": "no video in it", "short.mp4": "9 frames, 17 are needed",
    "one.mp4": "1 frames, 17 are needed", "wordless.mp4": "wordless.txt is missing or empty", "long.mp4": "tokens",
    "latin.mp4": "latin.txt is not UTF-8", "cut_short.mkv": "cut short", "flipped.mp4": "damaged|not a readable",
    "hdr.mp4": "HDR", "too_late.mp4": "a face in 29%", "close.mp4": "a face of 7.. px at 960p .* at most 690",
    "two.mp4": "more than 1 face", "nobody.mp4": "a face in 0%",
}  # fmt: skip


def test_every_file_of_a_folder_ends_in_one_list_with_the_right_reason(troublemakers):
    folder, said = troublemakers
    kept, refused = rows(folder / "set"), rows(folder / "set", "rejected.jsonl")
    for row in refused:
        assert re.search(REASONS[row["clip"]], row["reason"]), row
    assert {row["clip"] for row in refused} == REASONS.keys()
    names = Counter(row["clip"].split("@")[0] for row in kept)
    assert names == {"good": 1, "ten_bit": 1, "alpha": 1, 'it\'s a "name" ünd 名': 1, "late": 1, "three_minutes": 6}
    assert len(names.keys() | {Path(r["clip"]).stem for r in refused}) == len(list_items(folder / "clips"))
    assert f"{len(kept)} clips kept, {len(refused)} refused" in said
    late = next(row for row in kept if row["clip"] == "late")
    assert late["coverage"] == pytest.approx(9 / 17, abs=0.07)


def test_a_film_gives_a_clip_of_each_shot(troublemakers):
    folder, _ = troublemakers
    film = [row for row in rows(folder / "set") if row["clip"].startswith("three_minutes")]
    assert [row["start"] for row in film] == pytest.approx(list(range(0, 1440, 240)), abs=2)
    assert len({row["split"] for row in film}) == 1  # all clips of a file are on one side
    assert all(row["agreement"] > 0.7 for row in film)


def test_the_report_is_one_file_that_shows_kept_and_refused_clips(troublemakers):
    folder, _ = troublemakers
    page = (folder / "set/report.html").read_text()
    for kind, count in Counter(row["kind"] for row in rows(folder / "set", "rejected.jsonl")).items():
        assert f"<td>refused: {kind}</td><td>{count}</td>" in page
    assert page.count("<svg") == 6 and page.count("data:image/jpeg;base64") >= 11 + 4
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "it&#x27;s a &quot;name&quot; ünd 名" in page


def test_the_cache_holds_what_the_networks_give(troublemakers):
    folder, _ = troublemakers
    row = next(row for row in rows(folder / "set") if row["clip"] == "good")
    clips = Clips(folder / "set", row["split"])
    row = [r["clip"] for r in clips.rows].index("good")
    batch, wan = clips.batch([row]), Wan("tiny")
    frames, _ = read_video(folder / "clips/good.mp4")
    assert np.array_equal(clips.video(row), frames)
    first = wan.vae.encode(to_tensor(frames[:1]))
    context = wan.encode_text(batch["caption"])
    assert (batch["first"] - first).abs().max() < 5e-3  # the cache is fp16
    length = batch["context"].shape[1]
    assert (batch["context"] - context[:, :length]).abs().max() < 5e-3 and not context[:, length:].any()
    assert batch["pool"].shape == (1, 17, 512) and batch["pool_mask"].all()
    unit = torch.nn.functional.normalize(batch["pool"][0], dim=-1)
    assert (unit @ unit.T).mean() > 0.5  # one person


# ------------------------------------------------------------------------------------------------- frames, in time


@pytest.mark.parametrize("rotation", (90, -90, 180))
def test_a_video_that_is_stored_sideways_is_upright(rotation, prepared, tmp_path):
    frames = person(0)
    stored = np.rot90(frames, -rotation // 90, (1, 2))
    path = write(tmp_path / "phone.mp4", stored, rotation=rotation, crf=8)
    shown = np.stack([np.asarray(frame) for frame in read_span(path, 8, 0, 17)])
    assert np.abs(shown.astype(int) - frames).mean() < 3  # H.264's own error
    kept, _ = prepared(path)
    assert kept[0]["coverage"] == 1


def numbered(count):
    """Frames whose grey says their number: 2 levels each."""
    return np.repeat(np.arange(count, dtype=np.uint8)[:, None, None, None] * 2 + 10, 32, 1).repeat(32, 2).repeat(3, 3)


def picked(path, fps):
    """The numbers of the frames that resampling takes, and which of them are repeated."""
    shown = list(resample(decode(path), fps))
    assert [k for k, *_ in shown] == list(range(len(shown)))
    return [round((frame.to_ndarray(format="gray").mean() - 10) / 2) for _, _, frame, _ in shown], [s[1] for s in shown]


def write_numbered(path, count, **options):
    return write(path, numbered(count), pix_fmt="yuvj420p", qp=0, **options)


def test_frames_are_taken_by_their_time(tmp_path):
    numbers, repeated = picked(write_numbered(tmp_path / "60.mp4", 61, fps=60), 24)
    assert len(numbers) == 25 and not any(repeated)
    assert all(abs(n / 60 - k / 24) <= 0.5 / 60 + 1e-9 for k, n in enumerate(numbers))
    assert picked(write_numbered(tmp_path / "16.mp4", 33, fps=16), 16)[0] == list(range(33))  # as it is
    assert picked(write_numbered(tmp_path / "ms.mkv", 49, fps=24), 24)[0] == list(range(49))  # times in whole ms
    numbers, repeated = picked(write_numbered(tmp_path / "12.mp4", 13, fps=12), 24)
    assert sum(repeated) == len(numbers) - 13 and len(numbers) == 25
    random_times = np.cumsum([0.0, *np.random.default_rng(0).uniform(0.005, 0.06, 80)]).round(3)
    numbers, _ = picked(write_numbered(tmp_path / "variable.mkv", 81, times=random_times), 16)
    nearest = [np.abs(random_times - k / 16).min() for k in range(len(numbers))]
    assert np.allclose(np.abs(random_times[numbers] - np.arange(len(numbers)) / 16), nearest)


def test_a_slow_video_is_refused_or_repeats_frames(prepared, tmp_path):
    path = write(tmp_path / "slow.mp4", person(0), fps=8)
    (row,) = prepared(path, fps=12)[1]
    assert row["kind"] == "low fps" and "5 of 17 frames would be repeated" in row["reason"]
    (row,) = prepared(path, fps=12, low_fps="repeat")[0]
    assert row["repeated"] == 5 and row["fps"] == 12


def test_a_span_late_in_a_film_is_found_by_time_as_it_is_by_decoding_all(tmp_path):
    path = write_numbered(tmp_path / "film.mp4", 120, fps=8, g=25, bf=3, **{"x264-params": "open-gop=1"})
    every = np.stack([np.asarray(frame) for frame in read_span(path, 8, 0, 120)])
    assert len(every) == 120 and (np.diff(every.mean((1, 2, 3))) > 1).all()
    for start in (0, 17, 31, 50, 77, 103):
        assert np.array_equal(np.stack([np.asarray(f) for f in read_span(path, 8, start, 17)]), every[start:][:17])


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    path = write(tmp_path / "wide.mp4", person(0), **{"x264-params": "sar=2/1"})
    assert next(read_span(path, 8, 0, 1)).size == (256, 128)


# ---------------------------------------------------------------------------------------------------- cuts and spans


def film(*parts):
    """Shots of people, joined by a cut (0), a dissolve over that many frames, or a flash of white ("flash")."""
    frames = parts[0].astype(float)
    for how, shot in zip(parts[1::2], parts[2::2]):
        if how == "flash":
            frames = np.concatenate([frames, frames[-1:] * 0 + 250, shot])
        elif how:
            mix = np.linspace(0, 1, how + 2)[1:-1, None, None, None]
            frames = np.concatenate([frames[:-how], frames[-how:] * (1 - mix) + shot[:how] * mix, shot[how:]])
        else:
            frames = np.concatenate([frames, shot])
    return frames.round().astype(np.uint8)


def walk(k, count=34):
    """A shot of a person: their clip, to and fro."""
    frames = person(k)
    return np.concatenate([frames, frames[::-1]] * (count // 34 + 1))[:count]


def test_cuts_and_dissolves_are_found_and_a_flash_is_none(tmp_path):
    path = write(tmp_path / "film.mp4", film(walk(1), 0, walk(2), 8, walk(3), "flash", walk(3)), crf=14)
    shots, repeated = survey(path, 8)
    assert len(repeated) == 34 + 26 + 34 + 35 and not any(repeated)
    assert [a for a, _ in shots] == pytest.approx([0, 34, 68], abs=3) and shots[0][1] == shots[1][0] == 34
    assert shots[1][1] <= 63 and shots[2][0] >= 65  # none but the outermost frames of the dissolve
    assert shots[2][1] == len(repeated)


def test_a_still_film_or_none_has_no_cut():
    still = np.full((9, 512), 1 / 512, np.float32)
    assert list(find_cuts([still] * 40, 16)) == [] and list(find_cuts([], 16)) == []


def test_no_clip_crosses_a_cut_and_short_shots_are_told_of(networks, prepared, tmp_path):
    path = write(tmp_path / "film.mp4", film(walk(1, 40), 0, walk(2, 10), 0, walk(3, 40)), crf=14)
    starts, item = {}, data.Item(path, path.name)
    for spans, more in dict(head={}, chunk={}, slide=dict(span_stride=5), uniform=dict(span_count=3)).items():
        tried = data.spans_to_try(networks, item, DataOptions(frames=17, spans=spans, **more), 8)
        starts[spans] = [start for start, _, pictures in tried if len(pictures) == 17]
    assert starts == dict(head=[0, 50], chunk=[0, 17, 50, 67], slide=[0, 5, 10, 15, 20, 50, 55, 60, 65, 70],
                          uniform=[0, 12, 23, 50, 62, 73])  # fmt: skip
    kept, refused = prepared(path)
    assert [row["clip"] for row in kept] == ["film", "film@50"]
    assert [row["reason"] for row in refused] == [
        "10 frames between two cuts, from 5.00 s, 17 are needed (at 8 a second)"
    ]
    assert {p.name for p in (tmp_path / "out/cache").iterdir()} == {"film.mp4.safetensors", "film.mp4@50.safetensors"}


# ------------------------------------------------------------------------------------------------------- the filters


def test_a_pool_of_two_people_is_refused(networks):
    one, other = person(0), person(3)
    options = DataOptions(max_face=999)
    pool, figures = filter_faces(networks.reward, to_tensor(one), options)
    assert figures["agreement"] > 0.7 and figures["strangers"] == 0 and len(pool["pool"]) == 17
    for mixed in (np.concatenate([one[:9], other[9:]]), np.concatenate([one[:6], other[6:9], one[9:]])):
        with pytest.raises(Refused, match="disagrees with itself") as refusal:
            filter_faces(networks.reward, to_tensor(mixed), options)
        assert refusal.value.figures["strangers"] > 0.1 and refusal.value.figures["agreement"] < 0.8


def test_the_largest_face_is_measured_at_960p(networks, prepared, tmp_path):
    path = write(tmp_path / "a.mp4", person(0), crf=12)
    (row,) = prepared(path)[0]
    assert row["face_960"] == pytest.approx(row["face"] * 960 / 128, rel=0.01)
    assert prepared(path, max_face=row["face_960"] + 1)[0]
    (refused,) = prepared(path, max_face=row["face_960"] - 1)[1]
    assert refused["kind"] == "face size" and refused["face_960"] == row["face_960"] and "at 960p" in refused["reason"]
    options = DataOptions(model="wan5b", ckpt=".", out="x")
    data.check_options(options)
    assert options.max_face == 100  # the paper's


def test_still_and_blurred_clips_are_refused_where_that_is_asked_for(prepared, tmp_path):
    moving = write(tmp_path / "moving.mp4", person(0), crf=12)
    still = write(tmp_path / "still.mp4", np.repeat(person(0)[:1], 17, 0), crf=12)
    soft = [np.asarray(Image.fromarray(f).resize((40, 40)).resize((128, 128))) for f in person(0)]
    soft = write(tmp_path / "soft.mp4", np.stack(soft), crf=12)
    (sharp,), (blurred,) = prepared(moving)[0], prepared(soft)[0]
    assert blurred["sharpness"] < sharp["sharpness"] * 0.7
    bounds = dict(min_motion=0.3, min_sharpness=(sharp["sharpness"] + blurred["sharpness"]) / 2)
    assert prepared(moving, **bounds)[0]
    assert [prepared(path, **bounds)[1][0]["kind"] for path in (still, soft)] == ["motion", "sharpness"]


def test_a_crop_keeps_the_face_or_the_clip_is_refused(prepared, tmp_path):
    high = write(tmp_path / "high.mp4", scene(person(0), 384, 192, 32, 8, 128), crf=12)  # a portrait, the face on top
    (row,) = prepared(high)[0]
    assert row["coverage"] == 1 and row["size"] == [128, 128]
    x0, y0, x1, y1 = row["crop"]
    assert (x0, x1, y1 - y0) == (0, 192, 192) and y0 < 96
    assert prepared(high, shape="refuse")[1][0]["kind"] == "shape"
    (row,) = prepared(high, shape="bucket")[0]
    assert row["size"][0] > 1.7 * row["size"][1] and "crop" not in row
    frames = scene(person(0), 384, 192, 32, 8, 128)
    frames[9:] = scene(person(0)[9:], 384, 192, 32, 248, 128)  # and then at the bottom
    torn = write(tmp_path / "torn.mp4", frames, crf=12)
    (row,) = prepared(torn)[1]
    assert row["kind"] == "shape" and "no crop" in row["reason"]


def test_several_people_have_a_pool_each(prepared, tmp_path):
    shutil.copy(PEOPLE[2].with_name("10002_3.mp4"), tmp_path / "two.mp4")
    (tmp_path / "two.txt").write_text(CAPTION)
    (row,) = prepared(tmp_path / "two.mp4", people=2)[0]
    assert data.load_file(tmp_path / "out" / row["cache"])["pool"].shape == (2, 17, 512)


def test_a_face_s_travel_is_its_distance_from_its_first_place_in_its_own_size():
    boxes, points = torch.zeros(1, 4, 4), torch.rand(1, 1, 5, 2).repeat(1, 4, 1, 1)
    boxes[..., 2:] = torch.tensor([40.0, 10.0])  # a size of 20
    points[..., 0] += torch.tensor([9.0, 3, 5, 3])[:, None]
    info = dict(boxes=boxes, landmarks=points, mask=torch.tensor([[False, True, True, True]]))
    assert face_travel(info) == pytest.approx((0 + 2 + 0) / 3 / 20)
    assert face_travel(info | dict(mask=torch.zeros(1, 4, dtype=torch.bool))) == 0


# --------------------------------------------------------------------------------------------- captions, lists, pairs


def test_a_byte_order_mark_is_no_part_of_a_caption(prepared, tmp_path):
    path = write(tmp_path / "a.mp4", person(0), caption=None)
    path.with_suffix(".txt").write_text(CAPTION, encoding="utf-8-sig")
    assert prepared(path)[0][0]["caption"] == CAPTION
    (tmp_path / "metadata.csv").write_text(f"video,prompt\na.mp4,{CAPTION}\n", encoding="utf-8-sig")
    assert list_items(tmp_path)[0].caption == CAPTION


def test_lists_name_videos_and_prompts_and_their_mistakes_are_told(tmp_path):
    (tmp_path / "sub").mkdir()
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("video", "prompt"), ("sub/a.mp4", 'he says "no", and nods'), ("../b.mp4", "b")])
    (tmp_path / "list.jsonl").write_text('{"video": "sub/a.mp4", "prompt": "x"}\n')
    first, second = list_items(tmp_path)
    assert (first.name, first.caption) == ("sub/a.mp4", 'he says "no", and nods')
    assert second.path == tmp_path / "../b.mp4" and re.fullmatch(r"elsewhere/[0-9a-f]{12}_b\.mp4", second.name)
    assert list_items(tmp_path / "list.jsonl")[0].path == tmp_path / "sub/a.mp4"
    for text, told in {"video,prompt\na.mp4,x\na.mp4,y\n": "row 2: a.mp4 is in the list twice",
                       "video,caption\na.mp4,x\n": "row 1 has no video and prompt; it has video, caption",
                       "video,prompt\n": "no rows in it"}.items():  # fmt: skip
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(UserError, match=told):
            list_items(tmp_path / "bad.csv")
    (tmp_path / "bad.jsonl").write_text('{"video": "a.mp4"\n')
    with pytest.raises(UserError, match="line 1 is not JSON"):
        list_items(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="no such folder or file"):
        list_items(tmp_path / "nowhere")


MISTAKES = {
    "nowhere --out x": "no such folder or file", "clips/a.mp4 --out x": "neither a folder nor",
    "empty --out x": "no video in it", "clips": "--out DIR is needed", "clips --out full": "is not empty",
    "clips --out x --coverage 2": "at most 1", "clips --out x --people 0": "at least 1",
    "clips --out x --max_face nan": "finite", "clips --out x --frames 16": "nearest is 17",
    "clips --out x --spans every": "choose from head, chunk", "clips --out x --vlm_captions": "needs --vlm URL",
    "clips --out x --pairs": "a .csv or .jsonl of image,prompt rows is needed",
    "clips --out x --workers 0": "at least 1",
    "clips --out x --model wan5b": "needs --ckpt DIR", "clips --out x --faces empty": "no face detector in it",
}  # fmt: skip


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_told_before_anything_is_written(arguments, tmp_path, monkeypatch):
    for folder in ("clips", "empty", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "clips/a.mp4").write_bytes(b"")
    (tmp_path / "full/something").write_text("kept")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=re.escape(MISTAKES[arguments])):
        program(monkeypatch, *arguments.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_an_evaluation_set_is_made_of_pictures_and_prompts(tmp_path, monkeypatch, capsys, networks):
    for name, picture in dict(face=person(0)[0], close=person(0, 1)[0], none=texture(128, 128)).items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    names = ["face", "face", "close", "none", "missing"]
    lines = [f"{name}.png,a man {word}\n" for name, word in zip(names, ("nods", "smiles", "nods", "nods", "nods"))]
    (tmp_path / "pairs.csv").write_text("image,prompt\n" + "".join(lines))
    program(monkeypatch, "--pairs", tmp_path / "pairs.csv", "--out", tmp_path / "set", "--max_face", 690)
    reasons = [row["kind"] for row in rows(tmp_path / "set", "rejected.jsonl")]
    assert reasons == ["face size", "coverage", "unreadable"]
    clips = Clips(tmp_path / "set", "heldout", model="tiny")
    assert [row["caption"] for row in clips.rows] == ["a man nods", "a man smiles"]
    assert np.array_equal(clips.video(0)[0], person(0)[0]) and clips.rows[0]["frames"] == 17
    batch = clips.batch([0, 1])
    look = networks.reward.detect_and_embed(to_tensor(person(0)[:1]))
    assert (batch["pool"][0, 0] - look["embeddings"][0, 0]).abs().max() < 0.01 * look["embeddings"].abs().max()


# ----------------------------------------------------------------------------------- the vision-language model's side


@pytest.fixture
def endpoint():
    """A server that answers as `replies` says, in turn: a text, an HTTP status, "late", "garbled" or "hang up"."""
    replies, asked = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
            if reply == "late":
                time.sleep(1.5)
            if reply == "hang up":
                return
            body = json.dumps(dict(choices=[dict(message=dict(role="assistant", content=reply))])).encode()
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            self.wfile.write(b'{"choices": []' if reply == "garbled" else body)

        def handle(self):
            try:
                super().handle()
            except OSError:  # the client has given up
                pass

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield argparse.Namespace(url=f"http://127.0.0.1:{server.server_port}/v1", replies=replies, asked=asked)
    server.shutdown()
    server.server_close()


def test_the_question_goes_with_its_pictures_and_an_answer_comes_back(endpoint):
    endpoint.replies[:] = [" No. \n"]
    assert ask(endpoint.url, "qwen", "Is it?", person(0)[:2]) == "No."
    (asked,) = endpoint.asked
    *pictures, question = asked["messages"][0]["content"]
    assert question == dict(type="text", text="Is it?") and asked["model"] == "qwen" and asked["temperature"] == 0
    jpeg = base64.b64decode(pictures[0]["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
    assert len(pictures) == 2 and jpeg[:2] == b"\xff\xd8"


def test_only_yes_and_no_are_answers():
    said = {"yes": True, "No.": False, " **Yes** ": True, "no\n": False, "Yes, a hand": None, "nobody": None, "": None}
    assert {text: yes_or_no(text) for text in said} == said


def test_a_failing_endpoint_is_tried_three_times_and_one_that_refuses_once(endpoint):
    endpoint.replies[:] = [503, "garbled", "no"]
    assert ask(endpoint.url, "qwen", "?", [], timeout=5) == "no"
    for replies, count in ((["late"], 3), (["garbled", "hang up", 500], 3)):
        endpoint.replies[:], endpoint.asked[:] = replies, []
        began = time.monotonic()
        with pytest.raises(Unanswered, match=endpoint.url):
            ask(endpoint.url, "qwen", "?", [], timeout=0.3)
        assert len(endpoint.asked) == count and time.monotonic() - began < 10
    endpoint.replies[:], endpoint.asked[:] = [404], []
    with pytest.raises(UserError, match="404"):
        ask(endpoint.url, "qwen", "?", [])
    assert len(endpoint.asked) == 1
    with pytest.raises(Unanswered):  # nobody listens there
        ask("http://127.0.0.1:9/v1", "qwen", "?", [], tries=1)


def test_occluded_and_unclear_clips_are_refused_apart_and_unanswered_ones_asked_again(
    endpoint, tmp_path, monkeypatch, capsys
):
    (tmp_path / "clips").mkdir()
    for k in range(4):
        write(tmp_path / f"clips/{k}.mp4", person(k), caption=None if k == 0 else CAPTION)
    options = ("--out", tmp_path / "set", "--vlm", endpoint.url, "--vlm_captions", "--vlm_timeout", 0.5)
    endpoint.replies[:] = ["no", "A man looks down.", "yes", "I cannot tell", "garbled"]
    program(monkeypatch, tmp_path / "clips", *options)
    assert [row["caption"] for row in rows(tmp_path / "set")] == ["A man looks down."]
    assert [row["kind"] for row in rows(tmp_path / "set", "rejected.jsonl")] == ["occluded", "unclear"]
    said = capsys.readouterr().out
    assert "1 files are still to do" in said and "nothing is held out" in said
    endpoint.replies[:] = ["no"]
    program(monkeypatch, tmp_path / "clips", *options)
    kept = rows(tmp_path / "set")
    assert [row["clip"] for row in kept] == ["0", "3"] and sorted(row["split"] for row in kept) == ["heldout", "train"]


# ------------------------------------------------------------------------------------ splits, several runs and ranks


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    """Four people's clips, and the set that an unbroken run makes of them."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "clips").mkdir()
    for k in range(4):
        write(folder / f"clips/{k}.mp4", walk(k, 51), crf=14)
    done = run("data.py", folder / "clips", "--out", folder / "whole", "--spans", "chunk", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_of_four_clips_one_is_held_out(small_set):
    folder, said = small_set
    splits = {row["video"]: row["split"] for row in rows(folder / "whole")}
    assert Counter(splits.values()) == dict(train=3, heldout=1) and len(rows(folder / "whole")) == 12
    assert re.search(r"embed: 204 frames in .* a second", said) and "encode: 12" in said


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(small_set, tmp_path):
    folder, _ = small_set
    command = [sys.executable, REPO / "data.py", folder / "clips", "--out", folder / "killed", "--spans", "chunk"]
    generator, kills = random.Random(0), 0
    while kills < 3:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = set((folder / "killed").rglob("*.safetensors"))
        while process.poll() is None and set((folder / "killed").rglob("*.safetensors")) == seen:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert run(*command[1:], cwd=folder).returncode == 0
    assert digest(folder / "killed") == digest(folder / "whole")
    again = run(*command[1:], cwd=folder)  # nothing is done twice
    assert again.returncode == 0 and "4 of 4 files are done" in again.stdout and "embed" not in again.stdout
    assert digest(folder / "killed") == digest(folder / "whole")
    other = run(*command[1:], "--coverage", 0.5, cwd=folder)
    assert other.returncode == 2 and "begun with --coverage 0.4, not 0.5" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ("workers", "torchrun"))
def test_several_processes_make_the_same_set(small_set, how, tmp_path):
    folder, _ = small_set
    program = [sys.executable, REPO / "data.py"]
    if how == "torchrun":
        program = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, REPO / "data.py"]
    more = ["--workers", 2] if how == "workers" else []
    command = map(str, [*program, folder / "clips", "--out", folder / how, "--spans", "chunk", *more])
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert rows(folder / how) == rows(folder / "whole")
    for row in rows(folder / how):
        a, b = (data.load_file(folder / name / row["cache"]) for name in (how, "whole"))
        assert all((a[k].float() - b[k].float()).abs().max() < 2e-2 for k in a)  # threads sum in another order; fp16
    assert digest(folder / how).keys() == digest(folder / "whole").keys()


def test_two_runs_into_one_folder_are_refused(small_set, tmp_path):
    lock = lock_folder(tmp_path / "out")
    done = run("data.py", small_set[0] / "clips", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2 and f"process {os.getpid()} on" in done.stderr and "is at work in it" in done.stderr
    lock.close()


# --------------------------------------------------------------------------------------------- what train.py reads


def test_clips_of_one_file_name_have_a_cache_each_and_a_stray_one_is_refused(tmp_path, monkeypatch):
    for path, name in zip(PEOPLE, ("train/a/b_c.mp4", "train/a_b/c.mp4", "train/a/b_c.mov")):
        target = tmp_path / "clips" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        target.with_suffix(".txt").write_text(CAPTION)
    program(monkeypatch, tmp_path / "clips", "--out", tmp_path / "set")
    clips = Clips(tmp_path / "set", "train")
    means = torch.stack([clips.batch([row])["pool"][0].mean(0) for row in range(3)])
    cosine = torch.cosine_similarity(means[:, None], means[None], dim=-1)
    assert len(clips) == 3 and (cosine - torch.eye(3)).max() < 0.6  # three people
    shutil.copy(PEOPLE[0], tmp_path / "clips/stray.mp4")
    with pytest.raises(UserError, match=r"stray\.mp4"):
        program(monkeypatch, tmp_path / "clips", "--out", tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_a_set_made_with_another_face_encoder_is_refused(networks):
    clips = Clips(ASSETS / "data", "train")
    clips.rows[0]["encoder"] = networks.encoder
    clips.check_encoder(networks.reward.encoder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = ArcFace((1, 1, 1, 1)).eval()
    with pytest.raises(UserError, match="embedded with another network"):
        clips.check_encoder(other)


@pytest.mark.parametrize("cache", ("../secret.safetensors", "/etc/secret.safetensors", "cache/../../secret"))
def test_a_cache_outside_the_folder_is_refused(cache, tmp_path):
    (tmp_path / "index.jsonl").write_text(json.dumps(dict(clip="a", split="train", cache=cache)) + "\n")
    with pytest.raises(UserError, match="is outside the folder"):
        Clips(tmp_path, "train")


def test_a_torn_index_is_named(tmp_path):
    (tmp_path / "index.jsonl").write_text('{"clip": "a", "spl')
    with pytest.raises(UserError, match=r"index\.jsonl: line 1 is not JSON"):
        Clips(tmp_path, "train")


def test_the_clips_that_move_furthest_are_chosen_and_a_set_that_does_not_say_is_named(tmp_path):
    every = Clips(ASSETS / "data", "train")
    moving = Clips(ASSETS / "data", "train", moving=0.25)
    left = [row["travel"] for row in every.rows if row not in moving.rows]
    assert len(moving) == pytest.approx(len(every) / 4, abs=2)
    assert min(row["travel"] for row in moving.rows) > max(left)
    lines = [json.dumps({k: v for k, v in row.items() if k != "travel"}) + "\n" for row in every.rows]
    (tmp_path / "index.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match="make it anew"):
        Clips(tmp_path, "train", moving=0.5)


def test_a_set_for_another_model_is_named():
    with pytest.raises(UserError, match="made for tiny.*--model wan5b"):
        Clips(ASSETS / "data", "train", model="wan5b")


def test_a_folder_that_is_no_set_is_named(tmp_path):
    with pytest.raises(UserError, match=r"python data\.py CLIPS"):
        Clips(tmp_path, "train")
