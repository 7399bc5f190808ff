"""The face reward of IPRO (arXiv 2510.14255): the facial scoring mechanism, the velocity KL, and what they need.

`face_score` and `velocity_kl` are the method; `FaceReward` gathers the faces that are scored: detect, align, embed.
Detection is not differentiated, it says where the faces are. From the pixels under the landmarks on, all is: one
`grid_sample` takes every face from its full frame straight to ArcFace's 112x112 crop, and a frozen IResNet embeds it.

What is unusual: the score compares each generated face with ALL faces of the true clip, not with the input picture, so
that a turned head is compared with turned heads too. The weights omega' of the paper's KL are not published; here they
are those of its official code (ROLL, reward_fl).

All of it is fp32, RGB and [-1, 1]; points are (x, y) pixels, and an integer coordinate is a pixel's centre. Sources of
behaviour: InsightFace's SCRFD and face_align (python-package), arcface_torch's iresnet.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import scipy  # scipy.optimize is loaded where it is first used: 0.6 s that most programs need not wait
import torch
import torch.nn.functional as F
from torch import nn

from cli import UserError
from model import FrozenConv
from weights import iresnet_from_onnx, open_pickle, open_safetensors

# ------------------------------------------------------------------------------------------------------------
# The method


def face_score(embeddings, mask, pool, pool_mask, fsm="pool"):
    """The facial scoring mechanism: how alike P people's generated and true faces are, R [P] in [-1, 1].

    embeddings [P, F, D] of generated frames, mask [P, F] true where a frame shows the face; pool [P, J, D] and
    pool_mask [P, J], the true clip's. Over the frames that show a face, with phi the face encoder,

        s_i = mean_j cos(phi(x^_i), phi(x_j)),        R = mean_i s_i        (the paper's FSM)

    fsm: "pool" compares with all true frames; "first" with the first of them that shows the face; "aligned" with the
    true frame of the same time. A person with nothing to compare scores 0, with gradient 0. Raises ValueError for
    another fsm, and for "aligned" where F is not J.
    """
    compared = compared_pairs(mask, pool_mask, fsm)  # [P, F, J]
    # zeroed first: what stands in a faceless frame reaches neither the score nor its gradient
    x = F.normalize(embeddings.masked_fill(~mask[..., None], 0), dim=-1)
    y = F.normalize(pool.masked_fill(~pool_mask[..., None], 0), dim=-1)
    cosine = x @ y.mT  # [P, F, J]
    s = (cosine * compared).sum(-1) / compared.sum(-1).clamp(min=1)  # s_i, [P, F]
    scored = compared.any(-1)
    return (s * scored).sum(-1) / scored.sum(-1).clamp(min=1)  # R


def compared_pairs(mask, pool_mask, fsm="pool"):
    """Which generated frame i is compared with which true frame j: bool [P, F, J], of mask [P, F], pool_mask [P, J].

    fsm and errors: `face_score`'s.
    """
    pairs = mask[:, :, None] & pool_mask[:, None, :]
    if fsm == "pool":
        return pairs
    if fsm == "first":
        return pairs & (pool_mask.cumsum(1) == 1)[:, None, :]
    if fsm == "aligned":
        if mask.shape[1] != pool_mask.shape[1]:
            raise ValueError(
                f"fsm 'aligned' compares frame with frame: {mask.shape[1]} generated, {pool_mask.shape[1]} true ones"
            )
        return pairs & torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    raise ValueError(f"fsm is pool, first or aligned, not {fsm!r}")


def velocity_kl(v, v_ref, sigma, free=slice(1, None)):
    """The regulariser of one sampling step: omega' |v - v_ref|² as a mean over elements, omega' = 1/(2 sigma²); [B].

    v, v_ref [B, C, F', h, w]; sigma the step's noise level in 0..1, > 0; free: the latent frames that are sampled
    (default: all but the first, which image-to-video pins). A mean, so that its weight means the same at every size,
    taken in fp32 at least.

    Why it is a KL: make the sampler's ODE the SDE dx = v dsigma + sigma dW, whose diffusion is the noise that the
    latent holds. A step of length dt is then a draw from N(x - dt v, sigma² dt), and two such Gaussians differ by
    dt |v - v_ref|² / (2 sigma²) an element; summed over the steps this is the KL of the two samplers' paths (Girsanov's
    theorem as dt -> 0). omega' is that per unit of time, so that every step counts alike, as in the official code.

    Which gradient a training step takes: v is differentiated through x_i as well, so that this term's gradient joins
    the reward's on its way to earlier steps; v_ref is a constant. That is the official code's way, and neither the
    whole chain's gradient (which would differentiate v_ref's x_i too) nor that of a KL at a fixed x_i; either of those
    needs a second backward pass through every step of the window, and neither tunes measurably better
    (docs/results.md).
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    error = v[:, :, free].to(wide) - v_ref[:, :, free].to(wide)
    return error.square().flatten(1).mean(1) / (2 * sigma**2)


