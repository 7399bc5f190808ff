"""The tiny world's face networks, from scratch on rendered people: stages `arcface` and `detector` of build.py.

ArcFace: the IResNet of reward.py with few blocks and channels, taught by the additive angular margin loss
(arXiv 1801.07698) on crops that are blurred, shrunk, compressed and noisy, so that it judges generated faces well.
Detector: a small network with SCRFD's input and nine outputs (arXiv 2105.04714), exported to ONNX and read by the
code that reads the released one.
"""

import io
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from codec import Optimizer, read_clips

from reward import ArcFace, FaceDetector, align
from weights import write_safetensors

LAYERS, WIDTHS = (1, 2, 2, 1), (16, 32, 64, 128)
MARGIN, SCALE = 0.35, 32.0
ARCFACE_STEPS, ARCFACE_BATCH = 2400, 64
DETECTOR_STEPS, DETECTOR_BATCH = 6500, 32
INPUT_SIZE = 128  # of the detector: the tiny world's frames as they are


def degrade(x, rng):
    """What generated and compressed faces suffer: x [n, 3, H, W] in [-1, 1], each in its own way."""
    n, _, h, w = x.shape
    gain = torch.from_numpy(rng.uniform(0.93, 1.07, (n, 3, 1, 1)) * rng.uniform(0.8, 1.2, (n, 1, 1, 1))).float()
    x = (x + 1) * gain - 1 + torch.from_numpy(rng.uniform(-0.15, 0.15, (n, 1, 1, 1))).float()
    out = []
    for picture in x.split(1):
        kind = rng.random()
        if kind < 0.35:  # low resolution
            size = int(h * rng.uniform(0.2, 0.7))
            picture = F.interpolate(F.interpolate(picture, (size, size), mode="area"), (h, w), mode="bicubic")
        elif kind < 0.6:  # JPEG
            pixels = ((picture[0].clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=int(rng.integers(8, 60)))
            picture = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float() / 127.5 - 1
        if rng.random() < 0.4:  # smooth warp, as bad decoders do
            field = torch.from_numpy(rng.normal(0, rng.uniform(0, 0.02), (1, 2, 6, 6))).float()
            field = F.interpolate(field, (h, w), mode="bicubic").permute(0, 2, 3, 1)
            grid = F.affine_grid(torch.eye(2, 3)[None], (1, 3, h, w), align_corners=False)
            picture = F.grid_sample(picture, grid + field, padding_mode="border", align_corners=False)
        if rng.random() < 0.3:
            picture = picture + rng.uniform(0, 0.12) * torch.from_numpy(rng.standard_normal(picture.shape)).float()
        out.append(picture)
    return torch.cat(out).clamp(-1, 1)


def cosine(step, steps, warmup=100):
    return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def save(path, **state):
    torch.save(state, f"{path}.part")
    os.replace(f"{path}.part", path)


def people(folder):
    """(clip, person in it, identity) of everybody seen in the clips of a folder."""
    rows = []
    for i, file in enumerate(sorted(Path(folder).glob("*.json"))):
        truth = json.loads(file.read_text())
        rows += [(i, j, person["identity"]) for j, person in enumerate(truth["people"])]
    return rows


def faces_at(clips, landmarks, rows, frames, jitter, rng):
    """Aligned crops [n, 3, 112, 112] of people `rows` at `frames`; `jitter` of the landmarks, in eye distances."""
    points = torch.from_numpy(np.stack([landmarks[i, t, j] for (i, j, _), t in zip(rows, frames, strict=True)]))
    eyes = (points[:, 1] - points[:, 0]).norm(dim=-1).clamp(min=4).view(-1, 1, 1)
    points = points + jitter * eyes * torch.from_numpy(rng.standard_normal(points.shape)).float()
    pictures = np.stack([clips[i, t] for (i, _, _), t in zip(rows, frames, strict=True)])
    return align(torch.from_numpy(pictures).float() / 127.5 - 1, points)


def train_arcface(work, out, threads=1):
    """Write out/arcface.safetensors; resumes from work/arcface/state.pt."""
    torch.set_num_threads(threads)
    work = Path(work)
    (work / "arcface").mkdir(parents=True, exist_ok=True)
    clips, _, landmarks = read_clips(work / "more/train", work / "more.npy")
    rows = people(work / "more/train")
    label = {identity: k for k, identity in enumerate(sorted({r[2] for r in rows}))}
    torch.manual_seed(0)
    model = ArcFace(LAYERS, WIDTHS)
    model.features.weight.requires_grad_(False)  # as arcface_torch: the embedding's scale is fixed
    centres = nn.Parameter(torch.randn(len(label), 512) * 0.01)
    optimizer = Optimizer(model)
    head = torch.optim.AdamW([centres], lr=1e-3, weight_decay=0)
    start, state = 0, work / "arcface/state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        centres.data.copy_(saved["centres"])
        optimizer.load_state_dict(saved["optimizer"])
        head.load_state_dict(saved["head"])
        start = saved["step"]
    bar = tqdm(range(start, ARCFACE_STEPS), initial=start, total=ARCFACE_STEPS, desc="arcface", mininterval=5)
    for step in bar:
        rng = np.random.default_rng([11, step])
        chosen = [rows[k] for k in rng.integers(len(rows), size=ARCFACE_BATCH)]
        crops = faces_at(clips, landmarks, chosen, rng.integers(17, size=len(chosen)), 0.04, rng)
        mirrored = torch.from_numpy(rng.random((len(crops), 1, 1, 1)) >= 0.5)
        crops = degrade(torch.where(mirrored, crops.flip(3), crops), rng)
        target = torch.tensor([label[r[2]] for r in chosen])
        with torch.autocast("cpu", torch.bfloat16):  # channels last: 1.5 times as fast on a CPU
            embedding = model(crops.contiguous(memory_format=torch.channels_last)).float()
        cos = F.normalize(embedding, dim=1) @ F.normalize(centres, dim=1).T
        margin = MARGIN * min(1, 3 * step / ARCFACE_STEPS)
        true = cos.gather(1, target[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
        logits = SCALE * cos.scatter(1, target[:, None], torch.cos(true.acos() + margin))
        loss = F.cross_entropy(logits, target)
        model.zero_grad()
        centres.grad = None
        loss.backward()
        rate = cosine(step, ARCFACE_STEPS)
        head.param_groups[0]["lr"] = 3e-3 * rate
        optimizer.step(0.02 * rate)
        head.step()
        if step % 20 == 0:
            right = (cos.argmax(1) == target).float().mean()
            bar.set_postfix(loss=f"{float(loss):.2f}", right=f"{float(right):.2f}", cos=f"{float(true.mean()):.2f}")
        if (step + 1) % 200 == 0:
            save(state, model=model.state_dict(), centres=centres.data, optimizer=optimizer.state_dict(),
                 head=head.state_dict(), step=step + 1)  # fmt: skip
            if (step + 1) % 400 == 0 or step + 1 == ARCFACE_STEPS:
                with open(work / "arcface/log.jsonl", "a") as log:
                    print(json.dumps(dict(step=step + 1, **measure_arcface(model, work))), file=log)
                model.train()
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    write_safetensors({k: v.contiguous() for k, v in weights.items()}, Path(out) / "arcface.safetensors")


def auc(same, different):
    """Chance that a pair of one person scores above a pair of two."""
    order = np.argsort(np.concatenate([different, same]), kind="stable")
    rank = np.empty(len(order))
    rank[order] = np.arange(1, len(order) + 1)
    return float((rank[len(different) :].sum() - len(same) * (len(same) + 1) / 2) / len(same) / len(different))


@torch.no_grad()
def measure_arcface(model, work):
    """Same against different over held-out people: pairs from different clips of one person, and of two people."""
    clips, _, landmarks = read_clips(Path(work) / "clips/heldout", Path(work) / "heldout.npy")
    rows = [(i, j, person, t) for i, j, person in people(Path(work) / "clips/heldout") for t in (0, 5, 10, 16)]
    rng = np.random.default_rng(0)
    crops = faces_at(clips, landmarks, [r[:3] for r in rows], [r[3] for r in rows], 0.0, rng)
    model.eval()
    unit = F.normalize(torch.cat([model(c) for c in crops.split(64)]), dim=1)
    cos = (unit @ unit.T).numpy()
    clip, person = np.array([r[0] for r in rows]), np.array([r[2] for r in rows])
    upper = np.triu(np.ones_like(cos, dtype=bool), 1)
    same = cos[upper & (person[:, None] == person) & (clip[:, None] != clip)]
    different = cos[upper & (person[:, None] != person)]
    return dict(auc=round(auc(same, different), 5), same=round(float(same.mean()), 3),
                different=round(float(different.mean()), 3), people=len(set(person)))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Detector


def block(a, b, stride=1):
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


class Detector(nn.Module):
    """Frames [B, 3, H, W], (x - 127.5)/128, to SCRFD's outputs: scores, boxes, landmarks [B, anchors, 1, 4, 10].

    Scores are logits while training (`logits=True`), probabilities in the exported graph.
    """

    def __init__(self, width=32):
        super().__init__()
        w = width
        self.stem = nn.Sequential(block(3, w // 2, 2), block(w // 2, w, 2), block(w, w))
        self.down8 = nn.Sequential(block(w, 2 * w, 2), block(2 * w, 2 * w), block(2 * w, 2 * w))
        self.down16 = nn.Sequential(block(2 * w, 3 * w, 2), block(3 * w, 3 * w), block(3 * w, 3 * w))
        self.down32 = nn.Sequential(block(3 * w, 3 * w, 2), block(3 * w, 3 * w))
        self.lateral = nn.ModuleList(nn.Conv2d(c * w, 2 * w, 1) for c in (2, 3, 3))
        self.smooth = nn.ModuleList(nn.Sequential(block(2 * w, 2 * w), block(2 * w, 2 * w)) for _ in range(3))
        self.heads = nn.ModuleList(nn.Conv2d(2 * w, 2 * 15, 3, padding=1) for _ in range(3))
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
            head.bias.data.view(2, 15)[:, 0] = -4.0
            head.bias.data.view(2, 15)[:, 1:5] = 2.0

    def forward(self, x, logits=False):
        a = self.down8(self.stem(x))
        b = self.down16(a)
        c = self.down32(b)
        c = self.lateral[2](c)
        b = self.lateral[1](b) + F.interpolate(c, scale_factor=2.0, mode="nearest")
        a = self.lateral[0](a) + F.interpolate(b, scale_factor=2.0, mode="nearest")
        outputs = []
        for level, smooth, head in zip((a, b, c), self.smooth, self.heads, strict=True):
            y = head(smooth(level)).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 15))  # [B, anchors, 15]
            outputs.append(y if logits else (y[..., :1].sigmoid(), y[..., 1:5], y[..., 5:]))
        return outputs if logits else tuple(level[k] for k in range(3) for level in outputs)


def empty_scene(frame, boxes, rng):
    """A part of a frame beside its faces (hair, clothes, walls), or its tiles shuffled where there is no such part."""
    picture = torch.from_numpy(np.array(frame))[None].float() / 127.5 - 1
    for _ in range(10):
        side = int(rng.integers(24, 64))
        x, y = rng.integers(0, 128 - side, 2)
        w, h = (np.minimum(boxes[:, 2:], [x + side, y + side]) - np.maximum(boxes[:, :2], [x, y])).clip(0).T
        if (w * h == 0).all():
            return F.interpolate(picture[..., y : y + side, x : x + side], (128, 128), mode="bicubic")
    tiles = F.unfold(picture, 16, stride=16)[..., torch.from_numpy(rng.permutation(64))]
    return F.fold(tiles, 128, 16, stride=16)


def scenes(clips, boxes, landmarks, rng, size):
    """Randomly scaled, turned, shifted, mirrored and degraded frames with their boxes and landmarks."""
    pictures, targets = [], []
    for _ in range(size):
        i, t = rng.integers(len(clips)), rng.integers(17)
        if rng.random() < 0.12:
            pictures.append(empty_scene(clips[i, t], boxes[i, t], rng))
            targets.append([])
            continue
        scale, turn = np.exp(rng.uniform(np.log(0.35), np.log(1.7))), rng.normal(0, 0.15)
        mirror = rng.random() < 0.5
        c, s = scale * np.cos(turn), scale * np.sin(turn)
        matrix = np.array([[c, -s], [s, c]]) @ np.diag([-1.0 if mirror else 1.0, 1.0])
        present = [j for j in range(2) if boxes[i, t, j, 2] > 0]
        focus = boxes[i, t, present[rng.integers(len(present))]].reshape(2, 2).mean(0) if present else [64, 64]
        place = rng.uniform(8, 120, 2) if rng.random() < 0.8 else rng.uniform(-60, 188, 2)  # some at or over the border
        shift = place - matrix @ focus
        inverse = np.linalg.inv(matrix)
        # output pixel p comes from inverse (p - shift); as affine_grid's normalised coordinates (size 128 both)
        theta = np.concatenate([inverse, (inverse @ (np.array([63.5, 63.5]) - shift) - 63.5)[:, None] / 64], 1)
        grid = F.affine_grid(torch.from_numpy(theta[None]).float(), (1, 3, 128, 128), align_corners=False)
        picture = torch.from_numpy(np.array(clips[i, t]))[None].float() / 127.5 - 1
        pictures.append(F.grid_sample(picture, grid, padding_mode="border", align_corners=False))
        found = []
        for j in present:
            x0, y0, x1, y1 = boxes[i, t, j]
            corners = np.array([[x0, y0], [x1, y0], [x0, y1], [x1, y1]]) @ matrix.T + shift
            # a turned box's bounding box is too large: keep its centre, scale its sides
            middle, half = corners.mean(0), np.array([x1 - x0, y1 - y0]) * scale / 2
            box = np.concatenate([middle - half, middle + half])
            points = landmarks[i, t, j] @ matrix.T + shift
            if mirror:
                points = points[[1, 0, 2, 4, 3]]
            found.append((box, points))
        targets.append(found)
    return degrade(torch.cat(pictures), rng), targets


RANGES = {8: (0, 44), 16: (30, 110), 32: (70, 400)}  # face sizes in pixels that a stride answers for


def assign(targets):
    """Per stride: positives [B, anchors] (1 face, 0 none, -1 ignored), boxes [B, anchors, 4], landmarks [.., 10]."""
    out = []
    for stride, (low, high) in RANGES.items():
        cells = INPUT_SIZE // stride
        y, x = np.divmod(np.arange(cells * cells), cells)
        centre = np.stack([x, y], 1) * stride
        positive = np.zeros((len(targets), len(centre)), np.float32)
        box_t, points_t = (
            np.zeros((*positive.shape, 4), np.float32),
            np.zeros((*positive.shape, 10), np.float32),
        )
        for b, found in enumerate(targets):
            for box, points in found:
                side = np.sqrt((box[2:] - box[:2]).prod())
                middle = (box[:2] + box[2:]) / 2
                inside = ((points >= -2) & (points <= INPUT_SIZE + 1)).all(1).sum()
                away = np.abs(centre - middle).max(1) / side
                if inside < 4 or side < 10:  # cut off or tiny: neither face nor background
                    positive[b, (away < 0.6) & (positive[b] == 0)] = -1
                    continue
                if not low <= side <= high:
                    positive[b, (away < 0.3) & (positive[b] == 0)] = -1
                    continue
                near = away < max(0.22, 0.55 * stride / side)
                positive[b, near] = 1
                box_t[b, near] = np.concatenate([centre[near] - box[:2], box[2:] - centre[near]], 1) / stride
                points_t[b, near] = ((points[None] - centre[near][:, None]) / stride).reshape(-1, 10)
        out.append([torch.from_numpy(z.repeat(2, 1)) for z in (positive, box_t, points_t)])
    return out


def giou_loss(p, t):
    """1 - generalised IoU of boxes given as distances [n, 4] from one centre (arXiv 1902.09630)."""
    p = p.clamp(min=0.01)
    inter = (torch.minimum(p[:, 0], t[:, 0]) + torch.minimum(p[:, 2], t[:, 2])).clamp(min=0) * (
        torch.minimum(p[:, 1], t[:, 1]) + torch.minimum(p[:, 3], t[:, 3])
    ).clamp(min=0)
    area = [(z[:, 0] + z[:, 2]) * (z[:, 1] + z[:, 3]) for z in (p, t, torch.maximum(p, t))]
    union = area[0] + area[1] - inter
    return 1 - inter / union + (area[2] - union) / area[2]


def detector_loss(outputs, targets):
    loss = 0
    for y, (positive, box, points) in zip(outputs, assign(targets), strict=True):
        known, face = positive >= 0, positive > 0
        p = y[..., 0].sigmoid()
        focal = F.binary_cross_entropy_with_logits(y[..., 0], face.float(), reduction="none")
        focal = focal * torch.where(face, 1 - p, p).detach() ** 2
        count = face.sum().clamp(min=1)
        loss = loss + (focal * known).sum() / count
        if face.any():
            side = (box[face].view(-1, 2, 2).sum(1).prod(1).sqrt())[:, None]
            error = F.smooth_l1_loss(y[..., 5:][face] / side, points[face] / side, beta=0.02, reduction="none")
            loss = loss + giou_loss(y[..., 1:5][face], box[face]).mean() + 30 * error.mean()
    return loss


def export(model, path):
    """The nine-output ONNX graph with free batch, height and width."""
    model.eval()
    names = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in (8, 16, 32)]
    part = f"{path}.part"
    torch.onnx.export(
        model, (torch.zeros(2, 3, INPUT_SIZE, INPUT_SIZE),), part, input_names=["input"], output_names=names,
        dynamic_axes={"input": {0: "batch", 2: "height", 3: "width"}, **{n: {0: "batch", 1: "anchors"} for n in names}},
        opset_version=17, dynamo=False,
    )  # fmt: skip
    import onnx

    graph = onnx.load(part)
    entry = graph.metadata_props.add()
    entry.key, entry.value = "input_size", str(INPUT_SIZE)
    onnx.save(graph, part)
    os.replace(part, path)


def train_detector(work, out, threads=1):
    """Write out/detector.onnx; resumes from work/detector/state.pt."""
    torch.set_num_threads(threads)
    work, out = Path(work), Path(out)
    (work / "detector").mkdir(parents=True, exist_ok=True)
    clips, boxes, landmarks = read_clips(work / "clips/train", work / "train.npy")
    torch.manual_seed(0)
    model = Detector()
    optimizer = Optimizer(model)
    start, state = 0, work / "detector/state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    bar = tqdm(range(start, DETECTOR_STEPS), initial=start, total=DETECTOR_STEPS, desc="detector", mininterval=5)
    for step in bar:
        rng = np.random.default_rng([13, step])
        pictures, targets = scenes(clips, boxes, landmarks, rng, DETECTOR_BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(pictures * (127.5 / 128), logits=True)
        loss = detector_loss([y.float() for y in outputs], targets)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step(0.02 * cosine(step, DETECTOR_STEPS))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
        if (step + 1) % 200 == 0:
            save(state, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            if (step + 1) % 400 == 0 or step + 1 == DETECTOR_STEPS:
                export(model, work / "detector/detector.onnx")
                model.train()
                with open(work / "detector/log.jsonl", "a") as log:
                    row = measure_detector(work / "detector/detector.onnx", work)
                    print(json.dumps(dict(step=step + 1, **row)), file=log)
    export(model, out / "detector.onnx")


def measure_detector(path, work, every=4):
    """Held-out clips: recall at precision 0.99 (a hit overlaps by IoU ≥ 0.4), and the landmarks' error in eye
    distances over faces of 35 px and up."""
    clips, boxes, landmarks = read_clips(Path(work) / "clips/heldout", Path(work) / "heldout.npy")
    detector = FaceDetector(path, threshold=0.05)
    hits, errors, total = [], [], 0
    for i in range(len(clips)):
        frames = torch.from_numpy(np.array(clips[i, ::every])).float() / 127.5 - 1
        for faces, truth, points in zip(detector(frames), boxes[i, ::every], landmarks[i, ::every], strict=True):
            present = [j for j in range(2) if truth[j, 2] > 0]
            total += len(present)
            free = set(present)
            for box, score, five in zip(
                faces.boxes.numpy(), faces.scores.numpy(), faces.landmarks.numpy(), strict=True
            ):
                best, overlap = None, 0.4
                for j in free:
                    w, h = (np.minimum(box[2:], truth[j, 2:]) - np.maximum(box[:2], truth[j, :2])).clip(0)
                    both = w * h
                    iou = both / ((box[2:] - box[:2]).prod() + (truth[j, 2:] - truth[j, :2]).prod() - both)
                    if iou > overlap:
                        best, overlap = j, iou
                hits.append((score, best is not None))
                if best is not None:
                    free.discard(best)
                    if score >= 0.5 and (truth[best, 2:] - truth[best, :2]).prod() >= 35**2:
                        eyes = np.linalg.norm(points[best, 1] - points[best, 0])
                        errors.append(np.linalg.norm(five - points[best], axis=1).mean() / max(eyes, 1))
    order = sorted(hits, reverse=True)
    right = np.cumsum([h for _, h in order])
    precision = right / np.arange(1, len(order) + 1)
    recall = max((right[k] / total for k in range(len(order)) if precision[k] >= 0.99), default=0.0)
    at = [(s, h) for s, h in order if s >= 0.5]
    return dict(recall_at_precision_99=round(float(recall), 4), landmark_error=round(float(np.mean(errors or [9])), 4),
                recall_at_05=round(sum(h for _, h in at) / total, 4),
                precision_at_05=round(sum(h for _, h in at) / max(1, len(at)), 4))  # fmt: skip


if __name__ == "__main__":
    here = Path(__file__).parent
    print("arcface", measure_arcface(ArcFace.from_file(here / "arcface.safetensors"), here / "build"))
    print("detector", measure_detector(here / "detector.onnx", here / "build"))
