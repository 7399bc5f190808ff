"""What a training step takes on a GPU that is not there: no weights, no data, nothing computed.

    python plan.py --model wan5b --size 704x1280 --frames 121

Runs train.py's own step on fake tensors (shapes without data, torch's FakeTensorMode) of the preset's networks, counts
FLOPs and follows every storage from its first use to its end; the step says itself which phase it is in, by the
profiler's `record_function`. Two things stand in for a GPU's: bf16 autocast is on, and the detector sees one face of
100 px in the middle of every frame. Caching allocators and cuDNN's workspaces come on top; the plan leaves that margin
to the reader.
"""

import collections
import dataclasses
import math
import types
import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cli import option, parse_options, run
from model import CONFIGS, WanDiT, WanVAE, add_lora, lora_disabled
from reward import ArcFace, FaceReward, Faces, fold_batch_norms, velocity_kl
from sample import latent_size, rollout, sigmas, velocity, with_first_frame
from train import TrainOptions, Tuning, check_window, ipro_step
from weights import KEPT_FP32

PEAK, SHARE = 989e12, 0.4  # an H100's dense bf16 FLOP/s, and the share of them that training is taken to reach
FACE, CROP = 100, 144  # pixels a side: a face's box, and what ArcFace's crop covers around it
PHASES = ("rollout", "decode", "window", "optimizer")
aten, profiler = torch.ops.aten, torch.ops.profiler
FLOPS = flop_registry | {  # a CPU's fused attention, which fake tensors take, keeps what a GPU's keeps
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_flash_attention_backward],
}  # fmt: skip


@dataclass
class PlanOptions:
    model: str = option("wan5b", "preset", choices=tuple(CONFIGS))
    frames: int | None = option(None, "of the clip, 4n+1; default: the preset's", least=1)
    size: tuple[int, int] | None = option(None, "of the clip, HxW in pixels; default: the preset's")
    lora_rank: int = option(32, "rank of the LoRA; 0 tunes all weights", least=0)
    gpus: int = option(1, "over how many all weights are sharded (a LoRA's base is whole on each)", least=1)
    sampling_steps: int = option(8, "N, Euler steps of a rollout", least=1, most=1000)
    window: int = option(4, "K, the last sampling steps, which the gradient passes through", least=1)
    checkpointing: bool = option(False, "recompute each transformer block in the backward pass")
    offload: bool = option(False, "keep on the host what is not at work")
    decode_frames: int = option(0, "decoder caches kept every n latent frames; 0 = all graphs at once", least=0)
    face_window: int | None = option(None, "decode with gradient so many latent cells around the faces; default: all",
                                     least=0)  # fmt: skip


class Meter(TorchDispatchMode):
    """Bytes of live storages, peak and FLOPs of every phase; and the answers that a step wants of tensors without data.

    (FlopCounterMode would keep what its hooks on modules see alive.)
    """

    def __init__(self):
        super().__init__()
        self.live, self.host, self.seen = 0, 0, weakref.WeakSet()
        self.phases, self.peaks, self.flops = ["weights"], collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is profiler._record_function_enter_new.default:
            self.phases.append(args[0] if args[0] in PHASES else self.phases[-1])  # torch's ranges are parts of ours
        if func is profiler._record_function_exit._RecordFunction:
            self.phases.pop()
        if func in (aten._local_scalar_dense.default, aten.equal.default):
            return 1  # every number that the step reads: true, finite, one
        if func is aten.repeat_interleave.Tensor:
            return torch.zeros_like(args[0])  # one face a frame
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in FLOPS:
            self.flops[self.phases[-1]] += FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.track(tensor.untyped_storage())
        return out

    def track(self, storage):
        if storage not in self.seen:
            self.seen.add(storage)
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())

    def add(self, size):
        self.live += size
        phase = self.phases[-1]
        self.peaks[phase] = max(self.peaks[phase], self.live)

    def save_on_host(self):
        """`WanDiT.saved_inputs` under --offload: the device lets the tensor go, the host counts it."""

        def pack(x):
            self.host += x.nbytes
            return x.shape, x.dtype

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: torch.empty(packed[0], dtype=packed[1]))


