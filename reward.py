"""The face reward (IPRO, arXiv 2510.14255): detect -> align -> ArcFace -> facial scoring; the velocity KL.

To read the method alone: `align`, `face_score`, `velocity_kl`, then `FaceReward`, which joins them. Detection is not
differentiated: it says where the faces are. From the pixels under the landmarks on, all is: one `grid_sample` takes
every face from its full frame straight to ArcFace's 112x112 crop, a frozen IResNet embeds the crops, and the facial
scoring mechanism (FSM) compares each generated face with all faces of the true clip.

All of it is fp32, RGB and [-1, 1]; points are (x, y) pixels, and an integer coordinate is a pixel's centre.
Sources of behaviour: InsightFace's SCRFD and face_align (python-package), arcface_torch's iresnet.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import scipy  # scipy.optimize is loaded where it is first used: 0.6 s that most programs need not wait
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model import UserError, open_pickle, open_safetensors

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


class FaceDetector:
    """SCRFD through onnxruntime: frames [F, 3, H, W] RGB in [-1, 1] to a list of F `Faces`.

    Reads any graph with SCRFD's nine outputs (scores, boxes, landmarks at strides 8, 16, 32; two anchors a
    cell; distances in strides), whatever their names and order. Frames are letterboxed to the top left of the
    network's input: the graph's own size, or the `input_size` in its metadata, or 640. All frames go as one
    batch where the graph can take it, otherwise one by one, as the released graphs do. Faces are those that
    score `threshold`, less those that overlap a better one by IoU > `overlap`.
    tiled: where a frame's largest face is under 48 px in the network's input, or none is seen, look again at the
    frame enlarged 1.8 times, in overlapping tiles: at most 4 more passes (measured: tests/bench_reward.py).
    `provider` says what onnxruntime runs on. Raises UserError for a missing file or another kind of graph, and
    where a GPU is there but onnxruntime cannot use it (`providers=["CPUExecutionProvider"]` asks for the CPU).
    Source: InsightFace's model_zoo/scrfd.py, at one `det_size`.
    """

    def __init__(self, path, providers=None, threshold=0.5, overlap=0.4, tiled=False):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; a face detector (SCRFD, .onnx) is needed")
        available = onnxruntime.get_available_providers()
        if providers is None:
            providers = ["CPUExecutionProvider"]
            if torch.cuda.is_available():
                if "CUDAExecutionProvider" not in available:
                    raise UserError(f"{path}: a GPU, but onnxruntime has {available}: want onnxruntime-gpu")
                place = dict(device_id=torch.cuda.current_device())  # this rank's
                providers = [("CUDAExecutionProvider", place), *providers]
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), settings, providers=providers)
        except Exception as error:
            raise UserError(f"{path}: not a readable ONNX file ({str(error).splitlines()[0]})") from None
        self.provider = self.session.get_providers()[0]
        wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if self.provider != wanted:
            raise UserError(f"{path}: {wanted} was asked for, onnxruntime fell back to {self.provider}")
        entry, outputs = self.session.get_inputs()[0], self.session.get_outputs()
        stored = self.session.get_modelmeta().custom_metadata_map.get("input_size")
        self.name = entry.name
        self.size = [s if isinstance(s, int) else int(stored or 640) for s in entry.shape[2:]]  # H, W
        self.batched = not isinstance(entry.shape[0], int) and all(len(o.shape) == 3 for o in outputs)
        self.threshold, self.overlap, self.tiled = threshold, overlap, tiled
        shapes = [o.shape for o in outputs]
        if len(entry.shape) == 4:  # what a graph declares of its outputs may be symbolic; what it computes is not
            blank = np.zeros((1, 3, *self.size), np.float32)
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
        """For each frame, the Faces of each of its tiles, in the frame's pixels: those that are whole there, for half
        a face at a tile's edge is another tile's, or the first pass's."""
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
                low = torch.where(corner > 0, corner + 2 / scale, -torch.inf)  # where the frame ends, faces may too
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


