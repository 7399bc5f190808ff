"""Identity-preserving reward-guided optimisation (IPRO, arXiv 2510.14255) of a Wan image-to-video model.

    python train.py                  tunes the tiny Wan that ships with the repo, on a CPU, in minutes
    python train.py --help           every option

One step: roll out a clip from fresh noise (no gradient), decode it, score its faces against all faces of the true
clip, send the reward's gradient at the final latent back through the last K sampling steps, add the velocity KL
to the untuned model, step. `--objective sft` is plain flow matching on the true clips instead; it made the tiny
model. Everything lands in --out: lora.safetensors, log.jsonl, curves.png, before_after.mp4, options.json.
"""

import dataclasses
import functools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Clips
from model import (
    ASSETS,
    CONFIGS,
    UserError,
    add_lora,
    load_model,
    lora_disabled,
    save_lora,
    write_safetensors,
)
from reward import FaceReward, clip_metrics, velocity_kl
from sample import (
    latent_size,
    noise_like,
    option,
    parse_options,
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


@dataclass
class TrainOptions:
    model: str = option("tiny", f"preset: {', '.join(CONFIGS)}")
    ckpt: str = option("", "folder with the model's weights; tiny ships its own")
    data: str = option(str(ASSETS / "data"), "folder that data.py made: train and heldout clips")
    out: str = option("out", "folder of the run")
    faces: str = option(str(ASSETS), "folder with a face detector and encoder, the reward's, e.g. antelopev2")
    objective: str = option("ipro", "ipro: reward on own samples; sft: flow matching on the true clips")
    steps: int = option(40, "optimisation steps")
    batch: int = option(4, "clips a step")
    lr: float = option(1e-3, "learning rate")
    optimizer: str = option("adam", "adam, or muon: Muon for the blocks' matrices and Adam for the rest, from scratch")
    warmup: int = option(5, "steps over which the learning rate rises to lr")
    decay: float = option(0.0, "share of the steps, at the end, over which it falls to 0")
    grad_clip: float = option(1.0, "largest norm of a step's gradient")
    lora_rank: int = option(32, "rank of the LoRA on q, k, v, o and the feed-forward layers; 0 tunes all weights")
    sampling_steps: int = option(8, "N, Euler steps of a rollout")
    window: int = option(4, "K, the last sampling steps, which the gradient passes through")
    reward_weight: float = option(0.1, "w_R, weight of the face reward")
    kl_weight: float = option(1.0, "w_KL, weight of the velocity KL to the untuned model")
    kl_weighting: str = option("sigma", "of the KL over steps: sigma, dt or uniform")
    reward_clip: float = option(0.0, "largest norm of a clip's reward gradient at its final latent; 0 = any")
    fsm: str = option("pool", "what generated faces are compared with: pool, first or aligned")
    people: str = option("largest", "whose faces are scored: largest, or all (each person against their own pool)")
    pool_first: bool = option(True, "is the true clip's frame 0 in the pool?")
    score_first: bool = option(True, "is the generated frame 0, which is given, scored?")
    min_face: float = option(0.0, "pixels; a smaller face counts in proportion to its size; 0 = all count the same")
    min_score: float = option(0.0, "in 0..1; a face that the detector is less sure of counts less; 0 = as any other")
    judge: str = option("", "folder with a second detector and encoder, which only watches, e.g. buffalo_l")
    eval_clips: int = option(24, "held-out clips sampled before and after, with fixed noise")
    save_every: int = option(20, "steps between checkpoints that --resume can continue from")
    seed: int = option(0, "of data order, noise and LoRA")
    resume: bool = option(False, "continue the run in --out")


def learning_rate(options, step):
    end = options.steps * options.decay
    return options.lr * min(1, (step + 1) / max(1, options.warmup), (options.steps - step) / max(1, end))


def optimizers(options, model):
    """The optimizers of a model's trainable parameters: Adam, and with `muon` Muon before it.

    Muon (arXiv 2502.16982) takes the blocks' matrices, its updates scaled to the size of Adam's, so that one learning
    rate serves both.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = {n for n, p in named.items() if options.optimizer == "muon" and n.startswith("blocks.") and p.dim() == 2}
    rest = [p for n, p in named.items() if n not in matrices]
    found = [torch.optim.Adam(rest, lr=options.lr, betas=(0.9, 0.99 if matrices else 0.999))]
    if matrices:
        kernels = [named[n] for n in sorted(matrices)]
        found.insert(0, torch.optim.Muon(kernels, options.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return found


def batch_at(clips, options, step):
    """The clips of a step: a permutation an epoch, a function of seed and step only, so that resuming is exact."""
    rows = []
    for k in range(step * options.batch, (step + 1) * options.batch):
        epoch, place = divmod(k, len(clips))
        rows.append(int(np.random.default_rng([options.seed, epoch]).permutation(len(clips))[place]))
    return clips.batch(rows), rows


def autocast(device):
    """bf16 compute over fp32 master weights on a GPU; fp32 on a CPU. Sampler state, KL and reward stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def ipro_step(wan, reward, batch, options, sigma, noise, judged=lambda b, video: None):
    """Accumulate the gradient of  -w_R mean R + w_KL mean_i KL_i  (IPRO's objective); returns what to log.

    batch: `Clips.batch`; sigma [N+1]; noise [B, C, F', h, w]; judged(b, video): a second opinion on clip b, to log.
    A sample that shows no face adds its KL only.
    """
    first, context, size = batch["first"], batch["context"], len(noise)
    pool, pool_mask = batch["pool"], batch["pool_mask"]
    if options.people == "largest" and pool.dim() == 4:
        pool, pool_mask = pool[:, 0], pool_mask[:, 0]
    with autocast(noise.device):
        latents = rollout(wan.dit, noise, first, context, sigma, options.window)
    scores, metrics, grads, opinions = [], [], [], []
    for b in range(size):  # one clip's decoder graph at a time
        x = latents[-1][b : b + 1].clone().requires_grad_()
        with autocast(noise.device):
            video = wan.vae.decode(x).float()
        score, info = reward.score(video, pool[b : b + 1], pool_mask[b : b + 1], options.fsm)
        # g = d(-w_R R)/dx_N; the decoder's and the face network's graph is freed here
        (grad,) = torch.autograd.grad(-options.reward_weight * score.sum() / size, x)
        if options.reward_clip:
            grad = grad * (options.reward_clip / (size * grad.norm()).clamp(min=1e-12)).clamp(max=1)
        grads.append(grad)
        scores.append(None if info["missing"] else float(score.detach()))
        opinions.append(judged(b, video.detach()))
        metrics.append(clip_metrics(to_frames(video.detach()), info))
    kls = []

    def penalty(v, x, i):
        with torch.no_grad(), lora_disabled(wan.dit), autocast(x.device):
            v_ref = velocity(wan.dit, x, sigma[i], context)
        kl = velocity_kl(v, v_ref, float(sigma[i]), options.kl_weighting, dt=float(sigma[i] - sigma[i + 1]))
        kls.append(float(kl))
        return options.kl_weight * kl / options.window

    with autocast(noise.device):
        window_backward(wan.dit, latents, sigma, context, torch.cat(grads), penalty)
    seen = [s for s in scores if s is not None]
    motion = [m["motion"] for m in metrics if m["motion"] is not None]
    opinions = [o for o in opinions if o is not None]
    return dict(
        reward=float(np.mean(seen)) if seen else None,
        **(dict(judge=float(np.mean(opinions))) if opinions else {}),
        missing=scores.count(None),
        face_rate=float(np.mean([m["face_rate"] for m in metrics])),
        kl=float(np.mean(kls)),
        motion=float(np.mean(motion)) if motion else None,
    )


def sft_step(wan, batch, options, noise, u):
    """Accumulate the gradient of flow matching, E |v(x_sigma) - (noise - x_0)|² over free frames (2210.02747).

    batch["latent"] [B, C, F', h, w]; u [B] uniform in 0..1, shifted to sigma as the sampler's schedule is.
    """
    shift = wan.preset.shift
    sigma = (shift * u / (1 + (shift - 1) * u)).view(-1, 1, 1, 1, 1)
    x0 = batch["latent"]
    x = pin((1 - sigma) * x0 + sigma * noise, batch["first"])
    t = (1000 * sigma.flatten())[:, None].repeat(1, x.shape[2])
    t[:, 0] = 0
    with torch.autocast(noise.device.type, torch.bfloat16):
        v = wan.dit(x, t, batch["context"])
    loss = (v.float() - (noise - x0))[:, :, 1:].square().mean()
    loss.backward()
    return dict(loss=float(loss))


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


@torch.no_grad()
def held_out(wan, reward, clips, rows, steps, seed=0, judge=None):
    """Sample held-out clips with noise that depends on clip and seed only; metrics of each, and the videos.

    judge: a second FaceReward, whose FaceSim is reported beside the first's as `judge`.
    """
    schedule = sigmas(steps, wan.preset.shift)
    results, videos = [], []
    for row in tqdm(rows, desc="held-out clips", leave=False):
        batch = clips.batch([row])
        shape = batch["first"].shape[1], *latent_size(wan.preset, wan.preset.frames, wan.preset.size)
        noise = noise_like((1, *shape), seed, row).to(batch["first"].device)
        with autocast(noise.device):
            (latent,) = rollout(wan.dit, noise, batch["first"], batch["context"], schedule)
            video = wan.vae.decode(latent).float()
        image = to_tensor(clips.video(row)[:1])
        image = image.to(noise.device)
        results.append(clip_metrics(to_frames(video), reward.look(video), reward.look(image)))
        if judge is not None:
            opinion = clip_metrics(to_frames(video), judge.look(video), judge.look(image))
            results[-1]["judge"] = opinion["facesim"]
        videos.append(to_frames(video))
    return results, videos


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


def draw_curves(log, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, names, title in zip(axes, (("reward", "judge"), ("kl",)), ("reward (FSM)", "velocity KL")):
        for name in names:
            points = [(r["step"], r[name]) for r in log if r.get(name) is not None]
            if points:
                axis.plot(*zip(*points), marker=".", label=name)
        axis.set(xlabel="step", title=title)
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def check(options):
    """Refuse what cannot work before anything is loaded or written."""
    if options.model not in CONFIGS:
        raise UserError(f"--model {options.model}: unknown preset; choose from {', '.join(CONFIGS)}")
    choices = dict(objective=("ipro", "sft"), optimizer=("adam", "muon"), people=("largest", "all"),
                   kl_weighting=("sigma", "dt", "uniform"), fsm=("pool", "first", "aligned"))  # fmt: skip
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            raise UserError(f"--{name} {getattr(options, name)}: choose from {', '.join(allowed)}")
    for name in ("steps", "batch", "sampling_steps", "window", "save_every"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: at least 1")
    if options.window > options.sampling_steps:
        raise UserError(f"--window {options.window}: more than the {options.sampling_steps} sampling steps")
    if options.objective == "ipro" and options.lora_rank < 1:
        raise UserError("--lora_rank 0: ipro needs the LoRA, with which off the model is the KL's reference")
    out = Path(options.out)
    saved = out / "options.json"
    if options.resume:
        if not saved.is_file():
            raise UserError(f"--resume: {out} holds no run (no options.json)")
        before = json.loads(saved.read_text())
        changed = [k for k, v in dataclasses.asdict(options).items() if k != "resume" and before.get(k) != v]
        if changed:
            raise UserError(f"--resume: {out} was run with another --{changed[0]} ({before.get(changed[0])})")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not empty; name another folder, or continue it with --resume")


def main():
    options = parse_options(TrainOptions, doc=__doc__)
    check(options)
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ipro = options.objective == "ipro"
    wan = load_model(options.model, options.ckpt, device)
    clips = Clips(options.data, "train", device)
    out = Path(options.out)
    if ipro:
        guards = {k: getattr(options, k) for k in ("pool_first", "score_first", "min_face", "min_score")}
        reward = FaceReward.from_folder(options.faces, device, **guards)
        print(f"face detector on {reward.detector.provider}")
        judge = Judge(options.judge, clips, device) if options.judge else None
        unseen = Clips(options.data, "heldout", device)
        rows = unseen.spread(options.eval_clips)
        measure = functools.partial(held_out, wan, reward, unseen, rows, options.sampling_steps,
                                    judge=judge.reward if judge else None)  # fmt: skip
        before, videos_before = measure()
        print(table([("before", summary(before))]), flush=True)
    if options.lora_rank:
        parameters = add_lora(wan.dit, options.lora_rank)
    else:
        parameters = list(wan.dit.requires_grad_(True).parameters())
    steppers = optimizers(options, wan.dit)

    out.mkdir(parents=True, exist_ok=True)
    saved = {k: v for k, v in dataclasses.asdict(options).items() if k != "resume"}
    (out / "options.json").write_text(json.dumps(saved, indent=1))
    start, log = 0, []
    if options.resume and (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device, weights_only=True)
        with torch.no_grad():
            for p, value in zip(parameters, state["parameters"]):
                p.copy_(value)
        for optimizer, value in zip(steppers, state["optimizers"]):
            optimizer.load_state_dict(value)
        start, log = state["step"], state["log"]

    shape = wan.preset.dit.out_dim, *latent_size(wan.preset, wan.preset.frames, wan.preset.size)
    schedule = sigmas(options.sampling_steps, wan.preset.shift)
    with open(out / "log.jsonl", "w") as file:
        for row in log:
            print(json.dumps(row), file=file)
        bar = tqdm(range(start, options.steps), initial=start, total=options.steps, desc=options.objective)
        for step in bar:
            begin = time.perf_counter()
            batch, chosen = batch_at(clips, options, step)
            noise = torch.stack([noise_like(shape, options.seed, step, k) for k in range(options.batch)]).to(device)
            for group in (g for optimizer in steppers for g in optimizer.param_groups):
                group["lr"] = learning_rate(options, step)
            if ipro:
                judged = (lambda b, video, chosen=chosen: judge(chosen[b], video)) if judge else (lambda *_: None)
                row = ipro_step(wan, reward, batch, options, schedule, noise, judged)
            else:
                u = np.random.default_rng([options.seed, step]).random(options.batch)
                u = torch.from_numpy((np.arange(options.batch) + u) / options.batch).float()  # stratified
                row = sft_step(wan, batch, options, noise, u.to(device))
            row["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, options.grad_clip))
            for optimizer in steppers:
                optimizer.step()
                optimizer.zero_grad()
            row = dict(step=step, **row, seconds=round(time.perf_counter() - begin, 3))
            log.append(row)
            print(json.dumps(row), file=file, flush=True)
            bar.set_postfix({k: f"{row[k]:.3f}" for k in ("reward", "kl", "loss") if row.get(k) is not None})
            if (step + 1) % options.save_every == 0:
                state = dict(parameters=[p.detach() for p in parameters], optimizers=[o.state_dict() for o in steppers])
                torch.save(dict(state, step=step + 1, log=log), out / "state.part")
                os.replace(out / "state.part", out / "state.pt")

    if options.lora_rank:
        save_lora(wan.dit, out / "lora.safetensors")
    else:
        write_safetensors({k: v.half().contiguous() for k, v in wan.dit.state_dict().items()}, out / "dit.safetensors")
    if not ipro:
        return
    draw_curves(log, out / "curves.png")
    after, videos_after = measure()
    inputs = [np.repeat(unseen.video(r)[:1], len(v), 0) for r, v in zip(rows, videos_before)]
    shown = side_by_side([inputs, videos_before, videos_after], range(min(6, len(rows))))
    write_video(out / "before_after.mp4", shown, wan.preset.fps)
    print(table([("before", summary(before)), ("after", summary(after))]))


if __name__ == "__main__":
    run(main)