# ------------------------------------------------------------------------------------------------------------
# Detect


def nms(boxes, scores, overlap):
    """Indices of the boxes [n, 4] kept, best score first: none overlaps a better one by IoU > `overlap`.

    A box's sides count both border pixels (x1 - x0 + 1), as in InsightFace, which matters to small faces.
    """
    order = np.argsort(-scores, kind="stable")
    x0, y0, x1, y1 = boxes[order].T
    area = (x1 - x0 + 1) * (y1 - y0 + 1)
    w = (np.minimum(x1[:, None], x1) - np.maximum(x0[:, None], x0) + 1).clip(0)
    h = (np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0) + 1).clip(0)
    over = w * h / (area[:, None] + area - w * h) > overlap
    alive = np.ones(len(order), bool)
    for i in range(len(order)):
        if alive[i]:
            alive[i + 1 :] &= ~over[i, i + 1 :]
    return order[alive]


@dataclass
class Faces:
    """What one frame shows, best score first; in the frame's pixels, on the CPU."""

    boxes: torch.Tensor  # [n, 4] x0, y0, x1, y1
    scores: torch.Tensor  # [n] in 0..1
    landmarks: torch.Tensor  # [n, 5, 2]: eyes, nose tip, mouth corners; the image's left one first

    def __len__(self):
        return len(self.scores)

    def pick(self, rows):
        return Faces(self.boxes[rows], self.scores[rows], self.landmarks[rows])


def open_onnx(path, providers=None):
    """Open an ONNX graph in onnxruntime: on this rank's GPU where torch has one, otherwise on the CPU.

    Where onnxruntime cannot use that GPU (the plain package, ROCm, another CUDA than it is linked to), it warns and
    takes the CPU. Raises UserError for a file that cannot be read.
    """
    if providers is None:
        providers = ["CPUExecutionProvider"]
        if torch.cuda.is_available():
            if hasattr(onnxruntime, "preload_dlls"):
                onnxruntime.preload_dlls()  # CUDA's and cuDNN's, torch's own where it ships them
            providers = [("CUDAExecutionProvider", dict(device_id=torch.cuda.current_device())), *providers]
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    known = onnxruntime.get_available_providers()
    usable = [p for p in providers if (p if isinstance(p, str) else p[0]) in known]
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=usable)
    except Exception as error:
        raise UserError(f"{path}: not a readable ONNX file ({str(error).splitlines()[0]})") from None
    if len(providers) > 1 and session.get_providers()[0] == "CPUExecutionProvider":
        warnings.warn(
            f"{path}: on the CPU, since onnxruntime {onnxruntime.__version__} cannot use this GPU (it offers "
            f"{', '.join(known)}); where CUDA is: pip uninstall onnxruntime onnxruntime-gpu && pip install "
            "onnxruntime-gpu, linked to the same CUDA as torch", stacklevel=2,
        )  # fmt: skip
    return session


