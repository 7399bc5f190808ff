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
from torch import nn

from model import UserError, open_safetensors

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


class FaceDetector:
    """SCRFD through onnxruntime: frames [F, 3, H, W] RGB in [-1, 1] to a list of F `Faces`.

    Reads any graph with SCRFD's nine outputs (scores, boxes, landmarks at strides 8, 16, 32; two anchors a
    cell; distances in strides), whatever their names and order. Frames are letterboxed to the top left of the
    network's input: the graph's own size, or the `input_size` in its metadata, or 640. All frames go as one
    batch where the graph can take it, otherwise one by one. `provider` says what onnxruntime runs on. Raises
    UserError for a missing file or another kind of graph, and where a GPU is there but onnxruntime cannot use
    it (`providers=["CPUExecutionProvider"]` asks for the CPU).
    """

    def __init__(self, path, providers=None, threshold=0.5, overlap=0.4):
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
        self.threshold, self.overlap = threshold, overlap
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
        h, w = round(height * scale), round(width * scale)
        pixels = (frames.detach().float().clamp(-1, 1) + 1) * 127.5
        if (h, w) != (height, width):
            pixels = F.interpolate(pixels, (h, w), mode="bilinear")
        x = F.pad(pixels, (0, self.size[1] - w, 0, self.size[0] - h))  # black below and to the right
        x = ((x - 127.5) / 128).cpu().numpy()
        found = []
        for batch in [x] if self.batched else np.split(x, len(x)):
            found += self.decode(self.session.run(None, {self.name: batch}), len(batch), scale)
        return found

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


def largest(detections):
    """The largest face of each of F frames: landmarks [F, 5, 2], boxes [F, 4], mask [F]; zero where none is.

    A face whose landmarks fit no similarity (a detector's answer to noise) counts as none.
    """
    landmarks, boxes = torch.zeros(len(detections), 5, 2), torch.zeros(len(detections), 4)
    mask = torch.zeros(len(detections), dtype=torch.bool)
    for i, faces in enumerate(detections):
        area = (faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(1)
        area = area.where(similarity(faces.landmarks)[0].isfinite(), -torch.inf)
        if (area > -torch.inf).any():
            k = area.argmax()
            landmarks[i], boxes[i], mask[i] = faces.landmarks[k], faces.boxes[k], True
    return landmarks, boxes, mask


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
    and averaged. Raises ValueError where landmarks fit no similarity (see there); `largest` lets none of
    those through.
    """
    a, b, tx, ty = similarity(landmarks)
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
    the layout.
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

    def forward(self, crops):
        x = self.prelu(self.bn1(self.conv1(crops)))
        x = self.bn2(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return self.features(self.fc(self.dropout(x.flatten(1))))

    @classmethod
    def from_file(cls, path):
        """A frozen fp32 network from a state dict (.safetensors, or .pth read with weights_only).

        Depth and widths follow from the tensors' names and shapes. Raises UserError for any other kind of
        file.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            with open_safetensors(path) as file:
                state = {k: file.get_tensor(k) for k in file.keys()}
        elif not path.is_file():
            raise UserError(f"{path}: no such file; face-embedding weights are needed")
        else:
            try:
                state = dict(torch.load(path, map_location="cpu", weights_only=True))
            except Exception as error:
                raise UserError(f"{path}: not a readable state dict ({str(error).splitlines()[0]})") from None
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


# ------------------------------------------------------------------------------------------------------------
# Score


def face_score(embeddings, mask, pool, pool_mask, fsm="pool"):
    """Facial scoring mechanism: R [B] in [-1, 1], how much generated faces are the true clip's.

    embeddings [B, F', D], mask [B, F'] (true where the generated frame shows a face); pool [B, F, D],
    pool_mask [B, F], the true clip's.   s_i = mean_j cos(phi(x_i), phi(x_j)),   R = mean_i s_i,   over frames
    with a face. fsm: "pool" compares with all true frames; "first" with the first of them that shows a face;
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
    return (score * weight).sum(1) / weight.sum(1).clamp(min=1)


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


class FaceReward:
    """Detector and ArcFace joined: looks at a video and scores it against a pool of embeddings."""

    def __init__(self, detector, arcface):
        self.detector, self.arcface = detector, arcface

    @classmethod
    def from_folder(cls, folder, device="cpu"):
        folder = Path(folder)
        arcface = ArcFace.from_file(folder / "arcface.safetensors").to(device)
        return cls(FaceDetector(folder / "detector.onnx"), arcface)

    def look(self, video):
        """The largest face of every frame of video [B, 3, F, H, W] in [-1, 1], embedded with gradient.

        Returns a dict of mask [B, F] bool, count [B, F] faces seen, boxes [B, F, 4] and landmarks [B, F, 5,
        2] in pixels (zero where there is none), and embeddings [B, F, 512] (zero where there is none).
        """
        shape = video.shape[0], video.shape[2]
        frames = video.transpose(1, 2).flatten(0, 1)  # [B F, 3, H, W]
        detections = self.detector(frames)
        landmarks, boxes, mask = (x.to(frames.device) for x in largest(detections))
        index = mask.nonzero()[:, 0]
        faces = self.arcface(align(frames, landmarks[index], index))  # run for no face too: a gradient of zero
        embeddings = faces.new_zeros(len(frames), faces.shape[1]).index_copy(0, index, faces)
        count = torch.tensor([len(d) for d in detections], device=frames.device) * mask
        info = dict(mask=mask, count=count, boxes=boxes, landmarks=landmarks, embeddings=embeddings)
        return {name: value.unflatten(0, shape) for name, value in info.items()}

    def score(self, video, pool, pool_mask, fsm="pool"):
        """R [B] of a video [B, 3, F, H, W] in [-1, 1] against pool [B, Fp, 512] with pool_mask [B, Fp].

        Returns R, differentiable in the video, and what `look` saw plus: missing [B] bool, where there is
        nothing to compare (R and its gradient are zero there); face_rate [B], the share of frames with a
        face; similarity [B, F], each frame's mean cosine to the pool, s_i (zero where there is no face).
        """
        info = self.look(video)
        reward = face_score(info["embeddings"], info["mask"], pool, pool_mask, fsm)
        with torch.no_grad():
            embeddings, mask = info["embeddings"].flatten(0, 1)[:, None], info["mask"].flatten()[:, None]
            everyone = [x.repeat_interleave(info["mask"].shape[1], 0) for x in (pool, pool_mask)]
            info["similarity"] = face_score(embeddings, mask, *everyone).view_as(info["mask"])
        info["face_rate"] = info["mask"].float().mean(1)
        info["missing"] = ~(info["mask"].any(1) & pool_mask.bool().any(1))
        return reward, info


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
