"""Measure a LoRA against its base on the held-out clips.

    python eval.py                                    the tiny model, its shipped clips and out/lora.safetensors
    python eval.py --lora run/lora.safetensors --seeds 3 --out report

Both models start from the same noise. FaceSim: cosine of ArcFace embeddings between the generated frames and the
input image (the paper's measure; not the pool that the reward uses). Face rate: share of generated frames that show
a face. Motion: mean landmark speed over face size, a frame. TF: VBench's temporal flickering, (255 - mean absolute
difference of consecutive 8-bit frames) / 255; higher is steadier. The row `VAE` is the true clip through the
autoencoder: no model that it decodes can be expected to do better; `true clip` is the clip itself.
Writes --out/eval.json (every clip's figures) and --out/eval.mp4 (true clip, base, LoRA side by side).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Clips
from model import ASSETS, CONFIGS, Checkpoint, Experts, UserError, load_model, load_weights, merge_lora
from reward import FaceReward
from sample import option, parse_options, run, to_frames, to_tensor, write_video
from train import held_out, measured, side_by_side, summary, table


@dataclass
class EvalOptions:
    model: str = option("tiny", f"preset: {', '.join(CONFIGS)}")
    ckpt: str = option("", "folder with the model's weights; tiny ships its own")
    lora: str = option("out/lora.safetensors", "the tuned model's LoRA, or all its weights (dit.safetensors)")
    data: str = option(str(ASSETS / "data"), "folder that data.py made")
    out: str = option("eval", "folder for eval.json and eval.mp4")
    faces: str = option(str(ASSETS), "folder with a face detector and encoder")
    judge: str = option("", "folder with a second detector and encoder, for its own FaceSim, e.g. buffalo_l")
    clips: int = option(60, "held-out clips to sample")
    seeds: int = option(1, "samples of each clip, with different noise")
    sampling_steps: int = option(8, "Euler steps of a sample")
    shift: float = option(0.0, "of the noise schedule, as in training; 0 = the preset's")


@torch.no_grad()
def references(wan, reward, clips, rows, judge=None):
    """Metrics of the true clips and of the true clips through the VAE."""
    true, coded = [], []

    for row in tqdm(rows, desc="VAE ceiling", leave=False):
        frames = clips.video(row)
        video = to_tensor(frames).to(clips.device)
        image = video[:, :, :1]
        true.append(measured(frames, video, image, reward, judge))
        video = wan.vae.decode(wan.vae.encode(video)).float()
        coded.append(measured(to_frames(video), video, image, reward, judge))
    return true, coded


def main():
    options = parse_options(EvalOptions, doc=__doc__)
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not empty; name another folder")
    if not Path(options.lora).is_file():
        raise UserError(f"--lora {options.lora}: no such file; train one with: python train.py")
    if min(options.clips, options.seeds, options.sampling_steps) < 1:
        raise UserError("--clips, --seeds and --sampling_steps: at least 1")
    if options.shift < 0:
        raise UserError(f"--shift {options.shift}: at least 0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wan = load_model(options.model, options.ckpt, device, shift=options.shift)
    reward = FaceReward.from_folder(options.faces, device)
    judge = FaceReward.from_folder(options.judge, device) if options.judge else None
    print(f"face detector on {reward.detector.provider}")
    clips = Clips(options.data, "heldout", device, options.model)
    rows = clips.spread(options.clips)
    true, coded = references(wan, reward, clips, rows, judge)
    results, videos = {"true clip": true, "VAE": coded, "base": [], "LoRA": []}, {}
    for name in ("base", "LoRA"):
        if name == "LoRA":
            tuned = wan.dit.expert("low") if isinstance(wan.dit, Experts) else wan.dit
            if any(name.endswith("patch_embedding.weight") for name in Checkpoint(options.lora).shapes):
                load_weights(tuned, options.lora)
            else:
                print(f"{options.lora}: merged into {merge_lora(tuned, options.lora).merged} layers")
        for seed in range(options.seeds):
            metrics, sampled = held_out(wan, reward, clips, rows, options.sampling_steps, seed, judge)
            results[name] += metrics
            videos.setdefault(name, sampled)
    out.mkdir(parents=True, exist_ok=True)
    per_clip = {name: [dict(clip=clips.rows[rows[i % len(rows)]]["clip"], **r) for i, r in enumerate(values)]
                for name, values in results.items()}  # fmt: skip
    (out / "eval.json").write_text(json.dumps(per_clip, indent=1))
    shown = np.linspace(0, len(rows) - 1, min(6, len(rows))).round().astype(int)
    columns = [[clips.video(r) for r in rows], videos["base"], videos["LoRA"]]
    write_video(out / "eval.mp4", side_by_side(columns, shown), wan.preset.fps)
    print(f"{len(rows)} held-out clips, {options.seeds} noise seed(s); TF and FaceSim: higher is better")
    print(table([(name, summary(values)) for name, values in results.items()]))


if __name__ == "__main__":
    run(main)
