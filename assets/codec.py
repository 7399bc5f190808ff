"""The tiny world's VAE: Wan 2.2's architecture, trained from scratch on rendered clips. Stage `vae` of build.py.

Images first, because they teach space at a twentieth of a clip's cost (a causal network sees a lone frame with
its last temporal tap only); then clips of 17 frames, the length that it will be used at: trained on shorter ones
it falls apart after the second latent frame. Temporal taps start at zero and the time convolutions at
"repeat the frame", so that the first clip step continues where images ended. At last the decoder alone, on whole
frames, with ArcFace's word on the faces: of the people so far, then of three times as many.
"""

import copy
import json
import math
import os
import sys
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import CONFIGS, CausalConv3d, Resample, WanVAE
from reward import ArcFace, align
from weights import write_safetensors

# phase: steps, batch, frames, crop, peak learning rate of the kernels
PHASES = [
    ("images", 1500, 16, 1, 64, 0.02),
    ("clips", 4000, 3, 17, 64, 0.015),
    ("decoder", 1500, 1, 17, 128, 0.01),  # the encoder is final, so the DiT's latents can be made meanwhile
    ("people", 3000, 1, 17, 128, 0.006),  # the decoder on all 1800 people, from latents' means: 35.3 to 35.6 dB
]
IDENTITY_WEIGHT = 0.1  # on 1 - cosine of ArcFace embeddings of the faces, true against decoded (decoder's phases)
KL_WEIGHT = 2e-6  # keeps the latents' scale; small, so that the code stays sharp
EDGE_WEIGHT = 0.5  # on differences of neighbouring pixels: eyes and lips are edges
FACE_WEIGHT = 2.0  # extra weight inside the face boxes
EMA = 0.999


def read_clips(folder, cache):
    """A folder's clips that have a truth, as a memory map uint8 [N, 17, 3, 128, 128]; boxes [N, 17, 2, 4] and landmarks
    [N, 17, 2, 5, 2] of up to two people, zero where there is none."""
    files = sorted(f.with_suffix(".mp4") for f in Path(folder).glob("*.json"))
    names = cache.with_suffix(".json")
    if not (names.exists() and json.loads(names.read_text()) == [f.stem for f in files]):
        part = cache.with_suffix(".part.npy")
        frames = np.lib.format.open_memmap(part, "w+", np.uint8, (len(files), 17, 3, 128, 128))
        for i, file in enumerate(tqdm(files, desc="decoding clips")):
            with av.open(str(file)) as video:
                clip = np.stack([f.to_ndarray(format="rgb24") for f in video.decode(video=0)])
            frames[i] = clip.transpose(0, 3, 1, 2)
        frames.flush()
        os.replace(part, cache)
        names.write_text(json.dumps([f.stem for f in files]))
    boxes, landmarks = (
        np.zeros((len(files), 17, 2, 4), np.float32),
        np.zeros((len(files), 17, 2, 5, 2), np.float32),
    )
    for i, file in enumerate(files):
        for j, person in enumerate(json.loads(file.with_suffix(".json").read_text())["people"][:2]):
            boxes[i, :, j], landmarks[i, :, j] = person["box"], person["landmarks"]
    return np.load(cache, mmap_mode="r"), boxes, landmarks


