"""Identity-preserving reward-guided optimisation (IPRO, arXiv 2510.14255) of a Wan image-to-video model.

    python train.py                                                   the tiny Wan of this repository, on a CPU
    torchrun --nproc_per_node 8 train.py --model wan5b --ckpt DIR --data DIR
    python train.py --resume                                          goes on with the run in --out

The method is `ipro_step`, below. What is unusual: the reward's gradient is computed in two pieces that meet at the
final latent, so that the decoder's graph and the sampler's are never alive together, and of the sampler's graph only
one step is alive. What was left out of the paper: its in-house data and its 15 B model.

A LoRA is tuned by plain data parallelism (gradients are summed over the ranks once a step), all weights
(--lora_rank 0) under FSDP2. In --out: options.json, log.jsonl (a line a step), curves.png, checkpoints/, watch/,
lora.safetensors (of all weights dit.safetensors), before_after.mp4; tensorboard/ where that is installed.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read as torch is imported: its threads wait without spinning for long

import dataclasses
import functools
import json
import math
import shutil
import signal
import sys
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
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.profiler import record_function
from tqdm import tqdm

from cli import (
    UserError,
    check_can_be_made,
    gathered,
    given_options,
    is_empty,
    leave_ranks,
    lock_folder,
    option,
    rank_and_ranks,
    read_options,
    run,
    start_ranks,
    whole_file,
    write_text,
)
from data import Clips
from eval import (
    Judge,
    clip_metrics,
    compute_dtype,
    digest,
    mean_metrics,
    sample_held_out,
    shown_rows,
    side_by_side,
    table,
)
from model import ASSETS, CONFIGS, HostInputs, add_lora, lora_disabled
from reward import FaceReward, velocity_kl
from sample import (
    fresh_noise,
    rollout,
    sampling_assumptions,
    seeded_noise,
    sigmas,
    velocity,
    window_backward,
    write_video,
)
from weights import Wan, find_preset, parse_loras, save_lora, write_safetensors

# DCP warns where one process saves alone, which is meant; FSDP2 where a block returns a view, which nothing changes
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)


# ---------------------------------------------------------------------------------------------------------------
# The method


def ipro_step(tuning, batch, noise, fresh=None):
    """Accumulate the gradient of  -w_R mean R + w_KL mean KL  over a micro-batch (the paper's figure 2).

    tuning: a `Tuning`; batch: `Clips.batch`; noise [B, C, F', h, w]; fresh: `fresh_noise` for a renoise sampler, None
    for Euler. Every loss is divided by the step's whole batch, so the gradients of its micro-batches and ranks are
    summed, never averaged. A sample that shows no face adds its KL only. Returns a record for the log of each sample.
    """
    options, wan, sigma = tuning.options, tuning.wan, tuning.sigma
    first, y, context = batch.get("first"), batch.get("y"), batch["context"]  # y: A14B's, instead of first

    # (plan.py reads the names of the ranges.)
    # 1. Sample on-policy from noise, N steps without gradient; keep x_{N-K} .. x_N.
    with record_function("rollout"):
        wan.at_work("dit")
        latents = rollout(wan.dit, noise, first, context, sigma, options.window, y, fresh=fresh)

    # 2. Decode x_N and score its faces against all faces of the true clip, R by the facial scoring mechanism (FSM).
    with record_function("decode"):
        wan.at_work("vae")
        x_N = latents[-1].requires_grad_()
        video = wan.vae.decode(x_N, options.decode_frames or None, options.face_window)  # [B, 3, F, H, W] in [-1, 1]
        reward, faces = tuning.reward.score(video, *tuning.pool(batch), options.fsm)  # [B]
        # g = d(-w_R R)/dx_N: the graphs of the decoder and the face networks end here
        (grad,) = torch.autograd.grad(-options.reward_weight * reward.sum() / options.batch, x_N)
        records = tuning.records(batch, video.detach(), reward.detach(), faces)
        del video, reward, faces  # and with them all that their graphs still hold

    # 3. Send g back through the last K steps, one step's graph at a time, and charge each for its velocity KL.
    with record_function("window"):
        wan.at_work("tuned")
        for i, x, v, loss in window_backward(tuning.tuned, latents, sigma, context, grad, y, fresh):
            with torch.no_grad(), lora_disabled(tuning.reference):  # a frozen copy has no LoRA to switch off
                v_ref = velocity(tuning.reference, x, sigma[i], context, y)
            kl = velocity_kl(v, v_ref, float(sigma[i]), tuning.sampled_frames) / options.window  # [B]
            (loss + options.kl_weight * kl.sum() / options.batch).backward()  # leaves the next step's g in x.grad
            for record, value in zip(records, kl.tolist()):
                record["kl"] += value
    return records


@dataclass
class Tuning:
    """The networks, the reward and the schedule of a run."""

    wan: Any  # weights.Wan: dit, vae
    tuned: torch.nn.Module  # the transformer (A14B: the low-noise expert) whose weights or LoRA are tuned
    reference: torch.nn.Module  # the untuned one: `tuned` with its LoRA off, or a frozen copy
    options: Any  # TrainOptions
    sigma: torch.Tensor  # [N+1]
    reward: FaceReward
    judge: Judge | None = None

    @property
    def sampled_frames(self):
        """The latent frames that are sampled: all but the given first; A14B samples all."""
        return slice(1 if self.wan.preset.boundary is None else 0, None)

    def pool(self, batch):
        """The true clips' embeddings and mask: of one person (of several, the one seen most), or of all people."""
        if self.options.people == "largest" and batch["pool"].dim() == 4:
            return batch["pool"][:, 0], batch["pool_mask"][:, 0]
        return batch["pool"], batch["pool_mask"]

    def records(self, batch, video, reward, faces):
        """What is logged of each sample of a micro-batch, as dicts; a reward is None where no face was seen."""
        records = []
        for b, row in enumerate(batch["row"]):
            clip, found = video[b : b + 1], {name: value[b : b + 1] for name, value in faces.items()}
            metrics, missing = clip_metrics(clip, found), int(found["missing"])
            records.append(dict(reward=None if missing else float(reward[b]), missing=missing, kl=0.0,
                                **{name: metrics[name] for name in ("face_rate", "motion", "tf")}))  # fmt: skip
            if self.judge is not None:
                records[-1]["judge"] = self.judge.score(row, clip)
        return records


def optimisation_step(tuning, clips, step, micro_batches, optimizer):
    """One step of all ranks on their micro-batches; returns its line of the log.

    A sample's clip and noise, and so the step's gradient, depend on seed, step and the sample's number alone, not on
    the ranks. Where a reward, a loss or a gradient is not finite on any rank, none steps: the line says `skipped`.
    """
    options, records = tuning.options, []
    for samples in micro_batches:
        batch = batch_at(clips, options, step, samples)
        shape = clips.latent_shape(tuning.wan.preset, batch["row"][0])  # clips of a micro-batch are of one size
        seeds = [(options.seed, step, k) for k in samples]
        noise = torch.stack([seeded_noise(shape, *seed) for seed in seeds]).to(clips.device)
        fresh = None
        if options.solver == "renoise":
            fresh = fresh_noise(noise.shape, options.sampling_steps, *seeds, device=clips.device)
        records += ipro_step(tuning, batch, noise, fresh)
    parameters = [p for p in tuning.tuned.parameters() if p.requires_grad]
    if dist.is_initialized() and not isinstance(tuning.tuned, FSDPModule):  # FSDP2 has summed over the ranks already
        for p in parameters:
            dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # FSDP2's is a DTensor
    records = gathered(records)
    finite = bool(np.isfinite([norm, *(v for record in records for v in record.values() if v is not None)]).all())
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(options, step)
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    line = {name: value for name, value in mean_metrics(records).items() if name != "missing"}
    return line | dict(missing=sum(record["missing"] for record in records), grad_norm=norm, skipped=not finite)


def batch_at(clips, options, step, samples):
    """The batch of the samples of these numbers, of a step: a permutation of the clips an epoch, by the seed."""
    rows = []
    for k in samples:
        epoch, place = divmod(step * options.batch + k, len(clips))
        rows.append(int(np.random.default_rng([options.seed, epoch]).permutation(len(clips))[place]))
    return clips.batch(rows)


def learning_rate(options, step):
    """The rate of a step: it rises over `warmup` steps and falls to 0 over the last share `decay` of them."""
    end = options.steps * options.decay
    return options.lr * min(1, (step + 1) / max(1, options.warmup), (options.steps - step) / max(1, end))


# ---------------------------------------------------------------------------------------------------------------
# Options. A default is the paper's (arXiv 2510.14255, section 4.1) where it names one; `roll` is the official code's
# where that differs (ROLL v0.2.1, reward_fl: loss = -0.1 (R - 0.54) / 0.16 + KL, the input picture left out of the
# pool); `tiny` is the tiny model's; these are keywords of `option`. `resumable` ones may change when a run goes on.


@dataclass
class TrainOptions:
    model: str = option("tiny", f"preset: {', '.join(CONFIGS)}")
    ckpt: str = option("", "folder with the model's weights; tiny ships its own")
    base_lora: str = option("", "a distilled base's LoRA, merged: [high=|low=]FILE[:STRENGTH], comma-separated")
    data: str = option(str(ASSETS / "data"), "folder that data.py made: train and heldout clips")
    moving: float = option(1.0, "share of the clips that are trained on: those whose faces move furthest",
                           least=0, most=1, tiny=0.25)  # fmt: skip
    out: str = option("out", "folder of the run", resumable=True)
    resume: bool = option(False, "go on with the run in --out, with its options", resumable=True)
    faces: str = option(str(ASSETS), "folder with a face detector and encoder, the reward's, e.g. antelopev2")
    judge: str = option("", "folder with a second detector and encoder, which only watches, e.g. buffalo_l")
    recipe: str = option("paper", "where the defaults are from", choices=("paper", "roll"))
    steps: int = option(100, "optimisation steps", least=1, most=999_999, tiny=34, resumable=True)
    batch: int = option(64, "clips a step, of all ranks together", least=1, roll=8, tiny=3)
    micro_batch: int = option(1, "clips that a rank takes at once", least=1, tiny=3, resumable=True)
    lr: float = option(2e-5, "learning rate of Adam", least=0, roll=2.5e-6, tiny=2.4e-3)
    warmup: int = option(5, "steps over which the learning rate rises to lr", least=0, tiny=3)
    decay: float = option(0.0, "share of the steps, at the end, over which it falls to 0", least=0, most=1, tiny=0.9)
    lora_rank: int = option(32, "rank of the LoRA on q, k, v, o and the feed-forward layers; 0 tunes all weights",
                            least=0)  # fmt: skip
    sampling_steps: int = option(8, "N, sampling steps of a roll-out", least=1, most=1000)
    shift: float = option(0.0, "of the noise schedule, a larger one is noisier; 0 = the preset's", least=0)
    solver: str = option("euler", "how a model is sampled; renoise: as 5B-Turbo's weights are, with fresh noise a step",
                         choices=("euler", "renoise"))  # fmt: skip
    window: int = option(4, "K, the last sampling steps, which the gradient passes through", least=1)
    reward_weight: float = option(0.1, "w_R, weight of the face reward", least=0, roll=0.1 / 0.16)
    kl_weight: float = option(1.0, "w_KL, weight of the velocity KL to the untuned model", least=0, tiny=0.32)
    fsm: str = option("pool", "what generated faces are compared with: all true faces, the first, or the same frame's",
                      choices=("pool", "first", "aligned"))  # fmt: skip
    pool_first: bool = option(True, "is the true clip's frame 0, the input picture, in the pool?", roll=False)
    people: str = option("largest", "whose faces are scored: the largest, or each person's against their own pool",
                         choices=("largest", "all"))  # fmt: skip
    tiled: bool = option(False, "detect again, enlarged and in tiles, where faces are small against the frame")
    precision: str = option("", "of the networks; default: bf16 where the device computes it natively",
                            choices=("", "bf16", "fp32"))  # fmt: skip
    compile: bool = option(False, "torch.compile the tuned transformer's blocks")
    checkpointing: bool = option(False, "recompute each transformer block in the backward pass: memory for time")
    offload: bool = option(False, "keep on the host what is not at work: networks, and --checkpointing's block inputs")
    decode_frames: int = option(0, "decoder caches kept every n latent frames, one frame's graph at a time; 0 = all's",
                                least=0)  # fmt: skip
    face_window: int | None = option(None, "decode with gradient the faces only and so many latent cells around; "
                                           "default: the whole frame", least=0)  # fmt: skip
    eval_clips: int = option(8, "held-out clips sampled before, after and at every watch", least=1, tiny=60)
    watch_every: int = option(20, "steps between samplings of the held-out clips; 0 = before and after only",
                              least=0, tiny=0, resumable=True)  # fmt: skip
    save_every: int = option(20, "steps between checkpoints", least=1, resumable=True)
    seed: int = option(0, "of data order, noise and LoRA", least=0)


LARGEST_NORM = 1.0  # of a step's gradient: a larger one is scaled down to it
KEPT_CHECKPOINTS = 2
MAX_SKIPS = 10  # steps in a row without a finite gradient after which a run ends


def resolve(given):
    """TrainOptions of what the command line gave. What comes later wins: the defaults, the recipe's, the tiny model's
    (or, with --resume, the run's own), the command line's."""
    fields = {f.name: f.metadata["about"] for f in dataclasses.fields(TrainOptions)}
    if given.get("resume"):
        out = Path(given.get("out", TrainOptions.out))
        if (saved := read_options(out)) is None:
            raise UserError(f"--resume: {out} holds no run (no options.json)")
        if unknown := sorted(saved.keys() - fields.keys()):
            raise UserError(f"{out / 'options.json'}: of another version of train.py, it has {', '.join(unknown)}; "
                            f"go on with that version, or start again with another --out")  # fmt: skip
        changed = [k for k, v in given.items() if not fields[k].get("resumable") and saved.get(k) != v]
        if changed:
            raise UserError(f"--resume: {out} was run with another --{changed[0]} ({saved.get(changed[0])})")
        return TrainOptions(**(saved | given | dict(out=str(out))))
    base = {}
    for variant in (given.get("recipe", TrainOptions.recipe), given.get("model", TrainOptions.model)):
        base |= {name: about[variant] for name, about in fields.items() if variant in about}
    return TrainOptions(**(base | given))


def check(options):
    """Refuse what cannot work before anything is loaded or written."""
    preset = find_preset(options.model, options.ckpt, options.shift)
    parse_loras(options.base_lora, preset, "--base_lora")
    if options.reward_weight == options.kl_weight == 0:
        raise UserError("--reward_weight 0 and --kl_weight 0: nothing is left to optimise")
    check_window(options, preset)
    if options.lora_rank > preset.dit.dim:
        raise UserError(f"--lora_rank {options.lora_rank}: more than the model's width, {preset.dit.dim}")
    out = Path(options.out)
    check_can_be_made(out)
    if not options.resume and not is_empty(out):
        raise UserError(f"--out {out}: exists and is not empty; name another folder, or continue it with --resume")


def check_window(options, preset):
    """Refuse a window that the sampling steps of the tuned transformer do not hold."""
    steps = options.sampling_steps
    if options.window > steps:
        raise UserError(f"--window {options.window}: more than the {steps} sampling steps")
    low = int((sigmas(steps, preset.shift)[:-1] < preset.boundary).sum()) if preset.boundary else steps
    if options.window > low:
        raise UserError(f"--window {options.window}: the low-noise expert, which is tuned, takes the last {low} of "
                        f"{steps} steps")  # fmt: skip


def divided_among(ranks, options, given):
    """The options with a batch and micro-batch that the ranks can share, where the command line leaves them open."""
    batch, micro = options.batch, options.micro_batch
    if not given.keys() & {"batch", "resume"}:
        batch = -(-batch // ranks) * ranks
    if "micro_batch" not in given and batch % ranks == 0:
        micro = max(m for m in range(1, micro + 1) if batch // ranks % m == 0)
    return dataclasses.replace(options, batch=batch, micro_batch=micro)


def micro_batches_of(options, rank, ranks):
    """The numbers of a step's samples that are this rank's, by micro-batch; UserError if the batch does not divide."""
    if options.batch % (ranks * options.micro_batch):
        raise UserError(
            f"--batch {options.batch} is no multiple of {ranks * options.micro_batch}: {ranks} rank(s) x --micro_batch "
            f"{options.micro_batch} make one accumulation"
        )
    each = options.batch // ranks
    return [range(k, k + options.micro_batch) for k in range(rank * each, (rank + 1) * each, options.micro_batch)]


def prepare(options, device):
    """The `Tuning` of a run: networks loaded, LoRA added or weights sharded, reward and judge read."""
    full = options.lora_rank == 0
    # tuning all weights keeps fp32 masters; the forward pass still computes in bf16
    dtype = torch.float32 if full or options.precision == "fp32" else None
    distribute = shard if full and dist.is_initialized() else None
    wan = Wan(options.model, options.ckpt, device, dtype, shard=distribute, shift=options.shift,
                     compute_dtype=compute_dtype(options.precision, device),
                     base_loras=parse_loras(options.base_lora, CONFIGS[options.model], "--base_lora"))  # fmt: skip
    wan.offload = options.offload
    tuned = reference = wan.tuned
    tuned.checkpointing = options.checkpointing
    if options.offload:
        tuned.saved_inputs = HostInputs().hooks
    if full:
        reference = wan.load("dit" if wan.preset.boundary is None else "low")  # a frozen copy, sharded as well
        tuned.requires_grad_(True)
    else:
        add_lora(tuned, options.lora_rank)
    if options.compile:
        for block in tuned.blocks:
            block.compile(fullgraph=True)  # an error rather than parts that silently run uncompiled
    reward = FaceReward.from_folder(options.faces, device, options.tiled, options.pool_first)
    return Tuning(wan, tuned, reference, options, sigmas(options.sampling_steps, wan.preset.shift), reward)


def shard(dit):
    """FSDP2 on a transformer: the ranks hold a part each of every block, and gather a block while it runs.

    Parts, gradients and their sums are fp32 and autocast computes in bf16: a bf16 MixedPrecisionPolicy would round
    norms and modulations too, which Wan keeps in fp32.
    """
    for module in (*dit.blocks, dit):
        fully_shard(module)
        # the ranks' gradients are summed: a loss is a share of the step's mean
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # and by a plain sum, which gloo can do too


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: out/checkpoints/step-000020/, complete or absent


def sync(path):
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def training_state(model, optimizer):
    """Return the tuned weights and Adam's moments by parameter name, which any number of ranks can read.

    No random state: clips and noise follow from seed and step.
    """
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    return dict(weights=weights, optimizers=moments)


def save_checkpoint(folder, step, tuning, optimizer):
    """Write folder/step-<step>, of all ranks, with what other programs read of it; the last KEPT_CHECKPOINTS stay.

    It grows under a temporary name, is synced to the disk, and gets its name when its manifest of SHA-256 sums is in
    it. Raises UserError where that fails, as on a full disk: the checkpoints before it are untouched.
    """
    rank, _ = rank_and_ranks()
    whole = folder / f"step-{step:06}"
    part = whole.with_suffix(".part")
    sums = []

    def begin():
        if rank == 0:
            for torn in folder.glob("*.part"):  # of a run that was killed
                shutil.rmtree(torn)
            part.mkdir()

    def write():
        dcp.save(training_state(tuning.tuned, optimizer), checkpoint_id=part, no_dist=not dist.is_initialized())
        export_weights(tuning, part)
        # DCP names its shards __<rank>_<n>.distcp; rank 0 answers for the other files too
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
            for old in sorted(folder.glob("step-??????"))[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old.rename(old.with_suffix(".part")))  # renamed first: a kill leaves no half of one

    for stage in (begin, write, finish):
        fault = None
        try:
            stage()
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
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


def newest_checkpoint(folder):
    """The newest whole checkpoint of a run, or None if there is none yet; a damaged one is told of, and passed over.

    UserError where all are damaged: a run from step 0 would write over what is left of them.
    """
    rank, ranks = rank_and_ranks()
    found = sorted(folder.glob("step-??????"), reverse=True)
    for path in found:
        try:
            files = sorted(json.loads((path / "manifest.json").read_text())["files"].items())
            wrong = [name for name, expected in files[rank::ranks] if digest(path / name) != expected]
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


def load_checkpoint(path, tuning, optimizer):
    """Put a checkpoint's weights and optimizer state in place, whatever number of ranks wrote it; returns its step."""
    state = training_state(tuning.tuned, optimizer)
    dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    set_state_dict(
        tuning.tuned, optimizer, model_state_dict=state["weights"], optim_state_dict=state["optimizers"],
        options=StateDictOptions(strict=False),
    )  # fmt: skip
    return json.loads((path / "manifest.json").read_text())["step"]


def export_weights(tuning, path):
    """Write path/lora.safetensors, or with --lora_rank 0 path/dit.safetensors, for other programs."""
    rank, _ = rank_and_ranks()
    if tuning.options.lora_rank:
        if rank == 0:
            expert = {} if tuning.wan.preset.boundary is None else {"expert": "low"}
            save_lora(tuning.tuned, path / "lora.safetensors", expert)
        return
    dtype = torch.float16 if tuning.wan.preset.shipped else torch.bfloat16
    tensors = {}
    for name, value in tuning.tuned.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value  # FSDP2's: all ranks take part
        if rank == 0:
            tensors[name] = value.to("cpu", dtype).contiguous()
    if rank == 0:
        write_safetensors(tensors, path / "dit.safetensors")


# ---------------------------------------------------------------------------------------------------------------
# The log, and the held-out clips now and then


class Log:
    """log.jsonl, a line a step (or a watch, under `held_out`), and TensorBoard's files where that is installed.

    A resumed run keeps the lines of the steps before `start`. Only rank 0 writes.
    """

    def __init__(self, out, start):
        self.rows, self.file, self.board = [], None, None
        if rank_and_ranks()[0] > 0:
            return
        path = out / "log.jsonl"
        if path.exists():
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                try:
                    row = json.loads(line)
                    if row["step"] < start or (row["step"] == start and "held_out" in row):
                        self.rows.append(row)
                except (ValueError, KeyError, TypeError):  # torn by a crash
                    print(f"{path}: line {number} is not readable and left out", flush=True)
        write_text(path, "".join(json.dumps(r) + "\n" for r in self.rows))
        self.file = open(path, "a")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out / "tensorboard", purge_step=start)
        except ImportError:  # optional
            pass

    def has_held_out(self, step):
        """Return, alike on every rank, whether the log holds the held-out clips' metrics after so many steps."""
        return any(gathered([any("held_out" in row for row in self.rows if row["step"] == step)]))

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


LABELS = dict(facesim="FaceSim", judge="a second encoder's", motion="motion")


def draw_curves(rows, before, now, path):
    """Draw a run: reward and KL over its steps (of the log's rows), and what it made of each held-out clip.

    before, now: `clip_metrics` of the held-out clips by the untuned model and by the model as it is.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (score, kl, *held_out) = pyplot.subplots(1, 4, figsize=(18, 4), layout="constrained")
    steps = [row for row in rows if "held_out" not in row]
    for axis, name, label in ((score, "reward", "face reward"), (score, "judge", "second encoder"), (kl, "kl", "KL")):
        points = [(row["step"], row[name]) for row in steps if row.get(name) is not None]
        if points:
            axis.plot(*zip(*points), marker=".", label=label)
    score.set(title="the samples of each step", xlabel="step", ylabel="mean cosine to the true clip's faces")
    score.legend()
    kl.set(title="how far it has moved", xlabel="step", ylabel="velocity KL to the untuned model")
    for axis, name, unit in zip(held_out, ("facesim", "motion"), ("cosine to the input's face", "face sizes a frame")):
        title = []
        for key in (name, "judge") if name == "facesim" else (name,):
            pairs = [(a[key], b[key]) for a, b in zip(before, now) if None not in (a.get(key), b.get(key))]
            if pairs:
                first, last = np.mean(pairs, 0)
                title.append(f"{LABELS[key]}: {first:.3g} to {last:.3g}, higher in {sum(b > a for a, b in pairs)} of "
                             f"{len(pairs)}")  # fmt: skip
                axis.plot(*zip(*pairs), ".", label=LABELS[key])
        axis.axline((0, 0), slope=1, color="grey", linewidth=1)
        axis.autoscale_view()
        axis.set(xlabel=f"before, {unit}", ylabel="now")
        axis.set_title("\n".join(["held-out clips, a dot each", *title]), fontsize="medium")
        axis.legend(loc="upper left")
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=100)
    pyplot.close(figure)


class HeldOut:
    """The held-out clips, sampled with fixed noise by the model as it is: before (when this is made), every
    --watch_every steps, and after."""

    def __init__(self, tuning, clips, out):
        self.tuning, self.clips, self.out = tuning, clips, out
        self.rows = clips.spread(tuning.options.eval_clips)
        clock = time.perf_counter()
        self.before, self.frames_before = self.sample()
        self.seconds = time.perf_counter() - clock

    def sample(self):
        """Return `clip_metrics` of each clip, and the frames of some."""
        tuning, options = self.tuning, self.tuning.options
        judge = tuning.judge and tuning.judge.reward
        return sample_held_out(tuning.wan, tuning.reward, self.clips, self.rows, options.sampling_steps, judge=judge,
                               at_once=options.micro_batch, solver=options.solver)  # fmt: skip

    def compare(self, step, path, log):
        """Write a line of the log, curves.png, and a video of input, before, now and true clip; return the means."""
        metrics, frames = self.sample()
        means = mean_metrics(metrics)
        if not log.has_held_out(step):
            log.write(dict(step=step, held_out=means))
        if rank_and_ranks()[0] == 0:
            draw_curves(log.rows, self.before, metrics, self.out / "curves.png")
            shown = shown_rows(self.rows)
            true = {r: self.clips.video(r)[: len(frames[r])] for r in shown}
            inputs = {r: np.repeat(clip[:1], len(clip), 0) for r, clip in true.items()}
            columns = {"input": inputs, "before": self.frames_before, f"step {step}": frames, "true clip": true}
            path.parent.mkdir(exist_ok=True)
            write_video(path, side_by_side(columns, shown), self.tuning.wan.preset.fps)
        return means


# ---------------------------------------------------------------------------------------------------------------
# The run


BYTES_A_PIXEL = 250  # of a clip, that a step's graphs take at the least: 79 MB of 17 frames of 128x128


def check_clips(clips, options, device):
    """Refuse a set that does not hold what the step reads, and a micro-batch that the machine cannot hold."""
    cached, _ = clips.read(0)
    needed = options.micro_batch * clips.rows[0]["frames"] * math.prod(clips.rows[0]["size"]) * BYTES_A_PIXEL
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cpu" and needed > memory:
        raise UserError(f"--micro_batch {options.micro_batch}: takes {needed / 1e9:.0f} GB at least, this machine has "
                        f"{memory / 1e9:.0f}; more micro-batches of fewer clips make the same --batch")  # fmt: skip
    if "pool" not in cached:
        raise UserError(f"--data {options.data}: it holds no faces; make the set again with data.py")
    if options.people == "all" and cached["pool"].dim() == 2:
        raise UserError(f"--people all: {options.data} holds one person a clip; make a set with: data.py --people 2")


def announcement(tuning, clips, unseen, ranks, device):
    """What a run is about to do, as lines for the person who started it."""
    options, tuned = tuning.options, [p for p in tuning.tuned.parameters() if p.requires_grad]
    what = f"a LoRA of rank {options.lora_rank}" if options.lora_rank else "all weights"
    cores = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    yield (f"tuning {what} of {options.model} ({sum(p.numel() for p in tuned) / 1e6:.1f} M parameters) for "
           f"{options.steps} steps of {options.batch} of {len(clips)} clips, on {ranks} x {cores}; face detector on "
           f"{tuning.reward.detector.provider}")  # fmt: skip
    yield (f"before and after, {min(options.eval_clips, len(unseen))} held-out clips are sampled; what comes out is in "
           f"{options.out}/; stopped, the run goes on by --resume")  # fmt: skip


def time_left(options, step, step_seconds, sampling_seconds):
    """How long a run goes on after its first step, as a line: by that step, and one sampling of the held-out clips."""
    steps = options.steps - step - 1
    samplings = 1 + (steps // options.watch_every if options.watch_every else 0)
    minutes = max(1, round((steps * step_seconds + samplings * sampling_seconds) / 60))
    return f"about {minutes} min to go: {steps} more steps, the held-out clips {samplings} x"


def make_folder(options, out):
    """Make the run's folder, with its options in it; returns its lock. UserError where another process has it."""
    lock = lock_folder(out)
    saved = {k: v for k, v in dataclasses.asdict(options).items() if k != "resume"}
    write_text(out / "options.json", json.dumps(saved, indent=1))
    (out / "checkpoints").mkdir(exist_ok=True)
    return lock


def main():
    given = given_options(TrainOptions, doc=__doc__)
    chosen = resolve(given)
    check(chosen)
    rank, ranks, device = start_ranks()
    options = divided_among(ranks, chosen, given)
    micro_batches = micro_batches_of(options, rank, ranks)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    if options != chosen and ranks > 1:
        say(f"--batch {options.batch} --micro_batch {options.micro_batch}, so that {ranks} ranks share a step")
    out = Path(options.out)
    if not CONFIGS[options.model].shipped:
        shift = options.shift or CONFIGS[options.model].shift
        say(sampling_assumptions(options.model, options.solver, options.sampling_steps, shift, 1, options.base_lora))
    torch.manual_seed(options.seed)  # of the LoRA, the same on every rank
    clips = Clips(options.data, "train", device, options.model, options.moving)
    unseen = Clips(options.data, "heldout", device, options.model)
    check_clips(clips, options, device)
    tuning = prepare(options, device)
    clips.check_encoder(tuning.reward.encoder)
    tuning.judge = Judge(options.judge, clips, device) if options.judge else None
    lock, folder = make_folder(options, out) if rank == 0 else None, out / "checkpoints"
    found = newest_checkpoint(folder) if options.resume else None
    for line in announcement(tuning, clips, unseen, ranks, device):
        say(line)
    held_out = HeldOut(tuning, unseen, out)  # before a checkpoint is loaded: `before` is the untuned model
    before = mean_metrics(held_out.before)
    say(table([("before", before)]))

    optimizer = torch.optim.Adam([p for p in tuning.tuned.parameters() if p.requires_grad], lr=options.lr)
    start = load_checkpoint(found, tuning, optimizer) if found else 0
    if options.resume:
        say(f"{found}: going on from step {start}" if found else f"{folder}: no checkpoint yet, starting at step 0")
    log = Log(out, start)
    if not log.has_held_out(0):
        log.write(dict(step=0, held_out=before))

    signals, skipped, steps_taken = [], 0, 0
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: signals.append(number))
    bar = tqdm(range(start, options.steps), "steps", initial=start, total=options.steps, disable=rank > 0)
    for step in bar:
        if step and options.watch_every and step % options.watch_every == 0 and not log.has_held_out(step):
            held_out.compare(step, out / "watch" / f"step-{step:06}.mp4", log)
        clock = time.perf_counter()
        line = optimisation_step(tuning, clips, step, micro_batches, optimizer)
        log.write(dict(step=step, **line, seconds=round(time.perf_counter() - clock, 3)))
        if step == start and rank == 0:
            tqdm.write(time_left(options, step, time.perf_counter() - clock, held_out.seconds), file=sys.stdout)
        bar.set_postfix({k: f"{line[k]:.3f}" for k in ("reward", "kl")})
        skipped = skipped + 1 if line["skipped"] else 0
        steps_taken += not line["skipped"]
        done, stopped, broken = step + 1, any(gathered([bool(signals)])), skipped == MAX_SKIPS
        if done % options.save_every == 0 or done == options.steps or stopped or broken:
            save_checkpoint(folder, done, tuning, optimizer)
        if broken:
            raise UserError(
                f"{skipped} steps in a row without a finite reward, loss and gradient (see {out / 'log.jsonl'}); the "
                f"weights of the last good one are in {folder / f'step-{done:06}'}"
            )
        if stopped:
            say(f"stopped by a signal after step {done}; go on with: --resume --out {out}")
            return leave_ranks()
    for name, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(name, handler)  # from here on a signal ends the run at once; --resume repeats only what follows
    if start < options.steps and not steps_taken:
        say(f"no step had a finite reward, loss and gradient (see {out / 'log.jsonl'}): nothing was tuned")
        leave_ranks()
        return 1
    export_weights(tuning, out)
    after = held_out.compare(options.steps, out / "before_after.mp4", log)
    say(table([("before", before), ("after", after)]))
    leave_ranks()
    if lock:
        lock.close()


if __name__ == "__main__":
    run(main)