def usable(faces):
    """The `Faces` of a frame that can be aligned, largest first: one whose landmarks fit no similarity (a detector's
    answer to noise) counts as none."""
    area = (faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(1)
    area = area.where(similarity(faces.landmarks)[0].isfinite() & (area > 0), -torch.inf)
    order = area.argsort(descending=True, stable=True)[: int((area > -torch.inf).sum())]
    return faces.pick(order)


# ------------------------------------------------------------------------------------------------------------
# Align

# where ArcFace expects the eyes, the nose tip and the mouth's corners in its 112x112 crop
TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def similarity(landmarks):
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
    similarity (see there); `usable` lets none of those through.
    """
    a, b, tx, ty = (size / 112 * t for t in similarity(landmarks))
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


def frozen(layer):
    """Is nothing of it trained, neither parameters nor statistics?"""
    return not layer.training and not next(layer.parameters()).requires_grad


def scale_shift(norm):
    """A batch-norm in evaluation as scale [C] and shift [C]."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


class FoldedConv(torch.autograd.Function):
    """norm(conv(x)) of frozen layers as one convolution. Its gradient needs no activations, only the kernel: autograd
    would keep both layers' inputs. The whole reward then takes 2 to 3 times less memory (tests/bench_reward.py)."""

    @staticmethod
    def fold(conv, norm, dtype):
        scale, shift = scale_shift(norm)
        return (conv.weight * scale.view(-1, 1, 1, 1)).to(dtype), shift.to(dtype)

    @staticmethod
    def forward(ctx, x, conv, norm):
        ctx.conv, ctx.norm, ctx.shape = conv, norm, x.shape
        kernel, shift = FoldedConv.fold(conv, norm, x.dtype)
        return F.conv2d(x, kernel, shift, conv.stride, conv.padding)

    @staticmethod
    def backward(ctx, grad):
        kernel, _ = FoldedConv.fold(ctx.conv, ctx.norm, grad.dtype)
        return nn.grad.conv2d_input(ctx.shape, kernel, grad, ctx.conv.stride, ctx.conv.padding), None, None


def conv_norm(conv, norm, x):
    """norm(conv(x))."""
    return FoldedConv.apply(x, conv, norm) if frozen(conv) else norm(conv(x))


def prelu(layer, x):
    return F.prelu(x, layer.weight.to(x.dtype)) if frozen(layer) else layer(x)


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
        if frozen(self.bn1):
            scale, shift = (t.to(x.dtype).view(-1, 1, 1) for t in scale_shift(self.bn1))
            y = torch.addcmul(shift, x, scale)
        else:
            y = self.bn1(x)
        y = prelu(self.prelu, conv_norm(self.conv1, self.bn2, y))
        y = conv_norm(self.conv2, self.bn3, y)
        return y + (x if self.downsample is None else conv_norm(*self.downsample, x))


class ArcFace(nn.Module):
    """ArcFace's IResNet: crops [n, 3, 112, 112] RGB in [-1, 1] to embeddings [n, 512], not normalised.

    layers: blocks in each of four stages (r18: 2, 2, 2, 2; r34: 3, 4, 6, 3; r50: 3, 4, 14, 3; r100: 3, 13,
    30, 3); widths: their channels, the first also the stem's. Attribute names are arcface_torch's, and so is
    the layout. Once frozen: `trunk` is the precision of all before the embedding head, which stays in fp32
    (None: fp32 too; torch.bfloat16); `checkpointing` recomputes each stage in the backward pass instead of
    keeping its activations.
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
        self.bn2, self.dropout = nn.BatchNorm2d(before), nn.Dropout(0.0)
        self.fc = nn.Linear(before * 7 * 7, 512)
        self.features = nn.BatchNorm1d(512)
        self.size, self.trunk, self.checkpointing = 112, None, False

    def stem(self, x):  # with the first stage, as its activations are the largest
        return self.layer1(prelu(self.prelu, conv_norm(self.conv1, self.bn1, x)))

    def forward(self, crops):
        wide = self.fc.weight.dtype
        with torch.autocast(crops.device.type, enabled=False) if frozen(self) else nullcontext():
            # channels last, as the kernels are: 1.3 times as fast on a CPU in fp32, 2.5 times in bf16
            x = crops.to(self.trunk or wide, memory_format=torch.channels_last)
            for stage in (self.stem, self.layer2, self.layer3, self.layer4):
                again = self.checkpointing and x.requires_grad
                x = checkpoint(stage, x, use_reentrant=False) if again else stage(x)
        with torch.autocast(crops.device.type, enabled=False):
            x = self.bn2(x.to(wide))
            return self.features(self.fc(self.dropout(x.flatten(1))))

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
        return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def iresnet_from_onnx(path):
    """The state dict of an IResNet in an InsightFace .onnx, by walking its graph node by node.

    There a batch-norm after a convolution is folded into the convolution's bias: it comes back as a batch-norm
    that only adds. A graph that normalises pixels of 0..255 itself (Sub, Mul: the older ones, from MXNet) has the
    factor folded into its first convolution. Raises UserError at the first node that an IResNet does not have there.
    """
    import onnx
    from onnx import helper, numpy_helper

    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:
        raise UserError(f"{path}: not a readable ONNX file ({type(error).__name__}); download it again") from None
    constants = {t.name: t for t in graph.initializer}
    for node in graph.node:  # weights may also stand in the graph as nodes
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    users, state = {}, {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def attribute(node, name, default):
        return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)

    entry = next(i for i in graph.input if i.name not in constants)
    size = [d.dim_value for d in entry.type.tensor_type.shape.dim][1:]
    kind = {(3, 192, 192): "a landmark model", (3, 96, 96): "an age and gender model"}.get(tuple(size))
    if len(graph.output) >= 5:
        kind = "a face detector"
    elif any(node.op_type == "Conv" and attribute(node, "group", 1) > 1 for node in graph.node):
        kind = kind or "a MobileFaceNet or its like (grouped convolutions)"
    if kind:
        raise UserError(f"{path}: {kind}, not an ArcFace IResNet")
    if size[0] != 3 or any(n not in (0, 112) for n in size[1:]):
        raise UserError(f"{path}: takes {size}, an ArcFace IResNet takes [3, 112, 112]")

    def weight(name):
        if name not in constants:
            raise UserError(f"{path}: not an ArcFace IResNet: {name!r} is computed, weights are constants")
        return torch.from_numpy(numpy_helper.to_array(constants[name]).copy()).float()

    def after(name):
        """The nodes that use a tensor; those that do nothing are stepped over."""
        found = []
        for node in users.get(name, []):
            found += after(node.output[0]) if node.op_type in ("Identity", "Dropout", "Cast") else [node]
        return found

    def take(name, kind):
        """The one node of a kind that uses a tensor."""
        found = [n for n in after(name) if n.op_type == kind]
        if len(found) != 1:
            kinds = ", ".join(n.op_type for n in after(name)) or "nothing"
            raise UserError(f"{path}: not an ArcFace IResNet: {kind} expected after {name!r}, there is {kinds}")
        return found[0]

    def put_norm(node, key):
        gain, bias, mean, var = (weight(n) for n in node.input[1:5])
        eps = attribute(node, "epsilon", 1e-5)
        state.update({f"{key}.weight": gain, f"{key}.bias": bias, f"{key}.running_mean": mean,
                      f"{key}.running_var": var + eps - 1e-5})  # fmt: skip

    def norm_of(conv):
        """The batch-norm after a convolution, None where it is folded; and the tensor that the two give."""
        norm = next((n for n in after(conv.output[0]) if n.op_type == "BatchNormalization"), None)
        return norm, (norm or conv).output[0]

    def put_conv(conv, key, norm_key):
        """A convolution and its batch-norm, folded or not."""
        kernel = state[f"{key}.weight"] = weight(conv.input[1])
        norm, _ = norm_of(conv)
        if norm:
            return put_norm(norm, norm_key)
        zeros = torch.zeros(len(kernel))
        state.update({f"{norm_key}.weight": zeros + 1, f"{norm_key}.running_mean": zeros,
                      f"{norm_key}.running_var": zeros + 1 - 1e-5,
                      f"{norm_key}.bias": weight(conv.input[2]) if len(conv.input) > 2 else zeros})  # fmt: skip

    x, pixel = entry.name, 1.0
    if any(n.op_type == "Sub" for n in after(x)):
        minus = take(x, "Sub")
        times = take(minus.output[0], "Mul")
        if weight(minus.input[1]).unique().tolist() != [127.5] or weight(times.input[1]).numel() != 1:
            raise UserError(f"{path}: does not normalise its input by (x - 127.5) times one number")
        x, pixel = times.output[0], 127.5 * weight(times.input[1]).item()
    stem = take(x, "Conv")
    put_conv(stem, "conv1", "bn1")
    state["conv1.weight"] *= pixel
    prelu = take(norm_of(stem)[1], "PRelu")
    state["prelu.weight"] = weight(prelu.input[1]).flatten()
    x, stage, block = prelu.output[0], 0, 0
    norm = take(x, "BatchNormalization")
    while any(n.op_type == "Conv" for n in after(norm.output[0])):
        first = take(norm.output[0], "Conv")
        prelu = take(norm_of(first)[1], "PRelu")
        second = take(prelu.output[0], "Conv")
        stage, block = (stage + 1, 0) if attribute(second, "strides", [1, 1])[0] == 2 else (stage, block + 1)
        key = f"layer{stage}.{block}"
        put_norm(norm, f"{key}.bn1")
        put_conv(first, f"{key}.conv1", f"{key}.bn2")
        state[f"{key}.prelu.weight"] = weight(prelu.input[1]).flatten()
        put_conv(second, f"{key}.conv2", f"{key}.bn3")
        joined = take(norm_of(second)[1], "Add")
        end = x  # of the shortcut: x itself, or x convolved
        for shortcut in (n for n in after(x) if n.op_type == "Conv"):
            put_conv(shortcut, f"{key}.downsample.0", f"{key}.downsample.1")
            end = norm_of(shortcut)[1]
        if not any(n is joined for n in after(end)):
            raise UserError(f"{path}: not an ArcFace IResNet: {key}'s shortcut does not end in its sum")
        x = joined.output[0]
        norm = take(x, "BatchNormalization")
    put_norm(norm, "bn2")
    flat = next((n for n in after(norm.output[0]) if n.op_type in ("Flatten", "Reshape")), norm)
    gemm = take(flat.output[0], "Gemm")
    kernel = weight(gemm.input[1])
    state["fc.weight"] = kernel if attribute(gemm, "transB", 0) else kernel.T.contiguous()
    state["fc.bias"] = weight(gemm.input[2]) if len(gemm.input) > 2 else torch.zeros(len(state["fc.weight"]))
    put_norm(take(gemm.output[0], "BatchNormalization"), "features")
    return state


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
# Score


def face_score(embeddings, mask, pool, pool_mask, fsm="pool"):
    """Facial scoring mechanism: R [B] in [-1, 1], how much generated faces are the true clip's.

    embeddings [B, F', D], mask [B, F'] (true, or a weight above 0, where the generated frame shows a face); pool
    [B, F, D], pool_mask [B, F], the true clip's.   s_i = mean_j cos(phi(x_i), phi(x_j)),   R = mean_i s_i,   over
    frames with a face. fsm: "pool" compares with all true frames; "first" with the first of them that shows a face;
    "aligned" with the true frame of the same time. A clip with nothing to compare scores 0, with gradient 0. Raises
    ValueError for another fsm, and for "aligned" where F' is not F. Source: the paper's FSM.
    """
    # faceless frames are zeroed first: what stands there reaches neither the score nor its gradient
    x = F.normalize(embeddings.masked_fill(~mask.bool()[..., None], 0), dim=-1)
    y = F.normalize(pool.masked_fill(~pool_mask.bool()[..., None], 0), dim=-1)
    mask, pool_mask = mask.to(x.dtype), pool_mask.to(x.dtype)
    if fsm == "aligned":
        if x.shape[1] != y.shape[1]:
            raise ValueError(f"fsm 'aligned' compares frame with frame: {x.shape[1]} generated, {y.shape[1]} true ones")
        weight = mask * pool_mask
        score = (x * y).sum(-1)  # [B, F']
    elif fsm in ("pool", "first"):
        if fsm == "first":
            pool_mask = pool_mask * (pool_mask.cumsum(1) == 1)
        # mean_j <x_i, y_j> = <x_i, mean_j y_j>
        mean = (pool_mask[:, None] @ y) / pool_mask.sum(1).clamp(min=1)[:, None, None]  # [B, 1, D]
        weight, score = mask * pool_mask.amax(1, keepdim=True), (x @ mean.mT)[..., 0]
    else:
        raise ValueError(f"fsm is pool, first or aligned, not {fsm!r}")
    return (score * weight).sum(1) / weight.sum(1).clamp(min=1e-6)


def velocity_kl(v, v_ref, sigma, weighting="sigma", dt=None, free=slice(1, None)):
    """The regulariser of one sampling step: omega · mean |v - v_ref|² over the free latent frames; a scalar.

    v, v_ref [B, C, F', h, w]; sigma the step's noise level in 0..1, > 0; dt the step's length in sigma, > 0; free
    the latent frames that are sampled (default: all but the first, which image-to-video pins). A mean over elements,
    so that omega means the same at every size, taken in fp32 at least. Raises ValueError for another weighting, or
    "dt" without dt.
    Derivation: make the sampler's ODE the SDE dx = v dsigma + sigma dW, with as much noise as the latent holds. A
    step is then a draw from N(x - dt v, sigma² dt). Two Gaussians of one variance s² differ by KL = |mean -
    mean_ref|² / (2 s²), here dt |v - v_ref|² / (2 sigma²) an element; summed over the steps this is the KL of the
    two samplers' paths (chain rule; Girsanov's theorem as dt -> 0).
    - "dt": omega = dt / (2 sigma²), that KL: a step counts by its length;
    - "sigma": omega = 1 / (2 sigma²), the same per unit of time, each step counts alike: the official code's
      (ROLL, reward_fl);
    - "uniform": omega = 1.
    To keep the flow's marginals too, the SDE's drift would need v times 1 + sigma (1 - sigma) / 2 (and a part that
    both models share): up to 1.27 times the KL, left out.
    """
    if weighting not in ("sigma", "dt", "uniform"):
        raise ValueError(f"weighting is sigma, dt or uniform, not {weighting!r}")
    if weighting == "dt" and dt is None:
        raise ValueError("weighting 'dt' needs dt, the step's length")
    omega = {"sigma": 1, "dt": dt, "uniform": 2 * sigma**2}[weighting] / (2 * sigma**2)
    wide = torch.promote_types(v.dtype, torch.float32)
    return omega * (v[:, :, free].to(wide) - v_ref[:, :, free].to(wide)).square().mean()


def link(frames, likeness=0.3):
    """Link faces into identities over time: embeddings [n_f, D] of each frame to the identity number of each.

    Identities start in the first frame that shows faces. A later frame's faces go to those identities that make the
    sum of cosines to the identities' means largest (Hungarian method); one less like than `likeness` is a new one.
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


def assign(embeddings, clip, frame, anchors):
    """Which face is whose: the rows of the faces that are someone's [m], and the identity that each is [m].

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


@dataclass
class FaceReward:
    """Detector and face encoder joined: looks at a video and scores it against a pool of embeddings."""

    detector: FaceDetector
    encoder: nn.Module  # crops [n, 3, size, size] in [-1, 1] to embeddings [n, D]; has `size`: ArcFace, CLIPVision
    pool_first: bool = True  # is the true clip's frame 0 in the pool?
    score_first: bool = True  # is the generated frame 0, which is given, scored?
    # Weighed down, not dropped. Measured on held-out faces of 8 to 48 px, min_face 24, pixel noise of 6/255: variance
    # of the gradient over its mean² 0.09, dropped 0.17, all alike 0.06; bias of R -0.17, dropped -0.02, alike -0.23.
    min_face: float = 0.0  # pixels; a smaller face counts in proportion to its size; 0: all count the same
    min_score: float = 0.0  # in 0..1; the same for the detector's score

    @classmethod
    def from_folder(cls, folder, device="cpu", tiled=False, **options):
        """From a folder with a detector and an encoder: assets/, InsightFace's antelopev2 or buffalo_l, or the like.

        tiled: `FaceDetector`'s second look for small faces. Raises UserError where the folder has no such files.
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
        return cls(FaceDetector(paths[0], tiled=tiled), read_encoder(paths[1]).to(device), **options)

    def embed(self, frames, most=None):
        """The faces of frames [F, 3, H, W], at most `most` a frame, largest first, embedded with gradient.

        Returns the number of the frame that each is in [n]; a dict of boxes [n, 4], scores [n], landmarks [n, 5, 2]
        and embeddings [n, D]; and how many faces each frame shows [F].
        """
        detections = [usable(faces) for faces in self.detector(frames)]
        count = torch.tensor([len(faces) for faces in detections])
        detections = [faces.pick(slice(most)) for faces in detections]
        place = torch.arange(len(frames)).repeat_interleave(torch.tensor([len(faces) for faces in detections]))
        place, count = place.to(frames.device), count.to(frames.device)
        faces = {name: torch.cat([getattr(f, name) for f in detections]).to(frames.device)
                 for name in ("boxes", "scores", "landmarks")}  # fmt: skip
        crops = align(frames, faces["landmarks"], place, self.encoder.size)
        # in parts: what passes through the encoder for a moment is larger than what it keeps for the backward pass
        embeddings = torch.cat([self.encoder(part) for part in crops.split(16)])  # of no face too: gradient 0
        return place, faces | dict(embeddings=embeddings), count

    def look(self, video, anchors=None, only=slice(None)):
        """The largest face of every frame of video [B, 3, F, H, W] in [-1, 1], embedded with gradient.

        With anchors [B, P, D], embeddings of P identities (zero: none), the face of each identity instead, see
        `assign`. Returns a dict of mask [B, F] bool, weight [B, F] in 0..1, boxes [B, F, 4] and landmarks
        [B, F, 5, 2] in pixels, embeddings [B, F, D], zero where there is no face, each [B, P, F, ...] with anchors;
        and count [B, F], the faces that were seen. only: the frames to look at [n]; the others show none.
        """
        B, _, T, _, _ = video.shape
        frames = video[:, :, only].transpose(1, 2).flatten(0, 1)  # [B F, 3, H, W]
        place, faces, count = self.embed(frames, most=1 if anchors is None else None)
        looked = torch.arange(B * T, device=place.device).view(B, T)[:, only].flatten()
        place, count = looked[place], count.new_zeros(B * T).index_copy(0, looked, count)
        side = (faces["boxes"][:, 2:] - faces["boxes"][:, :2]).prod(1).sqrt()
        size, score = side / max(self.min_face, 1e-6), faces.pop("scores") / max(self.min_score, 1e-6)
        faces |= dict(mask=torch.ones_like(place, dtype=torch.bool), weight=size.clamp(max=1) * score.clamp(max=1))
        people, shape = 1, (B, T)
        if anchors is not None:
            people, shape = anchors.shape[1], (B, anchors.shape[1], T)
            rows, who = assign(faces["embeddings"], place // T, place, anchors)
            faces = {name: value[rows] for name, value in faces.items()}
            place = (place[rows] // T * people + who) * T + place[rows] % T
        info = dict(count=count.view(B, T))
        for name, value in faces.items():
            empty = value.new_zeros(B * people * T, *value.shape[1:])
            info[name] = empty.index_copy(0, place, value).unflatten(0, shape)
        return info

    def identities(self, video, most=2, seen=0.1):
        """The pool of a true clip [1, 3, F, H, W]: embeddings [P, F, D] and mask [P, F], P ≤ `most` identities.

        Faces are linked over time by `link`. The identity seen most comes first; those in less than a share `seen` of
        the frames are left out.
        """
        frames = video[0].transpose(0, 1)
        place, faces, count = self.embed(frames)
        embeddings = faces["embeddings"]
        numbers = link(embeddings.split(count.tolist()))
        who = torch.tensor([k for row in numbers for k in row], device=frames.device, dtype=torch.long)
        times = torch.bincount(who)
        chosen = [int(k) for k in times.argsort(descending=True, stable=True)[:most] if times[k] >= seen * len(frames)]
        pool = embeddings.new_zeros(len(chosen), len(frames), embeddings.shape[1])
        mask = torch.zeros(pool.shape[:2], dtype=torch.bool, device=frames.device)
        for p, k in enumerate(chosen):
            pool[p, place[who == k]], mask[p, place[who == k]] = embeddings[who == k], True
        return pool, mask

    def score(self, video, pool, pool_mask, fsm="pool", only=slice(None)):
        """R [B] of a video [B, 3, F, H, W] in [-1, 1] against pool [B, Fp, D] with pool_mask [B, Fp].

        A pool [B, P, Fp, D] of P identities (mask [B, P, Fp]) scores the face of each identity against its own pool;
        R is the mean over the identities that are seen, and what `look` reports is the first identity's. only: see
        `look`.
        Returns R, differentiable in the video, and what `look` saw plus: missing [B] bool, where there is
        nothing to compare (R and its gradient are zero there); face_rate [B], the share of those frames with a
        face; similarity [B, F], each frame's mean cosine to the pool, s_i (zero where there is no face).
        """
        pool_mask = pool_mask.bool()
        if pool.dim() == 3:
            info = self.look(video, only=only)
            seen = {name: info[name][:, None] for name in ("mask", "weight", "embeddings")}
            pool, pool_mask = pool[:, None], pool_mask[:, None]
        else:  # the first face of each identity stands for it: the clip starts with the true first frame
            first = pool_mask.long().argmax(-1)[..., None, None].expand(-1, -1, 1, pool.shape[-1])
            anchors = pool.gather(2, first)[:, :, 0] * pool_mask.any(-1, keepdim=True)
            seen = self.look(video, anchors, only)
            info = {name: value if name == "count" else value[:, 0] for name, value in seen.items()}
        B, P, T = seen["mask"].shape
        weight = seen["weight"] * seen["mask"]
        if not self.score_first:
            weight = weight * (torch.arange(T, device=weight.device) > 0)
        if not self.pool_first and fsm != "first":  # which compares with nothing else
            pool_mask = pool_mask & (torch.arange(pool_mask.shape[-1], device=pool_mask.device) > 0)
        flat = [x.flatten(0, 1) for x in (seen["embeddings"], weight, pool, pool_mask)]
        compared = (flat[1] > 0) & (flat[3] if fsm == "aligned" else flat[3].any(1, keepdim=True))
        present = compared.any(1).view(B, P)
        reward = (face_score(*flat, fsm).view(B, P) * present).sum(1) / present.sum(1).clamp(min=1)
        with torch.no_grad():
            embeddings, mask = info["embeddings"].flatten(0, 1)[:, None], info["mask"].flatten()[:, None]
            everyone = [x[:, 0].repeat_interleave(T, 0) for x in (pool, pool_mask)]
            info["similarity"] = face_score(embeddings, mask, *everyone).view_as(info["mask"])
        return reward, info | dict(missing=~present.any(1), face_rate=info["mask"][:, only].float().mean(1))


def clip_metrics(frames, info, image=None):
    """What is watched in one clip: uint8 frames [F, H, W, 3], `look` of it, and `look` of the input image.

    facesim: mean cosine of the frames' embeddings to the input image's (the paper's FaceSim; None without
    faces or image); face_rate: share of frames with a face; motion: mean landmark speed over the face's size,
    a frame (None where no two neighbouring frames show a face); tf: VBench's temporal flickering, (255 - mean
    |difference|)/255.
    """
    mask = info["mask"][0]
    facesim = motion = None
    if image is not None and mask.any() and image["mask"][0, 0]:
        embeddings = info["embeddings"][0][mask].detach()
        facesim = float(F.cosine_similarity(embeddings, image["embeddings"][0, :1].detach()).mean())
    both = mask[1:] & mask[:-1]
    if both.any():
        box = info["boxes"][0]
        size = (box[:, 2:] - box[:, :2]).clamp(min=1).prod(1).sqrt()
        speed = info["landmarks"][0].diff(dim=0).norm(dim=-1).mean(1) / ((size[1:] + size[:-1]) / 2)
        motion = float(speed[both].mean())
    tf = 1 - np.abs(np.diff(frames.astype(np.float32), axis=0)).mean() / 255
    return dict(facesim=facesim, face_rate=float(mask.float().mean()), motion=motion, tf=float(tf))