def initialise(vae):
    """Start as a code of single frames: no temporal tap but the last, time convolutions that repeat the frame."""
    for module in vae.modules():
        if isinstance(module, CausalConv3d) and module.kernel_size[0] == 3:
            module.weight.data[:, :, :-1] = 0
        if isinstance(module, Resample) and hasattr(module, "time_conv"):
            weight = module.time_conv.weight.data.zero_()
            eye = torch.eye(weight.shape[1])[:, :, None, None]
            weight[:, :, -1] = eye.repeat(weight.shape[0] // weight.shape[1], 1, 1, 1)
            module.time_conv.bias.data.zero_()
    for block in vae.modules():
        if hasattr(block, "residual"):
            block.residual[-1].weight.data.mul_(0.3)


def batch_of(clips, boxes, rng, size, frames, crop):
    """Random crops [B, 3, T, crop, crop] in [-1, 1], most of them around a face, and the weight of each pixel;
    the clips' numbers too."""
    video, weight, chosen = [], [], []
    for _ in range(size):
        i, t = rng.integers(len(clips)), rng.integers(17 - frames + 1)
        box = boxes[i, t + frames // 2, rng.integers(2)]
        if rng.random() < 0.7 and box[2] > 0:
            cx, cy = rng.uniform(box[0], box[2]), rng.uniform(box[1], box[3])
        else:
            cx, cy = rng.uniform(0, 128, 2)
        x0, y0 = (int(np.clip(c - crop / 2, 0, 128 - crop)) for c in (cx, cy))
        piece = np.ascontiguousarray(clips[i, t : t + frames, :, y0 : y0 + crop, x0 : x0 + crop])
        inside = np.zeros((frames, crop, crop), np.float32)
        for k in range(frames):
            for a, b, c, d in boxes[i, t + k]:
                a, c = np.clip([a - x0, c - x0], 0, crop).astype(int)
                b, d = np.clip([b - y0, d - y0], 0, crop).astype(int)
                inside[k, b:d, a:c] = 1
        chosen.append(i)
        if crop < 128 and rng.random() < 0.5:
            piece, inside = piece[..., ::-1].copy(), inside[..., ::-1].copy()
        video.append(torch.from_numpy(piece))
        weight.append(torch.from_numpy(inside))
    video = torch.stack(video).transpose(1, 2).float() / 127.5 - 1
    weight = 1 + FACE_WEIGHT * torch.stack(weight)[:, None]
    return video, weight / weight.mean(), chosen


def reconstruction_loss(output, video, weight):
    error = output - video
    loss = (weight * (error.abs() + 4 * error.square())).mean()
    for axis in (-1, -2):
        loss = loss + EDGE_WEIGHT * (weight.narrow(axis, 1, error.shape[axis] - 1) * error.diff(dim=axis).abs()).mean()
    return loss


def identity_loss(arcface, output, video, landmarks, rng):
    """1 - cosine between the embeddings of decoded and true faces in four frames of a clip [1, 3, 17, 128, 128]."""
    frames = np.sort(rng.choice(17, 4, replace=False))
    points = torch.from_numpy(landmarks[frames, rng.integers(2 if landmarks[0, 1].any() else 1)])
    decoded, true = (align(v[0, :, frames].transpose(0, 1), points) for v in (output, video))
    with torch.no_grad():
        target = arcface(true)
    return (1 - F.cosine_similarity(arcface(decoded), target)).mean()


def phase_at(step):
    """The phase that a step belongs to, and its number within the phase."""
    for phase in PHASES:
        if step < phase[1]:
            return phase, step
        step -= phase[1]
    raise ValueError(f"{step} steps after the last phase")


def learning_rate(step):
    """Warm-up, then cosine within each phase: to a third, to a twentieth, the decoder's to a hundredth."""
    phase, ahead = phase_at(step)
    floor = dict(images=0.3, clips=0.05).get(phase[0], 0.01)
    return (
        phase[-1] * min(1, (ahead + 1) / 100) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * ahead / phase[1])))
    )


class Optimizer:
    """Muon for the kernels, as matrices [out, in·taps], and Adam for gains and biases (at 0.05 of its rate).

    300 image steps gave 31.7 dB held out where Adam (1.5e-3) gave 26.4. torch's Muon takes matrices only, so it
    holds flat views of the kernels, which share their memory.
    """

    def __init__(self, module):
        kernels = [p for p in module.parameters() if p.dim() >= 4 and p.shape[0] > 1 and p[0].numel() > 1]
        chosen = {id(p) for p in kernels}
        self.pairs = [(p, torch.nn.Parameter(p.data.view(len(p), -1))) for p in kernels]
        self.muon = torch.optim.Muon([flat for _, flat in self.pairs], lr=0.02, momentum=0.95, weight_decay=0.01)
        rest = [p for p in module.parameters() if id(p) not in chosen]
        self.adam = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0)

    def step(self, lr):
        for p, flat in self.pairs:
            flat.grad = None if p.grad is None else p.grad.view_as(flat)
        for optimizer, rate in ((self.muon, lr), (self.adam, 0.05 * lr)):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def state_dict(self):
        return dict(muon=self.muon.state_dict(), adam=self.adam.state_dict())

    def load_state_dict(self, state):
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def psnr(error):
    """dB for an error in [-1, 1] units."""
    return float(-10 * torch.log10((error / 2).square().mean()))


