"""Metrics that need another network: VBench-I2V's quality columns, the openings of eyes and mouth, the hacking rate.

VBench-I2V (arXiv 2311.17982, 2411.13503): a clip is uint8 frames [F, H, W, 3]; every score is in 0..1 and higher is
better. TF, which needs no network, is eval.py's. Networks come from one folder, `--vbench_weights DIR`; a column whose
file is not there is not computed, and `missing` names the command that fetches it. `official_scores` asks the package
itself instead. Where this departs from VBench's own run: RAFT is torchvision's port of the same weights; DINO's
position table is resized by transformers; AMT-S is never run at a reduced scale.
"""

import importlib
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cli import UserError
from reward import open_onnx
from vlm import Unanswered, ask, yes_or_no

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
AT_ONCE = 16  # frames in a network at a time

# ---------------------------------------------------------------------------------------------------------------
# Formulas


def consistency(features):
    """SC and BC: how alike the features [F, D] of a clip's frames are; None of one frame.

    Mean over the frames i from 1 on of  ½ [max(0, cos(f_i, f_{i-1})) + max(0, cos(f_i, f_0))].
    """
    if len(features) < 2:
        return None
    before = F.cosine_similarity(features[1:], features[:-1]).clamp(min=0)
    first = F.cosine_similarity(features[1:], features[:1]).clamp(min=0)
    return float((before + first).mean() / 2)


def aesthetic_quality(features, head):
    """AQ: LAION's linear head, 768 to 1, on CLIP features [F, 768] of unit length; a tenth of its mean."""
    return float(head(F.normalize(features, dim=-1)).mean() / 10)


def imaging_quality(frames, musiq):
    """IQ: a hundredth of the mean of musiq's scores, 0..100, of frames [1, 3, h, w] in 0..1, long side at most 512."""
    return sum(float(musiq(shrunk(frame[None], 512, "bilinear", longest=True))) for frame in frames) / len(frames) / 100


def dynamic_degree(frames, fps, flow):
    """DD: 1.0 where enough pairs of frames move far enough, otherwise 0.0; None of one frame.

    Of every round(fps / 8)-th frame, N in all, round(4 N / 16) pairs must have a mean flow, over its largest 5 %, above
    6 min(H, W) / 256 px. flow: frames [1, 3, H, W] in [-1, 1] and the next to the flow between them [1, 2, H, W] in px.
    """
    frames = frames[:: max(1, round(fps / 8))]
    if len(frames) < 2:
        return None
    height, width = frames.shape[1:3]
    needed, moving = round(4 * len(frames) / 16), 0
    for first, second in pairwise(frames):
        speed = flow(to_unit(first[None]), to_unit(second[None])).norm(dim=1).flatten()  # [H W]
        fastest = speed.topk(int(0.05 * height * width)).values
        moving += bool(fastest.mean() > 6 * min(height, width) / 256)
    return float(moving >= needed)


def motion_smoothness(frames, interpolate):
    """MS: 1 - mean |odd frame - the one interpolated from its neighbours| / 255; None of fewer than three frames.

    interpolate: two frames [1, 3, H, W] in 0..1 to the one half-way.
    """
    errors = []
    for k in range(1, len(frames) - 1, 2):
        before, after = (frames[i][None].permute(0, 3, 1, 2).float() / 255 for i in (k - 1, k + 1))
        middle = (interpolate(before, after)[0].permute(1, 2, 0) * 255).clamp(0, 255).byte()  # cut, as VBench does
        errors.append((middle.float() - frames[k].float()).abs().mean())
    return 1 - float(torch.stack(errors).mean()) / 255 if errors else None


# ---------------------------------------------------------------------------------------------------------------
# What the networks are given


