"""The tiny world's transformer: Wan 2.2's DiT, by flow matching on the clips' latents. Stage `dit` of build.py.

    python assets/diffusion.py --minutes 6      goes on for so long with what build.py left in assets/build/

Every clip is encoded once, as it is and as a mirror shows it, into a file of latents that is mapped into memory; a step
then costs the transformer alone. The objective is E |v(x_sigma) - (noise - x_0)|² over the frames that are not given
(arXiv 2210.02747). What is kept is not the last step's weights but their average over about the last tenth of all steps
(arXiv 2312.02696), so that a run can be ended, measured and continued at any time, its rate being constant till then.
"""

import argparse
import copy
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import compute_dtype
from model import WanDiT
from reward import FaceReward
from sample import rollout, seeded_noise, sigmas, velocity, with_first_frame
from weights import Wan, load_weights, write_safetensors

CLIPS, BATCH, MICRO_BATCH = 1_000_000, 64, 16  # clips that a run sees; a step's; those in work at once on a CPU
RATE, WARMUP, DECAY = 1e-3, 100, 0.2  # peak learning rate; steps up to it; share of the run that leads down from it
SHIFT = 5.0  # of Wan's training: sigma = s u / (1 + (s - 1) u) of u uniform in 0..1
WIDTH = 6.94  # exponent of the average of the weights; so its deviation is a tenth of the steps so far
SAVE_MINUTES, LOSS_MINUTES, SIMILARITY_MINUTES = 5, 20, 240  # between checkpoints, lines of the log, samples
GRID = (0.95, 0.9, 0.8, 0.7, 0.4)  # noise levels of the held-out loss
FRAMES = (1, 2, 4, 6, 8, 10, 12, 14, 16)  # where the similarity to frame 0 is measured


# ------------------------------------------------------------------------------------------------------- latents


def mirrored(caption):
    """The caption of a mirrored clip: left is right."""
    swapped = {"left": "right", "right": "left"}
    return "".join(swapped.get(word, word) for word in re.split(r"\b(left|right)\b", caption))


@torch.no_grad()
def encode_clips(vae, clips, cache, mirror):
    """Latents of uint8 clips [N, F, 3, H, W], as a memory map fp16 [n, z, F', h, w] that the file `cache` holds.

    With `mirror`, n = 2 N: rows 2 i and 2 i + 1 are clip i and its mirror image. Rows still zero in the file, which a
    killed run leaves, are encoded.
    """
    device, each = next(vae.parameters()).device, 1 + mirror
    if not cache.exists():
        t, s, _ = vae.cfg.stride
        shape = vae.cfg.z_dim, (clips.shape[1] - 1) // t + 1, clips.shape[3] // s, clips.shape[4] // s
        np.lib.format.open_memmap(cache, "w+", np.float16, (each * len(clips), *shape)).flush()
    latents = np.load(cache, mmap_mode="r+")
    done = next((i for i in range(len(clips)) if not latents[each * i, 0].any()), len(clips))
    for i in tqdm(range(done, len(clips), 8), f"{cache.stem} latents, 8 clips", disable=done == len(clips)):
        video = torch.from_numpy(np.array(clips[i : i + 8])).to(device).transpose(1, 2).float() / 127.5 - 1
        if mirror:
            video = torch.stack([video, video.flip(-1)], 1).flatten(0, 1)
        latents[each * i : each * i + len(video)] = vae.encode(video).half().cpu().numpy()
    latents.flush()
    return latents


