"""What a training step takes on a GPU that is not there: `python train.py --model wan5b --plan`.

Runs train.py's own step on fake tensors (shapes without data, torch's FakeTensorMode) of the preset's networks, counts
FLOPs and follows every storage from its first use to its end. Nothing is downloaded and nothing is computed. Three
things stand in for a GPU's: attention is the fused kernel's (a CPU's would keep an L x L matrix), bf16 autocast is on,
and the detector sees one face of 100 px in the middle of every frame. Caching allocators and cuDNN's workspaces come
on top; the plan leaves that margin to the reader.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import types
import weakref
from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import model
import train
from model import CONFIGS, KEPT_FP32, WanDiT, WanVAE, add_lora, find_preset, untuned
from reward import ArcFace, FaceReward, Faces
from sample import latent_size, pin, rollout, sigmas, velocity, window_backward

PEAK, SHARE = 989e12, 0.4  # an H100's dense bf16 FLOP/s, and the share of them that training is taken to reach
FACE, CROP = 100, 144  # pixels a side: a face's box, and what ArcFace's crop covers around it
aten = torch.ops.aten


class Meter(TorchDispatchMode):
    """Bytes of live storages, peak and FLOPs of every phase; and the answers that a step wants of tensors without data.

    (FlopCounterMode would keep what its hooks on modules see alive.)
    """

    def __init__(self):
        super().__init__()
        self.live, self.host, self.seen = 0, 0, weakref.WeakSet()
        self.phase, self.peaks, self.flops = "weights", collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten._local_scalar_dense.default, aten.equal.default):
            return 1  # every number that the step reads: true, finite, one
        if func is aten.repeat_interleave.Tensor:
            return torch.zeros_like(args[0])  # one face a frame
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops[self.phase] += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor.untyped_storage())
        return out

    def watch(self, storage):
        if storage not in self.seen:
            self.seen.add(storage)
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())

    def add(self, size):
        self.live += size
        self.peaks[self.phase] = max(self.peaks[self.phase], self.live)


def fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Attention as a GPU runs it: flash, or for heads wider than 256 (the VAE's) the memory-efficient kernel."""
    if q.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[0]


def on_host(meter, **_):
    """save_on_cpu: the device lets the tensor go, the host counts it."""

    def pack(x):
        meter.host += x.nbytes
        return x.shape, x.dtype

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: torch.empty(packed[0], dtype=packed[1]))


@contextlib.contextmanager
def resting(meter, network, rest=True):
    """model.resting: the device lets the network's frozen weights go, and has them again afterwards."""
    size = sum(p.nbytes for p in network.parameters() if not p.requires_grad) if rest else 0
    meter.add(-size)
    yield
    meter.add(size)


def detector(frames):
    """One face in the middle of every frame."""
    centre = torch.tensor([frames.shape[3] / 2, frames.shape[2] / 2])
    corners = torch.tensor([-FACE / 2, -FACE / 2, FACE / 2, FACE / 2])
    return [Faces(centre.repeat(2)[None] + corners, torch.ones(1), centre + torch.zeros(1, 5, 2)) for _ in frames]


