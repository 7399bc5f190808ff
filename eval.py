"""Measure a tuned model against its base on the held-out clips, both from the same noise.

    python eval.py                                    the tiny model, its shipped clips and out/lora.safetensors
    python eval.py --lora run/lora.safetensors --seeds 3 --out report

FaceSim: mean cosine of the face embeddings of the generated frames to that of the input picture (the paper's measure;
not the pool that the reward uses). Face rate: share of generated frames that show a face. Motion: mean speed of the
landmarks, in face sizes a frame. TF: VBench's temporal flickering, (255 - mean absolute difference of consecutive
8-bit frames) / 255; higher is steadier. The row `VAE` is the true clip through the autoencoder: no model that it
decodes can be expected to do better; `true clip` is the clip itself.
Writes --out/eval.json (every clip's figures), --out/eval.mp4 (true clip, base, LoRA side by side) and
--out/over_time.webp (two people, frames from left to right).
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from cli import UserError, gathered, option, parse_options, rank_and_ranks, run
from data import Clips
from model import ASSETS, CONFIGS
from reward import FaceReward
from sample import (
    fresh_noise,
    noise_like,
    rollout,
    sampling_assumptions,
    sigmas,
    to_bytes,
    to_frames,
    to_tensor,
    write_video,
)
from weights import Checkpoint, find_preset, load_model, load_weights, parse_loras

SHOWN = 6  # clips of a comparing video

# ---------------------------------------------------------------------------------------------------------------
# Metrics of one clip


def face_similarity(embeddings, mask, image):
    """FaceSim: mean cosine of embeddings [F, D], where mask [F], to the input picture's image [D]; None of no face."""
    if not mask.any():
        return None
    return float(F.cosine_similarity(embeddings[mask], image[None]).mean())


def landmark_speed(landmarks, boxes, mask):
    """Motion: mean landmark speed over the face's size, a frame, of landmarks [F, 5, 2], boxes [F, 4] and mask [F].

    None where no two neighbouring frames show a face.
    """
    both = mask[1:] & mask[:-1]
    if not both.any():
        return None
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).prod(1).sqrt()
    speed = landmarks.diff(dim=0).norm(dim=-1).mean(1) / ((size[1:] + size[:-1]) / 2)
    return float((speed * both).sum() / both.sum())


def temporal_flickering(video):
    """VBench's TF in 0..1 of a video [1, 3, F, H, W] in [-1, 1]: 1 - mean |8-bit frame - the one before| / 255."""
    frames = to_bytes(video)[0].unbind(1)  # a pair at a time: all of a 720p clip's differences would take gigabytes
    steps = [(b.float() - a.float()).abs().mean() for a, b in pairwise(frames)]
    return 1 - float(torch.stack(steps).mean()) / 255 if steps else 1.0


def clip_metrics(video, faces, image=None):
    """FaceSim, face rate, motion and TF of a video [1, 3, F, H, W], as a dict; None where there is nothing to measure.

    faces and image: `FaceReward.detect_and_embed` of the video and of its input picture (no picture: no FaceSim).
    """
    mask, similarity = faces["mask"][0], None
    if image is not None and image["mask"][0, 0]:
        similarity = face_similarity(faces["embeddings"][0].detach(), mask, image["embeddings"][0, 0])
    return dict(
        facesim=similarity, face_rate=float(mask.float().mean()),
        motion=landmark_speed(faces["landmarks"][0], faces["boxes"][0], mask), tf=temporal_flickering(video),
    )  # fmt: skip


def measure(video, image, reward, judge=None):
    """`clip_metrics` of a video and its input picture [1, 3, 1, H, W] by `reward`; its FaceSim by a second FaceReward,
    `judge`, beside them."""
    metrics = clip_metrics(video, reward.detect_and_embed(video), reward.detect_and_embed(image))
    if judge is not None:
        metrics["judge"] = clip_metrics(video, judge.detect_and_embed(video), judge.detect_and_embed(image))["facesim"]
    return metrics


class Judge:
    """A second face reward that only watches training: the score that it would have given, so that hacking shows."""

    def __init__(self, folder, clips, device):
        self.reward, self.clips, self.pools = FaceReward.from_folder(folder, device), clips, {}

    @torch.no_grad()
    def score(self, row, video):
        """R of a video [1, 3, F, H, W] against the faces of the set's true clip `row`; None without a face."""
        if row not in self.pools:
            true = self.reward.detect_and_embed(to_tensor(self.clips.video(row)).to(video.device))
            self.pools[row] = true["embeddings"].cpu(), true["mask"].cpu()
        score, faces = self.reward.score(video, *(x.to(video.device) for x in self.pools[row]))
        return None if faces["missing"] else float(score)


# ---------------------------------------------------------------------------------------------------------------
# Held-out clips