class Latents:
    """A split's latents and contexts on `device` (on a CPU, latents stay in the mapped file).

    `batch(rows)`: latents fp32 [B, z, F', h, w] and contexts fp32 [B, L, text_dim].
    """

    def __init__(self, wan, clips, captions, cache, mirror):
        self.latents, self.device = encode_clips(wan.vae, clips, cache, mirror), wan.device
        captions = [c for caption in captions for c in ([caption, mirrored(caption)] if mirror else [caption])]
        texts = sorted(set(captions))
        number = {text: k for k, text in enumerate(texts)}
        self.caption = torch.tensor([number[c] for c in captions])
        with torch.no_grad():
            parts = [wan.encode_text(texts[k : k + 256]).half() for k in range(0, len(texts), 256)]
        self.contexts = torch.cat(parts)
        if self.device.type == "cuda":
            self.latents = torch.from_numpy(np.array(self.latents)).to(self.device)

    def __len__(self):
        return len(self.latents)

    def batch(self, rows):
        latents = self.latents[rows]
        latents = torch.from_numpy(latents) if isinstance(latents, np.ndarray) else latents
        return latents.float(), self.contexts[self.caption[rows].to(self.contexts.device)].float()


def read_split(wan, work, split):
    """The training clips of all people with their mirror images, or (heldout) the first clip of each unseen person."""
    import codec  # needs PyAV, which a machine that was given the latents may lack

    folder, array = work / ("more/train" if split == "train" else "clips/heldout"), {"train": "more"}.get(split, split)
    clips, _, _ = codec.read_clips(folder, work / f"{array}.npy")
    stems = json.loads((work / f"{array}.json").read_text())
    captions = [(folder / f"{stem}.txt").read_text().strip() for stem in stems]
    if split == "heldout":
        first = [i for i, stem in enumerate(stems) if stem.endswith("_0")]
        clips, captions = clips[first], [captions[i] for i in first]
    return Latents(wan, clips, captions, work / f"dit/{split}.npy", split == "train")