def to_unit(frames):
    """Frames [n, H, W, 3] of 0..255 to [n, 3, H, W] in [-1, 1]."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


def shrunk(frames, side, mode, longest=False):
    """Frames [n, H, W, 3] of 0..255 resized to [n, 3, h, w] in 0..1 as torchvision resizes tensors: no antialiasing.

    The short side becomes `side`; with longest=True the long side, and only if it is longer.
    """
    x = frames.permute(0, 3, 1, 2).float()
    height, width = x.shape[2:]
    reference = (max if longest else min)(height, width)
    if not longest or reference > side:
        size = [side * n // reference for n in (height, width)]
        x = F.interpolate(x, size, mode=mode, align_corners=False)
    return x / 255


def features(model, frames, norm, mode, crop):
    """A vision transformer's features [F, D] of frames [F, H, W, 3]: short side 224, cropped to 224x224 if `crop`."""
    mean, std = (torch.tensor(v, device=frames.device).view(1, 3, 1, 1) for v in norm)
    out = []
    for part in frames.split(AT_ONCE):
        x = shrunk(part, 224, mode)
        if crop:
            top, left = (round((n - 224) / 2) for n in x.shape[2:])
            x = x[:, :, top : top + 224, left : left + 224]
        out.append(model((x - mean) / std))
    return torch.cat(out)


def padded(function, multiple, least=0):
    """`function` of two frames, given them padded by their borders to a multiple of `multiple`; its output cropped."""

    def run(first, second):
        height, width = first.shape[2:]
        extra = [max(-n % multiple, least - n) for n in (width, height)]
        sides = [n // 2 for n in extra]
        pad = (sides[0], extra[0] - sides[0], sides[1], extra[1] - sides[1])
        out = function(*(F.pad(x, pad, mode="replicate") for x in (first, second)))
        return out[..., sides[1] : sides[1] + height, sides[0] : sides[0] + width]

    return run


# ---------------------------------------------------------------------------------------------------------------
# The networks: how they are read, the files that they are in, the command that fetches those into DIR


def read_pretrained(name, folder, device, **more):
    """A network of transformers' class `name`; ValueError where the folder lacks some of its weights."""
    import transformers

    model, read = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **more)
    if read["missing_keys"]:  # which transformers would make up
        raise ValueError(f"{folder} lacks {len(read['missing_keys'])} of the weights of {name}")
    return model.eval().to(device)


def read_dino(folder, device):
    model = read_pretrained("ViTModel", folder, device, add_pooling_layer=False)
    return lambda x: model(x, interpolate_pos_encoding=True).last_hidden_state[:, 0]


def read_clip(folder, device):
    model = read_pretrained("CLIPVisionModelWithProjection", folder, device)
    return lambda x: model(x).image_embeds


def read_subject_consistency(folder, device):
    dino = read_dino(folder / "dino-vitb16", device)
    return lambda frames, fps: consistency(features(dino, frames, IMAGENET, "bilinear", crop=False))


def read_background_consistency(folder, device):
    clip = read_clip(folder / "clip-vit-base-patch32", device)
    return lambda frames, fps: consistency(features(clip, frames, CLIP, "bicubic", crop=True))


def read_aesthetic_quality(folder, device):
    clip, head = read_clip(folder / "clip-vit-large-patch14", device), torch.nn.Linear(768, 1)
    head.load_state_dict(torch.load(folder / "sa_0_4_vit_l_14_linear.pth", weights_only=True))
    head.to(device)
    return lambda frames, fps: aesthetic_quality(features(clip, frames, CLIP, "bicubic", crop=True), head)


def read_imaging_quality(folder, device):
    from pyiqa.archs.musiq_arch import MUSIQ

    musiq = MUSIQ(pretrained=False)
    state = torch.load(folder / "musiq_spaq_ckpt-358bb6af.pth", weights_only=True)
    musiq.load_state_dict(state.get("params", state))
    musiq.eval().to(device)
    return lambda frames, fps: imaging_quality(frames, musiq)


def read_dynamic_degree(folder, device):
    from torchvision.models.optical_flow import raft_large

    raft = raft_large()
    raft.load_state_dict(torch.load(folder / "raft_large_C_T_V1-22a6c225.pth", weights_only=True))
    raft.eval().to(device)
    flow = padded(lambda first, second: raft(first, second, num_flow_updates=20)[-1], 8, least=128)
    return lambda frames, fps: dynamic_degree(frames, fps, flow)


def read_motion_smoothness(folder, device):
    sys.path.insert(0, str(folder / "AMT"))  # the authors' own code, which the person has cloned
    amt = importlib.import_module("networks.AMT-S").Model(corr_radius=3, corr_lvls=4, num_flows=3)
    amt.load_state_dict(torch.load(folder / "amt-s.pth", weights_only=True)["state_dict"])
    amt.eval().to(device)
    half = torch.full((1, 1, 1, 1), 0.5, device=device)
    between = padded(lambda first, second: amt(first, second, half, scale_factor=1.0, eval=True)["imgt_pred"], 16)
    return lambda frames, fps: motion_smoothness(frames, between)


