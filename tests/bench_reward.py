"""What the reward costs, and what its detector finds.

    python tests/bench_reward.py                 cost, for 17 and 81 frames
    python tests/bench_reward.py --detection     recall and precision by face size, with and without tiles

Cost: detect, align, embed and the gradient to the pixels, ours against a loop over frames. The loop is how the
method's first public code did it: one frame at a time through the detector, a warp of the whole frame to the crop's
pose of which a corner is kept, one crop at a time through the encoder's plain layers. Both use the same detector and
an IResNet-50 with the same random weights, on a held-out clip enlarged to 480x480. Each run is a process of its own,
so that peak memory is its own; the variants take turns; medians of three. Where other programs run, look at CPU s.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))

from reward import ArcFace, FaceDetector, FaceReward, alignable, fold_batch_norms, similarity_transform  # noqa: E402
from sample import read_video, to_tensor  # noqa: E402

VARIANTS = ("ours", "loop")


def loop(reward, video, pool):
    """Frame by frame, whole-frame warps, every layer as it stands."""
    height, width = video.shape[3:]
    scores = []
    for t in range(video.shape[2]):
        frame = video[:, :, t]
        faces = alignable(reward.detector(frame)[0])
        if not len(faces):
            continue
        a, b, tx, ty = (float(x) for x in similarity_transform(faces.landmarks[:1]))
        inverse = torch.linalg.inv(torch.tensor([[a, -b, tx], [b, a, ty], [0, 0, 1]]))
        unit = torch.tensor([[width / 2, 0, (width - 1) / 2], [0, height / 2, (height - 1) / 2], [0, 0, 1]])
        theta = (torch.linalg.inv(unit) @ inverse @ unit)[None, :2]
        warped = F.grid_sample(frame, F.affine_grid(theta, frame.shape, align_corners=False), align_corners=False)
        face = F.normalize(reward.encoder(warped[:, :, :112, :112]), dim=-1)
        scores.append(torch.stack([(face[0] * F.normalize(p, dim=0)).sum() for p in pool]).mean())
    return torch.stack(scores).mean()


def measure(variant, frames):
    """Seconds of a score with its backward pass, by the wall and of the CPU; the peak growth in memory, MB."""
    torch.manual_seed(0)
    clip = sorted((REPO / "assets/clips/heldout").glob("*.mp4"))[0]
    video = to_tensor(read_video(clip)[0])
    large = F.interpolate(video[0].transpose(0, 1), scale_factor=3.75, mode="bicubic").clamp(-1, 1)
    video = large.transpose(0, 1)[None]
    video = video.repeat(1, 1, -(-frames // video.shape[2]), 1, 1)[:, :, :frames].contiguous().requires_grad_()
    encoder = ArcFace((3, 4, 14, 3)).eval().requires_grad_(False)
    if variant != "loop":  # which has the plain layers
        encoder = fold_batch_norms(encoder)  # as from_file returns it
    reward = FaceReward(FaceDetector(REPO / "assets/detector.onnx"), encoder)
    pool = torch.randn(frames, 512)
    with torch.no_grad():
        reward.detect_and_embed(video[:, :, :1])  # warm
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin, busy = time.perf_counter(), time.process_time()
    if variant == "loop":
        score = loop(reward, video, pool)
    else:
        score = reward.score(video, pool[None], torch.ones(1, frames, dtype=torch.bool))[0].sum()
    (grad,) = torch.autograd.grad(score, video)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return dict(seconds=seconds, busy=busy, megabytes=peak, score=float(score.detach()), grad=float(grad.norm()))


def cost(lengths, runs):
    print(f"{'':24}{'seconds':>9}{'CPU s':>9}{'peak MB':>9}{'score':>9}{'|grad|':>10}   the loop takes")
    for frames in lengths:
        found = {variant: [] for variant in VARIANTS}
        for _ in range(runs):
            for variant, rows in found.items():
                command = [sys.executable, __file__, "--variant", variant, "--frames", str(frames)]
                rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        middle = {v: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for v, rows in found.items()}
        for variant, m in middle.items():
            ratio = [middle["loop"][k] / m[k] for k in ("seconds", "busy", "megabytes")]
            print(f"{frames:6} {variant:17}{m['seconds']:9.2f}{m['busy']:9.2f}{m['megabytes']:9.0f}{m['score']:9.4f}"
                  f"{m['grad']:10.2e}   {ratio[0]:.2f}x time, {ratio[1]:.2f}x CPU, {ratio[2]:.2f}x memory",
                  flush=True)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Detection


def face_scenes(paths, side, canvas):
    """Frames [n, 3, canvas, canvas] of held-out clips of one person (paths of their .json), scaled so that the face
    has `side` pixels and set in a square, its borders continued; and for each the true box [n, 4]."""
    scenes, boxes, rng = [], [], np.random.default_rng(0)
    for path in paths:
        people = json.loads(path.read_text())["people"]
        if len(people) > 1:
            continue
        frames = read_video(path.with_suffix(".mp4"))[0]
        for t in (2, 8, 14):
            box = np.array(people[0]["box"][t])
            size = round(len(frames[t]) * side / np.sqrt((box[2:] - box[:2]).prod()))
            picture = to_tensor(frames[t : t + 1])[:, :, 0]
            picture = F.interpolate(picture, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
            box = box * size / len(frames[t])
            if size > canvas:
                corner = -np.clip((box[:2] + box[2:] - canvas) // 2, 0, size - canvas).astype(int)
            else:
                corner = rng.integers(0, canvas - size + 1, 2)
            x, y = (int(c) for c in corner)
            scenes.append(F.pad(picture, (x, canvas - size - x, y, canvas - size - y), mode="replicate"))
            boxes.append(box + np.tile(corner, 2))
    return torch.cat(scenes), np.stack(boxes)


def found_faces(found, truth):
    """Recall and precision of `Faces` of n frames against their one true box [n, 4]: a hit has IoU > 0.4."""
    hits = others = 0
    for faces, true in zip(found, truth, strict=True):
        boxes = faces.boxes.numpy()
        both = (np.minimum(boxes[:, 2:], true[2:]) - np.maximum(boxes[:, :2], true[:2])).clip(0).prod(1)
        either = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (true[2:] - true[:2]).prod() - both
        hit = bool((both > 0.4 * either).any())
        hits, others = hits + hit, others + len(boxes) - hit
    return hits / len(truth), hits / max(1, hits + others)


def detection():
    paths = sorted((REPO / "assets/clips/heldout").glob("*.json"))
    print(f"{'':18}{'one pass':>27}{'with tiles':>27}")
    print(f"{'frame':>6}{'face':>6}{'n':>6}" + f"{'recall':>9}{'precision':>11}{'ms':>7}" * 2)
    for canvas in (128, 256):
        for side in (16, 24, 35, 50, 80):
            scenes, truth = face_scenes(paths, side, canvas)
            row = f"{canvas:6}{side:6}{len(truth):6}"
            for tiled in (False, True):
                detector = FaceDetector(REPO / "assets/detector.onnx", tiled=tiled)
                begin = time.perf_counter()
                found = [faces for part in scenes.split(32) for faces in detector(part)]
                milliseconds = 1000 * (time.perf_counter() - begin) / len(truth)
                recall, precision = found_faces(found, truth)
                row += f"{recall:9.3f}{precision:11.3f}{milliseconds:7.1f}"
            print(row, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", choices=VARIANTS, help="one run of one variant, as JSON")
    parser.add_argument("--frames", type=int, nargs="+", default=[17, 81])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--detection", action="store_true")
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.frames[0])))
    elif options.detection:
        detection()
    else:
        cost(options.frames, options.runs)


if __name__ == "__main__":
    main()
