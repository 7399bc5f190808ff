"""Does tuning keep the person, and what does it cost? Base and tuned models on held-out people, from the same noise.

    python eval.py                                    the tiny model, its held-out clips and out/lora.safetensors
    python eval.py --lora "a.safetensors; b.safetensors" --seeds 3 --judge buffalo_l --out report
    torchrun --nproc_per_node 8 eval.py --model wan5b --ckpt wan5b --data data --faces antelopev2

FaceSim is the paper's (arXiv 2510.14255): the mean cosine of the face embeddings of a clip's frames to that of the
input picture. Here it leaves out frame 0, which is given; with it, and with faceless frames counted as zero, it stands
beside. A score must not rise because a face is lost or because nothing moves any more: so each comes with the share of
faceless frames, the motion, and three controls: the true clip, the true clip through the VAE (no model that it decodes
can be expected to do better), and the picture repeated, which beats all of them in FaceSim.

Each version of each held-out clip is an mp4 in --out/clips/<version>/, and what these files hold is what is scored: a
stopped run goes on where it was when it is started again. Means are over people, with 95 % bootstrap intervals; models
are compared clip by clip; seeds are repeats of a person. Writes results.json (every clip) and report.html into --out.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read as torch is imported: its threads wait without spinning for long

import functools
import hashlib
import itertools
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import external_metrics
import report
from cli import (
    UserError,
    check_can_be_made,
    gathered,
    is_empty,
    leave_ranks,
    lock_folder,
    option,
    parse_options,
    rank_and_ranks,
    read_options,
    run,
    start_ranks,
    whole_file,
    write_text,
)
from data import Clips
from model import ASSETS, CONFIGS
from report import CONTROLS
from report import table as table  # for train.py, which imports what it shows from here
from reward import FaceReward
from sample import (
    fresh_noise,
    read_video,
    rollout,
    sampling_assumptions,
    seeded_noise,
    sigmas,
    to_bytes,
    to_frames,
    to_tensor,
    write_video,
)
from weights import (
    Checkpoint,
    Wan,
    blank,
    expected,
    find_preset,
    load_weights,
    match,
    parse_loras,
    read_lora,
)

SHOWN = 6  # clips of a comparing video

# ---------------------------------------------------------------------------------------------------------------
# Metrics of one clip


def similarities(embeddings, mask, image):
    """Cosine of the face in each frame, embeddings [..., F, D], to the input picture's, image [..., D]: [..., F].

    NaN where mask [..., F] is false: the frame does not show the face.
    """
    return F.cosine_similarity(embeddings, image[..., None, :], dim=-1).masked_fill(~mask, torch.nan)


def face_similarity(cosine, first=1, faceless=None):
    """FaceSim of `similarities` [F]: their mean over the frames from `first` on; None where none shows the face.

    faceless: what a frame without the face counts as; None leaves it out, as the paper does.
    """
    cosine = cosine[first:]
    cosine = cosine[cosine.isfinite()] if faceless is None else cosine.nan_to_num(faceless)
    return float(cosine.mean()) if len(cosine) else None


def opens2v_similarity(cosine):
    """OpenS2V-Eval's FaceSim of `similarities` [F]: mean of max(0, cosine) over 32 frames, evenly spread from 0 on."""
    chosen = cosine[torch.linspace(0, len(cosine) - 1, 32).long()]
    return face_similarity(chosen.clamp(min=0), first=0)


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


def yaw_and_mouth(landmarks):
    """Head yaw in degrees [n] and the mouth's width over the eyes' distance [n], of landmarks [n, 5, 2].

    A nose tip that stands out by 0.6 eye distances is seen tan(yaw) 0.6 of them beside the eyes' middle; on the tiny
    world's people the angle's correlation with the truth is 0.98.
    """
    left, right, nose, mouth_left, mouth_right = landmarks.unbind(1)
    distance = (right - left).norm(dim=1).clamp(min=1e-6)
    beside = ((nose - (left + right) / 2) * (right - left)).sum(1) / distance**2
    return torch.rad2deg(torch.atan(beside / 0.6)), (mouth_right - mouth_left).norm(dim=1) / distance


