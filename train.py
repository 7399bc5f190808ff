"""Identity-preserving reward-guided optimisation (IPRO, arXiv 2510.14255) of a Wan image-to-video model.

    python train.py                                                   the tiny Wan of this repository, on a CPU
    torchrun --nproc_per_node 8 train.py --model wan5b --ckpt DIR --data DIR
    python train.py --resume                                          goes on with the run in --out

One step: roll out a clip from fresh noise (no gradient), decode it, score its faces against all faces of the true
clip, send the reward's gradient at the final latent back through the last K sampling steps, add the velocity KL
to the untuned model, step. `--objective sft` is plain flow matching on the true clips instead; it made the tiny
model. A LoRA is tuned under DDP; all weights (--lora_rank 0) under FSDP2. In --out: options.json, log.jsonl (a
line a step), curves.png, checkpoints/, watch/, lora.safetensors, before_after.mp4.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import Clips
from model import (
    ASSETS,
    CONFIGS,
    CachedContext,
    Experts,
    UserError,
    add_lora,
    find_preset,
    load_model,
    resting,
    save_lora,
    untuned,
    write_safetensors,
)
from reward import FaceReward, clip_metrics, velocity_kl
from sample import (
    given_options,
    noise_like,
    option,
    pin,
    rollout,
    run,
    sigmas,
    to_frames,
    to_tensor,
    velocity,
    window_backward,
    write_video,
)  # fmt: skip

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # a run of one process is no fault

# The recipes: what an option is that the command line does not give.
RECIPES = {
    "paper": dict(  # arXiv 2510.14255, section 4.1
        batch=64, steps=100, lr=2e-5, sampling_steps=8, window=4, reward_weight=0.1, kl_weight=1.0, pool_first=True,
    ),
    "roll": dict(  # ROLL v0.2.1, reward_fl: loss = -0.1 (R - 0.54) / 0.16 + KL, the input image left out of the pool
        batch=8, steps=100, lr=2.5e-6, sampling_steps=8, window=4, reward_weight=0.1 / 0.16, kl_weight=1.0,
        pool_first=False,
    ),
}  # fmt: skip
TINY = dict(  # over the recipe's; some 8 minutes on two cores without bf16 that nothing else keeps busy
    moving=0.25, batch=3, micro_batch=3, steps=34, lr=2.4e-3, warmup=3, decay=0.9, kl_weight=0.32, eval_clips=60,
    watch_every=0,
)  # fmt: skip
CHOICES = dict(
    recipe=tuple(RECIPES), optimizer=("adam", "muon"), kl_weighting=("sigma", "dt", "uniform"),
    fsm=("pool", "first", "aligned"), people=("largest", "all"), precision=("", "bf16", "fp32"),
)  # fmt: skip
LEAST = dict(face_window=-1)  # that the numbers may be
LEAST |= dict.fromkeys("lr warmup decay grad_clip lora_rank reward_weight kl_weight reward_clip".split(), 0)
LEAST |= dict.fromkeys("shift moving kept_graphs decode_frames score_frames min_face min_score watch_every".split(), 0)
LEAST |= dict.fromkeys("steps batch micro_batch sampling_steps window".split(), 1)
LEAST |= dict.fromkeys("save_every keep max_skips eval_clips gpus".split(), 1)


@dataclass
class TrainOptions:
    model: str = option("tiny", f"preset: {', '.join(CONFIGS)}")
    ckpt: str = option("", "folder with the model's weights; tiny ships its own")
    data: str = option(str(ASSETS / "data"), "folder that data.py made: train and heldout clips")
    moving: float = option(1.0, "*share of the clips that ipro trains on: those whose true faces move furthest")
    out: str = option("out", "folder of the run")
    resume: bool = option(False, "go on with the run in --out, with its options")
    faces: str = option(str(ASSETS), "folder with a face detector and encoder, the reward's, e.g. antelopev2")
    judge: str = option("", "folder with a second detector and encoder, which only watches, e.g. buffalo_l")
    objective: str = option("ipro", "ipro: reward on own samples; sft: flow matching on the true clips")
    recipe: str = option("paper", "where the defaults marked * are from: paper or roll; tiny has some of its own")
    steps: int = option(100, "*optimisation steps")
    batch: int = option(64, "*clips a step, of all ranks together")
    micro_batch: int = option(1, "*clips that a rank has in work at a time, in the decoder too")
    lr: float = option(2e-5, "*learning rate")
    optimizer: str = option("adam", "adam, or muon: Muon for the blocks' matrices and Adam for the rest, from scratch")
    warmup: int = option(5, "*steps over which the learning rate rises to lr")
    decay: float = option(0.0, "*share of the steps, at the end, over which it falls to 0")
    grad_clip: float = option(1.0, "largest norm of a step's gradient")
    lora_rank: int = option(32, "rank of the LoRA on q, k, v, o and the feed-forward layers; 0 tunes all weights")
    sampling_steps: int = option(8, "*N, Euler steps of a rollout")
    shift: float = option(0.0, "of the noise schedule, towards noise; 0 = the preset's")
    window: int = option(4, "*K, the last sampling steps, which the gradient passes through")
    reward_weight: float = option(0.1, "*w_R, weight of the face reward")
    kl_weight: float = option(1.0, "*w_KL, weight of the velocity KL to the untuned model")
    kl_weighting: str = option("sigma", "of the KL over steps: sigma, dt or uniform")
    reward_clip: float = option(0.0, "largest norm of a clip's reward gradient at its final latent; 0 = any")
    checkpointing: bool = option(False, "recompute each transformer block in the backward pass: memory for time")
    offload: bool = option(False, "keep on the host what is not at work: networks, and --checkpointing's block inputs")
    kept_graphs: int = option(0, "keep the graphs of the rollout's last n steps: each saves a forward pass later")
    decode_frames: int = option(0, "decoder caches kept every n latent frames, one frame's graph at a time; 0 = all's")
    face_window: int = option(-1, "decode with gradient the faces only and so many latent cells around; -1 = all")
    score_frames: int = option(0, "frames of a clip that are scored, drawn anew for every sample; 0 = all")
    precision: str = option("", "of the networks: bf16 or fp32; default: bf16 where the device computes it natively")
    compile: bool = option(False, "torch.compile the tuned transformer's blocks")
    fsm: str = option("pool", "what generated faces are compared with: pool, first or aligned")
    people: str = option("largest", "whose faces are scored: largest, or all (each person against their own pool)")
    pool_first: bool = option(True, "*is the true clip's frame 0 in the pool?")
    score_first: bool = option(True, "is the generated frame 0, which is given, scored?")
    tiled: bool = option(False, "detect again, enlarged and in tiles, where faces are small against the frame")
    face_bf16: bool = option(False, "the face encoder's trunk in bf16, its head in fp32")
    min_face: float = option(0.0, "pixels; a smaller face counts in proportion to its size; 0 = all count the same")
    min_score: float = option(0.0, "in 0..1; a face that the detector is less sure of counts less; 0 = as any other")
    eval_clips: int = option(8, "*held-out clips sampled before, after and at every watch, with fixed noise")
    watch_every: int = option(20, "*steps between looks at the held-out clips; 0 = only before and after")
    save_every: int = option(20, "steps between checkpoints")
    keep: int = option(2, "checkpoints that stay")
    max_skips: int = option(10, "steps in a row without a finite gradient after which the run ends")
    seed: int = option(0, "of data order, noise and LoRA")
    plan: bool = option(False, "print what a step takes on a GPU, by the next three, and end: no weights, data or GPU")
    gpus: int = option(1, "of the plan: over how many all weights are sharded (a LoRA's base is whole on each)")
    frames: int | None = option(None, "of the plan's clip, 4n+1; default: the preset's")
    size: tuple[int, int] | None = option(None, "of the plan's clip, HxW in pixels; default: the preset's")


UNBOUND = ("resume", "steps", "micro_batch", "watch_every", "save_every", "keep", "max_skips")  # may change on --resume


def resolve(given):
    """TrainOptions: what the command line gave, over the run's own (--resume) or the tiny model's and the recipe's."""
    out = Path(given.get("out", TrainOptions.out))
    if not given.get("resume"):
        base = RECIPES.get(given.get("recipe", TrainOptions.recipe), {})
        return TrainOptions(**(base | (TINY if given.get("model", "tiny") == "tiny" else {}) | given))
    if not (out / "options.json").is_file():
        raise UserError(f"--resume: {out} holds no run (no options.json)")
    saved = json.loads((out / "options.json").read_text())
    changed = [k for k, v in given.items() if k not in (*UNBOUND, "out") and saved.get(k) != v]
    if changed:
        raise UserError(f"--resume: {out} was run with another --{changed[0]} ({saved.get(changed[0])})")
    return TrainOptions(**(saved | given))


