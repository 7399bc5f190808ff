"""From a folder of clips to a training set: find the shots, filter, embed the faces, caption, encode, cache.

    python data.py CLIPS --out DIR                a training set; killed, the same command goes on
    python data.py PAIRS.csv --pairs --out DIR    an evaluation set of (image, prompt) rows

What is kept, and why (arXiv 2510.14255): video models lose a face where it is small, so the paper trains on clips
whose largest face is at most 100 px a side in every frame of a 960p picture, with a face in at least 40 % of the
frames, and none that a vision-language model calls occluded. The embedding of EVERY frame's face is stored: they are
the pool that the reward compares a generated face with. That needs one person a pool, so clips are taken from within
shots, and a pool whose faces are of several people is refused.

DIR receives index.jsonl (a line a kept clip), rejected.jsonl (a line a refused one: reason and figures), report.html,
and cache/ (a clip's pool, the first frame's latent or A14B's y, the prompt's context). train.py and eval.py read it.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read as torch is imported: its threads wait without spinning for long

import base64
import codecs
import concurrent.futures
import contextlib
import csv
import dataclasses
import datetime
import functools
import hashlib
import html
import io
import json
import multiprocessing
import shutil
import string
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from cli import (
    UserError,
    check_can_be_made,
    gathered,
    is_empty,
    leave_ranks,
    lock_folder,
    option,
    parse_options,
    read_options,
    run,
    start_ranks,
    this_device,
    write_text,
)
from model import ASSETS, CONFIGS
from reward import FaceReward, alignable, link_identities
from sample import best_size, condition, cover_and_crop, latent_size, read_picture, to_tensor
from video import Refused, decode, read_span, resample, survey, upright
from vlm import Unanswered, ask, yes_or_no
from weights import Wan, find_preset, write_safetensors

SPLITS = ("train", "heldout")


@dataclass
class DataOptions:
    clips: str = option("", "folder of videos, searched through, with captions beside them (a.mp4, a.txt) or in its "
                            "metadata.csv; or a .csv or .jsonl of video,prompt rows")  # fmt: skip
    out: str = option("", "folder to make; one begun with the same options is continued")
    pairs: bool = option(False, "CLIPS is a .csv or .jsonl of image,prompt rows: make an evaluation set")
    model: str = option("tiny", "preset", choices=tuple(CONFIGS))
    ckpt: str = option("", "folder with the model's weights; tiny ships its own")
    faces: str = option(str(ASSETS), "folder with a face detector and encoder, e.g. antelopev2")
    workers: int = option(
        1, "processes, each with the networks in memory; torchrun starts more, on more machines", 1, 1024
    )
    # which frames
    frames: int | None = option(None, "frames of a clip, 4n+1; default: the preset's", 1)
    size: tuple[int, int] | None = option(None, "HxW in pixels; default: the preset's")
    spans: str = option("head", "which frames of a shot become clips: its first ones, all one after another, "
                                "overlapping ones, or --span_count spread evenly",
                                choices=("head", "chunk", "slide", "uniform"))  # fmt: skip
    span_stride: int | None = option(None, "frames from one clip to the next, for slide; default: half a clip", 1)
    span_count: int = option(4, "clips of a shot, for uniform", 1)
    low_fps: str = option("refuse", "a video with fewer frames a second than the model's: refuse it, or repeat frames",
                          choices=("refuse", "repeat"))  # fmt: skip
    shape: str = option("crop", "a video of another shape: crop it so that the faces stay, give it a size of its own "
                                "(bucket; then train with --micro_batch 1), or refuse it",
                                choices=("crop", "bucket", "refuse"))  # fmt: skip
    # which of them are kept
    max_face: float | None = option(None, "px that the largest face's longer side may have in any frame, were the "
                                          "frame 960p; default: 100, the paper's, and 750 for tiny", 1)  # fmt: skip
    coverage: float = option(0.4, "smallest share of frames that show a face", 0, 1)
    people: int = option(
        1, "most people of a clip (one more in under a tenth of the frames is let pass); each has a pool", 1
    )
    min_motion: float = option(0.0, "least change from frame to frame, mean of 0..255 levels", 0)
    min_sharpness: float = option(0.0, "least sharpness of the face: its Laplacian's standard deviation, levels", 0)
    tiled: bool = option(False, "look again, enlarged and in tiles, where faces are small against the frame")
    split: float = option(0.1, "share of videos held out, where the folder has no train/ and heldout/ (which keep the "
                               "clips of one person together; a share does not)", 0, 1)  # fmt: skip
    vlm: str = option("", "URL of an OpenAI-compatible endpoint, as http://localhost:8000/v1, whose vision-language "
                          "model is asked whether a face is occluded; $OPENAI_API_KEY is its key")  # fmt: skip
    vlm_model: str = option("Qwen/Qwen2.5-VL-7B-Instruct", "the model's name there")
    vlm_captions: bool = option(False, "let it write the captions that are missing, too")
    vlm_timeout: float = option(60.0, "seconds to wait for an answer, three times", 0.1)


# ---------------------------------------------------------------------------------------------------------------
# What is kept


def filter_faces(reward, video, options):
    """The pool of a clip [1, 3, F, H, W] as tensors, and the figures that the index gives; Refused by the filters.

    The pool is pool [F, D] with pool_mask [F], every frame's largest face; of several people [P, F, D] and [P, F].
    """
    info = reward.detect_and_embed(video)
    seen, (height, width) = info["mask"][0], video.shape[-2:]  # [F]
    boxes = info["boxes"][0][seen]
    side = float((boxes[:, 2:] - boxes[:, :2]).max()) if len(boxes) else 0.0
    side_960 = side * 960 / min(height, width)  # as the paper measures it, whatever the size here is
    coverage, crowd = (float(share.float().mean()) for share in (seen, info["count"][0] > options.people))
    pool, mask = info["embeddings"][0], seen
    if options.people > 1:
        pool, mask = reward.identities(video, options.people)
        strangers = 1 - float(mask.sum()) / max(int(info["count"].sum()), 1)
    else:
        numbers = Counter(number for (number,) in link_identities([face[None] for face in pool[mask]]))
        strangers = 1 - max(numbers.values(), default=0) / max(len(boxes), 1)
    unit = F.normalize(info["embeddings"][0][seen], dim=-1)
    agreement = float((unit @ unit.T).mean()) if len(unit) else 0.0
    motion, sharpness = motion_and_sharpness(video, info)
    figures = dict(coverage=round(coverage, 3), face=round(side, 1), face_960=round(side_960, 1), crowd=round(crowd, 3),
                   travel=round(face_travel(info), 4), agreement=round(agreement, 3), strangers=round(strangers, 3),
                   motion=round(motion, 2), sharpness=round(sharpness, 2))  # fmt: skip
    for kind, refused, reason in (
        ("coverage", coverage < options.coverage or not seen.any(),
         f"a face in {coverage:.0%} of the frames, {options.coverage:.0%} are needed"),
        ("face size", side_960 > options.max_face,
         f"a face of {side_960:.0f} px at 960p ({side:.1f} px of {width}x{height}), at most {options.max_face:g} are "
         "allowed"),
        ("people", crowd > 0.1, f"more than {options.people} face(s) in {crowd:.0%} of the frames"),
        ("pool", strangers > 0.1, f"the pool disagrees with itself: {strangers:.0%} of its faces are of other people"),
        ("motion", len(seen) > 1 and motion < options.min_motion,
         f"frames change by {motion:.2f} levels, at least {options.min_motion:g} are wanted"),
        ("sharpness", sharpness < options.min_sharpness,
         f"a face of sharpness {sharpness:.2f}, at least {options.min_sharpness:g} is wanted"),
    ):  # fmt: skip
        if refused:
            raise Refused(kind, reason, **figures)
    return dict(pool=pool, pool_mask=mask.byte()), figures


def face_travel(info):
    """How far a clip's face gets from its first place, from `detect_and_embed`: mean over frames, in sizes of the face.

    0 where no frame shows a face.
    """
    seen = info["mask"][0]
    if not seen.any():
        return 0.0
    place, box = info["landmarks"][0][seen].mean(1), info["boxes"][0][seen][0]
    return float((place - place[0]).norm(dim=-1).mean() / (box[2:] - box[:2]).prod().sqrt())


def motion_and_sharpness(video, info):
    """Mean |difference| of consecutive frames, and the mean over frames of the standard deviation of the Laplacian
    inside the largest face's box; both of the luma, in levels of 0..255. video [1, 3, F, H, W] in [-1, 1]."""
    luma = (video[0] * video.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)).sum(0) * 127.5  # [F, H, W]
    kernel = luma.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    laplacian = F.conv2d(F.pad(luma[:, None], (1, 1, 1, 1), mode="replicate"), kernel[None, None])[:, 0]
    boxes = [(k, *info["boxes"][0, k].round().clamp(min=0).int().tolist()) for k in info["mask"][0].nonzero()[:, 0]]
    faces = [laplacian[k, y0:y1, x0:x1] for k, x0, y0, x1, y1 in boxes]
    spread = [float(face.std()) for face in faces if face.numel() > 1]
    motion = float(luma.diff(dim=0).abs().mean()) if len(luma) > 1 else 0.0
    return motion, sum(spread) / max(len(spread), 1)