def temporal_flickering(video):
    """VBench's TF in 0..1 of a video [1, 3, F, H, W] in [-1, 1]: 1 - mean |8-bit frame - the one before| / 255."""
    frames = to_bytes(video)[0].unbind(1)  # a pair at a time: all of a 720p clip's differences would take gigabytes
    steps = [(b.float() - a.float()).abs().mean() for a, b in itertools.pairwise(frames)]
    return 1 - float(torch.stack(steps).mean()) / 255 if steps else 1.0


def clip_metrics(video, faces, image=None):
    """FaceSim (with frame 0, and from 1 on), face rate, motion and TF of a video [1, 3, F, H, W]: what training logs.

    faces and image: `FaceReward.detect_and_embed` of the video and of its input picture (no picture: no FaceSim). A
    dict; None where there is nothing to measure.
    """
    mask, facesim, from_1 = faces["mask"][0], None, None
    if image is not None and image["mask"][0, 0]:
        cosine = similarities(faces["embeddings"][0].detach(), mask, image["embeddings"][0, 0])
        facesim, from_1 = face_similarity(cosine, 0), face_similarity(cosine)
    return dict(
        facesim=facesim, facesim_from_1=from_1, face_rate=float(mask.float().mean()),
        motion=landmark_speed(faces["landmarks"][0], faces["boxes"][0], mask), tf=temporal_flickering(video),
    )  # fmt: skip


def mean_or_none(values):
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


@torch.no_grad()
def face_metrics(video, picture, reward, people="largest", opens2v=False, landmarks=None):
    """All that is measured of the faces of a video [1, 3, F, H, W], whose input picture is [1, 3, 1, H, W].

    people: "largest" follows the largest face of each frame; "all" each person of the picture, and a metric is the mean
    over them. landmarks: `external_metrics.read_landmarks`, for the openings of eyes and mouth. Returns a dict of
    facesim_from_1, facesim (frame 0 too), facesim_zero (from 1 on, a faceless frame counts as 0), faceless (share of
    the frames from 1 on), over_time (cosine by frame), persons (each one's FaceSim), face_size (longer side in the
    picture, px), motion, yaw_range (10th to 90th percentile, degrees), mouth_width and openings (standard deviation
    over time). None where there is nothing to measure.
    """
    _, found, _ = reward.embed(picture[:, :, 0], most=1 if people == "largest" else None)
    image = found["embeddings"]  # [P, D], largest first
    several = len(image) > 1
    faces = reward.detect_and_embed(video, image[None] if several else None)
    faces = {name: value[0] if several else value for name, value in faces.items()}  # [P, F, ...]
    mask, points = faces["mask"], faces["landmarks"]
    cosine = similarities(faces["embeddings"], mask, image) if len(image) else torch.full(mask.shape, torch.nan)
    persons = [face_similarity(c) for c in cosine]
    shown = cosine.nanmean(0).tolist()
    metrics = dict(
        facesim_from_1=mean_or_none(persons), facesim=mean_or_none(face_similarity(c, 0) for c in cosine),
        facesim_zero=mean_or_none(face_similarity(c, faceless=0.0) for c in cosine) if len(image) else None,
        faceless=1 - float(mask[:, 1:].float().mean()),
        motion=mean_or_none(map(landmark_speed, points, faces["boxes"], mask)),
        face_size=float((found["boxes"][0, 2:] - found["boxes"][0, :2]).max()) if len(image) else None,
        over_time=[None if np.isnan(c) else c for c in shown], persons=persons,
    )  # fmt: skip
    yaws, mouths = zip(*(yaw_and_mouth(p[m]) for p, m in zip(points, mask)))
    metrics["yaw_range"] = mean_or_none(float(y.quantile(0.9) - y.quantile(0.1)) if len(y) > 1 else None for y in yaws)
    metrics["mouth_width"] = mean_or_none(float(w.std()) if len(w) > 1 else None for w in mouths)
    if opens2v:
        metrics["opens2v"] = mean_or_none(map(opens2v_similarity, cosine))
    if landmarks is not None:
        openings = [external_metrics.openings(video[0, :, m].transpose(0, 1), box[m], landmarks)
                    for box, m in zip(faces["boxes"], mask)]  # fmt: skip
        for name, k in (("eye_opening", 0), ("mouth_opening", 1)):
            metrics[name] = mean_or_none(float(o[:, k].std()) if len(o) > 1 else None for o in openings)
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