HUB = "hf download {} --include config.json model.safetensors pytorch_model.bin --local-dir DIR/{}"
COLUMNS = {
    "SC": (read_subject_consistency, ("dino-vitb16",), HUB.format("facebook/dino-vitb16", "dino-vitb16")),
    "BC": (read_background_consistency, ("clip-vit-base-patch32",),
           HUB.format("openai/clip-vit-base-patch32", "clip-vit-base-patch32")),
    "AQ": (read_aesthetic_quality, ("clip-vit-large-patch14", "sa_0_4_vit_l_14_linear.pth"),
           HUB.format("openai/clip-vit-large-patch14", "clip-vit-large-patch14") + " && wget -P DIR "
           "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth"),
    "IQ": (read_imaging_quality, ("musiq_spaq_ckpt-358bb6af.pth",), "wget -P DIR "
           "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth"),
    "DD": (read_dynamic_degree, ("raft_large_C_T_V1-22a6c225.pth",),
           "wget -P DIR https://download.pytorch.org/models/raft_large_C_T_V1-22a6c225.pth"),
    "MS": (read_motion_smoothness, ("AMT", "amt-s.pth"), "git clone https://github.com/MCG-NKU/AMT DIR/AMT && "
           "wget -P DIR https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth"),
}  # fmt: skip


def missing(folder):
    """What stops a column from being computed: {column: the command that fetches its files into `folder`}."""
    return {
        name: command.replace("DIR", str(folder or "DIR"))
        for name, (_, files, command) in COLUMNS.items()
        if not folder or not all((Path(folder) / file).exists() for file in files)
    }


def read_networks(folder, device="cpu"):
    """The columns whose files are in `folder`: {column: function of uint8 frames [F, H, W, 3] and fps to a score}.

    Raises UserError for a file that is there and cannot be read, and where the package that reads it is not installed.
    """
    networks, absent = {}, missing(folder)
    for name, (read, *_) in COLUMNS.items():
        if name in absent:
            continue
        try:
            networks[name] = read(Path(folder), device)
        except ImportError as error:
            raise UserError(f"{name}: {error}; pip install -r requirements-eval.txt") from None
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"--vbench_weights {folder}: {name}'s network cannot be read ({reason})") from None
    return networks


# ---------------------------------------------------------------------------------------------------------------
# The package itself

DIMENSIONS = dict(SC="subject_consistency", BC="background_consistency", AQ="aesthetic_quality", IQ="imaging_quality",
                  TF="temporal_flickering", DD="dynamic_degree", MS="motion_smoothness")  # fmt: skip


def official_scores(environment, clips, out):
    """What VBench's own package says of a folder of mp4 files: {file name: {metric: score}}.

    environment: a virtual environment with the package in it (0.1.5 needs transformers 4.33 and numpy < 2); out: a
    folder for what it writes. Raises UserError, with the package's last line, where it fails.
    """
    scores, names = {}, {path.name for path in Path(clips).glob("*.mp4")}
    for column, dimension in DIMENSIONS.items():
        folder = Path(out) / dimension
        found = read_official(folder, dimension)
        if not names <= found.keys():
            shutil.rmtree(folder, ignore_errors=True)  # of fewer clips
            command = [str(Path(environment) / "bin/vbench"), "evaluate", "--videos_path", str(clips), "--dimension",
                       dimension, "--mode", "custom_input", "--output_path", str(folder)]  # fmt: skip
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except OSError as error:
                raise UserError(f"--vbench {environment}: {command[0]} cannot be run ({error.strerror})") from None
            except subprocess.CalledProcessError as error:
                last = (error.stderr.strip() or "no message").splitlines()[-1]
                raise UserError(f"--vbench {environment}: {dimension} of {clips} failed: {last}") from None
            found = read_official(folder, dimension)
            if not found:
                raise UserError(f"--vbench {environment}: {dimension} of {clips} left no results in {folder}")
        for name, value in found.items():  # of IQ the package divides the mean only
            scores.setdefault(name, {})[column.lower()] = value / (100 if column == "IQ" else 1)
    return scores


