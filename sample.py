"""The flow-matching sampler, its gradient window, and the program that makes a clip from a face and a prompt.

    python sample.py --image face.png --prompt "a woman turns left and smiles" --out clip.mp4

A clip is an ODE's solution from noise (sigma 1) to data (sigma 0): dx/dsigma = v(x, 1000 sigma). Latent frame 0
holds the given image: its timestep is 0 and it is written back after every step, the last one included.
The gradient window (arXiv 2510.14255, after DRaFT) sends a gradient at the final latent back through the last K
steps, one step's graph at a time: memory of one step whatever K is, and exactly the truncated chain's gradient.
"""

import argparse
import dataclasses
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from model import CONFIGS, UserError, load_model, merge_lora


def sigmas(steps, shift):
    """Noise levels from 1 to 0, [steps + 1], moved towards noise by `shift` (Wan: 5; 1 = evenly spaced)."""
    s = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * s / (1 + (shift - 1) * s)


def pin(x, first):
    """The latent x [B, C, F', h, w] with frame 0 replaced by the image's latent `first` [B, C, 1, h, w]."""
    return torch.cat([first.type_as(x), x[:, :, 1:]], 2)


def velocity(dit, x, sigma, context):
    """v(x, 1000 sigma) of a pinned latent: frame 0 is clean, so its timestep is 0."""
    t = x.new_full((x.shape[0], x.shape[2]), 1000 * float(sigma))
    t[:, 0] = 0
    return dit(x, t, context)


@torch.no_grad()
def rollout(dit, noise, first, context, sigma, window=0, progress=lambda steps: steps):
    """Euler steps from noise to the clip's latent, without gradient.

    noise [B, C, F', h, w]; first [B, C, 1, h, w]; context [B, L, text_dim]; sigma [N+1]. Returns the window's
    latents x_{N-K} .. x_N, a list of K + 1 with K = `window`. Raises ValueError if the window exceeds the steps.
    """
    steps = len(sigma) - 1
    if not 0 <= window <= steps:
        raise ValueError(f"window is {window} steps, the sampler takes {steps}")
    x = pin(noise, first)
    latents = [x] if window == steps else []
    for i in progress(range(steps)):
        x = pin(x + float(sigma[i + 1] - sigma[i]) * velocity(dit, x, sigma[i], context), first)
        if i + 1 >= steps - window:
            latents.append(x)
    return latents


def window_backward(dit, latents, sigma, context, grad, penalty=None):
    """Accumulate the gradient of <grad, x_N> + sum_i penalty_i in the DiT's parameters, through the window.

    latents: `rollout`'s list x_{N-K} .. x_N; grad: the loss's gradient at x_N, [B, C, F', h, w].
    penalty(v, x, i) gives a scalar of step i's velocity v at latent x (the velocity KL), or None.
    Returns the gradient at x_{N-K}. One DiT graph is alive at a time: step i's chain rule is
        g_i = d/dx_i ( <g_{i+1}, x_i + (sigma_{i+1} - sigma_i) v(x_i)> + penalty_i ),
    and a pinned frame passes nothing on, because the next latent does not depend on it.
    """
    last = len(sigma) - 1
    for i, x in zip(range(last - 1, last - len(latents), -1), latents[-2::-1]):
        grad = pin(grad, torch.zeros_like(grad[:, :, :1]))
        x = x.detach().requires_grad_()
        v = velocity(dit, x, sigma[i], context)
        loss = (grad * (x + float(sigma[i + 1] - sigma[i]) * v)).sum()
        if penalty is not None:
            loss = loss + penalty(v, x.detach(), i)
        loss.backward()
        grad = x.grad
    return pin(grad, torch.zeros_like(grad[:, :, :1]))


def noise_like(shape, *seed):
    """Standard normal noise [shape] that depends on the integers `seed` only, not on device or batch."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
    return torch.randn(shape, generator=generator)


def latent_size(preset, frames, size):
    """(F', h, w) of a clip of `frames` frames of `size` = (height, width) pixels; UserError if it cannot be."""
    ft, fs, _ = preset.vae.stride
    fs *= preset.dit.patch_size[1]
    if frames < 1 or (frames - 1) % ft:
        near = max(1, round((frames - 1) / ft) * ft + 1)
        raise UserError(f"--frames {frames}: the VAE codes {ft}n+1 frames; the nearest is {near}")
    if size[0] % fs or size[1] % fs or min(size) <= 0:
        raise UserError(f"--size {size[0]}x{size[1]}: height and width must be multiples of {fs}")
    return (
        (frames - 1) // ft + 1,
        size[0] * preset.dit.patch_size[1] // fs,
        size[1] * preset.dit.patch_size[2] // fs,
    )


# ---------------------------------------------------------------------------------------------------------------
# Pictures and clips on disk


def fit(image, size):
    """A PIL image resized to cover `size` = (height, width) and centre-cropped to it, as uint8 [H, W, 3]."""
    h, w = size
    scale = max(w / image.width, h / image.height)
    image = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)), Image.LANCZOS)
    x, y = (image.width - w) // 2, (image.height - h) // 2
    return np.asarray(image.crop((x, y, x + w, y + h)))


