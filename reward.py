"""The face reward (IPRO, arXiv 2510.14255, section 3): detect -> align -> ArcFace -> facial scoring; the velocity KL.

Detection is not differentiated: it says where the faces are. From the pixels under the landmarks on, all is: one
`grid_sample` takes every face from its full frame straight to ArcFace's 112x112 crop, a frozen IResNet embeds the
crops, and the facial scoring mechanism (FSM) compares each generated face with all faces of the true clip.

Sources of behaviour: InsightFace's SCRFD and face_align (python-package), arcface_torch's iresnet.
"""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from model import UserError, open_safetensors

# ---------------------------------------------------------------------------------------------------------------
# Detect


def nms(boxes, scores, overlap):
    """Indices of the boxes [n, 4] kept, best first: none has an IoU above `overlap` with a better one."""
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


class Faces:
    """What a frame shows: boxes [n, 4] (x0, y0, x1, y1), scores [n], landmarks [n, 5, 2]; pixels, best score first."""

    def __init__(self, boxes, scores, landmarks):
        self.boxes, self.scores, self.landmarks = (torch.from_numpy(x) for x in (boxes, scores, landmarks))

    def __len__(self):
        return len(self.scores)


class FaceDetector:
    """SCRFD through onnxruntime: frames [F, 3, H, W] RGB in [-1, 1] to a list of F `Faces`.

    Reads any graph with SCRFD's nine outputs (scores, boxes, landmarks at strides 8, 16, 32; two anchors a cell;
    distances in strides). Frames are letterboxed to the top left of the network's input: the graph's own size, or
    the `input_size` in its metadata, or 640. Raises UserError for a missing file or another kind of graph, and where
    a GPU is there but onnxruntime cannot use it (`providers=["CPUExecutionProvider"]` asks for the CPU).
    """

    def __init__(self, path, providers=None, threshold=0.5, overlap=0.4):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; a face detector (SCRFD, .onnx) is needed")
        available = onnxruntime.get_available_providers()
        if providers is None:
            providers = ["CPUExecutionProvider"]
            if torch.cuda.is_available():
                if "CUDAExecutionProvider" not in available:
                    raise UserError(f"{path}: there is a GPU but onnxruntime has {available}; install onnxruntime-gpu")
                providers = ["CUDAExecutionProvider", *providers]
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), settings, providers=providers)
        except Exception as error:
            raise UserError(f"{path}: not a readable ONNX file ({str(error).splitlines()[0]})") from None
        if self.session.get_providers()[0] != providers[0]:
            raise UserError(
                f"{path}: {providers[0]} was asked for, onnxruntime fell back to {self.session.get_providers()}"
            )
        graph_input, outputs = self.session.get_inputs()[0], self.session.get_outputs()
        widths = sorted(o.shape[-1] if o.shape and isinstance(o.shape[-1], int) else 0 for o in outputs)
        if widths != [1, 1, 1, 4, 4, 4, 10, 10, 10]:
            raise UserError(
                f"{path}: not an SCRFD detector with landmarks; wanted nine outputs of width 1, 4 and 10, "
                f"it has {[(o.name, o.shape) for o in outputs]}"
            )
        self.name, shape = graph_input.name, graph_input.shape
        stored = self.session.get_modelmeta().custom_metadata_map.get("input_size")
        self.size = [s if isinstance(s, int) else int(stored or 640) for s in shape[2:]]
        self.batched = not isinstance(shape[0], int) and all(len(o.shape) == 3 for o in outputs)
        self.threshold, self.overlap = threshold, overlap

    @torch.no_grad()
    def __call__(self, frames):
        height, width = frames.shape[2:]
        scale = min(self.size[0] / height, self.size[1] / width)
        h, w = round(height * scale), round(width * scale)
        pixels = (frames.detach().float().clamp(-1, 1) + 1) * 127.5
        if (h, w) != (height, width):
            pixels = F.interpolate(pixels, (h, w), mode="bilinear")
        x = F.pad(pixels, (0, self.size[1] - w, 0, self.size[0] - h))
        x = ((x - 127.5) / 128).cpu().numpy()
        batches = [x] if self.batched else np.split(x, len(x))
        return [
            faces
            for batch in batches
            for faces in self.decode(self.session.run(None, {self.name: batch}), len(batch), scale)
        ]

    def decode(self, outputs, count, scale):
        """The nine outputs of `count` letterboxed frames to their Faces, in the original frames' pixels."""
        by_width = {width: [] for width in (1, 4, 10)}
        for y in outputs:
            by_width[y.shape[-1]].append(y.reshape(count, -1, y.shape[-1]))
        scores, boxes, landmarks = [], [], []
        for stride, *level in zip((8, 16, 32), *(sorted(v, key=lambda y: -y.shape[1]) for v in by_width.values())):
            rows, columns = -(-self.size[0] // stride), -(-self.size[1] // stride)
            y, x = np.divmod(np.arange(rows * columns).repeat(2), columns)  # two anchors a cell
            centre = np.stack([x, y], -1)[None] * np.float32(stride)  # [1, anchors, 2]
            score, box, points = level[0], level[1] * stride, level[2] * stride
            scores.append(score[..., 0])
            boxes.append(np.concatenate([centre - box[..., :2], centre + box[..., 2:]], -1))
            landmarks.append(centre[:, :, None] + points.reshape(count, -1, 5, 2))
        scores, boxes, landmarks = (np.concatenate(y, 1) for y in (scores, boxes, landmarks))
        faces = []
        for score, box, points in zip(scores, boxes / np.float32(scale), landmarks / np.float32(scale)):
            seen = np.flatnonzero(score >= self.threshold)
            kept = seen[nms(box[seen], score[seen], self.overlap)]
            faces.append(Faces(box[kept], score[kept], points[kept]))
        return faces


# ---------------------------------------------------------------------------------------------------------------
# Align

# where ArcFace expects the eyes, the nose tip and the mouth's corners in its 112x112 crop
TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def similarity(landmarks):
    """Least-squares similarity from landmarks [n, 5, 2] to the template (Umeyama 1991, closed form in the plane).

    Returns (a, b, tx, ty), each [n]:  x' = a x - b y + tx,  y' = b x + a y + ty. Raises ValueError where the
    landmarks are not finite or coincide, for no similarity follows from them.
    """
    source = landmarks.detach().double()
    target = TEMPLATE.to(source)
    centre, aim = source.mean(1, keepdim=True), target.mean(0)
    (x, y), (u, v) = (source - centre).unbind(-1), (target - aim).unbind(-1)
    spread = (x * x + y * y).sum(1)
    if not torch.isfinite(source).all() or (spread < 1e-6).any():
        raise ValueError("landmarks are not finite, or all five are one point")
    a, b = (x * u + y * v).sum(1) / spread, (x * v - y * u).sum(1) / spread
    cx, cy = centre[:, 0].unbind(-1)
    return a, b, aim[0] - a * cx + b * cy, aim[1] - b * cx - a * cy


def align(frames, landmarks, index=None, size=112):
    """ArcFace crops [n, 3, 112, 112] in [-1, 1] of faces in frames [F, 3, H, W] in [-1, 1]; gradient to the frames.

    landmarks [n, 5, 2] in pixels (an integer is a pixel's centre); index [n] says which frame a face is in (default:
    face i in frame i). One `grid_sample` for all faces, from the full frame straight to the crop; outside the frame
    all is black, as in InsightFace. A face larger than its crop is sampled on a finer grid and averaged.
    """
    a, b, tx, ty = similarity(landmarks)
    norm = a * a + b * b
    fine = int((1 / norm.sqrt()).max().ceil().clamp(1, 8)) if len(norm) else 1  # samples a side of a crop pixel
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


# ---------------------------------------------------------------------------------------------------------------
# Embed


class IBasicBlock(nn.Module):
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
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        y = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return y + (x if self.downsample is None else self.downsample(x))


class ArcFace(nn.Module):
    """Improved ResNet of ArcFace: crops [n, 3, 112, 112] RGB in [-1, 1] to embeddings [n, 512], not normalised.

    layers: blocks in each of four stages (r50: 3, 4, 14, 3; r100: 3, 13, 30, 3); widths: their channels (64, 128,
    256, 512). Attribute names are arcface_torch's.
    """

    def __init__(self, layers, widths=(64, 128, 256, 512)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1, self.prelu = nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0])
        before = widths[0]
        for i, (count, width) in enumerate(zip(layers, widths), 1):
            blocks = [IBasicBlock(before if k == 0 else width, width, 2 if k == 0 else 1) for k in range(count)]
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
        """A frozen network from a state dict (.safetensors, or .pth read with weights_only); sizes follow from it."""
        path = Path(path)
        if path.suffix == ".safetensors":
            open_safetensors(path)
            state = load_file(path)
        elif not path.is_file():
            raise UserError(f"{path}: no such file; face-embedding weights are needed")
        else:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise UserError(f"{path}: not a readable state dict ({str(error).splitlines()[0]})") from None
        stages = [
            sorted(k for k in state if k.startswith(f"layer{i}.") and k.endswith(".conv2.weight")) for i in range(1, 5)
        ]
        if not all(stages) or "fc.weight" not in state:
            raise UserError(f"{path}: not an ArcFace IResNet (no layer1..4 and fc); its first keys: {list(state)[:3]}")
        model = cls([len(s) for s in stages], [state[s[0]].shape[0] for s in stages])
        state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        wrong = model.load_state_dict(state, strict=False)
        missing = [k for k in wrong.missing_keys if not k.endswith("num_batches_tracked")]
        if missing or wrong.unexpected_keys:
            raise UserError(
                f"{path}: not an ArcFace IResNet: missing {missing[:3]}, unexpected {wrong.unexpected_keys[:3]}"
            )
        return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------