def check(options):
    """Refuse what cannot work before anything is loaded or written."""
    for name, allowed in dict(CHOICES, objective=tuple(OBJECTIVES)).items():
        if getattr(options, name) not in allowed:
            raise UserError(f"--{name} {getattr(options, name)}: choose from {', '.join(filter(None, allowed))}")
    preset = find_preset(options.model, options.ckpt or options.plan, options.shift)  # a plan needs no weights
    for name, least in LEAST.items():
        if not getattr(options, name) >= least:
            raise UserError(f"--{name} {getattr(options, name)}: at least {least}")
    for name in ("decay", "min_score", "moving"):
        if getattr(options, name) > 1:
            raise UserError(f"--{name} {getattr(options, name)}: at most 1")
    if options.objective == "sft" and options.judge:
        raise UserError("--judge: --objective sft samples no clips that it could watch")
    if options.objective == "ipro" and options.reward_weight == options.kl_weight == 0:
        raise UserError("--reward_weight 0 and --kl_weight 0: nothing is left to optimise")
    if options.window > options.sampling_steps:
        raise UserError(f"--window {options.window}: more than the {options.sampling_steps} sampling steps")
    if options.kept_graphs > options.window:
        raise UserError(f"--kept_graphs {options.kept_graphs}: more than the window's {options.window} steps")
    if options.kept_graphs and options.offload:
        raise UserError("--kept_graphs: not with --offload, which moves weights that a kept graph goes back through")
    if preset.boundary and options.objective == "ipro":
        low = int((sigmas(options.sampling_steps, preset.shift)[:-1] < preset.boundary).sum())
        if options.window > low:
            raise UserError(
                f"--window {options.window}: the low-noise expert, which is tuned, takes the last {low} of "
                f"{options.sampling_steps} steps"
            )
    if options.plan:
        return
    for name in ("gpus", "frames", "size"):
        if getattr(options, name) != getattr(TrainOptions, name):
            raise UserError(f"--{name}: of --plan only; a run's clips are as data.py cached them")
    out = Path(options.out)
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--out {out}: nothing can be written to {place}; name another folder")
    if not options.resume and out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: exists and is not empty; name another folder, or continue it with --resume")


