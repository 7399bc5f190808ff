"""What a reward-tuning step costs, ours against a plain one built from diffusers' parts.

    python tests/bench_step.py              every table; about an hour on two idle cores
    python tests/bench_step.py --only step window frames parts share plan margin

The plain step keeps one graph from the first window step through the decoder to the score: WanTransformer3DModel with
its gradient checkpointing, AutoencoderKLWan.decode, a loop over frames through the same face encoder. Both sides have
the same sizes, LoRA, steps (N = 8, K = 4) and faces (a fixed one in every frame: detection is the same work on both),
random weights, fp32. Every row is a process of its own, so that its peak is its own: resident memory over what it was
after a first step, which leaves weights and the libraries' buffers. Medians of --repeats further ones.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))

# name: DiT sizes, VAE sizes, pixels, face box in pixels
SIZES = {
    "tiny": (dict(), dict(), 128, 48),
    "middle": (dict(dim=768, ffn_dim=3072, num_heads=12, num_layers=20, freq_dim=256, text_dim=512, text_len=128),
               dict(dim=32, dec_dim=64, dim_mult=(1, 2, 4, 4), num_res_blocks=1,
                    temporal_downsample=(False, True, True)), 256, 64),
}  # fmt: skip


def resident():
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


class Peak:
    """The most that `resident` was over its value at entry, sampled every 2 ms; seconds, and all cores' CPU seconds.

    On a machine that others use as well, compare CPU seconds under OMP_NUM_THREADS=1.
    """

    def __enter__(self):
        self.base = self.top = resident()
        self.on, self.begin, self.cpu = True, time.perf_counter(), time.process_time()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self):
        while self.on:
            self.top = max(self.top, resident())
            time.sleep(0.002)

    def __exit__(self, *_):
        self.seconds, self.cpu = time.perf_counter() - self.begin, time.process_time() - self.cpu
        self.on = False
        self.thread.join()
        self.megabytes = (self.top - self.base) / 2**20


def build(size, theirs):
    """(preset, transformer, decode, pixels, face): random weights, frozen; `theirs` are diffusers' classes."""
    import dataclasses

    import torch

    from model import CONFIGS, WanDiT, WanVAE

    torch.manual_seed(0)
    dit_sizes, vae_sizes, pixels, face = SIZES[size]
    preset = CONFIGS["tiny"]
    dit = dataclasses.replace(preset.dit, **dit_sizes)
    vae = dataclasses.replace(preset.vae, **vae_sizes)
    preset = dataclasses.replace(preset, dit=dit, vae=vae, size=(pixels, pixels))
    if not theirs:
        return preset, WanDiT(dit).requires_grad_(False), WanVAE(vae).requires_grad_(False), pixels, face
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    network = WanTransformer3DModel(
        patch_size=dit.patch_size, num_attention_heads=dit.num_heads, attention_head_dim=dit.dim // dit.num_heads,
        in_channels=dit.in_dim, out_channels=dit.out_dim, text_dim=dit.text_dim, freq_dim=dit.freq_dim,
        ffn_dim=dit.ffn_dim, num_layers=dit.num_layers, cross_attn_norm=True, rope_max_seq_len=64,
    ).requires_grad_(False)  # fmt: skip
    channels = 3 * vae.patch_size**2
    decoder = AutoencoderKLWan(
        base_dim=vae.dim, decoder_base_dim=vae.dec_dim, z_dim=vae.z_dim, dim_mult=list(vae.dim_mult),
        num_res_blocks=vae.num_res_blocks, temperal_downsample=list(vae.temporal_downsample), is_residual=True,
        in_channels=channels, out_channels=channels, patch_size=vae.patch_size,
        latents_mean=[0.0] * vae.z_dim, latents_std=[1.0] * vae.z_dim,
    ).requires_grad_(False)  # fmt: skip
    return preset, network, decoder, pixels, face


def detector(face):
    """A detector that sees one face of `face` px in the middle of every frame."""
    import torch

    from reward import TEMPLATE, Faces

    def detect(frames):
        corner = (torch.tensor(frames.shape[:1:-1]) - face) / 2  # x, y
        points = corner + (TEMPLATE + 0.01) * face / 112
        box = torch.cat([corner, corner + face])
        return [Faces(box[None], torch.ones(1), points[None]) for _ in frames]

    return detect


def plain_velocity(network, x, sigma, context):
    import torch

    frames, tokens = x.shape[2], x.shape[3] * x.shape[4] // 4
    t = torch.full((len(x), frames), 1000 * float(sigma))
    t[:, 0] = 0
    return network(x, t.repeat_interleave(tokens, 1), context, return_dict=False)[0]