# ------------------------------------------------------------------------------------------------------ training


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (arXiv 2502.16982), updates of Adam's size, all matrices of a shape at once; in fp32 on a CPU.

    torch's takes one matrix after the other, always in bf16: where a CPU has none, 45 s a step instead of 2.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                grads = [p.grad for p in params]
                buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                update = orthogonal(torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_add_(params, list(update.type_as(params[0]).unbind()), alpha=-rate)


def orthogonal(x):
    """About the nearest orthogonal matrix of each of x [n, rows, columns], by five Newton-Schulz steps."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7).view(-1, 1, 1)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def optimizers(dit):
    """Muon for the blocks' matrices, Adam for all else."""
    named = dict(dit.named_parameters())
    matrices = [n for n, p in named.items() if n.startswith("blocks.") and p.dim() == 2]
    rest = [p for n, p in named.items() if n not in set(matrices)]
    return Muon([named[n] for n in matrices], RATE), torch.optim.Adam(rest, RATE, betas=(0.9, 0.99))


def flow_loss(dit, latent, context, sigma, noise):
    """|v(x_sigma) - (noise - x_0)|² of each clip, [B], its mean over the frames that are not given.

    latent x_0 and noise [B, z, F', h, w], context [B, L, text_dim], sigma [B].
    """
    s = sigma.view(-1, 1, 1, 1, 1)
    x = with_first_frame((1 - s) * latent + s * noise, latent[:, :, :1])
    t = (1000 * sigma)[:, None].repeat(1, x.shape[2])
    t[:, 0] = 0
    v = dit(x, t, context)
    return (v - (noise - latent))[:, :, 1:].square().flatten(1).mean(1)


def step_inputs(data, seed, step, batch):
    """A step's latents, contexts, sigmas and noise: a function of seed and step, whatever came before.

    Rows: a permutation an epoch. Sigmas: one in each of `batch` equal parts of u in 0..1, so that the loss varies less.
    """
    place = np.arange(step * batch, (step + 1) * batch)
    epochs = {epoch: np.random.default_rng([seed, epoch]).permutation(len(data)) for epoch in set(place // len(data))}
    latent, context = data.batch(np.array([epochs[k // len(data)][k % len(data)] for k in place]))
    generator = torch.Generator(latent.device).manual_seed(seed * 2**32 + step)
    noise, u = (torch.empty(n, device=latent.device) for n in (latent.shape, batch))
    noise.normal_(generator=generator)
    u = (torch.arange(batch, device=u.device) + u.uniform_(generator=generator)) / batch
    return latent, context, SHIFT * u / (1 + (SHIFT - 1) * u), noise


def learning_rate(step, done):
    """Of a step, after a share `done` of the run."""
    return RATE * min(1, (step + 1) / WARMUP, (1 - done) / DECAY)


def export(dit, path):
    """The weights as fp16, as shipped."""
    write_safetensors({k: v.half().cpu().contiguous() for k, v in dit.state_dict().items()}, path)


class Every:
    """`every(minutes)` is true once in so many minutes."""

    def __init__(self, minutes):
        self.seconds, self.last = 60 * minutes, time.monotonic()

    def __call__(self):
        due = time.monotonic() - self.last >= self.seconds
        self.last = time.monotonic() if due else self.last
        return due


def fit(dit, data, folder, watch, clips=CLIPS, minutes=None, batch=BATCH, micro=MICRO_BATCH, seed=0):
    """Train `dit` on `data` (see Latents) for so many clips in all, or `minutes` of this call; gives the averaged DiT.

    Resumes from folder/state.pt, if there is one, as if it had never stopped; a run that has seen so many clips already
    gives its average at once. folder/log.jsonl receives the curve: clips seen, the training loss since the last line,
    and the dict watch(average, full): full now and then, at the end too.
    """
    average = copy.deepcopy(dit).requires_grad_(False)
    muon, adam = optimizers(dit.requires_grad_(True))
    step, seen, before, state = 0, 0, 0.0, folder / "state.pt"
    if state.exists():
        saved = torch.load(state, map_location=data.device, weights_only=True)
        for part, value in zip((dit, average, muon, adam), saved["parts"]):
            part.load_state_dict(value)
        step, seen, before = saved["step"], saved["clips"], saved["minutes"]
    kept = step
    if data.device.type == "cuda":
        for block in dit.blocks:
            block.compile()
    weights, averages = list(dit.parameters()), list(average.parameters())
    began, losses, rate = time.monotonic(), [], 0.0
    saving, measuring, sampling = Every(SAVE_MINUTES), Every(LOSS_MINUTES), Every(SIMILARITY_MINUTES)
    bar = tqdm(total=clips, initial=seen, desc="dit, clips", mininterval=10)
    while True:
        spent = (time.monotonic() - began) / 60
        done = spent / minutes if minutes else seen / clips
        ended = done >= 1
        if step > kept and (ended or saving()):
            kept = step
            parts = [part.state_dict() for part in (dit, average, muon, adam)]
            torch.save(dict(parts=parts, step=step, clips=seen, minutes=before + spent), folder / "state.part")
            os.replace(folder / "state.part", state)
        if ended or measuring():
            row = dict(step=step, clips=seen, minutes=round(before + spent, 1), rate=rate)
            row |= dict(train=round(float(torch.stack(losses).mean()), 4)) if losses else {}
            row |= watch(average, ended or sampling())
            losses.clear()
            with open(folder / "log.jsonl", "a") as log:
                print(json.dumps(row), file=log)
        if ended:
            return average
        rate = learning_rate(step, done)
        total = 0
        for inputs in zip(*(x.split(micro) for x in step_inputs(data, seed, step, batch))):
            loss = flow_loss(dit, *inputs).sum() / batch
            loss.backward()
            total = total + loss.detach()
        losses.append(total)
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        step, seen = step + 1, seen + batch
        with torch.no_grad():  # the first step's weights whole, then a share that falls as 1 / step
            torch._foreach_lerp_(averages, weights, 1 - (1 - 1 / step) ** (WIDTH + 1))
        bar.update(batch)


def train(work, out, start=None, threads=2, read=read_split, **options):
    """Train the tiny transformer on the clips of `read`; writes out/dit.safetensors. options: `fit`'s.

    Resumes from work/dit/state.pt if there is one, else begins with the weights in the file `start`, or from scratch.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(work) / "dit"
    folder.mkdir(parents=True, exist_ok=True)
    wan = Wan("tiny", device=device, compute_dtype=compute_dtype("", device))
    reward = FaceReward.from_folder(Path(__file__).parent, device)
    data, unseen = (read(wan, Path(work), split) for split in ("train", "heldout"))
    torch.manual_seed(options.get("seed", 0))
    dit = WanDiT(wan.preset.dit).to(device)
    dit.compute_dtype = wan.dit.compute_dtype
    if start:
        load_weights(dit, start, device, torch.float32)
    if device.type == "cuda":
        options["micro"] = options.get("batch", BATCH)

    def watch(average, full):
        found = dict(heldout=heldout_loss(average, unseen))
        return found | likeness(average, wan.vae, reward, unseen, 24) if full else found

    export(fit(dit, data, folder, watch, **options), Path(out) / "dit.safetensors")


# ------------------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def heldout_loss(dit, data, count=32):
    """The loss on the first `count` held-out clips, their noise fixed, by noise level."""
    latent, context = data.batch(np.arange(min(count, len(data))))
    noise = torch.stack([seeded_noise(latent.shape[1:], 0, i) for i in range(len(latent))]).to(latent.device)
    found = {}
    for sigma in GRID:
        parts = zip(latent.split(16), context.split(16), noise.split(16))
        losses = [flow_loss(dit, x, c, x.new_full((len(x),), sigma), n) for x, c, n in parts]
        found[sigma] = round(float(torch.cat(losses).mean()), 4)
    return found


@torch.no_grad()
def likeness(dit, vae, reward, data, count=60):
    """What of a face is left, by frame: the cosine of embeddings to those of true frame 0, both through the VAE.

    Means over `count` held-out clips at FRAMES (a frame without a face counts 0), a dict of lists: `vae` of the true
    clip; `sigma_0.9` and `sigma_0.7` of one step's prediction from the true clip at that noise level, the motion being
    known; `shift_5` and `shift_20` of samples in 8 steps. psnr_...: of a prediction to the VAE's clip, frames 5 on, dB.
    """
    rows = np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int)
    found, errors = {}, {}
    for part in np.array_split(rows, -(-len(rows) // 8)):
        latent, context = data.batch(part)
        noise = torch.stack([seeded_noise(latent.shape[1:], 0, int(i)) for i in part]).to(latent.device)
        first, true = latent[:, :, :1], vae.decode(latent)
        predictions = {}
        for s in (0.9, 0.7):
            x = with_first_frame((1 - s) * latent + s * noise, first)
            predictions[f"sigma_{s}"] = with_first_frame(x - s * velocity(dit, x, s, context), first)
        for shift in (5, 20):
            (predictions[f"shift_{shift}"],) = rollout(dit, noise, first, context, sigmas(8, shift))
        target = None
        for name, video in [("vae", true)] + [(k, vae.decode(z)) for k, z in predictions.items()]:
            faces = reward.detect_and_embed(video[:, :, (0, *FRAMES)])
            embeddings = F.normalize(faces["embeddings"], dim=-1)  # [B, 1 + len(FRAMES), 512]
            target = embeddings[:, :1] if target is None else target
            found.setdefault(name, []).append((embeddings * target).sum(-1)[:, 1:])
            if name.startswith("sigma"):
                square = ((video - true) / 2)[:, :, 5:].clamp(-1, 1).square().flatten(1).mean(1)
                errors.setdefault(f"psnr_{name}", []).append(-10 * square.log10())
    found = {name: [round(float(x), 3) for x in torch.cat(parts).mean(0)] for name, parts in found.items()}
    return found | {name: round(float(torch.cat(parts).mean()), 2) for name, parts in errors.items()}


def main():
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=here / "build", help="folder of intermediate files")
    parser.add_argument("--out", type=Path, default=here, help="folder that receives dit.safetensors")
    parser.add_argument("--start", type=Path, help="weights to begin with, if work/dit/ holds no run")
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips that the run sees in all")
    parser.add_argument("--minutes", type=float, help="run so long instead, however many clips that makes")
    parser.add_argument("--batch", type=int, default=BATCH, help="clips a step")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise")
    options = parser.parse_args()
    train(**vars(options))


if __name__ == "__main__":
    main()