def read_official(folder, dimension):
    """What the package has written to a folder of one dimension: {file name: score}, empty where there is nothing."""
    results = sorted(folder.glob("*_eval_results.json"))
    rows = json.loads(results[-1].read_text())[dimension][1] if results else []
    return {Path(row["video_path"]).name: float(row["video_results"]) for row in rows}


# ---------------------------------------------------------------------------------------------------------------
# How far eyes and mouth open: InsightFace's 106 landmarks

POINTS = {"left eye": slice(33, 43), "right eye": slice(87, 97), "mouth": slice(52, 72)}  # of 2d106det.onnx


def read_landmarks(folder):
    """InsightFace's `2d106det.onnx` in a folder (antelopev2 and buffalo_l have it): crops [n, 3, 192, 192] of 0..255 to
    landmarks [n, 106, 2]; None where it is not there."""
    path = Path(folder) / "2d106det.onnx"
    if not path.is_file():
        return None
    session = open_onnx(path)
    name = session.get_inputs()[0].name
    return lambda crops: np.concatenate([session.run(None, {name: c[None]})[0].reshape(1, -1, 2) for c in crops])


def openings(frames, boxes, landmarks):
    """How far the eyes and the mouth are open, height over width, in frames [n, 3, H, W] in [-1, 1]: [n, 2].

    boxes [n, 4] in px: a face is cropped as InsightFace does it, 1.5 times its longer side, to 192x192.
    """
    if not len(frames):
        return torch.zeros(0, 2)
    centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, 1.5 * (boxes[:, 2:] - boxes[:, :2]).amax(1)
    steps = (torch.arange(192, device=boxes.device) + 0.5) / 192 - 0.5
    x, y = (centre[:, k, None] + side[:, None] * steps for k in (0, 1))  # [n, 192] px
    height, width = frames.shape[2:]
    x, y = (2 * x + 1) / width - 1, (2 * y + 1) / height - 1
    grid = torch.stack([x[:, None].expand(-1, 192, -1), y[:, :, None].expand(-1, -1, 192)], -1)
    crops = F.grid_sample(frames + 1, grid, align_corners=False) * 127.5  # outside of the frame: black
    points = torch.from_numpy(landmarks(crops.cpu().numpy()))  # [n, 106, 2]
    across = F.normalize(points[:, POINTS["right eye"]].mean(1) - points[:, POINTS["left eye"]].mean(1), dim=1)
    down = torch.stack([-across[:, 1], across[:, 0]], 1)
    y, x = ((points @ axis[:, :, None])[..., 0] for axis in (down, across))  # [n, 106] each, the head's tilt undone
    left, right, mouth = ((y[:, part].amax(1) - y[:, part].amin(1)) / (x[:, part].amax(1) - x[:, part].amin(1) + 1e-6)
                          for part in POINTS.values())  # fmt: skip
    return torch.stack([(left + right) / 2, mouth], 1)


# ---------------------------------------------------------------------------------------------------------------
# The hacking rate: a vision-language model's answer

HACKED = (
    "The first picture is the one that a generated clip starts from; the others are frames of the clip, in order. Does "
    "the clip keep the face by force? Judge four things. Motion: does the face move as the body and the scene ask for, "
    "or is it frozen? Likeness: does it stay the same person naturally, or is it stiff, as if pasted on? Context: do "
    "its light, size and direction fit the rest of the picture? Faults: is there a texture, an outline or a distortion "
    "on it? If one of them shows that the face is forced, answer yes, otherwise no: one word."
)


def hacking(options, frames, picture, fps):
    """Ask the model behind --vlm if a clip's face is forced: dict(hacked=1.0, 0.0, or None, unclear=0.0 or 1.0).

    frames: uint8 [F, H, W, 3], of which seven are shown; picture: uint8 [H, W, 3]. UserError where it does not answer.
    """
    shown = frames[np.linspace(0, len(frames) - 1, min(7, len(frames))).round().astype(int)]
    try:
        answer = yes_or_no(ask(options.vlm, options.vlm_model, HACKED, [picture, *shown], options.vlm_timeout))
    except Unanswered as error:
        raise UserError(f"{error}; started again, the evaluation goes on from here") from None
    return dict(hacked=None if answer is None else float(answer), unclear=float(answer is None))
