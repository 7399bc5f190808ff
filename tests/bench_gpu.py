"""A training step on this machine's GPU: memory beside the plan's, seconds by phase, and the parts against diffusers'.

    python tests/bench_gpu.py                          every case and part
    python tests/bench_gpu.py --only 720p-offload --card 24        with the process limited to 23.0 GB
    python tests/bench_gpu.py --seconds 300            begins nothing that would end later

No weights are needed: networks have random ones, and a face is given in the middle of every frame (detection, on the
host, is the same work with any weights). One clip, a LoRA of rank 32, N = 8, K = 4, bf16. Every case is a process of
its own: a first step, which compiles, warms up and makes the host's buffers, then the measured one. Times are taken
with the device at rest before and after a phase. Without a GPU networks and clips are tiny, and no memory is told.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import model
import plan
import train
import weights
from cli import this_device
from model import CONFIGS, Experts, add_lora
from reward import ArcFace, FaceReward, fold_batch_norms
from sample import latent_size, sigmas
from weights import KEPT_FP32, Wan, blank

DEVICE = this_device()
CUDA = DEVICE.type == "cuda"
LOW = torch.bfloat16 if CUDA else torch.float32
CHECKPOINTED = dict(checkpointing=True, decode_frames=4)
OFFLOADED = CHECKPOINTED | dict(offload=True, face_window=4)
CASES = {  # name: (preset, clip, switches, seconds to allow: two steps as measured on an H200, and a start)
    "480p": ("wan5b", (480, 480, 81), CHECKPOINTED, 40),
    "480p-offload": ("wan5b", (480, 480, 81), OFFLOADED, 50),
    "480p-compile": ("wan5b", (480, 480, 81), CHECKPOINTED | dict(compile=True), 80),
    "480p-straight": ("wan5b", (480, 480, 81), dict(straight=True, checkpointing=True), 40),
    "720p": ("wan5b", (704, 1280, 121), CHECKPOINTED, 130),
    "720p-offload": ("wan5b", (704, 1280, 121), OFFLOADED, 140),
    "14b-480p-offload": ("wan14b", (480, 480, 81), CHECKPOINTED | dict(offload=True), 180),
}
PARTS = {"transformer": 60, "decoder": 40}


def synchronise():
    if CUDA:
        torch.cuda.synchronize()


class Clock:
    """Seconds by phase. Stands in for train.py's `record_function`; what moves networks is a phase of its own."""

    def __init__(self):
        self.seconds = collections.Counter()

    @contextlib.contextmanager
    def __call__(self, phase):
        synchronise()
        began, moving = time.perf_counter(), self.seconds["moving"]
        yield
        synchronise()
        self.seconds[phase] += time.perf_counter() - began - (self.seconds["moving"] - moving) * (phase != "moving")


def preset_of(name):
    """A preset; without a GPU, one of its kind that a CPU steps through in seconds."""
    preset = CONFIGS[name]
    if CUDA:
        return preset
    dit = dataclasses.replace(preset.dit, dim=96, ffn_dim=192, num_heads=4, num_layers=2, text_dim=32, text_len=8)
    return dataclasses.replace(preset, dit=dit, vae=dataclasses.replace(preset.vae, dim=8, dec_dim=8, num_res_blocks=1))


def random_network(preset, part):
    """A frozen network with random weights on the device, in the types that training reads it in."""
    module = blank(preset, part)
    for name, p in list(module.named_parameters()):
        dtype = torch.float32 if part == "vae" or KEPT_FP32.search(name) else LOW
        fan_in = p[0].numel() if p.dim() > 1 else 1
        value = torch.empty(p.shape, dtype=dtype, device=DEVICE).normal_(0, fan_in**-0.5 if p.dim() > 1 else 0.02)
        owner, _, leaf = name.rpartition(".")
        gain = leaf == "gamma" or (leaf == "weight" and p.dim() == 1)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value.fill_(1.0) if gain else value, False))
    if part == "vae":
        module.set_scale()
        module.to(DEVICE)
    module.compute_dtype = LOW if CUDA else None
    return module.eval()


def random_wan(preset, offload):
    """`Wan` with random networks."""
    wan = Wan.__new__(Wan)
    wan.preset, wan.device, wan.offload, wan.keep, wan.networks = preset, DEVICE, offload, True, {}
    make = functools.partial(random_network, preset)
    wan.networks["vae"] = make("vae")
    wan.networks["dit"] = make("dit") if preset.boundary is None else Experts(preset.dit, preset.boundary, make)
    return wan