OCCLUDED = (
    "These pictures are frames of one clip, in order. Look at the face of the person who is largest. Is a part of that "
    "face hidden in any of them: by a hand, a mask, dark glasses, a microphone, a cup, another person, or anything "
    "else in front of it? Turning away does not count. Answer with one word, yes or no."
)
CAPTION = (
    "These pictures are frames of one clip, in order. Describe the clip in one paragraph of at most 80 words: who is "
    "seen and what they look like, what they do from beginning to end, where they are, how the camera moves. Describe "
    "only what is seen, and answer with the description alone."
)


def check_occlusion(options, pictures, figures):
    """Refused where the vision-language model says that the face is occluded, or does not say whether it is."""
    answer = ask(options.vlm, options.vlm_model, OCCLUDED, pictures, options.vlm_timeout)
    occluded = yes_or_no(answer)
    if occluded is None:
        raise Refused("unclear", f"--vlm did not say yes or no to an occluded face, but {answer[:80]!r}", **figures)
    if occluded:
        raise Refused("occluded", f"the face is occluded, says {options.vlm_model}", **figures)


@torch.no_grad()
def fingerprint(encoder):
    """Eight numbers that tell face encoders apart, whatever file, device and precision they come in: the first ones of
    the unit embedding of a fixed picture."""
    ramp = torch.linspace(-1, 1, 3 * encoder.size**2).view(1, 3, encoder.size, encoder.size)
    embedding = encoder(ramp.to(next(encoder.parameters()).device))
    return [round(value, 4) for value in F.normalize(embedding.float(), dim=-1)[0, :8].tolist()]