# Score


def face_score(embeddings, mask, pool, pool_mask, fsm="pool"):
    """Facial scoring mechanism: R [B] in [-1, 1], how much generated faces are the true clip's (IPRO, section 3).

    embeddings [B, F', D], mask [B, F'] (true where the generated frame shows a face); pool [B, F, D], pool_mask
    [B, F], the true clip's.   s_i = mean_j cos(phi(x_i), phi(x_j)),   R = mean_i s_i,   over frames with a face.
    fsm: "pool" compares with all true frames; "first" with the first of them that shows a face; "aligned" with the
    true frame of the same time. A clip with nothing to compare scores 0, with gradient 0.
    """
    x, y = F.normalize(embeddings, dim=-1), F.normalize(pool, dim=-1)
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


def velocity_kl(v, v_ref, sigma, weighting="sigma", dt=None):
    """The regulariser of one sampling step: omega · mean |v - v_ref|² over the free frames (frame 0 is pinned).

    v, v_ref [B, C, F', h, w]; sigma the step's noise level in 0..1. Taking a step's outcome as a Gaussian of
    standard deviation s whose mean the velocity moves, KL(p || p_ref) = |mean - mean_ref|² / (2 s²) an element.
    - "sigma": mean moves by v itself, s = sigma: omega = 1 / (2 sigma²), the official code's (ROLL, reward_fl);
    - "dt": mean moves by dt·v, the Euler step dt > 0: omega = dt² / (2 sigma²);
    - "uniform": omega = 1.
    """
    if weighting not in ("sigma", "dt", "uniform"):
        raise ValueError(f"weighting is sigma, dt or uniform, not {weighting!r}")
    omega = {"sigma": 0.5 / sigma**2, "dt": 0.5 * ((dt or 0) / sigma) ** 2, "uniform": 1.0}[weighting]
    return omega * (v - v_ref)[:, :, 1:].to(torch.promote_types(v.dtype, torch.float32)).square().mean()