def step_of(name):
    """A case's step as a function, and its clock."""
    kind, (height, width, frames), switches, _ = CASES[name]
    preset = preset_of(kind)
    if not CUDA:
        height, width, frames = 160, 160, 9
    given = {key: value for key, value in switches.items() if key != "straight"}
    options = train.TrainOptions(batch=1, micro_batch=1, **given)
    clock = train.record_function = plan.record_function = Clock()
    for module in (model, weights):
        module.move_frozen = timed(clock, module.move_frozen)
    wan = random_wan(preset, options.offload)
    tuned = wan.tuned
    tuned.checkpointing = options.checkpointing
    if options.offload:
        tuned.saved_inputs = model.HostInputs().hooks
    for p in add_lora(tuned, options.lora_rank):
        p.data = p.data.to(DEVICE)
    if options.compile:
        for block in tuned.blocks:
            block.compile(fullgraph=True)
    widths = dict() if CUDA else dict(widths=(8, 8, 8, 8))
    encoder = fold_batch_norms(ArcFace((3, 13, 30, 3) if CUDA else (1, 1, 1, 1), **widths).eval()).to(DEVICE)
    reward = FaceReward(plan.detector, encoder.requires_grad_(False))
    schedule = sigmas(options.sampling_steps, preset.shift)
    tuning = train.Tuning(wan, tuned, tuned, options, schedule, reward)
    shape = latent_size(preset, frames, (height, width))
    channels, inputs = preset.dit.out_dim, preset.dit.in_dim
    context = torch.randn(1, preset.dit.text_len, preset.dit.text_dim, device=DEVICE)
    batch = dict(context=context, row=[0], pool=torch.randn(1, frames, 512, device=DEVICE),
                 pool_mask=torch.ones(1, frames, dtype=torch.bool, device=DEVICE))  # fmt: skip
    if inputs == channels:
        batch["first"] = torch.randn(1, channels, 1, *shape[1:], device=DEVICE)
    else:
        batch["y"] = torch.randn(1, inputs - channels, *shape, device=DEVICE)
    noise = torch.randn(1, channels, *shape, device=DEVICE)
    step = plan.straight_step if switches.get("straight") else train.ipro_step
    return lambda: step(tuning, batch, noise), clock


def timed(clock, function):
    def inner(*arguments):
        with clock("moving"):
            return function(*arguments)

    return inner