def same_encoder(a, b):
    """Are two fingerprints of one encoder? Those of two differ by 0.04 a number, those of bf16 and fp32 by 0.0005."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < 0.005


# ---------------------------------------------------------------------------------------------------------------
# What train.py and eval.py read


class Clips:
    """A split of the training set that `python data.py` made, on `device`.

    len(clips); `batch(rows)` gives a dict of first [B, z, 1, h, w] (A14B: y [B, 4 + z, F', h, w]), context
    [B, L, text_dim] (zero-padded), caption (a list), row (the clips' numbers: one that cannot be read is told of, and
    the next stands in for it), and pool [B, F, 512] with pool_mask [B, F] bool (of several people: [B, P, F, ...]);
    `video(row)` gives the true clip, uint8 [F, H, W, 3], of an evaluation set its picture, F = 1. moving: keep this
    share of the clips, those whose faces move furthest (`face_travel`).
    UserError where the folder is no such set, or one for another model than the given one.
    """

    def __init__(self, folder, split, device="cpu", model=None, moving=1.0):
        self.folder, self.device = Path(folder), device
        index = self.folder / "index.jsonl"
        if not index.is_file():
            raise UserError(
                f"--data {folder}: no index.jsonl in it; make the set with: python data.py CLIPS --out {folder}"
            )
        rows = read_rows(index)
        for number, row in enumerate(rows, 1):  # a set from elsewhere may say what it likes
            cache = str(row.get("cache", ""))
            if os.path.isabs(cache) or os.path.normpath(cache).startswith(".."):
                raise UserError(f"{index}: line {number}: the cache file {cache} is outside the folder")
            lost = ", ".join(sorted({"clip", "cache", "caption", "split", "frames", "size"} - row.keys()))
            if lost:
                raise UserError(f"{index}: line {number} lacks {lost}; make the set again with data.py")
        self.rows = [row for row in rows if row["split"] == split]
        if not self.rows:
            raise UserError(f"--data {folder}: none of its {len(rows)} clips is in the split {split!r}")
        if moving < 1:
            if any("travel" not in row for row in self.rows):
                raise UserError(f"--moving: {folder} does not say how its faces move; make it anew with data.py")
            travel = sorted((row["travel"] for row in self.rows), reverse=True)
            least = travel[max(1, round(moving * len(travel))) - 1]
            self.rows = [row for row in self.rows if row["travel"] >= least]
        made_for = self.rows[0].get("model", model)
        if model is not None and made_for != model:
            raise UserError(
                f"--data {folder}: made for {made_for}; make one with: python data.py CLIPS --out DIR --model {model}"
            )

    def __len__(self):
        return len(self.rows)

    def check_encoder(self, encoder):
        """UserError where the pools were made with another face encoder than the given one."""
        made_with = self.rows[0].get("encoder")
        if made_with and not same_encoder(made_with, fingerprint(encoder)):
            raise UserError(f"--data {self.folder}: its faces were embedded with another network than that of --faces; "
                            f"name the folder that data.py was given, or make the set anew")  # fmt: skip

    def spread(self, count):
        """At most `count` row numbers, evenly spread, so that they cover as many identities as they can."""
        return sorted({int(i) for i in np.linspace(0, len(self) - 1, min(count, len(self))).round()})

    def latent_shape(self, preset, row):
        """(z, F', h, w) of a clip's latent."""
        row = self.rows[row]
        return preset.dit.out_dim, *latent_size(preset, row["frames"], tuple(row["size"]))

    def read(self, row):
        """What is cached of the first clip from `row` on that can be read, and its number."""
        for r in range(row, row + len(self)):
            path = self.folder / self.rows[r % len(self)]["cache"]
            try:
                return load_file(path), r % len(self)
            except (OSError, SafetensorError) as error:
                print(f"{path}: not readable ({error}); the next clip stands in for it", flush=True)
        raise UserError(f"--data {self.folder}: none of its clips can be read; make it again with data.py")

    def batch(self, rows):
        cached, rows = zip(*map(self.read, rows))
        sizes = {tuple(self.rows[r]["size"]) for r in rows}
        if len(sizes) > 1:
            raise UserError(f"--data {self.folder}: clips of several sizes in one batch; take --micro_batch 1")
        length = max(c["context"].shape[0] for c in cached)
        if cached[0].get("pool", torch.empty(0)).dim() == 3:  # clips of one person among clips of several
            most = max(len(c["pool"]) for c in cached)
            for c in cached:
                c["pool"] = F.pad(c["pool"], (0, 0, 0, 0, 0, most - len(c["pool"])))
                c["pool_mask"] = F.pad(c["pool_mask"], (0, 0, 0, most - len(c["pool_mask"])))
        batch = {
            "context": torch.stack([F.pad(c["context"].float(), (0, 0, 0, length - len(c["context"]))) for c in cached])
        }
        names = cached[0].keys() - {"context", "pool_mask"}
        batch |= {name: torch.stack([c[name].float() for c in cached]) for name in names}
        if "pool_mask" in cached[0]:
            batch["pool_mask"] = torch.stack([c["pool_mask"].bool() for c in cached])
        batch = {name: value.to(self.device) for name, value in batch.items()}
        batch |= dict(row=list(rows), caption=[self.rows[r]["caption"] for r in rows])
        return batch

    def video(self, row):
        row = self.rows[row]
        if "image" in row:
            return cover_and_crop(read_picture(self.folder / row["image"]).crop(row.get("crop")), row["size"])[None]
        path = self.folder / row["video"]
        try:
            frames = list(read_span(path, row["fps"], row.get("start", 0), row["frames"]))
            if len(frames) < row["frames"]:
                raise Refused("short", f"{len(frames)} frames, {row['frames']} were there when the set was made")
        except Refused as error:
            raise UserError(f"{path}: {error}; make the set again with data.py") from None
        return np.stack([cover_and_crop(frame.crop(row.get("crop")), row["size"]) for frame in frames])


def read_rows(path):
    """The lines of a .jsonl file as dicts. UserError for one that is no JSON object in UTF-8."""
    rows = []
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        try:
            rows += [dict(json.loads(line.decode()))] if line.strip() else []
        except (ValueError, TypeError):
            raise UserError(f"{path}: line {number} is not JSON: {line[:60].decode(errors='replace')}") from None
    return rows


# ---------------------------------------------------------------------------------------------------------------
# One clip


class Networks:
    """The networks that a process prepares clips with, and the time that each stage took: seconds and frames."""

    def __init__(self, options, device):
        self.wan = Wan(options.model, options.ckpt, device)
        self.reward = FaceReward.from_folder(options.faces, device, tiled=options.tiled)
        self.encoder = fingerprint(self.reward.encoder)
        self.seconds, self.frames = Counter(), Counter()

    def add(self, stage, seconds, frames=0):
        self.seconds[stage] += seconds
        self.frames[stage] += frames

    @contextlib.contextmanager
    def timed(self, stage, frames):
        """Count the time that passes inside to a stage."""
        began = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - began, frames)


def face_box(reward, pictures, size, people):
    """The box (x0, y0, x1, y1) of PIL images, of `size`'s shape, that holds the faces in all of them, nearest to the
    centre; None where the centre does. Refused where no such box is large enough."""
    width, height = pictures[0].size
    scale = max(size[1] / width, size[0] / height)
    whole = round(height * scale), round(width * scale)  # covers `size`, not cropped yet
    axis = 0 if whole[1] > size[1] else 1  # along which there is a choice: x or y
    span, room = (size[1], whole[1]) if axis == 0 else (size[0], whole[0])
    device = next(reward.encoder.parameters()).device
    video = to_tensor(np.stack([cover_and_crop(picture, whole) for picture in pictures])).to(device)
    faces = torch.cat([alignable(found).boxes[:people] for found in reward.detector(video[0].transpose(0, 1))])
    if not len(faces):
        return None
    margin = 0.4 * (faces[:, 2 + axis] - faces[:, axis])  # a head is larger than the detector's face
    low = float((faces[:, axis] - margin).min().clamp(min=0))
    high = float((faces[:, 2 + axis] + margin).max().clamp(max=room))
    if high - low > span:
        raise Refused("shape", f"{width}x{height}: no crop to the shape of {size[1]}x{size[0]} holds the face in all "
                               f"frames; --shape bucket keeps the whole picture")  # fmt: skip
    centre = (room - span) / 2
    start = min(max(centre, high - span), low)
    if start == centre:
        return None
    a, b = round(start / scale), round((start + span) / scale)
    return (a, 0, b, height) if axis == 0 else (0, a, width, b)


@torch.no_grad()
def prepare(networks, pictures, caption, options, preset):
    """One clip's tensors to cache, and its row of the index. Refused where it is not taken.

    pictures: a list of functions, each giving one frame as an upright PIL image, so that one at a time is in memory.
    """
    wan, reward, size, box = networks.wan, networks.reward, preset.size, None
    with networks.timed("decode", len(pictures)):
        first = pictures[0]()
    if options.shape == "bucket":
        size = best_size(preset, *first.size)
    ratio = first.width * size[0] / (first.height * size[1])
    lost = 1 - min(ratio, 1 / ratio)  # the share that is cropped away
    if lost > 0.05:
        if options.shape == "refuse":
            raise Refused("shape", f"{first.width}x{first.height}: {lost:.0%} of it would be cropped away")
        some = np.linspace(0, len(pictures) - 1, min(8, len(pictures))).astype(int)
        with networks.timed("detect and embed", 0):
            box = face_box(reward, [pictures[k]() for k in some], size, options.people)
    with networks.timed("decode", 0):
        frames = np.stack([cover_and_crop(picture().crop(box), size) for picture in pictures])
    video = to_tensor(frames).to(wan.device)
    with networks.timed("detect and embed", len(frames)):
        tensors, figures = filter_faces(reward, video, options)
    if options.vlm:
        shown = frames[np.linspace(0, len(frames) - 1, min(6, len(frames))).astype(int)]
        with networks.timed("ask", len(shown)):
            check_occlusion(options, shown, figures)
            if not caption and options.vlm_captions:
                caption = ask(options.vlm, options.vlm_model, CAPTION, shown, options.vlm_timeout)
    if not caption:
        raise Refused("caption", "an empty caption", **figures)
    with networks.timed("encode", 1):
        try:
            context = wan.encode_text([caption])[0]
        except UserError as error:  # too long
            raise Refused("caption", str(error), **figures) from None
        first, y = condition(wan, frames[0], options.frames)
    tensors |= dict(context=context[: int((context != 0).any(1).sum())])
    tensors |= dict(first=first[0]) if y is None else dict(y=y[0])
    row = dict(caption=caption, model=options.model, encoder=networks.encoder, frames=options.frames, size=list(size))
    row |= dict(crop=list(box)) if box else {}
    return row | figures, {
        k: v.half().cpu().contiguous() if v.is_floating_point() else v.cpu() for k, v in tensors.items()
    }


# ---------------------------------------------------------------------------------------------------------------
# Clips on disk: which there are, their captions

VIDEOS = ".mp4 .mov .mkv .webm .avi .m4v .mpg .mpeg .ts .mts .m2ts .wmv .flv .3gp .ogv .mxf .vob".split()


@dataclass
class Item:
    """A video or picture to look at: its path, its name in the set, and its caption (None: in a file beside it)."""

    path: Path
    name: str
    caption: str | None = None
    clip: str = ""  # what its clips are called: its name, without the suffix where that tells it from all others

    def __post_init__(self):
        self.clip = self.clip or os.path.splitext(self.name)[0]


def name_of(path, folder):
    """A name for a file that holds for its cache too: its path in the folder, or, where it lies elsewhere or that is
    no file name of ours, a hash of its path before its own name."""
    name = os.path.relpath(path, folder)
    if not name.startswith("..") and len(os.fsencode(name)) < 200 and name.encode(errors="ignore") == os.fsencode(name):
        return name
    stem = Path(path).stem.encode(errors="replace")[-80:].decode(errors="replace")
    return f"elsewhere/{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}_{stem}{Path(path).suffix}"


def find_videos(folder):
    """The videos in a folder and all below it, sorted; links are followed, each folder is entered once."""
    found, entered = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(place))
        folders.sort()
        found += [Path(place, f) for f in files if Path(f).suffix.lower() in VIDEOS and not f.startswith("._")]
    return sorted(found)


def list_items(source, pairs=False):
    """List the items to prepare, of a folder, a .csv or a .jsonl. UserError where that cannot be read."""
    source, column = Path(source), "image" if pairs else "video"
    if not source.exists():
        raise UserError(f"{source}: no such folder or file")
    if source.is_dir() and not pairs and (source / "metadata.csv").is_file():
        source = source / "metadata.csv"
    if source.is_dir():
        if pairs:
            raise UserError(f"--pairs {source}: is a folder; a .csv or .jsonl of image,prompt rows is needed")
        items = [Item(path, name_of(path, source)) for path in find_videos(source)]
        if not items:
            raise UserError(f"{source}: no video in it ({', '.join(VIDEOS)})")
        return tell_apart(items)
    if source.suffix.lower() not in (".csv", ".jsonl"):
        raise UserError(f"{source}: is neither a folder nor a .csv or .jsonl of {column},prompt rows")
    try:
        if source.suffix.lower() == ".csv":
            with open(source, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        else:
            rows = read_rows(source)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source}: not a readable list ({error}); it must be UTF-8") from None
    items = {}
    for number, row in enumerate(rows, 1):
        if not (isinstance(row.get(column), str) and row[column] and isinstance(row.get("prompt"), str)):
            raise UserError(f"{source}: row {number} has no {column} and prompt; it has {', '.join(map(str, row))}")
        path, prompt = source.parent / row[column], row["prompt"].strip()
        name = name_of(path, source.parent)
        if pairs:  # a picture may have several prompts
            name = f"{hashlib.sha256(prompt.encode()).hexdigest()[:8]}/{name}"
        if name in items:
            raise UserError(f"{source}: row {number}: {row[column]} is in the list twice")
        items[name] = Item(path, name, prompt)
    if not items:
        raise UserError(f"{source}: no rows in it")
    return tell_apart(list(items.values()))


def tell_apart(items):
    """The items, with a clip's name that no other item has: the file's suffix stays where two differ in that alone."""
    stems = Counter(item.clip for item in items)
    return [item if stems[item.clip] == 1 else dataclasses.replace(item, clip=item.name) for item in items]


def read_caption(item, optional):
    """An item's caption, from its list or the text file beside it; Refused where there is none and it must be."""
    file = item.path.with_suffix(".txt")
    caption = item.caption
    if caption is None and file.is_file():
        try:
            caption = file.read_text(encoding="utf-8-sig").strip()
        except (UnicodeDecodeError, OSError) as error:
            raise Refused("caption", f"{file.name} is not UTF-8 text, or not to be read ({error})") from None
    if not caption and not optional:
        raise Refused("caption", "no caption: " + (f"{file.name} is missing or empty" if item.caption is None
                                                   else "its prompt is empty"))  # fmt: skip
    return caption or ""


# ---------------------------------------------------------------------------------------------------------------
# One file: its clips into the cache, its lines for index.jsonl and rejected.jsonl


def spans_of(start, end, options):
    """The first frames of the clips that are taken of a shot."""
    last = end - options.frames
    if last < start:
        return []
    if options.spans == "uniform":
        return sorted({round(k) for k in np.linspace(start, last, options.span_count)})
    stride = options.frames if options.spans == "chunk" else options.span_stride or max(options.frames // 2, 1)
    return [start] if options.spans == "head" else list(range(start, last + 1, stride))


def spans_to_try(networks, item, options, fps):
    """Yield the spans of a video: (start frame, how many frames are repeated, its frames as functions)."""
    began = time.perf_counter()
    shots, repeated = survey(item.path, fps)
    networks.add("find cuts", time.perf_counter() - began, len(repeated))
    starts = []
    for start, end in shots:
        starts += spans_of(start, end, options)
        if end - start < options.frames:
            where = f" between two cuts, from {start / fps:.2f} s" if len(shots) > 1 else ""
            yield start, 0, f"{end - start} frames{where}, {options.frames} are needed (at {fps} a second)"
    window, starts, began = deque(maxlen=options.frames), deque(starts), time.perf_counter()
    frames = resample(decode(item.path), fps) if starts else ()
    for k, _, *shown in frames:
        window.append(functools.partial(upright, *shown))
        if k == starts[0] + options.frames - 1:
            networks.add("decode", time.perf_counter() - began)
            yield starts[0], sum(repeated[starts[0] + 1 : k + 1]), list(window)
            began = time.perf_counter()
            starts.popleft()
            if not starts:
                break


def prepare_file(networks, item, options, preset):
    """The lines that an item gives index.jsonl and rejected.jsonl, (kept, refused); its cache files are written."""
    out, kept, refused = Path(options.out), [], []
    column = "image" if options.pairs else "video"
    about = {"file": item.name, column: os.path.relpath(item.path, out)}

    def refuse(refusal, **where):
        refused.append(dict(clip=item.name, kind=refusal.kind, reason=str(refusal)) | where | about | refusal.figures)

    def keep(pictures, caption, **where):
        row, tensors = prepare(networks, pictures, caption, options, preset)
        mark = f"@{where['start']}" if where.get("start") else ""
        cache = Path("cache") / f"{item.name}{mark}.safetensors"
        (out / cache).parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(tensors, out / cache)
        kept.append(dict(clip=item.clip + mark, **about, cache=str(cache)) | where | row)

    try:
        caption = read_caption(item, options.vlm and options.vlm_captions)
        if options.pairs:
            try:
                picture = read_picture(item.path)
            except UserError as error:
                raise Refused("unreadable", str(error)) from None
            keep([lambda: picture], caption)
        else:
            for start, repeated, pictures in spans_to_try(networks, item, options, preset.fps):
                where = dict(start=start, fps=float(preset.fps), repeated=repeated)
                try:
                    if isinstance(pictures, str):
                        raise Refused("short", pictures)
                    if options.low_fps == "refuse" and repeated > max(1, 0.02 * options.frames):
                        raise Refused("low fps", f"{repeated} of {options.frames} frames would be repeated to reach "
                                                 f"{preset.fps} a second; --low_fps repeat lets them")  # fmt: skip
                    keep(pictures, caption, **where)
                except Refused as refusal:
                    refuse(refusal, **where)
    except Refused as refusal:  # the file as a whole, also where its damage came to light late
        kept, refused = [], []
        refuse(refusal)
    return kept, refused


# ---------------------------------------------------------------------------------------------------------------
# report.html


def histogram(values, title, unit):
    """An SVG of how many clips have which value."""
    counts, edges = np.histogram(values, 20)
    bars = "".join(
        f'<rect x="{18 * k + 1}" y="{90 - 80 * n / counts.max():.1f}" width="16" height="{80 * n / counts.max():.1f}">'
        f"<title>{edges[k]:.3g} to {edges[k + 1]:.3g}: {n} clips</title></rect>"
        for k, n in enumerate(counts)
    )
    scale = f'<text x="0" y="106">{edges[0]:.3g}</text><text x="360" y="106" text-anchor="end">{edges[-1]:.3g}</text>'
    return (f'<figure><figcaption>{title}, {unit}; median {np.median(values):.3g}</figcaption>'
            f'<svg viewBox="0 0 360 110">{bars}{scale}</svg></figure>')  # fmt: skip


def contact_strip(out, row, count, shown=4):
    """Frames of a clip side by side as an <img>, or why there is none."""
    try:
        if "image" in row:
            frames = [read_picture(out / row["image"])]
        elif "start" in row:
            wanted = {int(k) for k in np.linspace(0, count - 1, shown)}
            span = read_span(out / row["video"], row["fps"], row["start"], count)
            frames = [frame for k, frame in enumerate(span) if k in wanted]
        else:
            return "<i>no picture</i>"
    except (Refused, UserError) as error:
        return f"<i>no picture: {html.escape(str(error))}</i>"
    if not frames:
        return "<i>no picture: the video has become shorter</i>"
    if "size" in row:
        frames = [Image.fromarray(cover_and_crop(frame.crop(row.get("crop")), row["size"])) for frame in frames]
    for frame in frames:
        frame.thumbnail((240, 120))
    strip = Image.new("RGB", (sum(frame.width + 2 for frame in frames), max(frame.height for frame in frames)))
    for k, frame in enumerate(frames):
        strip.paste(frame, (sum(f.width + 2 for f in frames[:k]), 0))
    jpeg = io.BytesIO()
    strip.save(jpeg, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}">'


def write_report(out, kept, refused, options):
    """report.html: counts, how the kept clips' figures are spread, and contact sheets; nothing outside the file."""

    def sheet(rows, text):
        return "".join(f"<div>{contact_strip(out, row, options.frames)}<p>{html.escape(text(row))}</p></div>"
                       for row in rows)  # fmt: skip

    def some(rows, most):
        return [rows[k] for k in sorted({int(k) for k in np.linspace(0, len(rows) - 1, min(most, len(rows)))})]

    by_kind = {}
    for row in refused:
        by_kind.setdefault(row["kind"], []).append(row)
    by_kind = dict(sorted(by_kind.items(), key=lambda item: -len(item[1])))
    splits = Counter(row["split"] for row in kept)
    counts = [*((f"kept, {name}", splits[name], "") for name in SPLITS),
              *((f"refused: {kind}", len(rows), rows[0]["reason"]) for kind, rows in by_kind.items())]  # fmt: skip
    figures = dict(face_960=("largest face", "px at 960p"), coverage=("frames with a face", "share"),
                   travel=("travel of the face", "its own sizes"), agreement=("agreement of the pool", "mean cosine"),
                   motion=("change from frame to frame", "levels"), sharpness=("sharpness", "levels"))  # fmt: skip
    page = string.Template((Path(__file__).parent / "templates/data.html").read_text())
    text = page.substitute(
        model=options.model,
        filters=f"{options.frames} frames at {CONFIGS[options.model].fps} a second; a largest face of at most "
                f"{options.max_face:g} px at 960p; a face in {options.coverage:.0%} of the frames; "
                f"at most {options.people} person(s); "
                + (f"occlusion judged by {options.vlm_model}" if options.vlm else "occlusion not judged (--vlm)"),
        counts="".join(f"<tr><td>{a}</td><td>{n}</td><td>{html.escape(text)}</td></tr>" for a, n, text in counts),
        histograms="".join(histogram([r[k] for r in kept], *title) for k, title in figures.items()) if kept else "",
        kept=sheet(some(kept, 24), lambda row: f"{row['clip']}: {row['caption']} ({row['face_960']:.0f} px)"),
        refused="".join(f"<h3>{kind}</h3>" + sheet(some(rows, 4), lambda row: f"{row['clip']}: {row['reason']}")
                        for kind, rows in by_kind.items()),
    )  # fmt: skip
    write_text(out / "report.html", text)


# ---------------------------------------------------------------------------------------------------------------
# Many files, several processes, and going on after a kill: a file's lines are appended to parts/ when its cache files
# are written; when every file has its lines, they are put in order as index.jsonl and rejected.jsonl.


def check_options(options):
    """The preset as it is used here; defaults are filled in. UserError for options that cannot work."""
    preset = find_preset(options.model, options.ckpt)
    if not options.out:
        raise UserError("--out DIR is needed: the folder to make")
    if options.frames is None:
        options.frames = preset.frames
    if options.max_face is None:
        options.max_face = 750.0 if preset.shipped else 100.0  # tiny: 100 px of its frames of 128
    if options.vlm and not options.vlm.startswith(("http://", "https://")):
        raise UserError(f"--vlm {options.vlm}: not an address, as http://localhost:8000/v1 is one")
    if options.vlm_captions and not options.vlm:
        raise UserError("--vlm_captions: needs --vlm URL, who writes them")
    options.size = options.size or preset.size
    latent_size(preset, options.frames, options.size)
    return dataclasses.replace(preset, size=tuple(options.size))


def named_splits(items):
    """Do the names of items say their split, by train/ and heldout/? UserError where some do and others do not."""
    stray = [item for item in items if item.name.split("/")[0] not in SPLITS]
    if stray and len(stray) < len(items):
        raise UserError(f"{stray[0].path}: is in none of the sub-folders {' and '.join(SPLITS)}, others are; move it")
    return not stray


def check_out(out, options):
    """UserError where a folder cannot be made, or what was begun in it not be gone on with."""
    check_can_be_made(out)
    begun, now = read_options(out), options_of_set(options)
    if not is_empty(out) and "spans" not in (begun or {}):
        raise UserError(f"--out {out}: exists, is not empty and is no set of data.py's; name another folder")
    changed = [k for k in now if begun and begun.get(k, now[k]) != now[k]]
    if changed and read_parts(out):
        k = changed[0]
        raise UserError(f"--out {out}: begun with --{k} {begun[k]}, not {now[k]}; name another folder")


def options_of_set(options):
    """The options that decide what the set holds, as options.json has them."""
    others = ("clips", "out", "faces", "workers", "vlm", "vlm_timeout", "split")
    values = {name: value for name, value in dataclasses.asdict(options).items() if name not in others}
    return values | dict(size=list(options.size))


def read_parts(out):
    """What is done so far: of each file, by its name, its lines (kept, refused)."""
    done = {}
    for name, column in (("index.jsonl", 0), ("rejected.jsonl", 1)):
        for row in read_rows(out / name) if (out / name).is_file() else ():
            if "file" not in row:
                raise UserError(f"{out / name}: written by another version of data.py; name another --out")
            done.setdefault(row["file"], ([], []))[column].append(row)
    for path in sorted((out / "parts").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that a kill cut short: its file is prepared again
                file, kept, refused = json.loads(line)
                done[file] = kept, refused
    return done


worker = None  # of a process that prepares files: (networks, options, preset)


def start_worker(options, preset, threads):
    """Load the networks of this process. One that --workers started ends with the process that started it."""
    global worker
    torch.set_num_threads(threads)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    device = this_device()
    worker = Networks(options, device), options, preset


def prepare_item(item, *start):
    """Prepare an item: its lines (kept, refused), or the text of Unanswered; and seconds and frames of each stage."""
    if worker is None:
        start_worker(*start)
    networks, options, preset = worker
    try:
        lines = prepare_file(networks, item, options, preset)
    except Unanswered as problem:
        lines = str(problem)
    spent = networks.seconds, networks.frames
    networks.seconds, networks.frames = Counter(), Counter()
    return lines, *spent


def prepare_all(items, options, preset):
    """Yield (item, what `prepare_item` returns) as items are finished, by --workers processes."""
    threads = max(1, torch.get_num_threads() // options.workers)
    if options.workers == 1:
        for item in items:
            yield item, prepare_item(item, options, preset, threads)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, spawn) as pool:
        futures = {pool.submit(prepare_item, item, options, preset, threads): item for item in items}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError("a worker was killed (by a lack of memory?); run it again with fewer --workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def finish(out, items, options, named):
    """index.jsonl, rejected.jsonl and report.html from all files' lines; what else is in cache/ is removed."""
    done = read_parts(out)
    files = [done[item.name] for item in items if item.name in done]
    kept = [row for rows, _ in files for row in rows]
    refused = [row for _, rows in files for row in rows]
    order = sorted({row["file"] for row in kept}, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    count = min(max(1, round(options.split * len(order))), len(order) - 1) if options.split else 0
    held = set(order if options.pairs else order[: max(count, 0)])
    for row in kept:  # all clips of a file on one side
        row["split"] = row["clip"].split("/")[0] if named else SPLITS[row["file"] in held]
    names = {row["cache"] for row in kept}
    for path in [p for p in (out / "cache").rglob("*") if p.is_file() and str(p.relative_to(out)) not in names]:
        path.unlink()
    for name, rows in (("rejected.jsonl", refused), ("index.jsonl", kept)):
        write_text(out / name, "".join(json.dumps(row) + "\n" for row in rows))
    write_report(out, kept, refused, options)
    shutil.rmtree(out / "parts", ignore_errors=True)
    return kept, refused


def prepare_files(todo, out, options, preset, rank, made_with):
    """Prepare files and append their lines to parts/. Returns seconds and frames a stage, and how many --vlm did not
    answer. made_with: the face encoder's fingerprint in what is done, in a list, empty if nothing is."""
    seconds, frames, unanswered, failures = Counter(), Counter(), 0, 0
    with open(out / f"parts/{rank}.jsonl", "a") as part:
        part.write("\n")  # after a line that a kill may have cut short
        finished = prepare_all(todo, options, preset)
        for item, (lines, spent, count) in tqdm(finished, desc="files", total=len(todo), disable=rank > 0):
            seconds, frames = seconds + spent, frames + count
            if isinstance(lines, str):
                unanswered, failures = unanswered + 1, failures + 1
                if failures == 3:
                    raise UserError(f"{lines} (three files in a row); what is done is kept: run it again to go on")
                continue
            failures, new = 0, [line["encoder"] for line in lines[0]]
            made_with = made_with or new[:1]
            if new and not same_encoder(made_with[0], new[0]):
                raise UserError(f"--faces {options.faces}: not the network that {out} was begun with")
            part.write(json.dumps([item.name, *lines]) + "\n")
            part.flush()
    return seconds, frames, unanswered


def main():
    options = parse_options(DataOptions, doc=__doc__, positional=("clips",))
    preset, out = check_options(options), Path(options.out)
    check_out(out, options)
    items = list_items(options.clips, options.pairs)
    named = named_splits(items)
    if options.workers == 1:  # before anything is written: weights may be missing
        start_worker(options, preset, torch.get_num_threads())
    rank, ranks, _ = start_ranks(datetime.timedelta(days=30))  # the fastest one waits for the slowest at the end
    if rank == 0:
        lock = lock_folder(out)
        write_text(out / "options.json", json.dumps(options_of_set(options), indent=1) + "\n")
        (out / "parts").mkdir(exist_ok=True)
    gathered([])  # until --out is there
    began, done = time.perf_counter(), read_parts(out)
    todo = [item for item in items[rank::ranks] if item.name not in done]
    if rank == 0:
        height, width = preset.size
        print(f"largest face: {options.max_face:g} px at 960p, {options.max_face * min(preset.size) / 960:.1f} px of "
              f"{width}x{height}")  # fmt: skip
    if done and rank == 0:
        print(f"{out}: begun before, {len(done)} of {len(items)} files are done")
    made_with = [row["encoder"] for kept, _ in done.values() for row in kept][:1]
    figures = gathered([prepare_files(todo, out, options, preset, rank, made_with)])
    seconds, frames, unanswered = (sum(values[1:], values[0]) for values in zip(*figures))
    leave_ranks()
    if rank > 0:
        return
    for stage, spent in seconds.items():
        print(f"{stage}: {frames[stage]} frames in {spent:.1f} s, {frames[stage] / spent:.1f} a second")
    kept, refused = finish(out, items, options, named)
    lock.close()
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(row["kind"] for row in refused).most_common())
    print(f"{out}: {len(items)} files in {time.perf_counter() - began:.0f} s, {len(kept)} clips kept, {len(refused)} "
          f"refused{f' ({kinds})' if kinds else ''}; look at {out / 'report.html'}")  # fmt: skip
    if unanswered:
        print(f"{unanswered} files are still to do, since --vlm did not answer: run it again")
    if not kept:
        raise UserError(f"no clip of {options.clips} passed the filters; see {out / 'rejected.jsonl'}")
    if not options.pairs and not any(row["split"] == "heldout" for row in kept):
        print("nothing is held out, which train.py wants to measure by: add videos of other people, or put some into a "
              "folder CLIPS/heldout and the others into CLIPS/train")  # fmt: skip


if __name__ == "__main__":
    run(main)