@dataclass
class Run:
    """What a step works with."""

    wan: Any  # model.Wan: dit, vae
    tuned: torch.nn.Module  # the transformer, or the expert, whose weights or LoRA are tuned
    model: Any  # `tuned` as it is called with gradient: itself, or inside DDP
    reference: Any  # called as `tuned` is: untuned
    options: TrainOptions
    sigma: torch.Tensor  # [N+1]
    share: float  # a sample's share of this rank's loss; DDP and FSDP2 average gradients over ranks
    reward: FaceReward | None = None
    judge: Any = None  # (row, video) to the judge's score, or None


# ---------------------------------------------------------------------------------------------------------------
# Ranks: one process, or those that torchrun starts


def start_ranks():
    """(rank, ranks, device) of this process; it joins the group of torchrun's processes if it is one of them."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "RANK" not in os.environ:
        return 0, 1, device
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def leave_ranks():
    """Leave the group, with a moment for gloo's threads to free the last collective's tensors.

    They need the interpreter's lock for it; where it ends first, torch 2.13 aborts the process (one run in twenty).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.5)


def gathered(rows):
    """The lists of all ranks as one, in rank order, the same on every rank."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def check_clips(clips, options):
    """Refuse a set that does not hold what the objective reads."""
    cached, _ = clips.read(0)
    if options.objective == "sft" and "latent" not in cached:
        raise UserError(f"--objective sft: {options.data} holds no latents; make a set with: data.py --latents")
    if options.objective == "ipro" and "pool" not in cached:
        raise UserError(f"--data {options.data}: made with --latents, it holds no faces; make a set without")
    if options.objective == "ipro" and options.people == "all" and cached["pool"].dim() == 2:
        raise UserError(f"--people all: {options.data} holds one person a clip; make a set with: data.py --people 2")


def samples_of(options, rank, ranks):
    """The numbers of a step's samples that are this rank's, as its micro-batches; UserError if it does not divide."""
    if options.batch % (ranks * options.micro_batch):
        raise UserError(
            f"--batch {options.batch} is no multiple of {ranks * options.micro_batch}: {ranks} rank(s) x --micro_batch "
            f"{options.micro_batch}, which accumulate until the batch is full"
        )
    each = options.batch // ranks
    return [range(k, k + options.micro_batch) for k in range(rank * each, (rank + 1) * each, options.micro_batch)]


def shard(dit):
    """FSDP2 on a transformer: the ranks hold a part each of every block, and gather a block while it runs.

    Parts, gradients and their sums are fp32 and autocast computes in bf16: a bf16 MixedPrecisionPolicy would round
    norms and modulations too, which Wan keeps in fp32.
    """
    for block in dit.blocks:
        fully_shard(block)
    fully_shard(dit)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: out/checkpoints/step-000020/, whole or not there


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path):
    """When this returns, a file's data, or a folder's list of names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def training_state(tuned, optimizers):
    """What a checkpoint holds of the tuned weights and the optimizers, by the weights' names: any number of ranks."""
    return get_state_dict(tuned, optimizers, options=StateDictOptions(ignore_frozen_params=True))


