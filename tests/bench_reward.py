"""What the reward costs: detect, align, embed and the gradient to the pixels, ours against a loop over frames.

    python tests/bench_reward.py

The loop is how the method's first public code did it: one frame at a time through the detector, a warp of the whole
frame to the crop's pose of which a corner is kept, one crop at a time through the encoder. Both use the same detector
and an IResNet-50 with random weights, on a held-out clip enlarged to 480x480. Each run is a process of its own, so
that peak memory is its own; the variants take turns; medians of three.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))


def loop(reward, video, pool):
    """Frame by frame, whole-frame warps."""
    import torch
    import torch.nn.functional as F

    from reward import similarity, usable

    height, width = video.shape[3:]
    scores = []
    for t in range(video.shape[2]):
        frame = video[:, :, t]
        faces = usable(reward.detector(frame)[0])
        if not len(faces):
            continue
        a, b, tx, ty = (float(x) for x in similarity(faces.landmarks[:1]))
        inverse = torch.linalg.inv(torch.tensor([[a, -b, tx], [b, a, ty], [0, 0, 1]]))
        unit = torch.tensor([[width / 2, 0, (width - 1) / 2], [0, height / 2, (height - 1) / 2], [0, 0, 1]])
        theta = (torch.linalg.inv(unit) @ inverse @ unit)[None, :2]
        warped = F.grid_sample(frame, F.affine_grid(theta, frame.shape, align_corners=False), align_corners=False)
        face = F.normalize(reward.encoder(warped[:, :, :112, :112]), dim=-1)
        scores.append(torch.stack([(face[0] * F.normalize(p, dim=0)).sum() for p in pool]).mean())
    return torch.stack(scores).mean()


def measure(variant, frames):
    """Seconds of a score with its backward pass, and the process's peak growth in memory, MB."""
    import torch
    import torch.nn.functional as F

    from reward import ArcFace, FaceDetector, FaceReward
    from sample import read_video, to_tensor

    torch.manual_seed(0)
    clip = sorted((REPO / "assets/clips/heldout").glob("*.mp4"))[0]
    video = to_tensor(read_video(clip)[0])
    large = F.interpolate(video[0].transpose(0, 1), scale_factor=3.75, mode="bicubic").clamp(-1, 1)
    video = large.transpose(0, 1)[None]
    video = video.repeat(1, 1, -(-frames // video.shape[2]), 1, 1)[:, :, :frames].contiguous().requires_grad_()
    encoder = ArcFace((3, 4, 14, 3)).eval().requires_grad_(False)
    reward = FaceReward(FaceDetector(REPO / "assets/detector.onnx"), encoder)
    pool = torch.randn(frames, 512)
    mask = torch.ones(1, frames, dtype=torch.bool)
    reward.look(video.detach()[:, :, :1])  # warm
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    score = reward.score(video, pool[None], mask)[0].sum() if variant == "ours" else loop(reward, video, pool)
    score.backward()
    seconds = time.perf_counter() - begin
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return dict(seconds=seconds, megabytes=peak, score=float(score.detach()), grad=float(video.grad.norm()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", choices=["ours", "loop"])
    parser.add_argument("--frames", type=int, nargs="+", default=[17, 81])
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.frames[0])))
        return
    print(f"{'frames':>6} {'':5}{'seconds':>9}{'peak MB':>9}{'score':>9}{'|grad|':>10}")
    for frames in options.frames:
        runs = {"ours": [], "loop": []}
        for _ in range(3):
            for variant, found in runs.items():
                command = [sys.executable, __file__, "--variant", variant, "--frames", str(frames)]
                found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        middle = {v: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for v, rows in runs.items()}
        for variant, m in middle.items():
            print(f"{frames:6} {variant:5}{m['seconds']:9.2f}{m['megabytes']:9.0f}{m['score']:9.4f}{m['grad']:10.2e}")
        ratio = {k: middle["loop"][k] / middle["ours"][k] for k in ("seconds", "megabytes")}
        print(f"{frames:6} loop / ours: {ratio['seconds']:.2f}x the time, {ratio['megabytes']:.2f}x the memory")


if __name__ == "__main__":
    main()
