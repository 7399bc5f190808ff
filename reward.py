"""The face reward (IPRO, arXiv 2510.14255): detect -> align -> ArcFace -> facial scoring; the velocity KL.

Detection is not differentiated: it says where the faces are. From the pixels under the landmarks on, all is:
one `grid_sample` takes every face from its full frame straight to ArcFace's 112x112 crop, a frozen IResNet
embeds the crops, and the facial scoring mechanism (FSM) compares each generated face with all faces of the
true clip.

All of it is fp32, RGB and [-1, 1]; points are (x, y) pixels, and an integer coordinate is a pixel's centre.
Sources of behaviour: InsightFace's SCRFD and face_align (python-package), arcface_torch's iresnet.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.utils.checkpoint import checkpoint

from model import UserError, open_pickle, open_safetensors

# ------------------------------------------------------------------------------------------------------------
# Detect


def nms(boxes, scores, overlap):
    """Indices of the boxes [n, 4] kept, best score first: none overlaps a better one by IoU > `overlap`."""
    order = np.argsort(-scores, kind="stable")
    x0, y0, x1, y1 = boxes[order].T
    area = (x1 - x0).clip(0) * (y1 - y0).clip(0)
    w = (np.minimum(x1[:, None], x1) - np.maximum(x0[:, None], x0)).clip(0)
    h = (np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0)).clip(0)
    over = w * h / (area[:, None] + area - w * h).clip(1e-9) > overlap
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
    batch where the graph can take it, otherwise one by one. `provider` says what onnxruntime runs on. Raises
    UserError for a missing file or another kind of graph, and where a GPU is there but onnxruntime cannot use
    it (`providers=["CPUExecutionProvider"]` asks for the CPU).
    tiled: where a frame's largest face is under 48 px in the network's input, or none is seen, look again at the
    frame enlarged 1.8 times, in overlapping tiles: at most 4 more passes, and faces of 16 px are found.
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
                providers = ["CUDAExecutionProvider", *providers]
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
            cells = [-(-self.size[0] // stride) * -(-self.size[1] // stride) * 2 for stride in (8, 16, 32)]
            if sorted(s[-2:] for s in shapes) == sorted((n, width) for n in cells for width in (1, 4, 10)):
                return
        has = ", ".join(f"{o.name} {list(s)}" for o, s in zip(outputs, shapes, strict=True))
        raise UserError(f"{path}: not an SCRFD with landmarks (nine outputs of width 1, 4, 10); it has {has}")

    @torch.no_grad()
    def __call__(self, frames):
        height, width = frames.shape[2:]
        scale = min(self.size[0] / height, self.size[1] / width)
        pixels = (frames.detach().float().clamp(-1, 1) + 1) * 127.5
        faces = self.detect(pixels, scale)
        if self.tiled:
            side = [float((f.boxes[:, 2:] - f.boxes[:, :2]).amax()) if len(f) else 0 for f in faces]
            small = [i for i, s in enumerate(side) if s * scale < 48]
            for i, found in zip(small, self.detect_tiles(pixels[small], scale * 1.8) if small else ()):
                faces[i] = self.merge([faces[i], *found])
        return faces

    def detect(self, pixels, scale):
        """Faces of frames [F, 3, H, W] in 0..255, each resized by `scale` and set at the top left of the input."""
        h, w = (min(round(n * scale), s) for n, s in zip(pixels.shape[2:], self.size))
        if (h, w) != pixels.shape[2:]:
            pixels = F.interpolate(pixels, (h, w), mode="bilinear")
        x = F.pad(pixels, (0, self.size[1] - w, 0, self.size[0] - h))  # black below and to the right
        x = ((x - 127.5) / 128).cpu().numpy()
        found = []
        for batch in [x] if self.batched else np.split(x, len(x)):
            found += self.decode(self.session.run(None, {self.name: batch}), len(batch), scale)
        return found

    def detect_tiles(self, pixels, scale):
        """For each frame, the Faces of each of its tiles, in the frame's pixels."""
        height, width = pixels.shape[2:]
        spans = [s / scale for s in self.size]  # a tile's height and width in the frame's pixels
        starts = [
            np.linspace(0, max(0, n - t), max(1, int(np.ceil((n - 0.1 * t) / (0.9 * t)))))
            for n, t in zip((height, width), spans)
        ]
        found = [[] for _ in pixels]
        for y in starts[0].astype(int):
            for x in starts[1].astype(int):
                tile = pixels[:, :, y : y + int(spans[0]), x : x + int(spans[1])]
                for i, faces in enumerate(self.detect(tile, scale)):
                    corner = torch.tensor([x, y])
                    found[i].append(Faces(faces.boxes + corner.repeat(2), faces.scores, faces.landmarks + corner))
        return found

    def merge(self, parts):
        """Several Faces of one frame as one."""
        every = Faces(*(torch.cat([getattr(p, name) for p in parts]) for name in ("boxes", "scores", "landmarks")))
        return every.pick(torch.from_numpy(nms(every.boxes.numpy(), every.scores.numpy(), self.overlap)))

    def decode(self, outputs, count, scale):
        """The nine outputs of `count` letterboxed frames to their Faces, in the original frames' pixels."""
        by_width = {width: [] for width in (1, 4, 10)}
        for y in outputs:
            by_width[y.shape[-1]].append(y.reshape(count, -1, y.shape[-1]))  # [count, anchors, width]
        scores, boxes, landmarks = [], [], []
        levels = [sorted(v, key=lambda y: -y.shape[1]) for v in by_width.values()]  # finest stride first
        for stride, score, box, points in zip((8, 16, 32), *levels, strict=True):
            rows, columns = -(-self.size[0] // stride), -(-self.size[1] // stride)
            y, x = np.divmod(np.arange(rows * columns).repeat(2), columns)  # two anchors a cell
            centre = np.stack([x, y], -1)[None] * np.float32(stride)  # [1, anchors, 2]
            box, points = box * stride, points * stride
            scores.append(score[..., 0])
            boxes.append(np.concatenate([centre - box[..., :2], centre + box[..., 2:]], -1))
            landmarks.append(centre[:, :, None] + points.reshape(count, -1, 5, 2))
        scores, boxes, landmarks = (np.concatenate(y, 1) for y in (scores, boxes, landmarks))
        faces = []
        for found in zip(boxes / np.float32(scale), scores, landmarks / np.float32(scale), strict=True):
            seen = np.flatnonzero(found[1] >= self.threshold)
            kept = seen[nms(found[0][seen], found[1][seen], self.overlap)]
            faces.append(Faces(*(torch.from_numpy(y[kept]) for y in found)))
        return faces


def usable(faces):
    """The faces of a frame that can be aligned, largest first: one whose landmarks fit no similarity (a detector's
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
    and averaged. Another `size` scales the template. Raises ValueError where landmarks fit no similarity (see
    there); `largest` lets none of those through.
    """
    a, b, tx, ty = (size / 112 * t for t in similarity(landmarks))
    tx, ty = tx + (size / 112 - 1) / 2, ty + (size / 112 - 1) / 2  # pixel centres, not corners, are at whole numbers
    if not a.isfinite().all():
        face = int(a.isfinite().long().argmin())
        raise ValueError(f"face {face}: no similarity fits its landmarks {landmarks[face].tolist()}")
    norm = a * a + b * b  # scale², crop pixels a frame pixel
    fine = int(norm.rsqrt().amax().ceil().clamp(1, 8)) if len(norm) else 1  # samples a side of a crop pixel
    steps = (torch.arange(size * fine, device=norm.device, dtype=norm.dtype) + 0.5) / fine - 0.5
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    u, v = u - tx.view(-1, 1, 1), v - ty.view(-1, 1, 1)
    a, b, norm = (t.view(-1, 1, 1) for t in (a, b, norm))
    grid = torch.stack([(a * u + b * v) / norm, (a * v - b * u) / norm], -1)  # frame pixels of each sample
    height, width = frames.shape[2:]
    grid = (2 * grid + 1) / grid.new_tensor([width, height]) - 1
    source = frames if index is None else frames[index]
    crops = F.grid_sample(source + 1, grid.to(source), align_corners=False, padding_mode="zeros") - 1
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
        y = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return y + (x if self.downsample is None else self.downsample(x))


class ArcFace(nn.Module):
    """ArcFace's IResNet: crops [n, 3, 112, 112] RGB in [-1, 1] to embeddings [n, 512], not normalised.

    layers: blocks in each of four stages (r18: 2, 2, 2, 2; r34: 3, 4, 6, 3; r50: 3, 4, 14, 3; r100: 3, 13,
    30, 3); widths: their channels, the first also the stem's. Attribute names are arcface_torch's, and so is
    the layout. `trunk` is the precision of all before the embedding head, which stays in fp32; `checkpointing`
    recomputes each stage in the backward pass instead of keeping its activations.
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
        self.size, self.trunk, self.checkpointing = 112, torch.float32, False

    def forward(self, crops):
        with torch.autocast(crops.device.type, self.trunk, enabled=self.trunk != torch.float32):
            x = self.prelu(self.bn1(self.conv1(crops)))
            for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
                if self.checkpointing and x.requires_grad:
                    x = checkpoint(stage, x, use_reentrant=False)
                else:
                    x = stage(x)
        with torch.autocast(crops.device.type, enabled=False):
            x = self.bn2(x.float() if self.trunk != torch.float32 else x)
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
        return model.eval().requires_grad_(False)


def iresnet_from_onnx(path):
    """The state dict of an IResNet in an InsightFace .onnx, by walking its graph node by node.

    There a batch-norm after a convolution is folded into the convolution's bias: it comes back as a batch-norm
    that only adds. Raises UserError at the first node that an IResNet does not have there.
    """
    import onnx
    from onnx import numpy_helper

    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:
        raise UserError(f"{path}: not a readable ONNX file ({type(error).__name__}); download it again") from None
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    for node in graph.node:  # weights may also stand in the graph as constants
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            weights[node.output[0]] = torch.from_numpy(numpy_helper.to_array(node.attribute[0].t).copy())
    users, state, skipped = {}, {}, ("Identity", "Dropout")
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    if any(node.op_type == "Conv" and attribute(node, "group", 1) > 1 for node in graph.node):
        raise UserError(f"{path}: has grouped convolutions, so it is a MobileFaceNet or its like, not an IResNet")
    entry = next(i for i in graph.input if i.name not in weights)
    size = [d.dim_value for d in entry.type.tensor_type.shape.dim][1:]
    if size[0] != 3 or any(n not in (0, 112) for n in size[1:]):
        raise UserError(f"{path}: takes {size}, an ArcFace IResNet takes [3, 112, 112]")

    def after(name):
        """The nodes that use a tensor; those that do nothing are stepped over."""
        found = []
        for node in users.get(name, []):
            found += after(node.output[0]) if node.op_type in skipped else [node]
        return found

    def take(name, kind):
        """The one node of a kind that uses a tensor."""
        found = [n for n in after(name) if n.op_type == kind]
        if len(found) != 1:
            kinds = ", ".join(n.op_type for n in after(name)) or "nothing"
            raise UserError(f"{path}: not an ArcFace IResNet: {kind} expected after {name!r}, there is {kinds}")
        return found[0]

    def put_norm(node, key):
        gain, bias, mean, var = (weights[n].float() for n in node.input[1:5])
        eps = attribute(node, "epsilon", 1e-5)
        state.update({f"{key}.weight": gain, f"{key}.bias": bias, f"{key}.running_mean": mean,
                      f"{key}.running_var": var + eps - 1e-5})  # fmt: skip
        return node.output[0]

    def put_conv(node, key, norm):
        """A convolution and the batch-norm after it, folded or not."""
        state[f"{key}.weight"] = weights[node.input[1]]
        width, out = len(weights[node.input[1]]), node.output[0]
        if [n.op_type for n in after(out)] == ["BatchNormalization"]:
            return put_norm(take(out, "BatchNormalization"), norm)
        bias = weights[node.input[2]] if len(node.input) > 2 else torch.zeros(width)
        state.update({f"{norm}.weight": torch.ones(width), f"{norm}.bias": bias,
                      f"{norm}.running_mean": torch.zeros(width),
                      f"{norm}.running_var": torch.full((width,), 1 - 1e-5)})  # fmt: skip
        return out

    def put_prelu(name, key):
        node = take(name, "PRelu")
        state[f"{key}.weight"] = weights[node.input[1]].flatten()
        return node.output[0]

    x = put_prelu(put_conv(take(entry.name, "Conv"), "conv1", "bn1"), "prelu")
    stage, block = 0, 0
    while True:
        norm = take(x, "BatchNormalization")
        if after(norm.output[0])[0].op_type != "Conv":
            break
        first = take(norm.output[0], "Conv")
        second = take(put_prelu(put_conv(first, "c1", "n1"), "p"), "Conv")
        stage, block = (stage + 1, 0) if attribute(second, "strides", [1, 1])[0] == 2 else (stage, block + 1)
        key = f"layer{stage}.{block}"
        for old in [k for k in state if k.split(".")[0] in ("c1", "n1", "p")]:
            part, rest = old.split(".", 1)
            state[f"{key}.{dict(c1='conv1', n1='bn2', p='prelu')[part]}.{rest}"] = state.pop(old)
        put_norm(norm, f"{key}.bn1")
        joined = take(put_conv(second, f"{key}.conv2", f"{key}.bn3"), "Add")
        shortcuts = [n for n in after(x) if n.op_type == "Conv"]
        if shortcuts:
            if take(put_conv(shortcuts[0], f"{key}.downsample.0", f"{key}.downsample.1"), "Add") is not joined:
                raise UserError(f"{path}: not an ArcFace IResNet: {key}'s shortcut does not end in its sum")
        elif not any(n is joined for n in after(x)):
            raise UserError(f"{path}: not an ArcFace IResNet: {key} has no shortcut")
        x = joined.output[0]
    x = put_norm(norm, "bn2")
    flat = next((n for n in after(x) if n.op_type in ("Flatten", "Reshape")), None)
    gemm = take(flat.output[0] if flat else x, "Gemm")
    weight = weights[gemm.input[1]]
    state["fc.weight"] = weight if attribute(gemm, "transB", 0) else weight.T.contiguous()
    state["fc.bias"] = weights[gemm.input[2]] if len(gemm.input) > 2 else torch.zeros(len(state["fc.weight"]))
    put_norm(take(gemm.output[0], "BatchNormalization"), "features")
    return state


def attribute(node, name, default):
    """An ONNX node's attribute as a number or a list."""
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


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
    """A frozen face encoder from a file: CLIP's image encoder, or else an ArcFace IResNet."""
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
    "aligned" with the true frame of the same time. A clip with nothing to compare scores 0, with gradient 0.
    """
    # faceless frames are zeroed first: what stands there reaches neither the score nor its gradient
    x = F.normalize(embeddings.masked_fill(~mask.bool()[..., None], 0), dim=-1)
    y = F.normalize(pool.masked_fill(~pool_mask.bool()[..., None], 0), dim=-1)
    mask, pool_mask = mask.to(x.dtype), pool_mask.to(x.dtype)
    if fsm == "aligned":
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

    v, v_ref [B, C, F', h, w]; sigma the step's noise level in 0..1, > 0; free the latent frames that are
    sampled (default: all but the first, which image-to-video pins). The mean is taken in fp32 at least. Of
    two Gaussians of one standard deviation s, KL(p || p_ref) = |mean - mean_ref|² / (2 s²) an element.
    Reading a sampling step as such a Gaussian, whose mean the velocity moves, gives
    - "sigma": mean moves by v itself, s = sigma: omega = 1 / (2 sigma²), the official code's (ROLL,
      reward_fl);
    - "dt": mean moves by dt · v, the Euler step dt > 0, s = sigma: omega = dt² / (2 sigma²);
    - "uniform": omega = 1.
    """
    if weighting not in ("sigma", "dt", "uniform"):
        raise ValueError(f"weighting is sigma, dt or uniform, not {weighting!r}")
    if weighting == "dt" and dt is None:
        raise ValueError("weighting 'dt' needs dt, the Euler step's size")
    omega = {"sigma": 0.5 / sigma**2, "dt": 0.5 * ((dt or 0) / sigma) ** 2, "uniform": 1.0}[weighting]
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
        match = {i: k for i, k in zip(*linear_sum_assignment(cosine, maximize=True)) if cosine[i, k] >= likeness}
        numbers.append([])
        for i, face in enumerate(faces):
            k = int(match.get(i, len(sums)))
            if k == len(sums):
                sums.append(torch.zeros_like(face))
            sums[k] = sums[k] + face
            numbers[-1].append(k)
    return numbers


@dataclass
class FaceReward:
    """Detector and face encoder joined: looks at a video and scores it against a pool of embeddings."""

    detector: FaceDetector
    encoder: nn.Module  # crops [n, 3, size, size] in [-1, 1] to embeddings [n, D]; has `size`: ArcFace, CLIPVision
    pool_first: bool = True  # is the true clip's frame 0 in the pool?
    score_first: bool = True  # is the generated frame 0, which is given, scored?
    min_face: float = 0.0  # pixels; a smaller face counts in proportion to its size; 0: all count the same
    min_score: float = 0.0  # in 0..1; the same for the detector's score

    @classmethod
    def from_folder(cls, folder, device="cpu", **options):
        """From a folder with a detector and an encoder: assets/, InsightFace's antelopev2 or buffalo_l, or the like."""
        folder, paths = Path(folder), []
        for what, names in (
            ("face detector", ("detector.onnx", "scrfd*.onnx", "det_*.onnx")),
            ("face encoder", ("arcface.safetensors", "glintr100.onnx", "w600k_r*.onnx", "*.safetensors", "*.pth")),
        ):
            found = [path for name in names for path in sorted(folder.glob(name))]
            if not found:
                raise UserError(f"--faces {folder}: no {what} in it ({', '.join(names)})")
            paths.append(found[0])
        return cls(FaceDetector(paths[0]), read_encoder(paths[1]).to(device), **options)

    def look(self, video, anchors=None):
        """The largest face of every frame of video [B, 3, F, H, W] in [-1, 1], embedded with gradient.

        With anchors [B, P, D], embeddings of P identities (zero: none), the face of each identity instead: the
        assignment whose sum of cosines is largest (Hungarian method, on detached values).
        Returns a dict of mask [B, F] bool, weight [B, F] in 0..1, boxes [B, F, 4] and landmarks [B, F, 5, 2] in
        pixels, embeddings [B, F, D], zero where there is no face, each [B, P, F, ...] with anchors; and count
        [B, F], the faces that were seen.
        """
        B, _, T, _, _ = video.shape
        frames = video.transpose(1, 2).flatten(0, 1)  # [B F, 3, H, W]
        detections = [usable(faces) for faces in self.detector(frames)]
        count = torch.tensor([len(faces) for faces in detections])
        if anchors is None:
            detections = [faces.pick(slice(1)) for faces in detections]
        boxes, scores, landmarks = (
            torch.cat([getattr(faces, name) for faces in detections]).to(frames.device)
            for name in ("boxes", "scores", "landmarks")
        )
        place = torch.arange(B * T).repeat_interleave(torch.tensor([len(faces) for faces in detections]))
        place = place.to(frames.device)
        embeddings = self.encoder(align(frames, landmarks, place, self.encoder.size))  # of no face too: gradient 0
        side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        weight = (side / max(self.min_face, 1e-6)).clamp(max=1) * (scores / max(self.min_score, 1e-6)).clamp(max=1)
        info = dict(mask=torch.ones_like(place, dtype=torch.bool), weight=weight, boxes=boxes, landmarks=landmarks,
                    embeddings=embeddings)  # fmt: skip
        people, shape = 1, (B, T)
        if anchors is not None:
            people, shape = anchors.shape[1], (B, *anchors.shape[1:2], T)
            faces, who = assign(embeddings, place // T, place, anchors)
            info = {name: value[faces] for name, value in info.items()}
            place = (place[faces] // T * people + who) * T + place[faces] % T
        for name, value in info.items():
            empty = value.new_zeros(B * people * T, *value.shape[1:])
            info[name] = empty.index_copy(0, place, value).unflatten(0, shape)
        return info | dict(count=count.to(frames.device).view(B, T))

    def identities(self, video, most=2, seen=0.1):
        """The pool of a true clip [1, 3, F, H, W]: embeddings [P, F, D] and mask [P, F], P ≤ `most` identities.

        The one that is seen most comes first; those in less than a share `seen` of the frames are left out.
        """
        frames = video[0].transpose(0, 1)
        detections = [usable(faces) for faces in self.detector(frames)]
        place = torch.arange(len(frames)).repeat_interleave(torch.tensor([len(faces) for faces in detections]))
        landmarks = torch.cat([faces.landmarks for faces in detections]).to(frames.device)
        place = place.to(frames.device)
        embeddings = self.encoder(align(frames, landmarks, place, self.encoder.size))
        numbers = link([embeddings[place == k] for k in range(len(frames))])
        who = torch.tensor([k for row in numbers for k in row], device=frames.device)
        times = torch.bincount(who, minlength=1)
        chosen = [int(k) for k in times.argsort(descending=True, stable=True)[:most] if times[k] >= seen * len(frames)]
        pool = embeddings.new_zeros(len(chosen), len(frames), embeddings.shape[1])
        mask = torch.zeros(pool.shape[:2], dtype=torch.bool, device=frames.device)
        for p, k in enumerate(chosen):
            pool[p, place[who == k]], mask[p, place[who == k]] = embeddings[who == k], True
        return pool, mask

    def score(self, video, pool, pool_mask, fsm="pool"):
        """R [B] of a video [B, 3, F, H, W] in [-1, 1] against pool [B, Fp, D] with pool_mask [B, Fp].

        A pool [B, P, Fp, D] of P identities (mask [B, P, Fp]) scores the face of each identity against its own pool;
        R is the mean over the identities that are seen, and what `look` reports is the first identity's.
        Returns R, differentiable in the video, and what `look` saw plus: missing [B] bool, where there is
        nothing to compare (R and its gradient are zero there); face_rate [B], the share of frames with a
        face; similarity [B, F], each frame's mean cosine to the pool, s_i (zero where there is no face).
        """
        single = pool.dim() == 3
        pool_mask = pool_mask.bool()
        if not self.pool_first:
            pool_mask = pool_mask & (torch.arange(pool_mask.shape[-1], device=pool_mask.device) > 0)
        if single:
            info = self.look(video)
            seen = {name: info[name][:, None] for name in ("mask", "weight", "embeddings")}
            pool, pool_mask = pool[:, None], pool_mask[:, None]
        else:  # the first face of each identity stands for it: the clip starts with the true first frame
            first = pool_mask.long().argmax(-1)[..., None, None].expand(-1, -1, 1, pool.shape[-1])
            anchors = pool.gather(2, first)[:, :, 0] * pool_mask.any(-1, keepdim=True)
            seen = self.look(video, anchors)
            info = {name: value if name == "count" else value[:, 0] for name, value in seen.items()}
        B, P, T = seen["mask"].shape
        weight = seen["weight"] * seen["mask"]
        if not self.score_first:
            weight = weight * (torch.arange(T, device=weight.device) > 0)
        flat = [x.flatten(0, 1) for x in (seen["embeddings"], weight, pool, pool_mask)]
        present = ((flat[1] > 0).any(1) & flat[3].any(1)).view(B, P)
        reward = (face_score(*flat, fsm).view(B, P) * present).sum(1) / present.sum(1).clamp(min=1)
        with torch.no_grad():
            embeddings, mask = info["embeddings"].flatten(0, 1)[:, None], info["mask"].flatten()[:, None]
            everyone = [x[:, 0].repeat_interleave(T, 0) for x in (pool, pool_mask)]
            info["similarity"] = face_score(embeddings, mask, *everyone).view_as(info["mask"])
        return reward, info | dict(missing=~present.any(1), face_rate=info["mask"].float().mean(1))


def assign(embeddings, clip, frame, anchors):
    """Which face is whose: of faces [n, D] with clip and frame numbers [n], the rows that are someone's, and whose."""
    cosine = F.normalize(embeddings.detach().float(), dim=-1)[:, None] * F.normalize(anchors.float(), dim=-1)[clip]
    cosine, real = cosine.sum(-1).cpu().numpy(), anchors.any(-1)[clip].cpu().numpy()  # [n, P]
    rows, who = [], []
    for k in frame.unique():
        here = (frame == k).nonzero()[:, 0].cpu().numpy()
        for i, p in zip(*linear_sum_assignment(cosine[here] - 9 * ~real[here], maximize=True)):
            if real[here[i], p]:
                rows.append(int(here[i]))
                who.append(int(p))
    return torch.tensor(rows, device=frame.device, dtype=torch.long), torch.tensor(
        who, device=frame.device, dtype=torch.long
    )


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