def mean_metrics(results):
    """Means over clips, by metric; what a clip lacks is left out of its mean."""
    values = {n: [r[n] for r in results if r[n] is not None] for n in results[0]}
    return {n: float(np.mean(v)) if v else float("nan") for n, v in values.items()}


# ---------------------------------------------------------------------------------------------------------------
# Held-out clips in memory: what train.py samples now and then


@torch.no_grad()
def sample_clips(wan, clips, rows, seed, steps, solver="euler"):
    """Sample held-out clips `rows` together, with noise that depends on clip and seed only.

    solver: "euler" or "renoise", as in training. Returns the numbers of the clips read (`Clips.batch`'s) and a video
    [1, 3, F, H, W] in [-1, 1] for each.
    """
    batch = clips.batch(rows)
    shape = clips.latent_shape(wan.preset, batch["row"][0])
    noise = torch.stack([seeded_noise(shape, seed, row) for row in rows]).to(batch["context"].device)
    fresh, first, y, schedule = None, batch.get("first"), batch.get("y"), sigmas(steps, wan.preset.shift)
    if solver == "renoise":
        fresh = fresh_noise(noise.shape, steps, *((seed, row) for row in rows), device=noise.device)
    wan.at_work("dit")
    (latent,) = rollout(wan.dit, noise, first, batch["context"], schedule, y=y, fresh=fresh)
    wan.at_work("vae")
    return batch["row"], wan.vae.decode(latent).split(1)


@torch.no_grad()
def sample_held_out(wan, reward, clips, rows, steps, seed=0, judge=None, at_once=1, show=SHOWN, solver="euler"):
    """`clip_metrics` of held-out clips as they are sampled; the ranks share the work.

    rows: the clips' numbers; steps, solver: `sample_clips`'s; judge: a second FaceReward, whose FaceSim is reported as
    `judge`; at_once: clips sampled together. Returns the metrics of each row, the same on every rank, and the uint8
    frames [F, H, W, 3] of `show` rows spread over them, by row, on rank 0 (no other clip's frames outlive their
    metrics).
    """
    rank, ranks = rank_and_ranks()
    metrics, frames, shown = {}, {}, shown_rows(rows, show)
    own = [rows[(i + rank) % len(rows)] for i in range(0, len(rows), ranks)]  # as many for each: FSDP2 needs it
    bar = tqdm(total=len(own), desc="held-out clips", leave=False, disable=rank > 0)
    for start in range(0, len(own), at_once):
        some = own[start : start + at_once]
        for row, read, video in zip(some, *sample_clips(wan, clips, some, seed, steps, solver)):
            image = to_tensor(clips.video(read)[:1]).to(video.device)
            metrics[row] = clip_metrics(video, *map(reward.detect_and_embed, (video, image)))
            if judge is not None:
                metrics[row]["judge"] = clip_metrics(video, *map(judge.detect_and_embed, (video, image)))["facesim"]
            if row in shown:
                frames[row] = to_frames(video)
            bar.update()
    bar.close()
    metrics = dict(gathered(list(metrics.items())))
    return [metrics[row] for row in rows], dict(gathered(list(frames.items()), everywhere=False))


def shown_rows(rows, most=SHOWN):
    """At most `most` of the rows, evenly spread: those whose frames are kept for a comparing video."""
    return [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(most, len(rows))).round()]