def window_of_face(grad, stride, margin):
    """model.latent_window of that face."""
    cells = []
    for n, s in zip(grad.shape[3:], stride[1:]):
        start, stop = (n - CROP) // 2 // s - margin, -(-(n + CROP) // 2 // s) + margin
        cells.append(slice(max(0, start), min(n // s, stop)))
    return slice(0, (grad.shape[2] - 1) // stride[0] + 1), *cells


def transformer(cfg, dtype):
    """A DiT in the types that `load_weights` gives it."""
    dit = WanDiT(cfg).requires_grad_(False)
    for name, p in dit.named_parameters():
        if not KEPT_FP32.search(name):
            p.data = p.data.to(dtype)
    return dit


def straight_step(job, batch, noise):
    """The same loss without this repository's means: one graph from the first window step to the score."""
    options, sigma, wan = job.options, job.sigma, job.wan
    first, context, y = batch.get("first"), batch["context"], batch.get("y")
    with train.autocast(noise.device, options.precision):
        x = rollout(wan.dit, noise, first, context, sigma, options.window, y)[0]
        loss = 0
        for i in range(options.sampling_steps - options.window, options.sampling_steps):
            v = velocity(job.model, x, sigma[i], context, y)
            with torch.no_grad():
                v_ref = velocity(job.reference, x, sigma[i], context, y)
            loss = loss + options.kl_weight * train.velocity_kl(v, v_ref, float(sigma[i])) / options.window
            x = pin(x + float(sigma[i + 1] - sigma[i]) * v, first)
        video = wan.vae.decode(x).float()
    score, _ = job.reward.score(video, batch["pool"], batch["pool_mask"], options.fsm)
    (loss - options.reward_weight * score.sum()).backward()


def simulate(options, frames, size, step=train.ipro_step):
    """A step of one clip: bytes on one GPU by category, and FLOPs and peak bytes by phase.

    Where several micro-batches accumulate, all weights' gradients also stay during the later ones' rollout and decode.
    """
    options = dataclasses.replace(options, precision="bf16")
    preset = find_preset(options.model, True, options.shift)  # no weights are read
    shape = latent_size(preset, frames, size)
    full = options.lora_rank == 0
    share = 1 / options.gpus if full else 1  # what FSDP2 leaves on a GPU of weights, gradients and optimizer state
    meter = Meter()

    def enter(name):
        meter.phase = name

    def during(name, f):
        def run(*args, **kwargs):
            enter(name)
            return f(*args, **kwargs)

        return run

    with ExitStack() as stack:
        for change in (
            patch.object(F, "scaled_dot_product_attention", fused_attention),
            patch.object(torch.autograd.graph, "save_on_cpu", functools.partial(on_host, meter)),
            patch.object(model, "latent_window", window_of_face),
            patch.object(train, "resting", functools.partial(resting, meter)),
            patch.object(train, "rollout", during("rollout", rollout)),
            patch.object(train, "window_backward", during("window", window_backward)),
            patch.object(train, "to_frames", lambda video: None),
            patch.object(train, "clip_metrics", lambda *_: dict(motion=None, tf=None)),
            FakeTensorMode(allow_non_fake_inputs=True), meter,
        ):  # fmt: skip
            stack.enter_context(change)
        sizes, before = {}, 0

        def weigh(name, share=1):
            nonlocal before
            meter.add((share - 1) * (meter.live - before))
            sizes[name], before = meter.live - before, meter.live

        def scatter(p):
            """A parameter's gradient is there, for good: further ones are added to it."""
            meter.add((share - 1) * p.grad.nbytes)
            hooks.pop(p).remove()

        dit = transformer(preset.dit, torch.float32 if full else torch.bfloat16)
        dit.checkpointing, dit.offload = options.checkpointing, options.offload
        blocks = [sum(p.nbytes for p in block.parameters()) for block in dit.blocks]
        weigh("transformer", share)
        parameters = sum(p.numel() for p in dit.parameters())
        vae = WanVAE(preset.vae).requires_grad_(False)
        weigh("VAE")
        reward = FaceReward(detector, ArcFace((3, 13, 30, 3)).eval().requires_grad_(False))
        if options.face_bf16:
            reward.encoder.trunk = torch.bfloat16
        weigh("face net")
        if full:
            reference = transformer(preset.dit, torch.float32)
            weigh("reference", share)
            hooks = {p: p.register_post_accumulate_grad_hook(scatter) for p in dit.requires_grad_(True).parameters()}
        else:
            add_lora(dit, options.lora_rank)
            weigh("LoRA")

            reference = untuned(dit)

        decode = vae.decode

        def decode_and_mark(latent, *how):
            enter("decode")
            video = decode(latent, *how)
            video.register_hook(lambda grad: enter("decode"))
            return video

        vae.decode, reward.score = decode_and_mark, during("face net", reward.score)
        wan = types.SimpleNamespace(dit=dit, vae=vae, preset=preset)
        schedule = sigmas(options.sampling_steps, preset.shift)
        job = train.Run(wan, dit, dit, reference, options, schedule, 1.0, reward)
        channels = preset.dit.out_dim
        batch = dict(context=torch.zeros(1, preset.dit.text_len, preset.dit.text_dim), row=[0],
                     pool=torch.zeros(1, frames, 512), pool_mask=torch.ones(1, frames, dtype=torch.bool))  # fmt: skip
        if preset.dit.in_dim == channels:
            batch["first"] = torch.zeros(1, channels, 1, *shape[1:])
        else:
            batch["y"] = torch.zeros(1, preset.dit.in_dim - channels, *shape)
        noise = torch.zeros(1, channels, *shape)
        weigh("inputs")
        meter.peaks.clear()
        step(job, batch, noise)
        enter("optimizer")
        weigh("gradients")
        for optimizer in train.optimizers(options, dit):
            optimizer.step()
        meter.peaks["optimizer"] = before + share * (meter.peaks["optimizer"] - before)  # its passing tensors' too
        weigh("optimizer", share)
    optimizer = sizes["optimizer"]
    peaks = {phase: peak + optimizer * (phase != "optimizer") for phase, peak in meter.peaks.items()}  # from step 2 on
    idle = sizes["transformer"] if preset.boundary and (share < 1 or not options.offload) else 0  # A14B's other expert
    if share < 1:
        idle += 2 * max(blocks)  # two at a time are gathered
    return types.SimpleNamespace(
        parameters=parameters, sizes=sizes, peaks={phase: peak + idle for phase, peak in peaks.items()},
        flops=meter.flops, host=meter.host, tokens=math.prod(shape) // math.prod(preset.dit.patch_size),
        seconds=meter.flops.total() / (PEAK * SHARE),
    )  # fmt: skip


SWITCHES = dict(checkpointing=True, decode_frames=4, offload=True, face_window=4)


def plan(options):
    """Print what a step of one clip takes on each GPU, by category and phase, and what each switch buys."""
    preset = CONFIGS[options.model]
    frames, size = options.frames or preset.frames, options.size or preset.size
    tuning = f"LoRA of rank {options.lora_rank}" if options.lora_rank else f"all weights over {options.gpus} GPU(s)"
    found = simulate(options, frames, size)
    print(f"{options.model}, {found.parameters / 1e9:.2f} B parameters{' (each expert)' if preset.boundary else ''}, "
          f"{size[0]}x{size[1]}x{frames}, {found.tokens} tokens, {tuning}, K = {options.window}")  # fmt: skip
    print("resident, GB: " + ", ".join(f"{n} {v / 1e9:.1f}" for n, v in found.sizes.items() if n != "inputs"))
    for phase, peak in found.peaks.items():
        print(f"{phase:10} peak {peak / 1e9:6.1f} GB {found.flops[phase] / 1e12:9.0f} TFLOP")
    print(f"a clip: {found.flops.total() / 1e15:.2f} PFLOP, {found.seconds:.0f} s on an H100 at {SHARE:.0%} of "
          f"{PEAK / 1e12:.0f} TFLOP/s; {found.host / 1e9:.0f} GB of block inputs pass through the host")  # fmt: skip
    print(f"\n{'switches, one after the other':44}{'peak GB':>9}{'in':>10}{'seconds':>9}")
    off = dict(checkpointing=False, offload=False, decode_frames=0, face_window=-1, kept_graphs=0)
    off = dataclasses.replace(options, **off)
    rows = [("one straight graph, block checkpoints", straight_step, dataclasses.replace(off, checkpointing=True))]
    rows.append(("this step, no switch", train.ipro_step, off))
    for name, value in SWITCHES.items():
        off = dataclasses.replace(off, **{name: value})
        rows.append((f"--{name}" + ("" if value is True else f" {value}"), train.ipro_step, off))
    for name, step, row in rows:
        found = simulate(row, frames, size, step)
        phase = max(found.peaks, key=found.peaks.get)
        print(f"{name:44}{found.peaks[phase] / 1e9:9.1f}{phase:>10}{found.seconds:9.0f}", flush=True)