def save_checkpoint(folder, step, tuned, optimizers, export, rank=0, keep=2):
    """Write folder/step-<step>, of all ranks, with what export(path) adds to it; the last `keep` checkpoints stay.

    It grows under a temporary name, is synced to the disk, and gets its name when its manifest of SHA-256 sums is in
    it. Raises UserError where that fails, as on a full disk: the checkpoints before it are untouched.
    """
    whole = folder / f"step-{step:06}"
    part = whole.with_suffix(".part")
    sums = []

    def begin():
        if rank == 0:
            for torn in folder.glob("*.part"):  # of a run that was killed
                shutil.rmtree(torn)
            part.mkdir()

    def write():
        weights, moments = training_state(tuned, optimizers)
        state = dict(weights=weights, optimizers=moments, rng={str(rank): torch.get_rng_state()})
        dcp.save(state, checkpoint_id=part, no_dist=not dist.is_initialized())
        export(part)
        own = [f for f in part.iterdir() if (f.name.startswith(f"__{rank}_") or (f.name[:2] != "__" and rank == 0))]
        sums.extend((f.name, digest(f)) for f in own)

    def finish():
        if rank == 0:
            (part / "manifest.json").write_text(json.dumps(dict(step=step, files=files), indent=1))
            for file in part.iterdir():
                sync(file)
            shutil.rmtree(whole, ignore_errors=True)
            part.rename(whole)
            sync(folder)
            for old in sorted(folder.glob("step-??????"))[:-keep]:
                shutil.rmtree(old.rename(old.with_suffix(".part")))  # a kill meanwhile leaves no half of one

    for stage in (begin, write, finish):
        fault = None
        try:
            stage()
        except (Exception, dcp.api.CheckpointException) as error:
            fault = (str(error).strip() or type(error).__name__).splitlines()[-1]
        faults = [f for f in gathered([fault]) if f is not None]
        if faults:
            if rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            kept = sorted(folder.glob("step-??????"))
            raise UserError(
                f"{whole}: not written ({faults[0]}); "
                + (f"the last whole checkpoint is {kept[-1]}; make room and --resume" if kept else "none is whole yet")
            )
        files = dict(gathered(sums)) if stage is write else None


def newest_checkpoint(folder, rank=0, ranks=1):
    """The newest whole checkpoint of a run, or None if there is none yet; a damaged one is told of, and passed over.

    UserError where all are damaged: a run from step 0 would write over what is left of them.
    """
    found = sorted(folder.glob("step-??????"), reverse=True)
    for path in found:
        try:
            files = sorted(json.loads((path / "manifest.json").read_text())["files"].items())
            wrong = [name for name, is_it in files[rank::ranks] if digest(path / name) != is_it]
        except (OSError, ValueError, KeyError) as error:
            wrong = [f"{type(error).__name__}: {error}"]
        wrong = gathered(wrong)
        if not wrong:
            return path
        if rank == 0:
            print(f"{path}: damaged ({wrong[0]}), passed over", flush=True)
    if found:
        raise UserError(f"{folder}: no checkpoint in it is whole; start again with another --out")
    return None


def load_checkpoint(path, tuned, optimizers, rank=0):
    """Put a checkpoint's weights and optimizer states in place, whatever number of ranks wrote it; returns its step."""
    weights, moments = training_state(tuned, optimizers)
    state = dict(weights=weights, optimizers=moments)
    if f"rng.{rank}" in dcp.FileSystemReader(path).read_metadata().state_dict_metadata:
        state["rng"] = {str(rank): torch.get_rng_state()}
    dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    set_state_dict(
        tuned, optimizers, model_state_dict=state["weights"], optim_state_dict=state["optimizers"],
        options=StateDictOptions(strict=False),
    )  # fmt: skip
    if "rng" in state:
        torch.set_rng_state(state["rng"][str(rank)])
    return json.loads((path / "manifest.json").read_text())["step"]


def export_weights(job, path, rank=0):
    """What other programs read of a tuned model: path/lora.safetensors, or all weights as path/dit.safetensors."""
    if job.options.lora_rank:
        if rank == 0:
            save_lora(job.tuned, path / "lora.safetensors")
        return
    dtype = torch.bfloat16 if job.wan.preset.folder is None else torch.float16
    tensors = {}
    for name, value in job.tuned.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value  # FSDP2's: all ranks take part
        if rank == 0:
            tensors[name] = value.to("cpu", dtype).contiguous()
    if rank == 0:
        write_safetensors(tensors, path / "dit.safetensors")


def learning_rate(options, step):
    end = options.steps * options.decay
    return options.lr * min(1, (step + 1) / max(1, options.warmup), (options.steps - step) / max(1, end))