@torch.no_grad()
def sample_held_out(wan, reward, clips, rows, steps, seed=0, judge=None, at_once=1, show=SHOWN, solver="euler"):
    """Sample held-out clips with noise that depends on clip and seed only; the ranks share the work.

    rows: the clips' numbers; steps: Euler steps; judge: a second FaceReward, whose FaceSim is reported as `judge`;
    at_once: clips sampled together. Returns the metrics of each row, the same on every rank, and the uint8 frames
    [F, H, W, 3] of `show` rows spread over them, by row, on rank 0 (no other clip's frames outlive their metrics).
    """
    rank, ranks = rank_and_ranks()
    schedule, metrics, frames, shown = sigmas(steps, wan.preset.shift), {}, {}, shown_rows(rows, show)
    own = [rows[(i + rank) % len(rows)] for i in range(0, len(rows), ranks)]  # as many for each: FSDP2 needs it
    bar = tqdm(total=len(own), desc="held-out clips", leave=False, disable=rank > 0)
    for start in range(0, len(own), at_once):
        some = own[start : start + at_once]
        batch = clips.batch(some)
        shape = clips.latent_shape(wan.preset, batch["row"][0])
        noise = torch.stack([noise_like(shape, seed, row) for row in some]).to(batch["context"].device)
        fresh, first, y = None, batch.get("first"), batch.get("y")
        if solver == "renoise":
            fresh = fresh_noise(noise.shape, steps, *((seed, row) for row in some), device=noise.device)
        wan.at_work("dit")
        (latent,) = rollout(wan.dit, noise, first, batch["context"], schedule, y=y, fresh=fresh)
        wan.at_work("vae")
        videos = wan.vae.decode(latent)
        for row, read, video in zip(some, batch["row"], videos.split(1)):
            image = to_tensor(clips.video(read)[:1]).to(noise.device)
            metrics[row] = measure(video, image, reward, judge)
            if row in shown:
                frames[row] = to_frames(video)
            bar.update()
    bar.close()
    metrics = dict(gathered(list(metrics.items())))
    return [metrics[row] for row in rows], dict(gathered(list(frames.items()), everywhere=False))


def shown_rows(rows, most=SHOWN):
    """At most `most` of the rows, evenly spread: those whose frames are kept for a comparing video."""
    return [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(most, len(rows))).round()]


@torch.no_grad()
def references(wan, reward, clips, rows, judge=None):
    """Metrics of the true clips and of the true clips through the VAE."""
    true, coded = [], []
    for row in tqdm(rows, desc="VAE ceiling", leave=False):
        video = to_tensor(clips.video(row)).to(clips.device)
        image = video[:, :, :1]
        true.append(measure(video, image, reward, judge))
        coded.append(measure(wan.vae.decode(wan.vae.encode(video)), image, reward, judge))
    return true, coded


def mean_metrics(results):
    """Means over clips, by metric; what a clip lacks is left out of its mean."""
    values = {n: [r[n] for r in results if r[n] is not None] for n in results[0]}
    return {n: float(np.mean(v)) if v else float("nan") for n, v in values.items()}


COLUMNS = dict(
    facesim=("FaceSim", 3), judge=("judge's", 3), face_rate=("face rate", 3), motion=("motion", 4), tf=("TF", 4)
)


def table(rows):
    """Rows of (name, `mean_metrics`) as text."""
    shown = {n: c for n, c in COLUMNS.items() if n in rows[0][1]}
    lines = [f"{'':12}" + "".join(f"{title:>11}" for title, _ in shown.values())]
    for name, means in rows:
        lines.append(f"{name:12}" + "".join(f"{means[n]:11.{digits}f}" for n, (_, digits) in shown.items()))
    return "\n".join(lines)


def side_by_side(columns, rows):
    """Several clips as one video: a row of the picture a clip, a column a version; columns: dicts of uint8 [F, H, W, 3]
    by clip."""
    return np.concatenate([np.concatenate([c[r] for c in columns], 2) for r in rows], 1)