def plain_step(network, vae, encoder, detect, noise, first, context, pool, sigma, window):
    """Sampling, decoding and scoring in one graph, and its backward pass."""
    import torch
    import torch.nn.functional as F

    from model import lora_disabled
    from reward import align

    x, loss, steps = torch.cat([first, noise[:, :, 1:]], 2), 0, len(sigma) - 1
    for i in range(steps):
        with torch.set_grad_enabled(i >= steps - window):
            v = plain_velocity(network, x, sigma[i], context)
            if i >= steps - window:
                with torch.no_grad(), lora_disabled(network):
                    v_ref = plain_velocity(network, x, sigma[i], context)
                loss = loss + (v - v_ref)[:, :, 1:].square().mean() / (2 * float(sigma[i]) ** 2 * window)
            x = x + float(sigma[i + 1] - sigma[i]) * v
            x = torch.cat([first, x[:, :, 1:]], 2)
    video = vae.decode(x).sample
    scores = []
    for frame in video[0].transpose(0, 1):
        (seen,) = detect(frame[None])
        embedding = encoder(align(frame[None], seen.landmarks))
        scores.append(F.cosine_similarity(embedding, pool[0], dim=-1).mean())
    (loss - 0.1 * torch.stack(scores).mean()).backward()


def step(variant, size, window):
    """A step as a function; variant: plain or ours, and options, as in `ours face_window=2`."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    import train
    from model import ASSETS, add_lora
    from reward import FaceReward, read_encoder
    from sample import latent_size, sigmas

    side, *given = variant.split()
    switches = {k: int(v) for k, v in (item.split("=") for item in given)}
    theirs = side == "plain"
    preset, network, vae, pixels, face = build(size, theirs)
    with unset_fake_temporarily():  # fake tensors read no files
        encoder = read_encoder(ASSETS / "arcface.safetensors")
    detect, frames = detector(face), preset.frames
    shape = preset.dit.out_dim, *latent_size(preset, frames, (pixels, pixels))
    generator = torch.Generator().manual_seed(1)
    noise, first = (torch.randn(1, *s, generator=generator) for s in (shape, (shape[0], 1, *shape[2:])))
    context = torch.randn(1, preset.dit.text_len, preset.dit.text_dim, generator=generator)
    pool = torch.randn(1, frames, 512, generator=generator)
    schedule = sigmas(8, 5.0)
    if theirs:
        targets = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
        add_lora(network, 32, targets=targets)
        network.enable_gradient_checkpointing()

        def once():
            plain_step(network, vae, encoder, detect, noise, first, context, pool, schedule, window)
    else:
        add_lora(network, 32)
        options = train.TrainOptions(batch=1, sampling_steps=8, window=window, precision="fp32", **switches)
        network.checkpointing = options.checkpointing
        if options.compile:
            for block in network.blocks:
                block.compile()

        wan = types.SimpleNamespace(dit=network, vae=vae, preset=preset, at_work=lambda part: None)
        tuning = train.Tuning(wan, network, network, options, schedule, FaceReward(detect, encoder))
        batch = dict(first=first, context=context, row=[0], pool=pool, pool_mask=torch.ones(pool.shape[:2]).bool())

        def once():
            train.ipro_step(tuning, batch, noise)

    return once


def decode(variant, size, frames):
    """VAE decode and its backward pass to the latent, of a clip of `frames`, as a function."""
    import torch

    preset, _, vae, _, _ = build(size, variant == "plain")
    x = torch.randn(1, preset.vae.z_dim, (frames - 1) // 4 + 1, 8, 8, requires_grad=True)
    decode = (lambda x: vae.decode(x).sample) if variant == "plain" else vae.decode
    return lambda: (decode(x, 2) if variant == "streamed" else decode(x)).sum().backward()


def part(variant, size, which):
    """The transformer's forward and backward pass (`compiled`: its blocks are), or decoding, as a function."""
    import torch

    theirs = variant == "plain"
    preset, network, vae, pixels, _ = build(size, theirs)
    side = pixels // preset.vae.stride[1]
    x = torch.randn(1, preset.dit.in_dim, 5, side, side)
    context = torch.randn(1, preset.dit.text_len, preset.dit.text_dim)
    t = torch.full((1, 5), 500.0)
    if which == "compiled":
        for block in network.blocks:
            block.compile()

    def once():
        if which != "decoder":
            y = x.clone().requires_grad_()
            v = plain_velocity(network, y, 0.5, context) if theirs else network(y, t, context)
            v.sum().backward()
        else:
            with torch.no_grad():
                vae.decode(x)

    return once