def run_case(name, card):
    """What a case took, as a dict; `error` where it ran out of memory."""
    if CUDA and card:
        torch.cuda.set_per_process_memory_fraction((card - 1) * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        step, clock = step_of(name)
        step()
        clock.seconds.clear()
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step()
        synchronise()
        found = dict(seconds=time.perf_counter() - began, phases=dict(clock.seconds))
    except torch.OutOfMemoryError as error:
        return dict(error=str(error).split(". ")[0])
    if CUDA:
        found |= dict(live=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())
    return found


def planned(name):
    """The peak bytes that plan.py finds for a case."""
    kind, (height, width, frames), switches, _ = CASES[name]
    step = plan.straight_step if switches.get("straight") else train.ipro_step
    given = {key: value for key, value in switches.items() if key not in ("straight", "compile")}
    options = plan.PlanOptions(model=kind, size=(height, width), frames=frames, **given)
    return dict(live=max(plan.simulate(options, step).peaks.values()))


def median_ms(function, repeats=5):
    function(), function()
    times = []
    for _ in range(repeats):
        synchronise()
        began = time.perf_counter()
        function()
        synchronise()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def peak_gb(function):
    """GB that a function adds at its peak."""
    if not CUDA:
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def transformer_part():
    """Eight of the 5B's blocks at 480x480x81: rows (name, forward ms, forward and backward ms, GB)."""
    preset = preset_of("wan5b")
    cfg = dataclasses.replace(preset.dit, num_layers=min(8, preset.dit.num_layers))
    shape = (21, 30, 30) if CUDA else (2, 4, 4)
    x, t = torch.randn(1, cfg.in_dim, *shape, device=DEVICE), torch.full((1, shape[0]), 500.0, device=DEVICE)
    context = torch.randn(1, cfg.text_len, cfg.text_dim, device=DEVICE)
    ours = random_network(dataclasses.replace(preset, dit=cfg), "dit")
    networks = [("ours", ours, lambda x: ours(x, t, context))]
    try:
        from diffusers import WanTransformer3DModel

        theirs = WanTransformer3DModel(
            patch_size=cfg.patch_size, num_attention_heads=cfg.num_heads, attention_head_dim=cfg.dim // cfg.num_heads,
            in_channels=cfg.in_dim, out_channels=cfg.out_dim, text_dim=cfg.text_dim, freq_dim=cfg.freq_dim,
            ffn_dim=cfg.ffn_dim, num_layers=cfg.num_layers, cross_attn_norm=True, rope_max_seq_len=64,
        ).requires_grad_(False).to(DEVICE, LOW)  # fmt: skip
        tokens = t.repeat_interleave(shape[1] * shape[2] // 4, 1)
        low = context.to(LOW)
        networks.append(("diffusers", theirs, lambda x: theirs(x.to(LOW), tokens, low, return_dict=False)[0]))
    except ImportError:
        pass
    rows = []
    for name, network, forward in networks:
        for compiled in (False, True):
            if compiled:
                for block in network.blocks:
                    block.compile()

            def both(forward=forward):
                y = x.clone().requires_grad_()
                forward(y).sum().backward()

            with torch.no_grad():
                once = median_ms(lambda forward=forward: forward(x))
            rows.append((name + ", compiled" * compiled, once, median_ms(both), peak_gb(both)))
    return rows


def decoder_part():
    """The 5B's decoder, 21 latent frames of 480x480: rows (name, decode ms, decode and backward ms, GB)."""
    preset = preset_of("wan5b")
    shape = (21, 30, 30) if CUDA else (3, 4, 4)
    x, ours = torch.randn(1, preset.vae.z_dim, *shape, device=DEVICE), random_network(preset, "vae")
    decoders = [("ours", ours.decode), ("ours, decode_frames=4", lambda x: ours.decode(x, 4))]
    try:
        from diffusers import AutoencoderKLWan

        cfg, channels = preset.vae, 3 * preset.vae.patch_size**2
        theirs = AutoencoderKLWan(
            base_dim=cfg.dim, decoder_base_dim=cfg.dec_dim, z_dim=cfg.z_dim, dim_mult=list(cfg.dim_mult),
            num_res_blocks=cfg.num_res_blocks, temperal_downsample=list(cfg.temporal_downsample), is_residual=True,
            in_channels=channels, out_channels=channels, patch_size=cfg.patch_size,
            latents_mean=[0.0] * cfg.z_dim, latents_std=[1.0] * cfg.z_dim,
        ).requires_grad_(False).to(DEVICE)  # fmt: skip

        def decode(x):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
                return theirs.decode(x).sample

        decoders.append(("diffusers", decode))
    except ImportError:
        pass
    rows = []
    for name, decode in decoders:

        def both(decode=decode):
            y = x.clone().requires_grad_()
            decode(y).float().sum().backward()

        with torch.no_grad():
            once = median_ms(lambda decode=decode: decode(x), 2)
        rows.append((name, once, median_ms(both, 2), peak_gb(both)))
    return rows


def ask(*arguments):
    """Start a process that answers with a line of JSON."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process):
    out, err = process.communicate()
    if process.returncode:
        return dict(error=(err.strip() or "no message").splitlines()[-1])
    return json.loads(out.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*CASES, *PARTS), default=(*CASES, *PARTS), help="cases and parts")
    parser.add_argument("--card", type=int, default=0, help="GB of the card to stand for; the process gets 1 less")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing that would end later")
    for kind in ("case", "plan", "part"):
        parser.add_argument(f"--{kind}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case or options.plan or options.part:
        part = dict(transformer=transformer_part, decoder=decoder_part).get(options.part)
        print(json.dumps(part() if part else planned(options.plan) if options.plan else
                         run_case(options.case, options.card)))  # fmt: skip
        return
    began = time.perf_counter()
    commit = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"], capture_output=True,
                            text=True).stdout.strip()  # fmt: skip
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU, tiny networks'}, torch {torch.__version__}, "
          f"{time.strftime('%Y-%m-%d')}, commit {commit or 'unknown'}"
          + (f", limited to {options.card - 1}.0 GB" if options.card else ""))  # fmt: skip
    left = lambda: options.seconds - (time.perf_counter() - began)
    print(
        f"\n{'case':18}{'planned':>9}{'live':>8}{'reserved':>10}{'seconds':>9}  GB of 10⁹; seconds by phase", flush=True
    )
    for name in [name for name in CASES if name in options.only]:
        if CUDA and left() < CASES[name][3]:
            print(f"{name:18} not begun: --seconds", flush=True)
            continue
        plans = ask("--plan", name) if CUDA else None  # on the host, meanwhile
        found = answer(ask("--case", name, "--card", options.card))
        expected = answer(plans) if plans else {}
        shown = lambda value: f"{value / 1e9:.1f}" if value else "-"
        if "error" in found:
            print(f"{name:18}{shown(expected.get('live')):>9}  {found['error']}", flush=True)
            continue
        phases = " + ".join(f"{phase} {seconds:.2f}" for phase, seconds in found["phases"].items())
        print(f"{name:18}{shown(expected.get('live')):>9}{shown(found.get('live')):>8}{shown(found.get('reserved')):>10}"
              f"{found['seconds']:9.2f}  {phases}", flush=True)  # fmt: skip
    for name in [name for name in PARTS if name in options.only]:
        if CUDA and left() < PARTS[name]:
            print(f"{name} not begun: --seconds", flush=True)
            continue
        rows = answer(ask("--part", name))
        print(f"\n{name:26}{'forward ms':>12}{'and backward':>14}{'GB':>8}")
        if isinstance(rows, dict):
            print(f"  {rows['error']}", flush=True)
            continue
        for row in rows:
            print(f"  {row[0]:24}{row[1]:12.1f}{row[2]:14.1f}{row[3]:8.1f}", flush=True)


if __name__ == "__main__":
    main()