def optimizers(options, model):
    """The optimizers of a model's trainable parameters: Adam, or with `muon` Muon and, for what it leaves, Adam.

    Muon (arXiv 2502.16982) takes the blocks' matrices, its updates scaled to the size of Adam's, so that one learning
    rate serves both.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = {n for n, p in named.items() if options.optimizer == "muon" and n.startswith("blocks.") and p.dim() == 2}
    rest = [p for n, p in named.items() if n not in matrices]
    found = []
    if matrices:
        kernels = [named[n] for n in sorted(matrices)]
        found.append(torch.optim.Muon(kernels, options.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    if rest:  # a LoRA's parameters are all matrices: with Muon, nothing is left
        found.append(torch.optim.Adam(rest, lr=options.lr, betas=(0.9, 0.99 if matrices else 0.999)))
    return found


def batch_at(clips, options, step, numbers):
    """Samples `numbers` of a step: a permutation an epoch, by seed, step and number only, whatever the ranks are."""
    rows = []
    for k in numbers:
        epoch, place = divmod(step * options.batch + k, len(clips))
        rows.append(int(np.random.default_rng([options.seed, epoch]).permutation(len(clips))[place]))
    return clips.batch(rows)


# ---------------------------------------------------------------------------------------------------------------
# The objectives: each accumulates a micro-batch's gradient and returns, a sample each, what to log of it


def autocast(device, precision=""):
    """bf16 compute over fp32 master weights ("": where the device has it natively), or fp32.

    Sampler state, KL and reward stay fp32. Casts are not kept: of all weights they would be half their size again.
    """
    native = device.type == "cuda" or any(torch.cpu.get_capabilities().get(k) for k in ("avx512_bf16", "amx_bf16"))
    enabled = precision == "bf16" or (native and not precision)
    return torch.autocast(device.type, torch.bfloat16, enabled, cache_enabled=False)


def scored_frames(noise, frames, count):
    """The frames to score, `count` of them, in order (0: all). The sample's own noise [C, F', h, w] draws them.

    So they depend on seed, step and sample only, whatever the ranks are.
    """
    return noise.flatten()[:frames].argsort()[:count].sort().values if 0 < count < frames else slice(None)


def reward_gradient(job, batch, noise, latent):
    """g = d(-w_R R)/dx_N at a micro-batch's final latents, both [B, C, F', h, w], and of each sample what to log.

    g carries a sample's share of the rank's loss; batch and noise are `ipro_step`'s. The pixels, and the graphs of the
    decoder and the face network, live in here only.
    """
    options, scored = job.options, []
    pool, pool_mask = batch["pool"], batch["pool_mask"]
    if options.people == "largest" and pool.dim() == 4:
        pool, pool_mask = pool[:, 0], pool_mask[:, 0]
    x = latent.detach().requires_grad_()
    with autocast(x.device, options.precision):
        videos = job.wan.vae.decode(
            x, options.decode_frames or None, options.face_window if options.face_window >= 0 else None
        ).float()
    for b, video in enumerate(videos.split(1)):
        looked = scored_frames(noise[b], video.shape[2], options.score_frames)
        scored.append(job.reward.score(video, pool[b : b + 1], pool_mask[b : b + 1], options.fsm, looked))
    total = torch.cat([score for score, _ in scored]).sum()
    (grad,) = torch.autograd.grad(-options.reward_weight * job.share * total, x)
    if options.reward_clip:
        norm = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1).clamp(min=1e-12)
        grad = grad * (options.reward_clip * job.share / norm).clamp(max=1)
    rows = []
    for row, video, (score, info) in zip(batch["row"], videos.detach().split(1), scored):
        watched = clip_metrics(to_frames(video), info)
        rows.append(dict(reward=None if info["missing"] else float(score.detach()), missing=int(info["missing"]),
                         face_rate=float(info["face_rate"]), motion=watched["motion"], tf=watched["tf"]))  # fmt: skip
        if job.judge is not None:
            rows[-1]["judge"] = job.judge(row, video)
    return grad, rows


def ipro_step(job, batch, noise, hold=contextlib.nullcontext):
    """Accumulate the gradient of  -w_R mean R + w_KL mean_i KL_i  (IPRO's objective).

    batch: `batch_at`; noise [B, C, F', h, w]; hold: a context for every backward pass but the last, DDP's no_sync.
    A sample that shows no face adds its KL only.
    """
    options, sigma = job.options, job.sigma
    context, y, size = batch["context"], batch.get("y"), len(noise)
    computing = functools.partial(autocast, noise.device, options.precision)
    rest = functools.partial(resting, rest=options.offload)
    kept = dict.fromkeys(range(options.sampling_steps - options.kept_graphs, options.sampling_steps))
    with computing(), rest(job.wan.vae):
        latents = rollout(  # the cached context lives no longer: of wan5b its keys and values take 0.2 GB
            job.wan.dit, noise, batch.get("first"), CachedContext(context), sigma, options.window, y, kept=kept
        )
    with rest(job.wan.dit):
        grad, rows = reward_gradient(job, batch, noise, latents[-1])

    reference_context = CachedContext(context)

    def penalty(v, x, i):
        with torch.no_grad(), computing():
            v_ref = velocity(job.reference, x, sigma[i], reference_context, y)
        step = dict(weighting=options.kl_weighting, dt=float(sigma[i] - sigma[i + 1]))
        if y is not None:
            step["free"] = slice(None)
        kl = torch.stack([velocity_kl(v[b : b + 1], v_ref[b : b + 1], float(sigma[i]), **step) for b in range(size)])
        for row, value in zip(rows, kl.tolist()):
            row["kl"] = row.get("kl", 0.0) + value / options.window
        return options.kl_weight * job.share * kl.sum() / options.window

    def tuned(*inputs):  # not the backward pass: autocast would round the gradients of fp32 layers
        with computing():
            return job.model(*inputs)

    with rest(job.wan.vae):
        window_backward(tuned, latents, sigma, context, grad, penalty, y, hold, kept)
    return rows


def sft_step(job, batch, noise, hold=contextlib.nullcontext):
    """Accumulate the gradient of flow matching, E |v(x_sigma) - (noise - x_0)|² over free frames (2210.02747).

    batch["latent"] [B, C, F', h, w]; batch["u"] [B] uniform in 0..1, shifted to sigma as the sampler's schedule is, and
    kept below the boundary of A14B's low-noise expert, which is the one that is tuned.
    """
    shift, boundary = job.wan.preset.shift, job.wan.preset.boundary or 1.0
    u = batch["u"] * boundary / (shift - (shift - 1) * boundary)
    sigma = (shift * u / (1 + (shift - 1) * u)).view(-1, 1, 1, 1, 1)
    x0, y = batch["latent"], batch.get("y")
    x = pin((1 - sigma) * x0 + sigma * noise, batch.get("first"))
    t = (1000 * sigma.flatten())[:, None].repeat(1, x.shape[2])
    if y is None:
        t[:, 0] = 0
    with autocast(noise.device, job.options.precision):
        v = job.model(x, t, batch["context"], y)
    free = slice(1 if y is None else 0, None)
    loss = (v.float() - (noise - x0))[:, :, free].square().flatten(1).mean(1)
    (job.share * loss.sum()).backward()
    return [dict(loss=value) for value in loss.tolist()]


OBJECTIVES = dict(ipro=ipro_step, sft=sft_step)


def averaged(rows):
    """A step's line of the log: means over samples; a figure that a sample lacks is left out of its mean."""
    line = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row.get(name) is not None]
        line[name] = float(np.mean(values)) if values else None
    if "missing" in line:
        line["missing"] = sum(row["missing"] for row in rows)
    return line


# ---------------------------------------------------------------------------------------------------------------
# Watching: the same held-out clips with the same noise, before, now and then, and after


class Judge:
    """A second face reward that only watches: the score that it would have given, so that hacking shows."""

    def __init__(self, folder, clips, device):
        self.reward, self.clips, self.pools = FaceReward.from_folder(folder, device), clips, {}

    @torch.no_grad()
    def __call__(self, row, video):
        if row not in self.pools:
            true = self.reward.look(to_tensor(self.clips.video(row)).to(video.device))
            self.pools[row] = true["embeddings"].cpu(), true["mask"].cpu()
        score, info = self.reward.score(video, *(x.to(video.device) for x in self.pools[row]))
        return None if info["missing"] else float(score)


def measured(frames, video, image, reward, judge=None):
    """`clip_metrics` of a clip, given as uint8 frames and as video, by `reward`; by `judge` its FaceSim, as `judge`."""
    metrics = clip_metrics(frames, reward.look(video), reward.look(image))
    if judge is not None:
        metrics["judge"] = clip_metrics(frames, judge.look(video), judge.look(image))["facesim"]
    return metrics


@torch.no_grad()
def held_out(wan, reward, clips, rows, steps, seed=0, judge=None, precision="", at_once=1):
    """Sample held-out clips with noise that depends on clip and seed only; metrics of each, and the videos.

    judge: a second FaceReward, whose FaceSim is reported beside the first's as `judge`. at_once: clips that are
    sampled together. The ranks share the work.
    """
    schedule, results = sigmas(steps, wan.preset.shift), []
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    turns = [rows[(i + rank) % len(rows)] for i in range(0, len(rows), ranks)]  # as many for each: FSDP2 needs it
    bar = tqdm(total=len(turns), desc="held-out clips", leave=False, disable=rank > 0)
    for start in range(0, len(turns), at_once):
        some = turns[start : start + at_once]
        batch = clips.batch(some)
        shape = clips.latent_shape(wan.preset, batch["row"][0])
        noise = torch.stack([noise_like(shape, seed, row) for row in some]).to(batch["context"].device)
        with autocast(noise.device, precision), resting(wan.vae, wan.dit.offload):
            context = CachedContext(batch["context"])
            (latent,) = rollout(wan.dit, noise, batch.get("first"), context, schedule, y=batch.get("y"))
        with autocast(noise.device, precision), resting(wan.dit, wan.dit.offload):
            videos = wan.vae.decode(latent).float()
        for row, shown, video in zip(some, batch["row"], videos.split(1)):
            frames = to_frames(video)
            image = to_tensor(clips.video(shown)[:1]).to(noise.device)
            results.append((row, measured(frames, video, image, reward, judge), frames))
            bar.update()
    bar.close()
    found = {row: (metrics, video) for row, metrics, video in gathered(results)}
    return [found[row][0] for row in rows], [found[row][1] for row in rows]


def summary(results):
    """Means over clips of FaceSim, face rate, motion and TF; a metric that a clip lacks is left out of its mean."""
    values = {n: [r[n] for r in results if r[n] is not None] for n in results[0]}
    return {n: float(np.mean(v)) if v else float("nan") for n, v in values.items()}


COLUMNS = dict(
    facesim=("FaceSim", 3), judge=("judge's", 3), face_rate=("face rate", 3), motion=("motion", 4), tf=("TF", 4)
)


def table(rows):
    """Rows of (name, summary) as text."""
    shown = {n: c for n, c in COLUMNS.items() if n in rows[0][1]}
    lines = [f"{'':12}" + "".join(f"{title:>11}" for title, _ in shown.values())]
    for name, s in rows:
        lines.append(f"{name:12}" + "".join(f"{s[n]:11.{digits}f}" for n, (_, digits) in shown.items()))
    return "\n".join(lines)


def side_by_side(columns, rows):
    """Several clips as one video: a row a clip, a column a version; lists of uint8 [F, H, W, 3]."""
    return np.concatenate([np.concatenate([c[r] for c in columns], 2) for r in rows], 1)


PANELS = (("reward (FSM)", ("reward", "judge")), ("velocity KL", ("kl",)), ("held-out FaceSim", ("facesim", "judge")),
          ("held-out motion", ("motion",)))  # fmt: skip


def draw_curves(log, path):
    """The log's rows, one a step or a watch, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2), layout="constrained")
    for axis, (title, names) in zip(axes, PANELS):
        for name in names:
            lines = [(r["step"], r["held_out"] if title.startswith("held") else r)
                     for r in log if ("held_out" in r) == title.startswith("held")]  # fmt: skip
            points = [(step, line[name]) for step, line in lines if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points), marker=".", label=name)
                axis.legend()
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


class Log:
    """log.jsonl, a line a step (or a watch, under `held_out`), and TensorBoard's files where that is installed.

    A resumed run keeps the lines of the steps before `start`. Only rank 0 writes.
    """

    def __init__(self, out, start, rank):
        self.rows, self.file, self.board = [], None, None
        if rank > 0:
            return
        path = out / "log.jsonl"
        if path.exists():
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            self.rows = [r for r in rows if r["step"] < start or (r["step"] == start and "held_out" in r)]
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(r) + "\n" for r in self.rows))
        part.replace(path)
        self.file = open(path, "a")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out / "tensorboard", purge_step=start)
        except ImportError:  # TensorBoard is a wish, not a need
            pass

    def watched(self, step):
        """Are the held-out clips' figures after so many steps in it?"""
        return any("held_out" in row for row in self.rows if row["step"] == step)

    def write(self, row):
        row = json.loads(json.dumps(row), parse_constant=lambda _: None)  # JSON has no NaN and no infinity
        self.rows.append(row)
        if self.file is not None:
            print(json.dumps(row), file=self.file, flush=True)
        if self.board is not None:
            place, shown = ("held_out/", row["held_out"]) if "held_out" in row else ("", row)
            for name, value in shown.items():
                if isinstance(value, int | float) and name != "step":
                    self.board.add_scalar(place + name, value, row["step"])


# ---------------------------------------------------------------------------------------------------------------
# The run


def prepare(options, ranks, device):
    """The `Run` of a model, distributed over the ranks, before it has a reward."""
    full, many = options.lora_rank == 0, dist.is_initialized()
    if many and not full and options.kept_graphs == options.window:
        raise UserError(
            f"--kept_graphs {options.kept_graphs}: under torchrun at most {options.window - 1}; "
            "the ranks' gradients are summed in the step that is not kept"
        )
    # all weights: fp32 masters, autocast computes in bf16
    dtype = torch.float32 if full or options.precision == "fp32" else None
    distribute = shard if full and many else None
    wan = load_model(options.model, options.ckpt, device, dtype, shard=distribute, shift=options.shift)
    tuned = wan.dit.expert("low") if isinstance(wan.dit, Experts) else wan.dit
    wan.dit.offload = tuned.offload = options.offload
    tuned.checkpointing = options.checkpointing
    part = "low" if isinstance(wan.dit, Experts) else "dit"
    if full:
        reference = wan.load(part) if options.objective == "ipro" else None  # a frozen copy, sharded as well
        tuned.requires_grad_(True)
        model = tuned
    else:
        add_lora(tuned, options.lora_rank)
        model = DistributedDataParallel(tuned, forward_sync_buffers=False) if many else tuned

        reference = untuned(tuned)
    if options.compile:
        for block in tuned.blocks:
            block.compile()
    schedule = sigmas(options.sampling_steps, wan.preset.shift)
    return Run(wan, tuned, model, reference, options, schedule, ranks / options.batch)


def step_inputs(job, clips, step, numbers):
    """The batch and the noise of samples `numbers` of a step: by seed, step and number, whatever the ranks are."""
    options = job.options
    batch = batch_at(clips, options, step, numbers)
    shape = clips.latent_shape(job.wan.preset, batch["row"][0])
    noise = torch.stack([noise_like(shape, options.seed, step, k) for k in numbers]).to(clips.device)
    u = [(k + np.random.default_rng([options.seed, step, k]).random()) / options.batch for k in numbers]  # stratified
    return batch | dict(u=torch.tensor(u, dtype=torch.float32, device=clips.device)), noise


def take_step(job, clips, step, micro_batches, steppers):
    """One optimisation step of all ranks; returns its line of the log, with `skipped` true if nothing was changed.

    Where a reward, a loss or a gradient is not finite on any rank, none of them steps.
    """
    rows, hold = [], getattr(job.model, "no_sync", contextlib.nullcontext)
    for numbers in micro_batches:
        batch, noise = step_inputs(job, clips, step, numbers)
        with contextlib.nullcontext() if numbers is micro_batches[-1] else hold():
            rows += OBJECTIVES[job.options.objective](job, batch, noise, hold)
    rows = gathered(rows)
    parameters = [p for p in job.tuned.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, job.options.grad_clip)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    values = [v for row in rows for v in row.values() if v is not None]
    finite = bool(np.isfinite([norm, *values]).all())
    for optimizer in steppers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(job.options, step)
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    return averaged(rows) | dict(grad_norm=norm, skipped=not finite)


def main():
    options = resolve(given_options(TrainOptions, doc=__doc__))
    check(options)
    if options.plan:
        from plan import plan

        return plan(options)
    rank, ranks, device = start_ranks()
    micro_batches = samples_of(options, rank, ranks)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    out, folder, ipro = Path(options.out), Path(options.out) / "checkpoints", options.objective == "ipro"
    torch.manual_seed(options.seed)
    clips = Clips(options.data, "train", device, options.model, options.moving if ipro else 1)
    check_clips(clips, options)
    job = prepare(options, ranks, device)
    if ipro:
        guards = {k: getattr(options, k) for k in ("tiled", "pool_first", "score_first", "min_face", "min_score")}
        job.reward = FaceReward.from_folder(options.faces, device, **guards)
        if options.face_bf16:
            job.reward.encoder.trunk = torch.bfloat16
        job.judge = Judge(options.judge, clips, device) if options.judge else None
        say(f"face detector on {job.reward.detector.provider}")
        unseen = Clips(options.data, "heldout", device)
        chosen = unseen.spread(options.eval_clips)
        watch = functools.partial(held_out, job.wan, job.reward, unseen, chosen, options.sampling_steps,
                                  judge=job.judge and job.judge.reward, precision=options.precision,
                                  at_once=options.micro_batch)  # fmt: skip
        before, videos_before = watch()
        inputs = [np.repeat(unseen.video(r)[:1], len(v), 0) for r, v in zip(chosen, videos_before)]
        say(table([("before", summary(before))]))
    steppers = optimizers(options, job.tuned)

    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be made ({error.strerror})") from None
        saved = {k: v for k, v in dataclasses.asdict(options).items() if k != "resume"}
        (out / "options.part").write_text(json.dumps(saved, indent=1))
        (out / "options.part").replace(out / "options.json")
    start = 0
    if options.resume and (found := newest_checkpoint(folder, rank, ranks)):
        start = load_checkpoint(found, job.tuned, steppers, rank)
        say(f"{found}: going on from step {start}")
    log = Log(out, start, rank)
    if ipro and not log.watched(0):
        log.write(dict(step=0, held_out=summary(before)))

    def look(step, path):
        """Sample the held-out clips with the model as it is: a line of the log, the curves, a video."""
        results, videos = watch()
        if not log.watched(step):
            log.write(dict(step=step, held_out=summary(results)))
        if rank == 0:
            draw_curves(log.rows, out / "curves.png")
            shown = side_by_side([inputs, videos_before, videos], range(min(6, len(inputs))))
            path.parent.mkdir(exist_ok=True)
            write_video(path, shown, job.wan.preset.fps)
        return results

    export = functools.partial(export_weights, job, rank=rank)
    signals = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: signals.append(number))
    in_a_row = 0
    bar = tqdm(range(start, options.steps), options.objective, initial=start, total=options.steps, disable=rank > 0)
    for step in bar:
        due = ipro and step and options.watch_every and step % options.watch_every == 0
        if due and not any(gathered([log.watched(step)])):  # the log before a resume is known to rank 0 only
            look(step, out / "watch" / f"step-{step:06}.mp4")
        begin = time.perf_counter()
        line = take_step(job, clips, step, micro_batches, steppers)
        log.write(dict(step=step, **line, seconds=round(time.perf_counter() - begin, 3)))
        bar.set_postfix({k: f"{line[k]:.3f}" for k in ("reward", "kl", "loss") if line.get(k) is not None})
        in_a_row = in_a_row + 1 if line["skipped"] else 0
        gone, stopped = step + 1, any(gathered([bool(signals)]))
        broken = in_a_row == options.max_skips
        if gone % options.save_every == 0 or gone == options.steps or stopped or broken:
            save_checkpoint(folder, gone, job.tuned, steppers, export, rank, options.keep)
        if broken:
            raise UserError(
                f"{in_a_row} steps in a row without a finite reward, loss and gradient (see {out / 'log.jsonl'}); the "
                f"weights of the last good one are in {folder / f'step-{gone:06}'}"
            )
        if stopped:
            say(f"stopped by a signal after step {gone}; go on with: --resume --out {out}")
            break
    else:  # not stopped
        signal.signal(signal.SIGINT, signal.default_int_handler)  # --resume does what follows again
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        export(out)
        if ipro:
            after = look(options.steps, out / "before_after.mp4")
            say(table([("before", summary(before)), ("after", summary(after))]))
    leave_ranks()


if __name__ == "__main__":
    run(main)