def measure(repeats, kind, *arguments):
    """Medians of seconds, all cores' CPU seconds and peak MB of what `kind` makes, after a first run."""
    once, runs = dict(step=step, decode=decode, part=part)[kind](*arguments), []
    once()
    for _ in range(repeats):
        with Peak() as peak:
            once()
        runs.append(peak)
    return {k: statistics.median(getattr(run, k) for run in runs) for k in ("seconds", "cpu", "megabytes")}


def share(variant, size, window):
    """A step's FLOPs, and the FLOPs a CPU second of this machine's matmul."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    once, n = step(variant, size, window), 2048
    with FlopCounterMode(display=False) as counter:
        once()
    a = torch.randn(n, n)
    a @ a
    return dict(flops=counter.get_total_flops(), matmul=2 * n**3 / min(timed(lambda: a @ a) for _ in range(5)))


def planned(variant, size, window):
    """The MB that plan.py's meter finds for the same step on fake tensors, attention and precision being the CPU's."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    import plan

    with FakeTensorMode(allow_non_fake_inputs=True), plan.Meter() as meter:
        once = step(variant, size, window)
        once()
        meter.peaks.clear()
        base = meter.live
        once()
        return dict(megabytes=(max(meter.peaks.values()) - base) / 2**20)


def cosine(which, seed):
    """Cosine of the windowed decode's gradient to the whole one's, by margin; `alone`: attention sees the window only.

    which: "tiny", the trained decoder, a sampled clip and the reward's own gradient; or "wan", Wan 2.2's decoder at an
    eighth of its width with random weights, 512x512, and a random gradient on 112x112 pixels in the middle.
    """
    import dataclasses
    from unittest.mock import patch

    import torch
    import torch.nn.functional as F

    import model
    from data import Clips
    from reward import FaceReward
    from sample import rollout, seeded_noise, sigmas
    from weights import Wan

    if which == "tiny":
        wan, reward = Wan("tiny"), FaceReward.from_folder(model.ASSETS)
        clips = Clips(model.ASSETS / "data", "heldout")
        row = clips.spread(6)[seed]
        batch, vae = clips.batch([row]), wan.vae
        noise = seeded_noise((1, *clips.latent_shape(wan.preset, row)), 3, row)
        x = rollout(wan.dit, noise, batch["first"], batch["context"], sigmas(8, 5.0))[0]
        score = lambda video: reward.score(video, batch["pool"], batch["pool_mask"])[0].sum()
    else:
        torch.manual_seed(seed)
        vae = model.WanVAE(dataclasses.replace(model.CONFIGS["wan5b"].vae, dim=20, dec_dim=32)).requires_grad_(False)
        for module in vae.modules():
            if isinstance(module, model.AttentionBlock):
                module.proj.reset_parameters()  # it starts at zero
        x, probe = torch.randn(1, 48, 2, 32, 32), torch.zeros(1, 3, 5, 512, 512)
        probe[..., 200:312, 200:312] = torch.randn(1, 3, 5, 112, 112)
        score = lambda video: (video * probe).sum()

    def gradient(margin):
        y = x.clone().requires_grad_()
        return torch.autograd.grad(score(vae.decode(y, None, margin)), y)[0].flatten()

    found, whole = {}, gradient(None)
    for margin in (0, 1, 2) if which == "tiny" else (0, 1, 2, 3, 4, 6, 8):
        found[margin] = float(F.cosine_similarity(gradient(margin), whole, dim=0))
        with patch.object(model, "set_into_frame", lambda seen, frame, window, halo, k, v, size: (k, v)):
            found[f"{margin}, alone"] = float(F.cosine_similarity(gradient(margin), whole, dim=0))
    return found


def timed(f):
    begin = time.process_time()  # CPU seconds
    f()
    return time.process_time() - begin


# glibc gives what is freed back at once, so that resident memory is what is in use: without, a step's peak varies by a
# third from run to run. It costs page faults, so that seconds are of runs without.
GIVE_BACK = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")


