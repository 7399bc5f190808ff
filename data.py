"""From a folder of clips with captions to a training set: detect, filter, embed the faces, encode, cache.

    python data.py CLIPS --out DIR

CLIPS holds videos with their captions beside them (a.mp4, a.txt); sub-folders `train` and `heldout`, where there
are such, say which clips are never trained on, otherwise --split holds a share out. DIR receives index.jsonl (a
line a kept clip), rejected.jsonl (a line a refused clip, with the reason) and cache/*.safetensors (per clip: the
pool of face embeddings, the first frame's latent or A14B's y, the prompt's context). train.py and eval.py read it.

The paper's filters (arXiv 2510.14255): the largest face at most 100 px a side in every frame, a face in at least
40 % of the frames; the embedding of every frame with a face is kept: they are the pool that FSM compares with.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from cli import UserError, option, parse_options, run
from model import ASSETS, CONFIGS
from reward import FaceReward
from sample import condition, fit, latent_size, read_video, to_frames, to_tensor
from weights import find_preset, load_model, write_safetensors

SPLITS = ("train", "heldout")


class Clips:
    """A split of the training set that `python data.py` made, on `device`.

    len(clips); `batch(rows)` gives a dict of first [B, z, 1, h, w] (A14B: y [B, 4 + z, F', h, w]), context
    [B, L, text_dim] (zero-padded), caption (a list), row (the clips' numbers: one that cannot be read is told of, and
    the next stands in for it), and pool [B, F, 512] with pool_mask [B, F] bool (of several people: [B, P, F, ...]), or
    latent [B, z, F', h, w] where the set was made with --latents; `video(row)` gives the true clip, uint8
    [F, H, W, 3]. moving: keep this share of the clips, those whose faces move furthest (`face_travel`).
    UserError where the folder is no such set, or one for another model than the given one.
    """

    def __init__(self, folder, split, device="cpu", model=None, moving=1.0):
        self.folder, self.device = Path(folder), device
        index = self.folder / "index.jsonl"
        if not index.is_file():
            raise UserError(
                f"--data {folder}: no index.jsonl in it; make the set with: python data.py CLIPS --out {folder}"
            )
        rows = [json.loads(line) for line in index.read_text().splitlines()]
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
        frames, _ = read_video(self.folder / row["video"], row["frames"])
        return np.stack([fit(Image.fromarray(f), row["size"]) for f in frames])


@dataclass
class DataOptions:
    clips: str = option("", "folder of videos with captions: a.mp4 and a.txt")
    out: str = option("", "folder to make")
    model: str = option("tiny", f"preset: {', '.join(CONFIGS)}")
    ckpt: str = option("", "folder with the model's weights; tiny ships its own")
    faces: str = option(str(ASSETS), "folder with a face detector and encoder, e.g. antelopev2")
    frames: int | None = option(None, "frames of a clip, 4n+1, counted from its start; default: the preset's")
    size: tuple[int, int] | None = option(None, "HxW in pixels, covered and centre-cropped; default: the preset's")
    max_face: float = option(100.0, "largest side in pixels that a clip's largest face may have in any frame")
    coverage: float = option(0.4, "smallest share of frames that show a face")
    people: int = option(
        1, "most people of a clip (one more in under a tenth of the frames is let pass); each has a pool"
    )
    tiled: bool = option(False, "look again, enlarged and in tiles, where faces are small against the frame")
    split: float = option(0.1, "share of clips held out, where the folder has no train/ and heldout/ (which keep the "
                               "clips of one person together; a share does not)")  # fmt: skip
    latents: bool = option(False, "cache whole clips' latents, for --objective sft, instead of looking for faces")


class Refused(Exception):
    """Why a clip is not taken."""


def read_clip(path, frames, size):
    """A clip's caption, its first `frames` frames as a video [1, 3, F, H, W], and its frames per second."""
    file = path.with_suffix(".txt")
    try:
        caption = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
        video, fps = read_video(path, frames)
    except UnicodeDecodeError as error:
        raise Refused(f"{file.name} is not UTF-8 text ({error})") from None
    except UserError as error:
        raise Refused(str(error)) from None
    if not caption:
        raise Refused(f"no caption: {file.name} is missing or empty")
    if len(video) < frames:
        raise Refused(f"{len(video)} frames, {frames} are needed")
    return caption, to_tensor(np.stack([fit(Image.fromarray(frame), size) for frame in video])), fps


def face_travel(info):
    """How far a clip's face gets from its first place, from `detect_and_embed`: mean over frames, in sizes of the face.

    0 where no frame shows a face.
    """
    seen = info["mask"][0]
    if not seen.any():
        return 0.0
    place, box = info["landmarks"][0][seen].mean(1), info["boxes"][0][seen][0]
    return float((place - place[0]).norm(dim=-1).mean() / (box[2:] - box[:2]).prod().sqrt())


def pool_of(reward, video, options):
    """The pool (embeddings and mask of every frame with a face) and what the index says of the faces; or Refused."""
    info = reward.detect_and_embed(video)
    seen = info["mask"][0]
    coverage = float(seen.float().mean())
    crowd = float((info["count"][0] > options.people).float().mean())
    if coverage < options.coverage:
        raise Refused(f"a face in {coverage:.0%} of the frames, {options.coverage:.0%} are needed")
    boxes = info["boxes"][0][seen]
    side = float((boxes[:, 2:] - boxes[:, :2]).max()) if len(boxes) else 0.0
    if side > options.max_face:
        raise Refused(f"a face of {side:.1f} px, at most {options.max_face:g} are allowed")
    if crowd > 0.1:
        raise Refused(f"more than {options.people} face(s) in {crowd:.0%} of the frames")
    pool, mask = info["embeddings"][0], seen
    if options.people > 1:
        pool, mask = reward.identities(video, options.people)
    about = dict(coverage=round(coverage, 3), face=round(side, 1), travel=round(face_travel(info), 4))
    return dict(pool=pool, pool_mask=mask.byte()), about


@torch.no_grad()
def prepare(wan, reward, path, options, frames, size):
    """One clip's tensors to cache, and its row of the index. Raises Refused with the reason why it is not taken."""
    caption, video, fps = read_clip(path, frames, size)
    video = video.to(next(wan.vae.parameters()).device)
    try:
        context = wan.encode_text([caption])[0]
    except UserError as error:
        raise Refused(str(error)) from None
    tensors = dict(context=context[: int((context != 0).any(1).sum())])
    row = dict(caption=caption, model=options.model, frames=frames, size=list(size), fps=fps)
    if options.latents:
        with torch.autocast(video.device.type, torch.bfloat16):  # off by 1.5 % of their size, in half the time
            tensors["latent"] = wan.vae.encode(video)[0].float()
    else:
        faces, about = pool_of(reward, video, options)
        tensors |= faces
        row |= about
    first, y = condition(wan, to_frames(video[:, :, :1])[0], frames)
    tensors |= dict(first=first[0]) if y is None else dict(y=y[0])
    return row, {k: v.half().cpu().contiguous() if v.is_floating_point() else v.cpu() for k, v in tensors.items()}


def main():
    options = parse_options(DataOptions, doc=__doc__, positional=("clips",))
    source, out = Path(options.clips), Path(options.out)
    if not options.out:
        raise UserError("--out DIR is needed: the folder to make")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not empty; name another folder")
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".mp4", ".mov", ".mkv", ".webm", ".avi"))
    if not files:
        raise UserError(f"{source}: no video in it (.mp4, .mov, .mkv, .webm, .avi)")
    preset = find_preset(options.model, options.ckpt)
    frames, size = preset.frames if options.frames is None else options.frames, options.size or preset.size
    latent_size(preset, frames, size)
    stray = [p for p in files if p.relative_to(source).parts[0] not in SPLITS]
    named = len(stray) < len(files)
    if named and stray:
        raise UserError(f"{source}: has {' or '.join(SPLITS)} sub-folders, but {stray[0]} is in neither; move it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wan = load_model(options.model, options.ckpt, device)
    reward = None if options.latents else FaceReward.from_folder(options.faces, device, tiled=options.tiled)
    if reward is not None:
        print(f"face detector on {reward.detector.provider}")
    held = set(np.random.default_rng(0).permutation(len(files))[: round(options.split * len(files))])
    (out / "cache").mkdir(parents=True)
    kept = 0
    with open(out / "index.part", "w") as index, open(out / "rejected.jsonl", "w") as rejected:
        for i, path in enumerate(tqdm(files, desc="clips")):
            name = path.relative_to(source).with_suffix("")
            try:
                row, tensors = prepare(wan, reward, path, options, frames, size)
            except Refused as reason:
                print(
                    json.dumps(dict(clip=str(path.relative_to(source)), reason=str(reason))), file=rejected, flush=True
                )
                continue
            split = name.parts[0] if named else SPLITS[i in held]
            cache = Path("cache") / ("_".join(name.parts) + ".safetensors")
            if (out / cache).exists():  # of a/b_c.mp4 and a_b/c.mp4, of x.mp4 and x.mov
                cache = cache.with_stem(f"{cache.stem}_{i}")
            write_safetensors(tensors, out / cache)
            where = dict(clip=str(name), split=split, video=os.path.relpath(path, out), cache=str(cache))
            print(json.dumps(where | row), file=index, flush=True)
            kept += 1
    (out / "index.part").replace(out / "index.jsonl")
    print(f"{out}: {kept} clips kept, {len(files) - kept} refused (reasons in {out / 'rejected.jsonl'})")
    if not kept:
        raise UserError(f"no clip of {source} passed the filters; see {out / 'rejected.jsonl'}")


if __name__ == "__main__":
    run(main)