class FaceDetector:
    """SCRFD through onnxruntime: frames [F, 3, H, W] RGB in [-1, 1] to a list of F `Faces`.

    Reads any graph with SCRFD's nine outputs (scores, boxes, landmarks at strides 8, 16, 32; two anchors a
    cell; distances in strides), whatever their names and order. Frames are letterboxed to the top left of the
    network's input: the graph's own size, or the `input_size` in its metadata, or 640. All frames go as one
    batch where the graph can take it, otherwise one by one, as the released graphs do. Faces are those that
    score `threshold`, less those that overlap a better one by IoU > `overlap`.
    tiled: where a frame's largest face is under 48 px in the network's input, or none is seen, detect again in the
    frame enlarged 1.8 times, in overlapping tiles: at most 4 more passes (measured: tests/bench_reward.py).
    `provider` says what onnxruntime runs on. Raises UserError for a missing file or another kind of graph.
    Source: InsightFace's model_zoo/scrfd.py, at one `det_size`.
    """

    def __init__(self, path, providers=None, threshold=0.5, overlap=0.4, tiled=False):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; a face detector (SCRFD, .onnx) is needed")
        self.session = open_onnx(path, providers)
        self.provider = self.session.get_providers()[0]
        entry, outputs = self.session.get_inputs()[0], self.session.get_outputs()
        stored = self.session.get_modelmeta().custom_metadata_map.get("input_size")
        if len(entry.shape) != 4 or entry.type != "tensor(float)":
            raise UserError(f"{path}: not an SCRFD: its input is {entry.type} {entry.shape}, not float [n, 3, H, W]")
        self.name = entry.name
        self.size = [s if isinstance(s, int) else int(stored or 640) for s in entry.shape[2:]]  # H, W
        self.batched = not isinstance(entry.shape[0], int) and all(len(o.shape) == 3 for o in outputs)
        self.threshold, self.overlap, self.tiled = threshold, overlap, tiled
        blank = np.zeros((1, 3, *self.size), np.float32)  # declared shapes may be symbolic; computed ones are not
        shapes = [y.shape for y in self.session.run(None, {self.name: blank})]
        anchors = [-(-self.size[0] // stride) * -(-self.size[1] // stride) * 2 for stride in (8, 16, 32)]
        if sorted(s[-2:] for s in shapes) != sorted((n, width) for n in anchors for width in (1, 4, 10)):
            has = ", ".join(f"{o.name} {list(s)}" for o, s in zip(outputs, shapes, strict=True))
            raise UserError(f"{path}: not an SCRFD with landmarks (nine outputs of width 1, 4, 10); it has {has}")

    @torch.no_grad()
    def __call__(self, frames):
        faces = self.detect(frames)
        if self.tiled:
            large = 48 * max(n / s for n, s in zip(frames.shape[2:], self.size))  # px in the frame
            sides = [(f.boxes[:, 2:] - f.boxes[:, :2]).flatten().tolist() for f in faces]
            small = [i for i, side in enumerate(sides) if max(side, default=0) < large]
            for i, found in zip(small, self.detect_tiles(frames[small], 1.8) if small else ()):
                every = [faces[i], *found]
                every = Faces(*(torch.cat([getattr(f, x) for f in every]) for x in ("boxes", "scores", "landmarks")))
                faces[i] = every.pick(torch.from_numpy(nms(every.boxes.numpy(), every.scores.numpy(), self.overlap)))
        return faces

    def detect(self, frames):
        """One pass over whole frames [F, 3, H, W]."""
        found = []
        for part in [frames] if self.batched else frames.split(1):
            pixels, scale = self.letterbox(part)
            found += self.decode(self.session.run(None, {self.name: pixels}), scale)
        return found

    def letterbox(self, frames):
        """The network's input [F, 3, *size], and its pixels to a frame's pixel."""
        height, width = frames.shape[2:]
        ratio = height / width  # InsightFace's arithmetic: sides cut to whole pixels, the scale is the height's
        if ratio > self.size[0] / self.size[1]:
            h, w = self.size[0], int(self.size[0] / ratio)
        else:
            h, w = int(self.size[1] * ratio), self.size[1]
        pixels = frames.detach().float()
        if (h, w) != (height, width):
            pixels = F.interpolate(pixels, (h, w), mode="bilinear")
        pixels = (pixels.clamp(-1, 1) * 127.5 / 128).cpu().numpy()  # of 0..255: (x - 127.5) / 128
        x = np.full((len(frames), 3, *self.size), -127.5 / 128, np.float32)  # black
        x[:, :, :h, :w] = pixels
        return x, h / height

    def detect_tiles(self, frames, zoom):
        """For each frame, the Faces of each of its tiles, in the frame's pixels: those that are whole there: a face
        that a tile's edge cuts is whole in another tile, or in the first pass."""
        sides = frames.shape[2:]
        scale = zoom * min(s / n for n, s in zip(sides, self.size))
        spans = [min(n, int(s / scale)) for n, s in zip(sides, self.size)]  # a tile's height and width
        starts = [
            np.linspace(0, n - span, int(np.ceil((n - 0.1 * span) / (0.9 * span)))).astype(int)
            for n, span in zip(sides, spans)
        ]
        found = [[] for _ in frames]
        for y in starts[0]:
            for x in starts[1]:
                corner, end = torch.tensor([x, y]), torch.tensor([x + spans[1], y + spans[0]])
                low = torch.where(corner > 0, corner + 2 / scale, -torch.inf)  # at the frame's border a cut face stays
                high = torch.where(end < torch.tensor(sides[::-1]), end - 2 / scale, torch.inf)
                for i, f in enumerate(self.detect(frames[:, :, y : y + spans[0], x : x + spans[1]])):
                    f = Faces(f.boxes + corner.repeat(2), f.scores, f.landmarks + corner)
                    found[i].append(f.pick(((f.boxes[:, :2] >= low) & (f.boxes[:, 2:] <= high)).all(1)))
        return found

    def decode(self, outputs, scale):
        """The nine outputs for letterboxed frames to their Faces, in the original frames' pixels."""
        levels = sorted((y.reshape(-1, *y.shape[-2:]) for y in outputs), key=lambda y: (y.shape[2], -y.shape[1]))
        scores, boxes, landmarks = [], [], []  # width 1, 4, 10; the finest stride first
        for stride, score, box, points in zip((8, 16, 32), levels[:3], levels[3:6], levels[6:], strict=True):
            rows, columns = -(-self.size[0] // stride), -(-self.size[1] // stride)
            y, x = np.divmod(np.arange(rows * columns).repeat(2), columns)  # two anchors a cell
            centre = np.stack([x, y], -1)[None] * np.float32(stride)  # [1, anchors, 2]
            box, points = box * stride, points.reshape(len(points), -1, 5, 2) * stride
            scores.append(score[..., 0])  # [F, anchors]
            boxes.append(np.concatenate([centre - box[..., :2], centre + box[..., 2:]], -1))
            landmarks.append(centre[:, :, None] + points)
        scores, boxes, landmarks = (np.concatenate(y, 1) for y in (scores, boxes, landmarks))
        faces = []
        for found in zip(boxes / np.float32(scale), scores, landmarks / np.float32(scale), strict=True):
            seen = np.flatnonzero(found[1] >= self.threshold)
            kept = seen[nms(found[0][seen], found[1][seen], self.overlap)]
            faces.append(Faces(*(torch.from_numpy(y[kept]) for y in found)))
        return faces


def alignable(faces):
    """The `Faces` of a frame that can be aligned, largest first: one whose landmarks fit no similarity (a detector's
    answer to noise) counts as none."""
    area = (faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(1)
    area = area.where(similarity_transform(faces.landmarks)[0].isfinite() & (area > 0), -torch.inf)
    order = area.argsort(descending=True, stable=True)[: int((area > -torch.inf).sum())]
    return faces.pick(order)


# ------------------------------------------------------------------------------------------------------------
# Align

# where ArcFace expects the eyes, the nose tip and the mouth's corners in its 112x112 crop
TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def similarity_transform(landmarks):
    """Least-squares similarity from landmarks [n, 5, 2] to the template (Umeyama 1991, in closed form).

    Returns (a, b, tx, ty), each [n]:  u = a x - b y + tx,  v = b x + a y + ty. They are NaN where no
    similarity follows: landmarks not finite, all one point, or unlike the template (R² of the fit ≤ 1 %).
    """
    source = landmarks.detach().double()
    target = TEMPLATE.to(source)
    (cx, cy), aim = source.mean(1).unbind(-1), target.mean(0)
    (x, y), (u, v) = (source - source.mean(1, keepdim=True)).unbind(-1), (target - aim).unbind(-1)
    spread = (x * x + y * y).sum(1)
    a, b = (x * u + y * v).sum(1) / spread, (x * v - y * u).sum(1) / spread
    likeness = (a * a + b * b) * spread / (u * u + v * v).sum()  # R² of the fit
    posed = (spread > 1e-6) & (likeness > 0.01)
    a, b = a.where(posed, torch.nan), b.where(posed, torch.nan)
    return a, b, aim[0] - a * cx + b * cy, aim[1] - b * cx - a * cy


def align(frames, landmarks, index=None, size=112):
    """ArcFace's crops [n, 3, 112, 112] of faces in frames [F, 3, H, W], both in [-1, 1] and with gradient.

    landmarks [n, 5, 2] in pixels, not differentiated; index [n] says which frame a face is in (default: face
    i in frame i). One `grid_sample` for all faces, from the full frame straight to the crop; outside the
    frame all is black, as in InsightFace's face_align. A face larger than its crop is sampled on a finer grid
    and averaged, others are not. Another `size` scales the template. Raises ValueError where landmarks fit no
    similarity (see there); `alignable` lets none of those through.
    """
    a, b, tx, ty = (size / 112 * t for t in similarity_transform(landmarks))
    tx, ty = tx + (size / 112 - 1) / 2, ty + (size / 112 - 1) / 2  # pixel centres, not corners, are at whole numbers
    if not a.isfinite().all():
        face = int(a.isfinite().long().argmin())
        raise ValueError(f"face {face}: no similarity fits its landmarks {landmarks[face].tolist()}")
    a, b, tx, ty = (t.view(-1, 1, 1) for t in (a, b, tx, ty))
    norm = a * a + b * b  # scale², crop pixels a frame pixel
    fine = int(norm.rsqrt().amax().ceil().clamp(1, 8)) if len(norm) else 1  # samples a side of a crop pixel
    # A crop pixel is 1 wide, a frame pixel is `scale` wide in it: samples spread over the width that is missing,
    # by variances sqrt(1 - scale²), which is none where the face is smaller than its crop, whatever others are.
    spread = (1 - norm).clamp(min=0).sqrt()
    offset = ((torch.arange(fine, device=norm.device) + 0.5) / fine - 0.5).repeat(size)
    steps = torch.arange(size, device=norm.device).repeat_interleave(fine) + spread[:, 0] * offset  # [n, size fine]
    u, v = steps[:, None] - tx, steps[:, :, None] - ty
    x, y = (a * u + b * v) / norm, (a * v - b * u) / norm  # frame pixels of each sample
    height, width = frames.shape[2:]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1).to(frames)
    if index is not None and not torch.equal(index, torch.arange(len(frames), device=index.device)):
        frames = frames[index]
    crops = F.grid_sample(frames, grid, align_corners=False, padding_mode="zeros")
    # zeros are grey: less the share of each sample's weight that falls outside the frame, they are black
    inside = (x + 1).clamp(0, 1) * (width - x).clamp(0, 1) * (y + 1).clamp(0, 1) * (height - y).clamp(0, 1)
    crops = crops + (inside.to(frames)[:, None] - 1)
    return F.avg_pool2d(crops, fine) if fine > 1 else crops


# ------------------------------------------------------------------------------------------------------------
# Embed


class IBasicBlock(nn.Module):
    """x + bn3(conv2(prelu(bn2(conv1(bn1(x)))))); the stride is conv2's."""

    def __init__(self, inplanes, planes, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.prelu = nn.PReLU(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            shortcut = nn.Conv2d(inplanes, planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(planes))

    def forward(self, x):
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(y)) + (x if self.downsample is None else self.downsample(x))


class ArcFace(nn.Module):
    """ArcFace's IResNet: crops [n, 3, 112, 112] RGB in [-1, 1] to embeddings [n, 512], not normalised.

    layers: blocks in each of four stages (r18: 2, 2, 2, 2; r34: 3, 4, 6, 3; r50: 3, 4, 14, 3; r100: 3, 13, 30, 3);
    widths: their channels, the first also the stem's. Attribute names are arcface_torch's, and so is the layout.
    """

    def __init__(self, layers, widths=(64, 128, 256, 512)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1, self.prelu = nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0])
        before = widths[0]
        for i, (count, width) in enumerate(zip(layers, widths, strict=True), 1):
            blocks = [IBasicBlock(before, width, 2)] + [IBasicBlock(width, width, 1) for _ in range(count - 1)]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
            before = width
        self.bn2 = nn.BatchNorm2d(before)
        self.fc = nn.Linear(before * 7 * 7, 512)
        self.features = nn.BatchNorm1d(512)
        self.size = 112

    def forward(self, crops):
        with torch.autocast(crops.device.type, enabled=False):  # a similarity of two faces wants fp32
            # channels last, as the kernels are: 1.3 times as fast on a CPU
            x = crops.to(self.fc.weight.dtype, memory_format=torch.channels_last)
            x = self.prelu(self.bn1(self.conv1(x)))  # [n, 64, 112, 112]
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [n, 512, 7, 7]
            return self.features(self.fc(self.bn2(x).flatten(1)))

    @classmethod
    def from_file(cls, path):
        """A frozen fp32 network from InsightFace's .onnx, or a state dict (.safetensors, .pth by weights_only).

        Depth and widths follow from the file. Raises UserError, which says what the file is, for any other.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file; face-embedding weights are needed")
        if path.suffix == ".onnx":
            state = iresnet_from_onnx(path)
        elif path.suffix == ".safetensors":
            with open_safetensors(path) as file:
                state = {k: file.get_tensor(k) for k in file.keys()}
        else:
            state = open_pickle(path)
        first = [state.get(f"layer{i}.0.conv2.weight") for i in range(1, 5)]
        if any(w is None for w in first):
            raise UserError(f"{path}: not an ArcFace IResNet (no layer1..4); it has {list(state)[:3]} ...")
        blocks = [k.split(".")[0] for k in state if k.endswith(".conv2.weight")]
        depth = [blocks.count(f"layer{i}") for i in range(1, 5)]
        model = cls(depth, [len(w) for w in first])
        want, have = (
            {k: tuple(v.shape) for k, v in x.items() if not k.endswith("num_batches_tracked")}
            for x in (model.state_dict(), state)
        )
        wrong = sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k))
        if wrong:
            k = wrong[0]
            raise UserError(f"{path}: not an ArcFace IResNet: {k} is {have.get(k)}, wanted {want.get(k)}")
        model.load_state_dict({k: state[k].float() for k in want}, strict=False)
        return fold_batch_norms(model.eval().requires_grad_(False))


class FrozenConv2d(nn.Conv2d):
    """A convolution with constant weights: its graph keeps the kernel and not its input."""

    def forward(self, x):
        return FrozenConv.apply(x, self.weight, self.bias, self.stride, self.padding)


class ScaleShift(nn.Module):
    """A batch-norm in evaluation: x scale + shift, which keeps nothing of x for the backward pass."""

    def __init__(self, norm):
        super().__init__()
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        self.register_buffer("scale", scale.view(-1, 1, 1))
        self.register_buffer("shift", (norm.bias - norm.running_mean * scale).view(-1, 1, 1))

    def forward(self, x):
        return torch.addcmul(self.shift, x, self.scale)


@torch.no_grad()
def fold_batch_norms(model):
    """A frozen ArcFace with its batch-norms folded into the convolutions before them; changed in place.

    Its graph then keeps the inputs of the PReLUs alone: the whole reward takes 2 to 3 times less memory
    (tests/bench_reward.py).
    """

    def fold(conv, norm):
        norm = ScaleShift(norm)
        frozen = FrozenConv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        kernel = (conv.weight * norm.scale[..., None]).contiguous(memory_format=torch.channels_last)
        frozen.weight = nn.Parameter(kernel)
        frozen.bias = nn.Parameter(norm.shift.flatten())
        return frozen, nn.Identity()

    model.conv1, model.bn1 = fold(model.conv1, model.bn1)
    for block in (m for m in model.modules() if isinstance(m, IBasicBlock)):
        block.bn1 = ScaleShift(block.bn1)
        block.conv1, block.bn2 = fold(block.conv1, block.bn2)
        block.conv2, block.bn3 = fold(block.conv2, block.bn3)
        if block.downsample is not None:
            block.downsample = nn.Sequential(*fold(*block.downsample))
    return model.requires_grad_(False)


class CLIPVision(nn.Module):
    """CLIP's image encoder: crops [n, 3, size, size] RGB in [-1, 1] to embeddings [n, D], not normalised.

    The paper's other reward. Attribute names are those of the openai/clip-vit-* files on the hub, which are
    transformers'; heads are 64 wide in all of them. Source: arXiv 2103.00020, with its x·sigmoid(1.702 x).
    """

    def __init__(self, width, layers, patch, size, out):
        super().__init__()
        self.size = size
        tower = self.vision_model = nn.Module()
        tower.embeddings = nn.Module()
        tower.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
        tower.embeddings.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        tower.embeddings.position_embedding = nn.Embedding((size // patch) ** 2 + 1, width)
        tower.pre_layrnorm, tower.post_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
        tower.encoder = nn.Module()
        tower.encoder.layers = nn.ModuleList(CLIPLayer(width) for _ in range(layers))
        self.visual_projection = nn.Linear(width, out, bias=False)
        for name, value in (
            ("mean", (0.48145466, 0.4578275, 0.40821073)),
            ("std", (0.26862954, 0.26130258, 0.27577711)),
        ):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def forward(self, crops):
        tower = self.vision_model
        x = tower.embeddings.patch_embedding(((crops + 1) / 2 - self.mean) / self.std).flatten(2).transpose(1, 2)
        x = torch.cat([tower.embeddings.class_embedding.expand(len(x), 1, -1), x], 1)
        x = tower.pre_layrnorm(x + tower.embeddings.position_embedding.weight)
        for layer in tower.encoder.layers:
            x = layer(x)
        return self.visual_projection(tower.post_layernorm(x[:, 0]))


class CLIPLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        attention = self.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(attention, name, nn.Linear(width, width))
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        y, a = self.layer_norm1(x), self.self_attn
        q, k, v = (f(y).unflatten(-1, (-1, 64)).transpose(1, 2) for f in (a.q_proj, a.k_proj, a.v_proj))
        x = x + a.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(y * (1.702 * y).sigmoid())


def read_encoder(path):
    """A frozen face encoder from a file: CLIP's image encoder (by its names), or else an ArcFace IResNet.

    Raises UserError, which says what the file is, for any other.
    """
    if Path(path).suffix != ".safetensors":
        return ArcFace.from_file(path)
    with open_safetensors(path) as file:
        names = {k for k in file.keys() if k.startswith(("vision_model.", "visual_projection."))}
        names -= {"vision_model.embeddings.position_ids"}
        if not names:
            return ArcFace.from_file(path)
        state = {k: file.get_tensor(k).float() for k in names}
    try:
        width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
        size = patch * round((len(state["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5)
        layers = len([k for k in names if k.endswith("mlp.fc1.weight")])
        model = CLIPVision(width, layers, patch, size, len(state["visual_projection.weight"]))
        model.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path}: not a CLIP image encoder ({str(error).splitlines()[-1].strip()})") from None
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# Several people: which face is whose


def link_identities(frames, likeness=0.3):
    """Link faces into identities over time: embeddings [n_f, D] of each frame to the identity number of each.

    Identities start in the first frame that shows faces. A later frame's faces go to those identities that make the
    sum of cosines to the identities' means largest (Hungarian method); a face whose cosine is below `likeness` starts
    a new one.
    """
    sums, numbers = [], []
    for embeddings in frames:
        faces = F.normalize(embeddings.detach().float().cpu(), dim=-1)
        means = F.normalize(torch.stack(sums), dim=-1) if sums else faces[:0]
        cosine = (faces @ means.T).numpy()
        pairs = zip(*scipy.optimize.linear_sum_assignment(cosine, maximize=True))
        match = {i: k for i, k in pairs if cosine[i, k] >= likeness}
        numbers.append([])
        for i, face in enumerate(faces):
            k = int(match.get(i, len(sums)))
            if k == len(sums):
                sums.append(torch.zeros_like(face))
            sums[k] = sums[k] + face
            numbers[-1].append(k)
    return numbers


def assign_identities(embeddings, clip, frame, anchors):
    """Match faces to identities: returns the rows of the matched faces [m], and the identity of each [m].

    embeddings [n, D] of faces with clip and frame numbers [n]; anchors [B, P, D], the identities of each clip (zero:
    none). Within a frame the sum of cosines is made largest (Hungarian method, on detached values).
    """
    cosine = F.normalize(embeddings.detach().float(), dim=-1)[:, None] * F.normalize(anchors.float(), dim=-1)[clip]
    cosine, real = cosine.sum(-1).cpu().numpy(), anchors.any(-1)[clip].cpu().numpy()  # [n, P]
    pairs = []
    for k in frame.unique():
        here = (frame == k).nonzero()[:, 0].cpu().numpy()
        for i, p in zip(*scipy.optimize.linear_sum_assignment(cosine[here] - 9 * ~real[here], maximize=True)):
            if real[here[i], p]:
                pairs.append([int(here[i]), int(p)])
    return torch.tensor(pairs, device=frame.device, dtype=torch.long).view(-1, 2).unbind(1)


# ------------------------------------------------------------------------------------------------------------
# All together


@dataclass
class FaceReward:
    """A face detector and a face encoder joined: finds, embeds and scores the faces of a video."""

    detector: FaceDetector
    encoder: nn.Module  # crops [n, 3, size, size] in [-1, 1] to embeddings [n, D]; has `size`: ArcFace, CLIPVision
    pool_first: bool = True  # is the true clip's frame 0 in the pool?

    @classmethod
    def from_folder(cls, folder, device="cpu", tiled=False, pool_first=True):
        """From a folder with a detector and an encoder: assets/, InsightFace's antelopev2 or buffalo_l, or the like.

        tiled: `FaceDetector`'s second pass for small faces. Raises UserError where the folder has no such files.
        """
        folder, paths = Path(folder), []
        for what, names in (
            ("face detector", ("detector.onnx", "scrfd*.onnx", "det_*.onnx")),
            ("face encoder", ("arcface.safetensors", "glintr100.onnx", "w600k_r*.onnx", "*.safetensors", "*.pth")),
        ):
            found = [path for name in names for path in sorted(folder.glob(name))]
            if not found:
                raise UserError(f"{folder}: no {what} in it ({', '.join(names)})")
            paths.append(found[0])
        return cls(FaceDetector(paths[0], tiled=tiled), read_encoder(paths[1]).to(device), pool_first)

    def embed(self, frames, most=None):
        """The faces of frames [F, 3, H, W], at most `most` a frame, largest first, embedded with gradient.

        Returns the number of the frame that each is in [n]; a dict of boxes [n, 4], landmarks [n, 5, 2] and embeddings
        [n, D]; and how many faces each frame shows [F].
        """
        detections = [alignable(faces) for faces in self.detector(frames)]
        count = torch.tensor([len(faces) for faces in detections])
        detections = [faces.pick(slice(most)) for faces in detections]
        place = torch.arange(len(frames)).repeat_interleave(torch.tensor([len(faces) for faces in detections]))
        place, count = place.to(frames.device), count.to(frames.device)
        faces = {name: torch.cat([getattr(f, name) for f in detections]).to(frames.device)
                 for name in ("boxes", "landmarks")}  # fmt: skip
        crops = align(frames, faces["landmarks"], place, self.encoder.size)
        # in parts: what passes through the encoder for a moment is larger than what it keeps for the backward pass;
        # of an empty batch too, so that a clip without a face has a graph and a gradient of 0
        embeddings = torch.cat([self.encoder(part) for part in crops.split(16)])
        return place, faces | dict(embeddings=embeddings), count

    def detect_and_embed(self, video, anchors=None):
        """The largest face of every frame of video [B, 3, F, H, W] in [-1, 1], embedded with gradient.

        With anchors [B, P, D], embeddings of P identities (zero: none), the face of each identity instead, see
        `assign_identities`. Returns a dict of mask [B, F] bool, boxes [B, F, 4] and landmarks [B, F, 5, 2] in pixels,
        embeddings [B, F, D], zero where there is no face, each [B, P, F, ...] with anchors; and count [B, F], the
        faces found.
        """
        B, _, T, _, _ = video.shape
        place, faces, count = self.embed(video.transpose(1, 2).flatten(0, 1), most=1 if anchors is None else None)
        faces |= dict(mask=torch.ones_like(place, dtype=torch.bool))
        people, shape = 1, (B, T)
        if anchors is not None:
            people, shape = anchors.shape[1], (B, anchors.shape[1], T)
            rows, who = assign_identities(faces["embeddings"], place // T, place, anchors)
            faces = {name: value[rows] for name, value in faces.items()}
            place = (place[rows] // T * people + who) * T + place[rows] % T
        found = dict(count=count.view(B, T))
        for name, value in faces.items():
            empty = value.new_zeros(B * people * T, *value.shape[1:])
            found[name] = empty.index_copy(0, place, value).unflatten(0, shape)
        return found

    def identities(self, video, most=2, seen=0.1):
        """The pool of a true clip [1, 3, F, H, W]: embeddings [P, F, D] and mask [P, F], P ≤ `most` identities.

        Faces are linked over time by `link_identities`. The identity seen most comes first; those in less than a share
        `seen` of the frames are left out.
        """
        frames = video[0].transpose(0, 1)
        place, faces, count = self.embed(frames)
        embeddings = faces["embeddings"]
        numbers = link_identities(embeddings.split(count.tolist()))
        who = torch.tensor([k for row in numbers for k in row], device=frames.device, dtype=torch.long)
        times = torch.bincount(who)
        chosen = [int(k) for k in times.argsort(descending=True, stable=True)[:most] if times[k] >= seen * len(frames)]
        pool = embeddings.new_zeros(len(chosen), len(frames), embeddings.shape[1])
        mask = torch.zeros(pool.shape[:2], dtype=torch.bool, device=frames.device)
        for p, k in enumerate(chosen):
            pool[p, place[who == k]], mask[p, place[who == k]] = embeddings[who == k], True
        return pool, mask

    def score(self, video, pool, pool_mask, fsm="pool"):
        """R [B] of a video [B, 3, F, H, W] in [-1, 1] against pool [B, Fp, D] with pool_mask [B, Fp].

        A pool [B, P, Fp, D] of P identities (mask [B, P, Fp]) scores the face of each identity against its own pool;
        R is the mean over the identities that are seen. Returns R, differentiable in the video, and what
        `detect_and_embed` found (of the first identity) plus: missing [B] bool, where there is nothing to compare (R
        and its gradient are zero there); face_rate [B], the share of frames with a face.
        """
        pool_mask, anchors = pool_mask.bool(), None
        if pool.dim() == 4:  # the first face of each identity stands for it: the clip starts with the true first frame
            first = pool_mask.long().argmax(-1)[..., None, None].expand(-1, -1, 1, pool.shape[-1])
            anchors = pool.gather(2, first)[:, :, 0] * pool_mask.any(-1, keepdim=True)  # [B, P, D]
        found = self.detect_and_embed(video, anchors)
        if not self.pool_first and fsm != "first":  # which compares with frame 0 only
            pool_mask = pool_mask & (torch.arange(pool_mask.shape[-1], device=pool_mask.device) > 0)
        embeddings, mask = found["embeddings"], found["mask"]
        if anchors is not None:
            found = {name: value if name == "count" else value[:, 0] for name, value in found.items()}
            embeddings, mask, pool, pool_mask = (x.flatten(0, 1) for x in (embeddings, mask, pool, pool_mask))
        present = compared_pairs(mask, pool_mask, fsm).any(2).any(1).view(len(video), -1)  # [B, P]
        scores = face_score(embeddings, mask, pool, pool_mask, fsm).view(len(video), -1)
        reward = (scores * present).sum(1) / present.sum(1).clamp(min=1)
        return reward, found | dict(missing=~present.any(1), face_rate=found["mask"].float().mean(1))