@functools.cache  # one row may stand in several tables
def measured(kind, *arguments, repeats=1, memory=False):
    """What a process of its own finds; memory: its peaks rather than its seconds."""
    command = [sys.executable, __file__, "--repeats", str(repeats), "--run", kind, *map(str, arguments)]
    told = dict(stdout=subprocess.PIPE, text=True, check=True, env=os.environ | (GIVE_BACK if memory else {}))
    return types.SimpleNamespace(**json.loads(subprocess.run(command, **told).stdout.splitlines()[-1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    tables = ("step", "window", "frames", "parts", "share", "plan", "margin")
    parser.add_argument("--only", nargs="+", choices=tables, default=tables)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=tuple(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        kind, *arguments = options.run
        arguments = [int(a) if a.isdigit() else a for a in arguments]
        counted = dict(planned=planned, share=share, cosine=cosine)
        print(json.dumps(counted[kind](*arguments) if kind in counted else measure(options.repeats, kind, *arguments)))
        return
    run = functools.partial(measured, repeats=options.repeats)
    peak = lambda *arguments: run(*arguments, memory=True).megabytes
    if "step" in options.only:
        print(f"{'1. step':8} {'variant':60}{'seconds':>9}{'CPU s':>8}{'MB':>8}{'time':>8}{'memory':>8}", flush=True)
        for size in options.sizes:
            plain = None
            for variant in VARIANTS:
                found, megabytes = run("step", variant, size, 4), peak("step", variant, size, 4)
                plain = plain or (found.seconds, megabytes)
                ratio = f"{found.seconds / plain[0]:7.2f}x{megabytes / plain[1]:7.2f}x"
                row = f"{size:8} {variant:60}{found.seconds:9.2f}{found.cpu:8.1f}{megabytes:8.0f}{ratio}"
                print(row, flush=True)
    if "window" in options.only:
        print("\n2. peak MB over K (tiny)\n" + f"{'':36}" + "".join(f"{k:8}" for k in (1, 2, 4, 8)))
        for variant in ("plain", "ours"):
            row = [peak("step", variant, "tiny", k) for k in (1, 2, 4, 8)]
            print(f"{variant:36}" + "".join(f"{mb:8.0f}" for mb in row), flush=True)
    if "frames" in options.only:
        lengths = (17, 33, 65, 121)
        print("\n3. decode + backward, peak MB over frames (middle's VAE, 128x128)")
        print(f"{'':36}" + "".join(f"{n:8}" for n in lengths) + "   MB a frame")
        for variant, name in (("plain", "plain"), ("ours", "ours"), ("streamed", "ours, decode_frames=2")):
            row = [peak("decode", variant, "middle", n) for n in lengths]
            growth = (row[-1] - row[0]) / (lengths[-1] - lengths[0])
            print(f"{name:36}" + "".join(f"{mb:8.0f}" for mb in row) + f"{growth:13.2f}", flush=True)
    if "parts" in options.only:
        print(f"\n4. {'CPU seconds':34}{'plain':>8}{'ours':>8}{'ratio':>8}")
        for which in ("transformer", "compiled", "decoder"):
            plain, ours = (run("part", v, "middle", which).cpu for v in ("plain", "ours"))
            print(f"   {which:34}{plain:8.3f}{ours:8.3f}{ours / plain:7.2f}x", flush=True)
    if "share" in options.only:
        found, cpu = measured("share", "ours", "middle", 4), run("step", "ours", "middle", 4).cpu
        rate = found.flops / cpu
        print(f"\n5. step at the middle size: {found.flops / 1e12:.2f} TFLOP, {rate / 1e9:.0f} GFLOP a CPU second, "
              f"{rate / found.matmul:.0%} of this machine's matmul ({found.matmul / 1e9:.0f})")  # fmt: skip
    if "plan" in options.only:
        print(f"\n6. {'peak MB of the step':42}{'measured':>9}{'planned':>9}{'ratio':>7}")
        for size in options.sizes:
            for variant in VARIANTS[1:3]:
                found = peak("step", variant, size, 4)
                plan = measured("planned", variant, size, 4).megabytes
                print(f"   {size + ', ' + variant:42}{found:9.0f}{plan:9.0f}{plan / found:7.2f}", flush=True)
    if "margin" in options.only:
        print("\n7. cosine of the face window's gradient to the frame's, by margin (alone: attention too)")
        for which, seeds in (("tiny", 6), ("wan", 2)):
            runs = [vars(measured("cosine", which, seed)) for seed in range(seeds)]
            for name in runs[0]:
                print(f"   {which + ', margin ' + name:36}" + "".join(f"{run[name]:8.4f}" for run in runs), flush=True)


VARIANTS = (
    "plain",
    "ours",
    "ours checkpointing=1 decode_frames=2",
    "ours face_window=2",
    "ours face_window=2 compile=1",
)

if __name__ == "__main__":
    main()