def side_by_side(columns, rows):
    """Several clips as one video, uint8: a row of the picture a clip, a column a version, its name above.

    columns: of each version's name, uint8 [F, H, W, 3] by row.
    """
    grid = np.concatenate([np.concatenate([clips[r] for clips in columns.values()], 2) for r in rows], 1)
    width = grid.shape[2] // len(columns)
    size = max(10, width // 10)
    title = Image.new("RGB", (grid.shape[2], 2 * size), "white")  # H.264 wants an even height
    draw, font = ImageDraw.Draw(title), ImageFont.load_default(size)
    for k, name in enumerate(columns):
        draw.text(((k + 0.5) * width, size), name, "black", font, anchor="mm")
    return np.concatenate([np.broadcast_to(np.asarray(title), (len(grid), *np.asarray(title).shape)), grid], 1)


def compute_dtype(precision, device):
    """The type that networks with fp32 weights compute in: bf16, or None for fp32.

    precision: "bf16", "fp32", or "" for bf16 where the device computes it natively.
    """
    native = device.type == "cuda" or any(torch.cpu.get_capabilities().get(k) for k in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if precision == "bf16" or (native and not precision) else None


# ---------------------------------------------------------------------------------------------------------------
# The clips of an evaluation: --out/clips/<version>/<name>-<seed>.mp4, and --out/input/<name>.png


class Job(typing.NamedTuple):
    """One clip to write and to score."""

    version: str  # of CONTROLS, "base", or a tuned model's name
    row: int  # number of the clip in the set
    seed: int
    shape: tuple  # (F, H, W)
    name: str  # of its files

    @property
    def file(self):
        return f"{self.version}/{self.name}-{self.seed}.mp4"


def list_jobs(clips, rows, versions, seeds):
    """The jobs of `rows` of the set: a version after the other, and one of each control.

    Files are named as VBench wants it, by prompt and number; of a prompt that comes again the name tells which it is.
    """
    names, times = [], {}
    for row in clips.rows:
        name = re.sub(r'[\x00-\x1f/\\:*?"<>|]', " ", row["caption"]).strip(" .")
        name = name.encode()[:150].decode(errors="ignore") or "clip"
        times[name] = times.get(name, 0) + 1
        names.append(name if times[name] == 1 else f"{name} ({times[name]})")
    return [
        Job(version, row, seed, (clips.rows[row]["frames"], *clips.rows[row]["size"]), names[row])
        for version in versions for row in rows for seed in range(1 if version in CONTROLS else seeds)
    ]  # fmt: skip


def is_whole(path, shape):
    """Return whether an mp4's header, which is written last, declares frames of `shape` = (F, H, W)."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return (stream.frames, stream.height, stream.width) == shape
    except (av.FFmpegError, OSError, IndexError):
        return False


def check_shape(frames, shape):
    """UserError where frames [F, H, W, 3] are not of `shape` = (F, H, W)."""
    if frames.shape[:3] != shape:
        raise UserError("{} frames of {}x{}, {} of {}x{} are wanted".format(*frames.shape[:3], *shape))
    return frames


def input_picture(out, clips, job):
    """The picture that a job's clip starts from, uint8 [H, W, 3]; it is kept in --out/input."""
    path = out / "input" / f"{job.name}.png"
    if not path.exists():
        picture = Image.fromarray(clips.video(job.row)[0])
        with whole_file(path) as part:
            picture.save(part, "PNG")
    return np.asarray(Image.open(path))


class Tuned(typing.NamedTuple):
    """A tuned model: LoRAs that stay beside the weights, or a file of all weights of the transformer that is tuned."""

    loras: tuple = ()
    weights: str = ""


def load_tuned(wan, model):
    """Read the transformer anew and make it a tuned model's."""
    wan.networks.pop("dit", None)
    wan.loras = model.loras
    if model.weights:
        load_weights(wan.tuned, model.weights)


@torch.no_grad()
def write_clips(options, clips, jobs, tuned, device):
    """Write the clips of `jobs` that --out does not hold whole; the ranks share them.

    tuned: {version: `Tuned`}. Returns {row: why one of its clips cannot be made}, the same on every rank.
    """
    out, dtype = Path(options.out), torch.float32 if options.precision == "fp32" else None
    wan = Wan(options.model, options.ckpt, device, dtype, shift=options.shift,
                     compute_dtype=compute_dtype(options.precision, device),
                     base_loras=parse_loras(options.base_lora, CONFIGS[options.model], "--base_lora"))  # fmt: skip
    rank, ranks = rank_and_ranks()
    own = [job for job in jobs[rank::ranks] if not is_whole(out / "clips" / job.file, job.shape)]
    loaded, wrong = None, {}
    for job in tqdm(own, "clips", disable=rank > 0 or not own):
        try:
            if job.version == "true":
                frames = clips.video(job.row)
            elif job.version == "vae":
                frames = to_frames(wan.vae.decode(wan.vae.encode(to_tensor(clips.video(job.row)).to(device))))
            elif job.version == "still":
                frames = np.repeat(input_picture(out, clips, job)[None], job.shape[0], 0)
            else:
                if loaded != job.version:
                    load_tuned(wan, tuned.get(job.version, Tuned()))
                    loaded = job.version
                (read,), (video,) = sample_clips(
                    wan, clips, [job.row], job.seed, options.sampling_steps, options.solver
                )
                if read != job.row:  # the next clip stood in for it
                    raise UserError(f"{clips.rows[job.row]['cache']}: not readable")
                frames = to_frames(video)
            write_video(out / "clips" / job.file, check_shape(frames, job.shape), wan.preset.fps, crf=10)
        except UserError as error:
            wrong[job.row] = f"{job.version}: {error}"
    return dict(gathered(list(wrong.items())))


# ---------------------------------------------------------------------------------------------------------------
# Scores: --out/scores-<rank>.jsonl, a line [file, scorer, metrics] for each as it is computed


def read_scores(out):
    """{(file, scorer): metrics} of all ranks that ever ran in `out`; a line torn by a kill is left out."""
    scores = {}
    for path in sorted(out.glob("scores-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                file, scorer, metrics = json.loads(line)
                scores[file, scorer] = metrics
            except ValueError:
                continue
    return scores


@torch.no_grad()
def score_clips(out, clips, jobs, scorers):
    """Score the clips of `jobs`, as their files hold them, by each of scorers; the ranks share them.

    scorers: {its name and settings: function of uint8 frames [F, H, W, 3], the picture [H, W, 3] and fps to a dict}.
    Returns {job: metrics} and {row: why a clip of it cannot be scored}, the same on every rank.
    """
    rank, ranks = rank_and_ranks()
    known, scores, wrong = read_scores(out), [], {}
    gathered([])  # every rank has read before one writes
    with open(out / f"scores-{rank}.jsonl", "a") as log:
        print(file=log)  # ends a line that a kill has torn
        for job in tqdm(jobs[rank::ranks], "scores", disable=rank > 0):
            todo = [name for name in scorers if (job.file, name) not in known]
            if todo:
                try:
                    frames, fps = read_video(out / "clips" / job.file)
                    check_shape(frames, job.shape)
                    picture = input_picture(out, clips, job)
                except UserError as error:
                    wrong[job.row] = f"{job.version}: {error}"
                    continue
            for name in todo:
                known[job.file, name] = scorers[name](frames, picture, fps)
                print(json.dumps([job.file, name, known[job.file, name]]), file=log, flush=True)
            scores.append((job, {k: v for name in scorers for k, v in known[job.file, name].items()}))
    return dict(gathered(scores)), dict(gathered(list(wrong.items())))


def read_scorers(options, device):
    """The scorers of `score_clips` that the options ask for; UserError where a network is missing or cannot be read."""
    landmarks = external_metrics.read_landmarks(options.faces)
    given = dict(tiled=options.tiled, OpenS2V=options.opens2v, openings=landmarks is not None)
    scorers, how = {}, ", ".join([options.people, *(name for name, wanted in given.items() if wanted)])
    for title, folder in (("faces", options.faces), ("judge", options.judge)):
        if folder:
            reward = FaceReward.from_folder(folder, device, tiled=options.tiled)
            scorers[f"{title} by {folder}, {how}"] = functools.partial(score_faces, options, title, reward, landmarks)
    for column, score in external_metrics.read_networks(options.vbench_weights, device).items():
        scorers[column] = lambda frames, picture, fps, column=column, score=score: {
            column.lower(): score(torch.from_numpy(frames).to(device), fps)
        }
    if options.vlm:
        scorers[f"hacking ({options.vlm_model})"] = functools.partial(external_metrics.hacking, options)
    return scorers


def score_faces(options, title, reward, landmarks, frames, picture, fps):
    """The face metrics and TF of a clip's frames; of the judge its FaceSim alone."""
    video, image = (to_tensor(x).to(next(reward.encoder.parameters()).device) for x in (frames, picture[None]))
    if title == "judge":
        return dict(judge=face_metrics(video, image, reward, options.people)["facesim_from_1"])
    metrics = face_metrics(video, image, reward, options.people, options.opens2v, landmarks)
    return metrics | dict(tf=temporal_flickering(video))


# ---------------------------------------------------------------------------------------------------------------
# The program


@dataclass
class EvalOptions:
    model: str = option("tiny", f"preset: {', '.join(CONFIGS)}")
    ckpt: str = option("", "folder with the model's weights; tiny ships its own")
    base_lora: str = option("", "a distilled base's LoRA, merged: [high=|low=]FILE[:STRENGTH], comma-separated")
    lora: str = option("out/lora.safetensors", "the tuned model: its LoRA (or LoRAs, as --base_lora), or all its "
                       "weights (dit.safetensors); several models: 'FILE; NAME=FILE'")  # fmt: skip
    data: str = option(str(ASSETS / "data"), "folder that data.py made, of clips or of pairs")
    out: str = option("eval", "folder for the clips and the results; one begun with the same options is continued")
    faces: str = option(str(ASSETS), "folder with a face detector and encoder")
    judge: str = option("", "folder with a second detector and encoder, for its own FaceSim, e.g. buffalo_l")
    tiled: bool = option(False, "detect again, enlarged and in tiles, where faces are small against the frame")
    people: str = option("largest", "whose faces are measured: each frame's largest, or every person's of the picture",
                         choices=("largest", "all"))  # fmt: skip
    person: str = option("", "regular expression: its match in a clip's name says who it shows; default: each clip "
                             "shows somebody else, and in the tiny set the name without its last number")  # fmt: skip
    clips: int = option(60, "held-out clips to sample", least=1)
    seeds: int = option(1, "samples of each clip, with different noise", least=1, most=1000)
    sampling_steps: int = option(8, "steps of a sample", least=1, most=1000)
    shift: float = option(0.0, "of the noise schedule, as in training; 0 = the preset's", least=0)
    solver: str = option("euler", "as in training", choices=("euler", "renoise"))
    precision: str = option("", "of the networks; default: bf16 where the device computes it natively",
                            choices=("", "bf16", "fp32"))  # fmt: skip
    opens2v: bool = option(False, "FaceSim as OpenS2V-Eval defines it, too")
    vbench_weights: str = option("", "folder with the networks of VBench's columns; what is missing is said")
    vbench: str = option("", "virtual environment with VBench's own package (0.1.5), which then computes its columns")
    vlm: str = option("", "URL of an OpenAI-compatible endpoint, as http://localhost:8000/v1, whose vision-language "
                          "model says whether a face looks forced; $OPENAI_API_KEY is its key")  # fmt: skip
    vlm_model: str = option("Qwen/Qwen2.5-VL-7B-Instruct", "the model's name there")
    vlm_timeout: float = option(60.0, "seconds to wait for an answer, three times", least=0.1)
    study: int = option(0, "clips of a user study, base against tuned: writes study.html; 0 = none", least=0)
    tally: str = option("", "count the votes of --out's study instead: their files, comma-separated, or a folder")


# what --out was begun with, it goes on with
FIXED = ("model", "ckpt", "base_lora", "data", "sampling_steps", "shift", "solver", "precision")


def tuned_models(options):
    """--lora's models as {name: `Tuned`}. UserError where one is not the preset's, or two have one name."""
    preset, models = find_preset(options.model, options.ckpt, options.shift), {}
    texts = [text.strip() for text in options.lora.split(";") if text.strip()]
    if not texts or (options.lora == EvalOptions.lora and not Path(options.lora).exists()):
        raise UserError(f"--lora {options.lora}: no such file; train one with: python train.py")
    for text in texts:
        named = None if Path(text).exists() else re.match(r"(?!high=|low=)([\w .-]+)=", text)
        text = text[named.end() :] if named else text
        whole = Path(text).is_file() and "head.head.weight" in Checkpoint(text).shapes
        model = Tuned(weights=text) if whole else Tuned(tuple(parse_loras(text, preset)))
        path = Path(os.path.abspath(text if whole else model.loras[0].path))
        own = path.parent.name if path.stem in ("lora", "dit") else path.stem
        name = named[1] if named else "tuned" if len(texts) == 1 else own
        if name in {"base", *CONTROLS, *models}:
            raise UserError(f"--lora {text}: {name!r} cannot be its name, or is another's; give it one: name={text}")
        models[name] = model
    part = "dit" if preset.boundary is None else "low"
    for model in models.values():
        if model.weights:
            match(blank(preset, part), Checkpoint(model.weights), expected(preset, part))
    base = parse_loras(options.base_lora, preset, "--base_lora")
    for lora in itertools.chain(base, *(model.loras for model in models.values())):
        read_lora(blank(preset, lora.part), lora.path, lora.strength, lora.part)
    return models


def check(options):
    """Refuse what cannot work before anything is read or written."""
    out = Path(options.out)
    check_can_be_made(out)
    if not is_empty(out) and "tuned" not in (read_options(out) or {}):
        raise UserError(f"--out {out}: exists, is not empty and is no evaluation; name another folder")
    if options.vbench and not (Path(options.vbench) / "bin/vbench").is_file():
        raise UserError(f"--vbench {options.vbench}: no bin/vbench in it; pip install vbench==0.1.5 there")
    if options.vlm and not options.vlm.startswith(("http://", "https://")):
        raise UserError(f"--vlm {options.vlm}: not an address, as http://localhost:8000/v1 is one")
    if options.vbench_weights and not Path(options.vbench_weights).is_dir():
        raise UserError(f"--vbench_weights {options.vbench_weights}: no such folder")
    try:
        re.compile(options.person)
    except re.error as error:
        raise UserError(f"--person {options.person}: not a regular expression ({error})") from None


def digest(path):
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(options, tuned):
    """Make --out, or go on with it; returns its lock.

    UserError where another process has it, or where its clips are of other options, another set or other files.
    """
    out = Path(options.out)
    about = {name: getattr(options, name) for name in FIXED} | dict(set=digest(Path(options.data) / "index.jsonl"))
    files = {name: [[digest(model.weights)]] if model.weights else [[digest(x.path), x.strength] for x in model.loras]
             for name, model in tuned.items()}  # fmt: skip
    if saved := read_options(out):
        changed = [name for name, value in about.items() if saved.get(name) != value]
        if changed:
            before = "set of clips" if changed == ["set"] else f"--{changed[0]} ({saved.get(changed[0])})"
            raise UserError(f"--out {out}: was begun with another {before}; name another folder")
        done = saved["tuned"]
        other = [name for name in files if done.get(name, files[name]) != files[name]]
        if other:
            raise UserError(f"--out {out}: its clips of {other[0]!r} are of another file; name another folder, or call "
                            "this model something else: --lora NAME=FILE")  # fmt: skip
        files = done | files
    lock = lock_folder(out)
    write_text(out / "options.json", json.dumps(about | dict(tuned=files), indent=1))
    return lock


def person_of(row, options):
    """Return whom a clip shows: the set's `person`, else --person's match in the clip's name, else the name up to `@`,
    after which it says which part of a video the clip is."""
    pattern = options.person or (r"^.*(?=_\d+$)" if options.model == "tiny" else "^[^@]*")
    found = re.search(pattern, row["clip"])
    return row.get("person") or (found[0] if found else row["clip"])


def evaluate(options, tuned, clips, device, scorers):
    """Write and score the clips. Returns the rows of results.json's `clips`, and of its `problems`: a clip that cannot
    be compared in one version is left out of all."""
    out, rows = Path(options.out), clips.spread(options.clips)
    controls = ["still"] if "image" in clips.rows[rows[0]] else list(CONTROLS)  # pairs have no true clips
    versions = [*controls, "base", *tuned]
    jobs = list_jobs(clips, rows, versions, options.seeds)
    for folder in (out / "input", *(out / "clips" / version for version in versions)):
        folder.mkdir(parents=True, exist_ok=True)
    wrong = write_clips(options, clips, jobs, tuned, device)
    scores, unread = score_clips(out, clips, [job for job in jobs if job.row not in wrong], scorers)
    wrong |= unread | {job.row: "no face is found in its input picture"
                       for job, metrics in scores.items() if metrics["face_size"] is None}  # fmt: skip
    if options.vbench and rank_and_ranks()[0] == 0:
        for version in versions:
            found = external_metrics.official_scores(options.vbench, out / "clips" / version, out / "vbench" / version)
            for job in scores:
                if job.version == version:
                    scores[job] |= found.get(Path(job.file).name, {})
    results = []
    for job in jobs:  # in this order, whatever the ranks were
        if job.row not in wrong:
            about = clips.rows[job.row]
            who = dict(version=job.version, clip=about["clip"], person=person_of(about, options), seed=job.seed)
            what = dict(file=job.file, picture=f"input/{job.name}.png", prompt=about["caption"])
            results.append(who | what | scores[job])
    return results, [dict(clip=clips.rows[row]["clip"], reason=reason) for row, reason in sorted(wrong.items())]


def write_results(options, tuned, rows, problems):
    """Write results.json and the pages, and print the tables."""
    out = Path(options.out)
    people, seen = len({row["person"] for row in rows}), len({row["clip"] for row in rows})
    about = (f"{options.model}: {seen} held-out clips of {people} people, {options.seeds} seed(s) each, "
             f"{options.sampling_steps} steps by {options.solver}")  # fmt: skip
    missing = external_metrics.missing(options.vbench_weights)
    missing = {column: command for column, command in missing.items() if column.lower() not in rows[0]}
    versions, differences = report.summarise(rows, tuned)
    results = dict(about=about, people=people, versions=versions, differences=differences, problems=problems,
                   missing=missing, clips=rows)  # fmt: skip
    write_text(out / "results.json", json.dumps(results, indent=1))
    report.write_report(results, out)
    if options.study:
        report.write_study(results, out, options.study)
    print(f"{about}\n\n{report.terminal_tables(results)}")
    print(f"\n{out}/results.json, report.html" + ", study.html" * (options.study > 0))


def main():
    options = parse_options(EvalOptions, doc=__doc__)
    if options.tally:
        return report.tally(options.tally, Path(options.out))
    check(options)
    tuned = tuned_models(options)
    rank, _, device = start_ranks()
    clips = Clips(options.data, "heldout", device, options.model)
    scorers = read_scorers(options, device)
    lock = None
    if rank == 0:
        preset = find_preset(options.model, options.ckpt, options.shift)
        if not preset.shipped:
            solver, steps = options.solver, options.sampling_steps
            print(sampling_assumptions(options.model, solver, steps, preset.shift, 1, options.base_lora), flush=True)
        lock = make_folder(options, tuned)
    gathered([])  # until --out is there
    rows, problems = evaluate(options, tuned, clips, device, scorers)
    if rank == 0:
        for problem in problems:
            print(f"left out: {problem['clip']}: {problem['reason']}")
        if not rows:
            raise UserError("no clip is left to compare")
        write_results(options, tuned, rows, problems)
        lock.close()
    leave_ranks()


if __name__ == "__main__":
    run(main)