@torch.no_grad()
def evaluate(vae, clips, count=60):
    """PSNR (dB) over held-out clips: of frames 1..16, which the linear code is measured on; of all; frame by frame."""
    index = np.linspace(0, len(clips) - 1, count).astype(int)
    square = torch.zeros(17)
    for i in index:
        video = torch.from_numpy(np.array(clips[i])).transpose(0, 1)[None].float() / 127.5 - 1
        output = vae.decode(vae.encode(video))
        square += (output.clamp(-1, 1) - video).div(2).square().mean((0, 1, 3, 4)) / count
    decibels = [round(float(-10 * torch.log10(x)), 2) for x in (square[1:].mean(), square.mean())]
    by_frame = [round(float(x), 1) for x in -10 * torch.log10(square)]
    return dict(psnr=decibels[0], psnr_all_frames=decibels[1], by_frame=by_frame)


def linear_yardstick(clips, held_out, count=60, stride=(4, 8, 8), components=48, patches=60000):
    """PSNR (dB) of the linear code with as many components: PCA of pixel patches, on what `evaluate` measures."""
    t, s, _ = stride
    rng = np.random.default_rng(0)

    def patches_of(array, i):
        x = torch.from_numpy(np.array(array[i, 1:])).float() / 127.5 - 1  # [16, 3, 128, 128]
        x = x.view(16 // t, t, 3, 128 // s, s, 128 // s, s).permute(0, 3, 5, 1, 2, 4, 6)
        return x.reshape(-1, t * 3 * s * s)

    sample = torch.cat([patches_of(clips, i) for i in rng.choice(len(clips), patches // 1024 * 2)])
    mean = sample.mean(0)
    _, vectors = torch.linalg.eigh((sample - mean).T @ (sample - mean))
    basis = vectors[:, -components:]
    square = []
    for i in np.linspace(0, len(held_out) - 1, count).astype(int):
        x = patches_of(held_out, i)
        output = mean + (x - mean) @ basis @ basis.T
        square.append((output.clamp(-1, 1) - x).div(2).square().mean())
    return float(-10 * torch.log10(torch.stack(square).mean()))


def train(work, out, threads=2):
    """Train, resuming from work/vae/state.pt if there is one; writes out/vae.safetensors."""
    torch.set_num_threads(threads)
    work = Path(work)
    folder = work / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    people = read_clips(work / "clips/train", work / "train.npy")
    all_people = read_clips(work / "more/train", work / "more.npy")
    held_out, _, _ = read_clips(work / "clips/heldout", work / "heldout.npy")
    torch.manual_seed(0)
    vae = WanVAE(CONFIGS["tiny"].vae)
    initialise(vae)
    ema = WanVAE(CONFIGS["tiny"].vae).requires_grad_(False)
    ema.load_state_dict(vae.state_dict())
    optimizer = Optimizer(vae)
    start, state = 0, folder / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        vae.load_state_dict(saved["vae"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    else:
        with open(folder / "log.jsonl", "a") as log:
            print(json.dumps(dict(linear_code_psnr=linear_yardstick(people[0], held_out))), file=log)
    arcface = None
    total = sum(phase[1] for phase in PHASES)
    bar = tqdm(range(start, total), initial=start, total=total, desc="vae", mininterval=5)
    for step in bar:
        (phase, _, size, frames, crop, _), ahead = phase_at(step)
        train_encoder = phase in ("images", "clips")
        if not train_encoder and ahead == 0:
            vae.load_state_dict(ema.state_dict())
        if phase == "decoder" and ahead == 0:
            finish(vae, people[0], folder)
        if not train_encoder and arcface is None:
            arcface = ArcFace.from_file(Path(out) / "arcface.safetensors")
        vae.encoder.requires_grad_(train_encoder)
        vae.conv1.requires_grad_(train_encoder)
        rng = np.random.default_rng([7, step])
        clips, boxes, landmarks = all_people if phase == "people" else people
        video, weight, chosen = batch_of(clips, boxes, rng, size, frames, crop)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(train_encoder):
                mean, logvar = vae.moments(video)
            mean, logvar = mean.float(), logvar.float().clamp(-14, 4)
            latent = mean if phase == "people" else mean + torch.randn_like(mean) * (0.5 * logvar).exp()
            output = vae.decode(latent).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(output, video, weight) + KL_WEIGHT * kl
        if not train_encoder:
            loss = loss + IDENTITY_WEIGHT * identity_loss(arcface, output, video, landmarks[chosen[0]], rng)
        vae.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step(learning_rate(step))
        keep = min(EMA, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(vae.parameters()), 1 - keep)
        if step % 20 == 0:
            bar.set_postfix(phase=phase, psnr=f"{psnr((output - video).detach()):.1f}", kl=f"{float(kl):.1f}")
        if (step + 1) % 250 == 0 or step + 1 == total:
            snapshot = dict(vae=vae.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            torch.save(snapshot, folder / "state.part")
            os.replace(folder / "state.part", state)
            with open(folder / "log.jsonl", "a") as log:
                row = dict(step=step + 1, **evaluate(ema, held_out, 24), lr=learning_rate(step))
                print(json.dumps(row), file=log)
    finish(ema, people[0], out)


@torch.no_grad()
def equalise(vae, latents):
    """Brings the latents' directions closer to one size, by a matrix that conv1 and conv2 take up; returns the latents.

    latents [N, z, F', h, w], as `moments` gives them. Trained for pixels alone, their variances spread over three
    orders, and those that hold a face's details are below the noise until the sampler's last step, which then guesses
    all of them at once. A = (C + 0.05 I)^-0.375, C the covariance of the channels at unit deviation, follows the
    encoder and its inverse precedes the decoder: the same pixels, of variances in 0.2 to 2. (The encoder's
    log-variances, which only training needs, are left as they were.)
    """
    z = latents.shape[1]
    mean, std = latents.mean((0, 2, 3, 4)).double(), latents.std((0, 2, 3, 4)).double()
    unit = (latents.double() - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    variances, axes = torch.linalg.eigh(torch.cov(unit.transpose(0, 1).flatten(1)))
    A = axes * (variances.clamp(min=0) + 0.05) ** -0.375 @ axes.T
    into, back = A / std, std[:, None] * torch.linalg.inv(A)
    weight, bias = vae.conv1.weight[:z], vae.conv1.bias[:z]
    weight.copy_((into @ weight.flatten(1).double()).view_as(weight))
    bias.copy_(into @ (bias.double() - mean))
    weight, bias = vae.conv2.weight, vae.conv2.bias
    bias.add_(weight.flatten(1) @ mean.float())
    weight.copy_((weight.flatten(1).double() @ back).view_as(weight))
    return torch.einsum("ij,bj...->bi...", A, unit).float()


@torch.no_grad()
def finish(vae, clips, out):
    """Equalise the latents, measure their mean and deviation per channel, and write the weights as fp16."""
    vae, latents = copy.deepcopy(vae), []
    for i in np.linspace(0, len(clips) - 1, 200).astype(int):
        video = torch.from_numpy(np.array(clips[i])).transpose(0, 1)[None].float() / 127.5 - 1
        latents.append(vae.moments(video)[0])
    latents = equalise(vae, torch.cat(latents))
    scale = {k: json.dumps([round(float(x), 5) for x in v]) for k, v in
             (("mean", latents.mean((0, 2, 3, 4))), ("std", latents.std((0, 2, 3, 4))))}  # fmt: skip
    weights = {k: v.half().contiguous() for k, v in vae.state_dict().items()}
    write_safetensors(weights, Path(out) / "vae.safetensors", scale)


if __name__ == "__main__":
    train(Path(__file__).parent / "build", Path(__file__).parent)