def read_image(path, size):
    """A picture as uint8 [H, W, 3], covering `size` = (height, width). UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return fit(image, size)
    except FileNotFoundError:
        raise UserError(f"--image {path}: no such file") from None
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"--image {path}: not a readable picture ({error})") from None


def read_video(path):
    """A clip's frames as uint8 [F, H, W, 3], and its frames per second. UserError if it cannot be decoded."""
    try:
        with av.open(str(path)) as container:
            fps = float(container.streams.video[0].average_rate or 0)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise UserError(f"{path}: not a readable video ({error})") from None
    if not frames:
        raise UserError(f"{path}: a video without frames")
    return np.stack(frames), fps


def write_video(path, frames, fps):
    """Write uint8 [F, H, W, 3] (H and W even) as H.264 mp4, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=round(fps), options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    part.replace(path)


def to_tensor(frames):
    """uint8 [F, H, W, 3] to a video [1, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def to_frames(video):
    """A video [1, 3, F, H, W] in [-1, 1] to uint8 [F, H, W, 3]."""
    return (video[0].clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------
# Command lines: a program's options are the fields of one dataclass.


def option(default, text):
    """A dataclass field with its line in --help."""
    return dataclasses.field(default=default, metadata={"help": text})


def pixels(text):
    """'HxW' to (height, width)."""
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW in pixels, as in 480x832") from None
    return height, width


def parse_options(cls, argv=None, doc=None, positional=()):
    """Fill the dataclass `cls` from the command line; every field is an option with its name, type and default."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def refuse(message):
        raise UserError(f"{message} (see --help)")

    parser.error = refuse
    for f in dataclasses.fields(cls):
        kind = f.type if not typing.get_args(f.type) else typing.get_args(f.type)[0]
        text = f.metadata["help"] + ("" if f.default in (None, "") else f" (default: {f.default})")
        if f.name in positional:
            parser.add_argument(f.name, type=kind, help=text)
        elif kind is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            parser.add_argument(f"--{f.name}", type=pixels if f.name == "size" else kind, default=f.default, help=text)
    return cls(**vars(parser.parse_args(argv)))


def run(main):
    """Run a program; a user's mistake is one line on the terminal and exit status 2."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


@dataclass
class SampleOptions:
    image: str = option("", "the first frame: a picture with a face")
    prompt: str = option("", "what happens in the clip")
    out: str = option("sample.mp4", "the clip to write, .mp4")
    model: str = option("tiny", f"preset: {', '.join(CONFIGS)}")
    ckpt: str = option("", "folder with the model's weights; tiny ships its own")
    lora: str = option("", "a LoRA to merge, e.g. out/lora.safetensors")
    steps: int | None = option(None, "sampling steps; default: the preset's")
    shift: float | None = option(None, "of the noise schedule; default: the preset's")
    frames: int | None = option(None, "frames of the clip, 4n+1; default: the preset's")
    size: tuple[int, int] | None = option(None, "HxW in pixels; default: the preset's")
    seed: int = option(0, "of the noise")


def main():
    options = parse_options(SampleOptions, doc=__doc__)
    if not options.image:
        raise UserError("--image FILE is needed: the picture that the clip starts from")
    if Path(options.out).suffix != ".mp4" or not Path(options.out).absolute().parent.is_dir():
        raise UserError(f"--out {options.out}: must be an .mp4 file in a folder that exists")
    if options.model not in CONFIGS:
        raise UserError(f"--model {options.model}: unknown preset; choose from {', '.join(CONFIGS)}")
    preset = CONFIGS[options.model]
    size, frames = options.size or preset.size, options.frames or preset.frames
    shape = latent_size(preset, frames, size)
    if (options.steps or 1) < 1:
        raise UserError(f"--steps {options.steps}: at least 1")
    image = read_image(options.image, size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wan = load_model(options.model, options.ckpt, device)
    if options.lora:
        print(f"{options.lora}: merged into {merge_lora(wan.dit, options.lora)} layers")
    context = wan.encode_text([options.prompt])
    with torch.no_grad():
        first = wan.vae.encode(to_tensor(image[None]).to(device))
        noise = noise_like((1, preset.dit.out_dim, *shape), options.seed).to(device)
        schedule = sigmas(options.steps or preset.steps, options.shift or preset.shift)
        (latent,) = rollout(wan.dit, noise, first, context, schedule, progress=lambda s: tqdm(s, desc="sampling"))
        video = wan.vae.decode(latent)
    write_video(options.out, to_frames(video), preset.fps)
    print(f"{options.out}: {frames} frames of {size[1]}x{size[0]} at {preset.fps} fps")


if __name__ == "__main__":
    run(main)