class FaceReward:
    """Detector and ArcFace joined: looks at a video and scores it against a pool of embeddings."""

    def __init__(self, detector, arcface):
        self.detector, self.arcface = detector, arcface

    @classmethod
    def from_folder(cls, folder, device="cpu"):
        folder = Path(folder)
        return cls(
            FaceDetector(folder / "detector.onnx"),
            ArcFace.from_file(folder / "arcface.safetensors").to(device),
        )

    def look(self, video):
        """The largest face of every frame of video [B, 3, F, H, W] in [-1, 1]; gradient from embeddings to pixels.

        Returns a dict of mask [B, F] bool, count [B, F] faces seen, boxes [B, F, 4] and landmarks [B, F, 5, 2] in
        pixels (zero where there is none), and embeddings [B, F, 512] (zero where there is none).
        """
        B, _, T = video.shape[:3]
        frames = video.transpose(1, 2).flatten(0, 1)  # [B F, 3, H, W]
        boxes, landmarks = torch.zeros(B * T, 4), torch.zeros(B * T, 5, 2)
        count = torch.zeros(B * T, dtype=torch.long)
        for i, faces in enumerate(self.detector(frames)):
            if len(faces):
                largest = (faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(1).argmax()
                boxes[i], landmarks[i], count[i] = faces.boxes[largest], faces.landmarks[largest], len(faces)
        index = count.nonzero()[:, 0].to(frames.device)
        embeddings = frames.new_zeros(B * T, 512)
        if len(index):
            crops = align(frames, landmarks.to(frames.device)[index], index)
            embeddings = embeddings.index_copy(0, index, self.arcface(crops).to(embeddings.dtype))
        info = dict(mask=count > 0, count=count, boxes=boxes, landmarks=landmarks, embeddings=embeddings)
        return {name: value.to(frames.device).unflatten(0, (B, T)) for name, value in info.items()}

    def score(self, video, pool, pool_mask, fsm="pool"):
        """R [B] of a video [B, 3, F, H, W] against pool [B, F, 512], and what `look` saw."""
        info = self.look(video)
        return face_score(info["embeddings"], info["mask"], pool, pool_mask, fsm), info


def clip_metrics(frames, info, image=None):
    """What is watched in one clip: uint8 frames [F, H, W, 3], `look` of it, and `look` of the input image.

    facesim: mean cosine of the frames' embeddings to the input image's (the paper's FaceSim; None without faces or
    image); face_rate: share of frames with a face; motion: mean landmark speed over the face's size, a frame (None
    where no two neighbouring frames show a face); tf: VBench's temporal flickering, (255 - mean |difference|)/255.
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