def over_time(clips, count=9):
    """A picture of clips over time, a named row each: (name, uint8 [F, H, W, 3]) pairs to a PIL image."""
    _, height, width, _ = clips[0][1].shape
    band = 24 + width // 4  # left of the rows, for their names
    picture = Image.new("RGB", (band + count * width, len(clips) * height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for k, (name, frames) in enumerate(clips):
        chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
        picture.paste(Image.fromarray(np.concatenate(frames[chosen], 1)), (band, k * height))
        draw.text((band - 6, (k + 0.5) * height), name, "black", font, anchor="rm")
    return picture


def compute_dtype(precision, device):
    """The type that networks with fp32 weights compute in: bf16, or None for fp32.

    precision: "bf16", "fp32", or "" for bf16 where the device computes it natively.
    """
    native = device.type == "cuda" or any(torch.cpu.get_capabilities().get(k) for k in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if precision == "bf16" or (native and not precision) else None


# ---------------------------------------------------------------------------------------------------------------
# The program


@dataclass
class EvalOptions:
    model: str = option("tiny", f"preset: {', '.join(CONFIGS)}")
    ckpt: str = option("", "folder with the model's weights; tiny ships its own")
    base_lora: str = option("", "a distilled base's LoRA, merged: [high=|low=]FILE[:STRENGTH], comma-separated")
    lora: str = option("out/lora.safetensors", "the tuned model's LoRA (or LoRAs, as --base_lora), or all its weights "
                       "(dit.safetensors)")  # fmt: skip
    data: str = option(str(ASSETS / "data"), "folder that data.py made")
    out: str = option("eval", "folder for eval.json and eval.mp4")
    faces: str = option(str(ASSETS), "folder with a face detector and encoder")
    judge: str = option("", "folder with a second detector and encoder, for its own FaceSim, e.g. buffalo_l")
    tiled: bool = option(False, "detect again, enlarged and in tiles, where faces are small against the frame")
    clips: int = option(60, "held-out clips to sample", least=1)
    seeds: int = option(1, "samples of each clip, with different noise", least=1, most=1000)
    sampling_steps: int = option(8, "Euler steps of a sample", least=1, most=1000)
    shift: float = option(0.0, "of the noise schedule, as in training; 0 = the preset's", least=0)
    solver: str = option("euler", "as in training", choices=("euler", "renoise"))
    precision: str = option("", "of the networks; default: bf16 where the device computes it natively",
                            choices=("", "bf16", "fp32"))  # fmt: skip


def main():
    options = parse_options(EvalOptions, doc=__doc__)
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not empty; name another folder")
    if options.lora == EvalOptions.lora and not Path(options.lora).is_file():
        raise UserError(f"--lora {options.lora}: no such file; train one with: python train.py")
    preset = find_preset(options.model, options.ckpt, options.shift)
    base = parse_loras(options.base_lora, preset, "--base_lora")
    names = Checkpoint(options.lora).shapes if Path(options.lora).is_file() else ()
    whole = any(name.endswith("patch_embedding.weight") for name in names)
    loras = [] if whole else parse_loras(options.lora, preset)
    if not whole and not loras:
        raise UserError("--lora: what is to be measured? A LoRA, or all of a tuned model's weights")
    if preset.folder is None:
        steps = options.sampling_steps
        print(sampling_assumptions(options.model, options.solver, steps, preset.shift, 1, options.base_lora))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if options.precision == "fp32" else None
    wan = load_model(options.model, options.ckpt, device, dtype, shift=options.shift,
                     compute_dtype=compute_dtype(options.precision, device), base_loras=base)  # fmt: skip
    reward = FaceReward.from_folder(options.faces, device, tiled=options.tiled)
    judge = FaceReward.from_folder(options.judge, device, tiled=options.tiled) if options.judge else None
    print(f"face detector on {reward.detector.provider}")
    clips = Clips(options.data, "heldout", device, options.model)
    rows = clips.spread(options.clips)
    true, coded = references(wan, reward, clips, rows, judge)
    results, videos = {"true clip": true, "VAE": coded, "base": [], "LoRA": []}, {}
    for name in ("base", "LoRA"):
        if name == "LoRA":
            if whole:
                load_weights(wan.tuned, options.lora)
            wan.attach(loras)
        for seed in range(options.seeds):
            metrics, frames = sample_held_out(wan, reward, clips, rows, options.sampling_steps, seed, judge,
                                              solver=options.solver)  # fmt: skip
            results[name] += metrics
            videos.setdefault(name, frames)
    out.mkdir(parents=True, exist_ok=True)
    per_clip = {name: [dict(clip=clips.rows[rows[i % len(rows)]]["clip"], **r) for i, r in enumerate(values)]
                for name, values in results.items()}  # fmt: skip
    (out / "eval.json").write_text(json.dumps(per_clip, indent=1))
    shown = shown_rows(rows)
    columns = [{r: clips.video(r) for r in shown}, videos["base"], videos["LoRA"]]
    write_video(out / "eval.mp4", side_by_side(columns, shown), wan.preset.fps)
    named = [(name, column[r]) for r in shown[:: max(1, len(shown) - 1)]
             for name, column in zip(("true", "base", "tuned"), columns)]  # fmt: skip
    over_time(named).save(out / "over_time.webp", quality=90)
    print(f"{len(rows)} held-out clips, {options.seeds} noise seed(s); TF and FaceSim: higher is better")
    print(table([(name, mean_metrics(values)) for name, values in results.items()]))


if __name__ == "__main__":
    run(main)
