"""The flow-matching sampler, and the gradient through its last steps; a picture and a prompt to a clip.

    python sample.py --image face.png --prompt "a woman turns left and smiles" --out clip.mp4

Sampling solves dx/dsigma = v(x, t) from noise (sigma = 1) to data (sigma = 0), with t = 1000 sigma: by Euler steps, as
in training, by UniPC, Wan's own, or, where a model was distilled so, by noising its prediction again. What is unusual:
latent frame 0 holds the given picture: its timestep is 0, and it is written back after every step, the last one
included (A14B has the picture as further channels, y, instead). A gradient at the final latent goes back through the
last K of N steps only (IPRO, arXiv 2510.14255, section 3; DRaFT's truncation, arXiv 2309.17400), one step's graph at a
time: exactly the truncated chain's gradient, with the memory of one step whatever K is.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read as torch is imported: its threads wait without spinning for long

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageOps
from tqdm import tqdm

from cli import UserError, option, parse_options, run, whole_file
from model import CONFIGS
from weights import Wan, find_preset, parse_loras


def sigmas(steps, shift, start=1.0):
    """The noise levels sigma_0 .. sigma_N from `start` to 0, fp64 [steps + 1].

    shift moves them towards noise: sigma = shift s / (1 + (shift - 1) s) of evenly spaced s. Wan's is 5.
    """
    s = torch.linspace(start, 0, steps + 1, dtype=torch.float64)
    return shift * s / (1 + (shift - 1) * s)


def with_first_frame(x, first):
    """The latent x [B, C, F', h, w] with frame 0 replaced by the picture's latent `first` [B, C, 1, h, w]; None: x."""
    return x if first is None else torch.cat([first.type_as(x), x[:, :, 1:]], 2)


def velocity(dit, x, sigma, context, y=None):
    """v(x, 1000 sigma), of the shape of x [B, C, F', h, w].

    Without y, frame 0 of x is the clean picture, so its timestep is 0. A14B is given the picture as y instead.
    """
    t = x.new_full((x.shape[0], x.shape[2]), 1000 * float(sigma))  # [B, F']
    if y is not None:
        return dit(x, t, context, y)
    t[:, 0] = 0
    return dit(x, t, context)


def advance(x, v, sigma, sigma_next, noise=None):
    """The latent x at noise level sigma, with its velocity v, at the next level.

    Without noise, along the velocity (Euler):  x + (sigma' - sigma) v.  With noise, as models that were distilled to
    predict the data are sampled: the data x_0 = x - sigma v, noised again,  (1 - sigma') x_0 + sigma' noise.  To
    sigma' = 0 the two are one: x_0.
    """
    if noise is None:
        return x + float(sigma_next - sigma) * v
    return float(1 - sigma_next) * (x - float(sigma) * v) + float(sigma_next) * noise


@torch.no_grad()
def rollout(dit, noise, first, context, sigma, window=0, y=None, progress=iter, fresh=None):
    """Sample from noise in N steps, without gradient: x_{i+1} = `advance`(x_i, v(x_i, 1000 sigma_i)).

    noise [B, C, F', h, w]; first [B, C, 1, h, w], or None with y [B, C_y, F', h, w]; context [B or 1, L, text_dim];
    sigma [N+1]; fresh: each step's own noise, N of the noise's shape (`fresh_noise`), None: Euler steps. Returns the
    latents x_{N-K} .. x_N, a list of K + 1, with K = `window`. Raises ValueError where the window is longer than the
    schedule.
    """
    steps = len(sigma) - 1
    if not 0 <= window <= steps:
        raise ValueError(f"window is {window} steps, the sampler takes {steps}")
    x = with_first_frame(noise, first)
    latents = [x] if window == steps else []
    for i in progress(range(steps)):
        v = velocity(dit, x, sigma[i], context, y)
        x = with_first_frame(advance(x, v, sigma[i], sigma[i + 1], fresh and fresh[i]), first)
        if i + 1 >= steps - window:
            latents.append(x)
    return latents


def window_backward(dit, latents, sigma, context, grad, y=None, fresh=None):
    """Send the gradient at x_N, grad [B, C, F', h, w], back through the last K steps; one step's graph is alive.

    latents: `rollout`'s x_{N-K} .. x_N; sigma, context, y and fresh as there. A generator: for i = N-1 .. N-K it yields
    (i, x_i, v_i, loss_i) with

        loss_i = <g_{i+1}, x_{i+1}(x_i, v_i)>,    g_N = grad,

    where x_{i+1} is `advance`'s: by Euler x_i + (sigma_{i+1} - sigma_i) v_i. The caller adds step i's own penalty (the
    velocity KL) to loss_i and calls backward() on the sum: that accumulates the step's part in the parameters and
    leaves g_i, the sum's gradient at x_i, in x_i.grad. Fresh noise and a picture that is written back as frame 0 are
    constants, whatever x_i is: that frame of g is set to zero.
    """
    last = len(sigma) - 1
    for i in range(last - 1, last - len(latents), -1):
        if y is None:
            grad = with_first_frame(grad, torch.zeros_like(grad[:, :, :1]))
        x = latents[i - last - 1].detach().requires_grad_()
        v = velocity(dit, x, sigma[i], context, y)
        yield i, x, v, (grad * advance(x, v, sigma[i], sigma[i + 1], fresh and fresh[i])).sum()
        grad = x.grad  # the caller's backward() has left it there


# ---------------------------------------------------------------------------------------------------------------
# Noise, guidance and UniPC: what sampling takes beyond the method


def seeded_noise(shape, *seed):
    """Standard normal noise of a shape that depends on the integers `seed` only, not on device or batch."""
    entropy = np.random.SeedSequence((len(seed), *seed))  # their number first: to numpy (1,) and (1, 0) are alike
    generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
    return torch.randn(shape, generator=generator)


def fresh_noise(shape, steps, *seeds, device="cpu"):
    """The noise that a renoise sampler's steps add, a list of N; None for the last step, which ends at the data.

    shape [B, C, F', h, w]; seeds: of each of the B samples a tuple of integers (or one integer), which with the step is
    all that its noise depends on, as the first noise does (`seeded_noise` of the same).
    """
    seeds = [seed if isinstance(seed, tuple) else (seed,) for seed in seeds]
    draws = [torch.stack([seeded_noise(shape[1:], *seed, i) for seed in seeds]).to(device) for i in range(1, steps)]
    return [*draws, None]


def guided(dit, null, scale):
    """A DiT under classifier-free guidance (arXiv 2207.12598): v_null + scale (v - v_null); null as a context."""

    def guided_dit(x, t, context, y=None):
        v_null = dit(x, t, null, y)
        return v_null + scale * (dit(x, t, context, y) - v_null)

    return guided_dit


@torch.no_grad()
def unipc(dit, noise, first, context, steps, shift, y=None, progress=iter):
    """UniPC of order 2, B(h) = e^h - 1 (arXiv 2302.04867): what Wan 2.2 samples with. Returns the final latent.

    As the reference does, the schedule starts at 0.999, timesteps are whole numbers, and the first and last step
    are of order 1. With lambda = log((1 - sigma) / sigma), m the data that a velocity predicts, h = lambda_j -
    lambda_i and e = exp(-h) - 1, a step from i to j is  sigma_j / sigma_i x_i - (1 - sigma_j) e (m_i + D).
    """
    sigma = sigmas(steps, shift, 0.999)
    lam = torch.log((1 - sigma) / sigma).tolist()
    sigma = sigma.tolist()

    def step(i, j, x, m, D):
        return sigma[j] / sigma[i] * x - (1 - sigma[j]) * math.expm1(lam[i] - lam[j]) * (m + D)

    def slope(i, h):  # the difference to the prediction before last, and where that one lies
        r = (lam[i - 1] - lam[i]) / h
        return (data[i - 1] - data[i]) / r, r

    x, last, data, order = with_first_frame(noise, first), None, [], 0
    for i in progress(range(steps)):
        v = velocity(dit, x, int(1000 * sigma[i] + 1e-5) / 1000, context, y)
        data.append(x - sigma[i] * v)
        if i:  # correct the last step with what this evaluation says
            h = lam[i] - lam[i - 1]
            e, D = math.expm1(-h), 0.5 * (data[i] - data[i - 1])
            if order == 2:
                D1, r = slope(i - 1, h)
                b1 = (-e / h - 1) / e
                b2 = 2 * ((-e / h - 1) / -h - 0.5) / e
                rho = (b1 - b2) / (1 - r)
                D = rho * D1 + (b1 - rho) * (data[i] - data[i - 1])
            x = step(i - 1, i, last, data[i - 1], D)
        order = min(2, i + 1, steps - i)
        last = x
        D = 0.5 * slope(i, lam[i + 1] - lam[i])[0] if order == 2 else 0.0
        x = with_first_frame(step(i, i + 1, x, data[i], D), first)
        data[: i - 1] = [None] * max(0, i - 1)  # only the last two are needed
    return x


# ---------------------------------------------------------------------------------------------------------------
# The picture that a clip starts from


MOST_PIXELS, MOST_FRAMES = 2**24, 4093  # 4096 x 4096 is 18 times 720p; Wan's rotary table ends at 1024 latent frames


def latent_size(preset, frames, size):
    """(F', h, w) of a clip of `frames` frames of `size` = (height, width) pixels; UserError if it cannot be."""
    ft, fs, _ = preset.vae.stride
    fs *= preset.dit.patch_size[1]
    if frames < 1 or (frames - 1) % ft:
        near = max(1, round((frames - 1) / ft) * ft + 1)
        raise UserError(f"--frames {frames}: the VAE codes {ft}n+1 frames; the nearest is {near}")
    if size[0] % fs or size[1] % fs or min(size) <= 0:
        raise UserError(f"--size {size[0]}x{size[1]}: height and width must be multiples of {fs}")
    if size[0] * size[1] > MOST_PIXELS or frames > MOST_FRAMES:
        raise UserError(f"{frames} frames of {size[0]}x{size[1]}: at most {MOST_FRAMES} frames of {MOST_PIXELS} pixels")
    return (frames - 1) // ft + 1, size[0] // preset.vae.stride[1], size[1] // preset.vae.stride[2]


def best_size(preset, width, height):
    """The output's (height, width) for a picture: its shape, the preset's area, multiples of stride times patch.

    Source: best_output_size in wan/utils/utils.py (5B); wan/image2video.py (A14B), whose own rounding error makes
    480x832 of some pictures 464x832: not repeated here.
    """
    area, ratio = preset.size[0] * preset.size[1], width / height
    dh, dw = (s * p for s, p in zip(preset.vae.stride[1:], preset.dit.patch_size[1:]))

    def whole(h, w):  # at least one cell, however thin the picture
        return max(int(h // dh), 1) * dh, max(int(w // dw), 1) * dw

    h, w = whole((area / ratio) ** 0.5, (area * ratio) ** 0.5)
    if preset.boundary is not None:
        return h, w
    by_width, by_height = (whole(area / w, w)[0], w), (h, whole(h, area / h)[1])

    def bend(size):
        return max(ratio * size[0] / size[1], size[1] / size[0] / ratio)

    return by_width if bend(by_width) < bend(by_height) else by_height


@torch.no_grad()
def condition(wan, image, frames):
    """What the networks are given of a picture uint8 [H, W, 3] for a clip of `frames`: (first, y), one of them None.

    5B: the picture's latent, [1, z, 1, h, w]. A14B: [1, 4 + z, F', h, w], a mask (1 in frame 0) and the latents
    of the picture followed by grey frames.
    """
    video = to_tensor(image[None]).to(wan.device)
    if wan.preset.dit.in_dim == wan.preset.dit.out_dim:
        return wan.vae.encode(video), None
    latent = wan.vae.encode(F.pad(video, (0, 0, 0, 0, 0, frames - 1)))
    mask = torch.zeros_like(latent[:, :4])
    mask[:, :, 0] = 1
    return None, torch.cat([mask, latent], 1)


@torch.no_grad()
def decode(vae, latent):
    """A latent [1, z, F', h, w] to uint8 frames [F, H, W, 3], one latent frame in memory at a time."""
    caches, frames = None, []
    for part in latent.split(1, 2):
        video, caches = vae.decode_chunk(part, caches)
        frames.append(to_frames(video))
    return np.concatenate(frames)


# ---------------------------------------------------------------------------------------------------------------
# Pictures and clips on disk


def cover_and_crop(image, size):
    """A PIL image resized to cover `size` = (height, width) and centre-cropped to it, as uint8 [H, W, 3]."""
    h, w = size
    scale = max(w / image.width, h / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.LANCZOS)
    x, y = (image.width - w) // 2, (image.height - h) // 2
    return np.asarray(image.crop((x, y, x + w, y + h)))


def read_picture(path):
    """A picture as a PIL image in RGB. UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut at 255: all white
                image = Image.fromarray((np.asarray(image, np.float32) / 257).round().clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises
        raise UserError(f"{path}: not a readable picture ({error})") from None


def read_video(path):
    """A clip's frames as uint8 [F, H, W, 3], and its frames per second. UserError if it cannot be decoded."""
    try:
        with av.open(str(path)) as container:
            fps = float(container.streams.video[0].average_rate or 0)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise UserError(f"{path}: not a readable video ({error})") from None
    if len({frame.shape for frame in frames}) != 1:
        raise UserError(f"{path}: a video without frames, or of frames of several sizes")
    return np.stack(frames), fps


def write_video(path, frames, fps, crf=12):
    """Write uint8 [F, H, W, 3] (H and W even) as H.264 mp4, whole or not at all, in BT.709 and limited range.

    crf: the quality, 0 best, 51 worst. The header says which colours they are: a player that guesses takes BT.709 too,
    and one that guessed BT.601 would shift them.
    """
    with whole_file(path) as part, av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=round(fps), options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        about = stream.codec_context
        about.colorspace, about.color_range = Colorspace.ITU709, ColorRange.MPEG
        about.color_primaries, about.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for frame in frames:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(image.reformat(format="yuv420p", dst_colorspace="itu709")))
        container.mux(stream.encode())


def to_tensor(frames):
    """uint8 [F, H, W, 3] to a video [1, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def to_bytes(video):
    """A video [B, 3, F, H, W] in [-1, 1] to its 8-bit levels, uint8 of the same shape, on its device."""
    return (video.clamp(-1, 1) * 127.5 + 127.5).round().byte()


def to_frames(video):
    """A video [1, 3, F, H, W] in [-1, 1] to uint8 [F, H, W, 3], on the host."""
    return to_bytes(video)[0].permute(1, 2, 3, 0).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------
# The program

# What the reference puts here (sample_neg_prompt of wan/configs/shared_config.py); the released weights expect it.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)


@dataclass
class SampleOptions:
    image: str = option("", "the first frame: a picture with a face")
    prompt: str = option("", "what happens in the clip")
    out: str = option("sample.mp4", "the clip to write, .mp4")
    model: str = option("tiny", f"preset: {', '.join(CONFIGS)}")
    ckpt: str = option("", "folder with the model's weights; tiny ships its own")
    base_lora: str = option("", "a distilled base's LoRA, merged: [high=|low=]FILE[:STRENGTH], comma-separated")
    lora: str = option("", "LoRAs beside the weights: [high=|low=]FILE[:STRENGTH], comma-separated")
    sampling_steps: int | None = option(None, "N, sampling steps; default: the preset's", least=1, most=1000)
    shift: float = option(0.0, "of the noise schedule; 0 = the preset's", least=0)
    solver: str = option("", "euler or renoise as in training; default: unipc, and euler for tiny",
                         choices=("", "euler", "unipc", "renoise"))  # fmt: skip
    cfg: float | None = option(None, "classifier-free guidance, 1 = off (distilled weights); default: the preset's",
                               least=0)  # fmt: skip
    negative: str | None = option(None, "negative prompt, where cfg is on; default: the reference's, none for tiny")
    frames: int | None = option(None, "frames of the clip, 4n+1; default: the preset's", least=1)
    size: tuple[int, int] | None = option(None, "HxW in pixels; default: the picture's shape at the preset's area")
    precision: str = option("", "of transformer and text encoder; default: bf16, and fp32 for tiny",
                            choices=("", "bf16", "fp32"))  # fmt: skip
    seed: int = option(0, "of the noise", least=0)


def sampling_assumptions(model, solver, steps, shift, cfg, base_lora):
    """One line: the sampler, and whether --ckpt must hold distilled weights, which no file tells."""
    guidance = "no guidance" if cfg == 1 else f"guidance {cfg:g}"
    distilled = f"base LoRA {base_lora}" if base_lora else "no base LoRA"
    if cfg == 1 and not base_lora:
        distilled += ", so --ckpt must hold distilled weights"
    return f"{model}: {steps} steps by {solver}, shift {shift:g}, {guidance}, {distilled}"


def main():
    options = parse_options(SampleOptions, doc=__doc__)
    if not options.image:
        raise UserError("--image FILE is needed: the picture that the clip starts from")
    out = Path(options.out)
    if out.suffix != ".mp4" or not out.absolute().parent.is_dir():
        raise UserError(f"--out {options.out}: must be an .mp4 file in a folder that exists")
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise UserError(f"--out {options.out}: cannot be written there; name another file")
    preset = find_preset(options.model, options.ckpt, options.shift)
    frames = preset.frames if options.frames is None else options.frames
    steps = options.sampling_steps or preset.steps
    tiny = preset.shipped
    picture = read_picture(options.image)
    small, large = sorted(picture.size)
    if small < 16 or large > 16 * small:  # nothing is on it; of a longer strip no clip's shape can be made
        shown = f"{picture.width}x{picture.height} pixels"
        raise UserError(f"--image {options.image}: {shown}; at least 16 a side and at most 16 times as long as wide")
    size = options.size or (preset.size if tiny else best_size(preset, *picture.size))
    shape = latent_size(preset, frames, size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"": None, "bf16": torch.bfloat16, "fp32": torch.float32}[options.precision]
    loras, base = parse_loras(options.lora, preset), parse_loras(options.base_lora, preset, "--base_lora")
    cfg = preset.cfg if options.cfg is None else options.cfg
    solver = options.solver or ("euler" if tiny else "unipc")
    if not tiny:
        print(sampling_assumptions(options.model, solver, steps, preset.shift, cfg, options.base_lora))
    wan = Wan(options.model, options.ckpt, device, dtype, keep=False, loras=loras, base_loras=base)
    negative = options.negative if options.negative is not None else "" if tiny else NEGATIVE
    contexts = wan.encode_text([options.prompt, negative] if cfg != 1 else [options.prompt])
    first, y = condition(wan, cover_and_crop(picture, size), frames)
    noise = seeded_noise((1, preset.dit.out_dim, *shape), options.seed).to(device)
    dit = wan.dit if cfg == 1 else guided(wan.dit, contexts[1:], cfg)
    bar = functools.partial(tqdm, desc="sampling")
    if solver == "unipc":
        latent = unipc(dit, noise, first, contexts[:1], steps, preset.shift, y, bar)
    else:
        sigma, fresh = sigmas(steps, preset.shift), None
        if solver == "renoise":
            fresh = fresh_noise(noise.shape, steps, options.seed, device=device)
        latent = rollout(dit, noise, first, contexts[:1], sigma, y=y, progress=bar, fresh=fresh)[0]
    del dit  # its memory is free before the decoder is read
    write_video(options.out, decode(wan.vae, latent), preset.fps)
    print(f"{options.out}: {frames} frames of {size[1]}x{size[0]} at {preset.fps} fps")


if __name__ == "__main__":
    run(main)