class PlannedVAE(WanVAE):
    """A VAE whose gradient window is that of one face in the middle of the frame."""

    def gradient_window(self, grad, margin):
        cells = []
        for n, s in zip(grad.shape[3:], self.cfg.stride[1:]):
            start, stop = (n - CROP) // 2 // s - margin, -(-(n + CROP) // 2 // s) + margin
            cells.append(slice(max(0, start), min(n // s, stop)))
        return slice(0, (grad.shape[2] - 1) // self.cfg.stride[0] + 1), *cells


class PlannedWan:
    """The part of weights.Wan that a step uses; with `offload` the device lets frozen weights go and has them again."""

    def __init__(self, preset, dit, vae, meter, offload):
        self.preset, self.dit, self.vae, self.meter, self.offload = preset, dit, vae, meter, offload
        self.resting = []  # what the device has let go

    def at_work(self, part):
        frozen = {name: sum(p.nbytes for p in getattr(self, name).parameters() if not p.requires_grad)
                  for name in ("dit", "vae")}  # fmt: skip
        self.meter.add(sum(frozen[name] for name in self.resting))
        at_work = "dit" if part == "tuned" else part
        self.resting = [name for name in frozen if name != at_work and self.offload]
        self.meter.add(-sum(frozen[name] for name in self.resting))


def detector(frames):
    """One face in the middle of every frame."""
    centre = torch.tensor([frames.shape[3] / 2, frames.shape[2] / 2])
    corners = torch.tensor([-FACE / 2, -FACE / 2, FACE / 2, FACE / 2])
    return [Faces(centre.repeat(2)[None] + corners, torch.ones(1), centre + torch.zeros(1, 5, 2)) for _ in frames]


def transformer(cfg, dtype):
    """A frozen DiT in the types that `load_weights` gives it."""
    dit = WanDiT(cfg).requires_grad_(False)
    for name, p in dit.named_parameters():
        if not KEPT_FP32.search(name):
            p.data = p.data.to(dtype)
    dit.compute_dtype = torch.bfloat16
    return dit


def straight_step(tuning, batch, noise):
    """The same loss without this repository's means: one graph from the first window step to the score."""
    options, sigma, wan = tuning.options, tuning.sigma, tuning.wan
    first, context, y = batch.get("first"), batch["context"], batch.get("y")
    with record_function("rollout"):
        x, loss = rollout(wan.dit, noise, first, context, sigma, options.window, y)[0], 0
    with record_function("window"):
        for i in range(options.sampling_steps - options.window, options.sampling_steps):
            v = velocity(tuning.tuned, x, sigma[i], context, y)
            with torch.no_grad(), lora_disabled(tuning.reference):
                v_ref = velocity(tuning.reference, x, sigma[i], context, y)
            kl = velocity_kl(v, v_ref, float(sigma[i]), tuning.sampled_frames)
            loss = loss + options.kl_weight * kl.sum() / options.window
            x = with_first_frame(x + float(sigma[i + 1] - sigma[i]) * v, first)
    with record_function("decode"):
        video = wan.vae.decode(x)
        score, _ = tuning.reward.score(video, batch["pool"], batch["pool_mask"], options.fsm)
        (loss - options.reward_weight * score.sum()).backward()


def simulate(options, step=ipro_step):
    """A step of one clip by PlanOptions: bytes on one GPU by category, and FLOPs and peak bytes by phase.

    Where several micro-batches accumulate, all weights' gradients also stay during the later ones' rollout and decode.
    """
    preset = CONFIGS[options.model]
    frames, size = options.frames or preset.frames, options.size or preset.size
    shape = latent_size(preset, frames, size)
    full = options.lora_rank == 0
    share = 1 / options.gpus if full else 1  # what FSDP2 leaves on a GPU of weights, gradients and optimizer state
    same = {f.name for f in dataclasses.fields(TrainOptions)} & {f.name for f in dataclasses.fields(options)}
    given = {name: getattr(options, name) for name in same}
    train_options = TrainOptions(**given, batch=1)
    meter = Meter()
    with FakeTensorMode(allow_non_fake_inputs=True), meter:
        sizes, before = {}, 0

        def record_size(name, share=1):
            nonlocal before
            meter.add((share - 1) * (meter.live - before))
            sizes[name], before = meter.live - before, meter.live

        def keep_share(p):
            """A parameter's gradient is there, for good: further ones are added to it."""
            meter.add((share - 1) * p.grad.nbytes)
            hooks.pop(p).remove()

        dit = transformer(preset.dit, torch.float32 if full else torch.bfloat16)
        dit.checkpointing = options.checkpointing
        if options.offload:
            dit.saved_inputs = meter.save_on_host
        blocks = [sum(p.nbytes for p in block.parameters()) for block in dit.blocks]
        record_size("transformer", share)
        parameters = sum(p.numel() for p in dit.parameters())
        vae = PlannedVAE(preset.vae).requires_grad_(False)
        vae.compute_dtype = torch.bfloat16
        record_size("VAE")
        reward = FaceReward(detector, fold_batch_norms(ArcFace((3, 13, 30, 3)).eval().requires_grad_(False)))
        record_size("face net")
        reference = dit
        if full:
            reference = transformer(preset.dit, torch.float32)
            record_size("reference", share)
            hooks = {p: p.register_post_accumulate_grad_hook(keep_share) for p in dit.requires_grad_(True).parameters()}
        else:
            add_lora(dit, options.lora_rank)
            record_size("LoRA")
        wan = PlannedWan(preset, dit, vae, meter, options.offload and not (full and options.gpus > 1))
        schedule = sigmas(options.sampling_steps, preset.shift)
        tuning = Tuning(wan, dit, reference, train_options, schedule, reward)
        channels = preset.dit.out_dim
        batch = dict(context=torch.zeros(1, preset.dit.text_len, preset.dit.text_dim), row=[0],
                     pool=torch.zeros(1, frames, 512), pool_mask=torch.ones(1, frames, dtype=torch.bool))  # fmt: skip
        if preset.dit.in_dim == channels:
            batch["first"] = torch.zeros(1, channels, 1, *shape[1:])
        else:
            batch["y"] = torch.zeros(1, preset.dit.in_dim - channels, *shape)
        noise = torch.zeros(1, channels, *shape)
        record_size("inputs")
        meter.peaks.clear()
        step(tuning, batch, noise)
        wan.offload = False
        wan.at_work("dit")  # so that what the optimizer adds is weighed against all of it
        with record_function("optimizer"):
            record_size("gradients")
            optimizer = torch.optim.Adam([p for p in dit.parameters() if p.requires_grad])
            optimizer.step()
        meter.peaks["optimizer"] = before + share * (meter.peaks["optimizer"] - before)  # its passing tensors' too
        record_size("optimizer", share)
    peaks = {phase: meter.peaks[phase] + sizes["optimizer"] * (phase != "optimizer")  # from step 2 on
             for phase in PHASES}  # fmt: skip
    idle = sizes["transformer"] if preset.boundary and (share < 1 or not options.offload) else 0  # A14B's other expert
    if share < 1:
        idle += 2 * max(blocks)  # two at a time are gathered
    return types.SimpleNamespace(
        parameters=parameters, sizes=sizes, peaks={phase: peak + idle for phase, peak in peaks.items()},
        flops=meter.flops, host=meter.host, tokens=math.prod(shape) // math.prod(preset.dit.patch_size),
        seconds=meter.flops.total() / (PEAK * SHARE),
    )  # fmt: skip


SWITCHES = dict(checkpointing=True, decode_frames=4, offload=True, face_window=4)


def main():
    options = parse_options(PlanOptions, doc=__doc__)
    preset = CONFIGS[options.model]
    check_window(options, preset)
    frames, size = options.frames or preset.frames, options.size or preset.size
    tuned = f"LoRA of rank {options.lora_rank}" if options.lora_rank else f"all weights over {options.gpus} GPU(s)"
    found = simulate(options)
    print(f"{options.model}, {found.parameters / 1e9:.2f} B parameters{' (each expert)' if preset.boundary else ''}, "
          f"{size[0]}x{size[1]}x{frames}, {found.tokens} tokens, {tuned}, K = {options.window}")  # fmt: skip
    print("resident, GB: " + ", ".join(f"{n} {v / 1e9:.1f}" for n, v in found.sizes.items() if n != "inputs"))
    for phase, peak in found.peaks.items():
        print(f"{phase:10} peak {peak / 1e9:6.1f} GB {found.flops[phase] / 1e12:9.0f} TFLOP")
    print(f"a clip: {found.flops.total() / 1e15:.2f} PFLOP, {found.seconds:.0f} s on an H100 at {SHARE:.0%} of "
          f"{PEAK / 1e12:.0f} TFLOP/s; {found.host / 1e9:.0f} GB of block inputs pass through the host")  # fmt: skip
    print(f"\n{'switches, one after the other':44}{'peak GB':>9}{'in':>10}{'seconds':>9}")
    row = dataclasses.replace(options, checkpointing=False, offload=False, decode_frames=0, face_window=None)
    rows = [("one straight graph, block checkpoints", straight_step, dataclasses.replace(row, checkpointing=True)),
            ("this step, no switch", ipro_step, row)]  # fmt: skip
    for name, value in SWITCHES.items():
        row = dataclasses.replace(row, **{name: value})
        rows.append((f"--{name}" + ("" if value is True else f" {value}"), ipro_step, row))
    for name, step, row in rows:
        found = simulate(row, step)
        phase = max(found.peaks, key=found.peaks.get)
        print(f"{name:44}{found.peaks[phase] / 1e9:9.1f}{phase:>10}{found.seconds:9.0f}", flush=True)


if __name__ == "__main__":
    run(main)
