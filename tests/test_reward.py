"""The reward's parts against plain loops, scikit-image, onnxruntime, transformers and finite differences."""

import json

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from cli import UserError
from data import Clips
from eval import clip_metrics
from model import ASSETS
from reward import (
    TEMPLATE,
    ArcFace,
    FaceDetector,
    FaceReward,
    Faces,
    align,
    alignable,
    face_score,
    fold_batch_norms,
    link_identities,
    read_encoder,
    similarity_transform,
    velocity_kl,
)
from sample import read_video, to_tensor
from tests.bench_reward import face_scenes, found_faces
from weights import write_safetensors

CPU = ["CPUExecutionProvider"]


@pytest.fixture(scope="module")
def reward():
    return FaceReward.from_folder(ASSETS)


def turned(scale, degrees, shift, noise=0.0):
    """Landmarks [1, 5, 2]: the template scaled, turned and moved, with noise in pixels."""
    c, s = scale * np.cos(np.radians(degrees)), scale * np.sin(np.radians(degrees))
    points = TEMPLATE.double() @ torch.tensor([[c, s], [-s, c]]).double() + torch.tensor(shift).double()
    return (points + noise * torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double())[None]


def smooth(count, height, width, seed=0):
    """Frames in [-1, 1] without detail finer than a few pixels, where any bilinear warp agrees with any other."""
    coarse = torch.rand(count, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse.double(), (height, width), mode="bicubic").clamp(-1, 1)


# ------------------------------------------------------------------------------------------------------------
# Align


@pytest.mark.parametrize("scale, degrees", [(0.4, 0), (0.7, 25), (1.0, -40), (0.9, 170)])
def test_align_brings_landmarks_to_the_template(scale, degrees):
    """A bump painted at each landmark has its centre of mass at the template's point of the crop."""
    landmarks = turned(scale, degrees, (90.3, 80.6))
    y, x = torch.meshgrid(torch.arange(260.0), torch.arange(260.0), indexing="ij")
    bumps = [torch.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 1.5**2)) for px, py in landmarks[0]]
    frames = (torch.stack(bumps)[:, None].repeat(1, 3, 1, 1) * 2 - 1).double()
    crops = (align(frames, landmarks.repeat(5, 1, 1)) + 1)[:, 0]
    v, u = torch.meshgrid(torch.arange(112.0).double(), torch.arange(112.0).double(), indexing="ij")
    centres = torch.stack([(crops * u).sum((1, 2)), (crops * v).sum((1, 2))], 1) / crops.sum((1, 2))[:, None]
    assert (centres - TEMPLATE).norm(dim=1).max() < 0.05


def test_similarity_is_umeyama_with_noisy_landmarks():
    transform = pytest.importorskip("skimage.transform")
    for landmarks in (turned(0.6, 10, (30, 40), 3.0), turned(2.5, -70, (300, 90), 8.0)):
        points, template = landmarks[0].numpy(), TEMPLATE.double().numpy()
        theirs = transform.SimilarityTransform.from_estimate(points, template)
        a, b, tx, ty = (float(x) for x in similarity_transform(landmarks))
        assert np.allclose([[a, -b, tx], [b, a, ty], [0, 0, 1]], theirs.params, atol=1e-6)


@pytest.mark.parametrize("shift", [(40.0, 30.0), (-30.0, -20.0)])  # the second reaches over the frame's border
def test_align_equals_skimage_warp_with_a_black_border(shift):
    transform = pytest.importorskip("skimage.transform")
    frames, landmarks = smooth(2, 160, 200), turned(0.8, 20, shift, 1.0)
    ours = align(frames, landmarks, torch.tensor([1]))[0].permute(1, 2, 0).numpy()
    a, b, tx, ty = (float(x) for x in similarity_transform(landmarks))
    matrix = transform.SimilarityTransform(np.array([[a, -b, tx], [b, a, ty], [0, 0, 1]]))
    picture = (frames[1].permute(1, 2, 0).numpy() + 1) / 2
    theirs = transform.warp(picture, matrix.inverse, output_shape=(112, 112), order=1, mode="constant", cval=0)
    assert np.abs((ours + 1) / 2 - theirs).mean() < 1 / 255
    if shift[0] < 0:
        assert ours[0, 0].max() == -1  # black, not grey


def test_align_of_rendered_faces_is_insightface_s_warp_to_a_level_and_puts_their_landmarks_on_the_template():
    """Held-out clips, true landmarks: a bilinear warp by the similarity that scikit-image estimates."""
    transform = pytest.importorskip("skimage.transform")
    for path in sorted((ASSETS / "clips/heldout").glob("*.json"))[:40:10]:
        points = np.array(json.loads(path.read_text())["people"][0]["landmarks"][8])
        frame = read_video(path.with_suffix(".mp4"))[0][8]
        match = transform.SimilarityTransform.from_estimate(points, TEMPLATE.double().numpy())
        theirs = transform.warp(frame / 255, match.inverse, output_shape=(112, 112), order=1, mode="constant", cval=0)
        landmarks = torch.from_numpy(points)[None]
        crop = align(to_tensor(frame[None])[0].transpose(0, 1).double(), landmarks)[0].permute(1, 2, 0).numpy()
        assert np.abs((crop + 1) / 2 - theirs).mean() < 0.05 / 255
        a, b, tx, ty = (float(x) for x in similarity_transform(landmarks))
        moved = points @ np.array([[a, b], [-b, a]]) + [tx, ty]
        assert np.abs(moved - match(points)).max() < 1e-6


def test_a_face_is_aligned_the_same_whatever_face_stands_beside_it():
    """A face larger than its crop makes the sampling grid finer: not for a smaller one, which no average blurs."""
    frames, small, large = smooth(1, 400, 400), turned(0.5, 10, (9.3, 8.1)), turned(2.6, 0, (40.0, 60.0))
    frames = frames + 0.3 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0)).double()
    together = align(frames, torch.cat([small, large]), torch.tensor([0, 0]))
    assert torch.allclose(together[:1], align(frames, small), atol=1e-12)
    assert torch.allclose(together[1:], align(frames, large), atol=1e-12)
    nearly, just = (align(frames, turned(s, 0, (40.0, 60.0))) for s in (0.9999, 1.0001))
    assert (nearly - just).abs().mean() < 0.02  # no step where averaging sets in


def test_align_averages_where_a_face_is_larger_than_its_crop():
    """Stripes a pixel wide: plain sampling of a 4x larger face would alias, the average is grey."""
    frames = torch.ones(1, 3, 600, 600)
    frames[..., ::2] = -1
    crop = align(frames, turned(4.0, 0, (40.25, 40.25)).float())
    assert crop[..., 8:-8, 8:-8].abs().max() < 0.3


def test_align_gradient_is_the_finite_difference_and_is_zero_outside_the_crop():
    landmarks = turned(0.5, 15, (20.2, 16.7)).requires_grad_()
    frames = smooth(1, 96, 120).requires_grad_()
    weight = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(1)).double()

    def value(x):
        return (align(x, landmarks).tanh() * weight).sum()

    (grad,) = torch.autograd.grad(value(frames), frames)
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(frames.shape, generator=generator).double()
    step = 1e-6
    with torch.no_grad():
        slope = (value(frames + step * direction) - value(frames - step * direction)) / (2 * step)
    assert float((grad * direction).sum()) == pytest.approx(float(slope), rel=1e-6)
    assert landmarks.grad is None
    a, b, tx, ty = (float(x) for x in similarity_transform(landmarks))
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(120.0), indexing="ij")
    u, v = a * x - b * y + tx, b * x + a * y + ty
    margin = 2 * np.hypot(a, b)  # bilinear reach of a pixel, in crop pixels
    outside = (u < -margin) | (u > 111 + margin) | (v < -margin) | (v > 111 + margin)
    inside = (u > 1) & (u < 110) & (v > 1) & (v < 110)
    assert outside.any() and not grad[:, :, outside].any() and (grad[:, :, inside] != 0).all()


def test_align_says_which_landmarks_fit_no_similarity():
    frames, good = smooth(1, 64, 64), turned(0.4, 0, (5.0, 5.0))
    for bad in (
        torch.full((1, 5, 2), 7.0),
        torch.full((1, 5, 2), torch.nan),
        good.clone().index_fill(1, torch.tensor([2]), torch.inf),
    ):
        with pytest.raises(ValueError, match="face 1: no similarity"):
            align(frames, torch.cat([good, bad.double()]), torch.tensor([0, 0]))
    line = torch.stack([torch.linspace(10, 50, 5)] * 2, 1)[None].double()
    assert align(frames, line).isfinite().all()  # on one line: a poor fit, but one and only one


# ------------------------------------------------------------------------------------------------------------
# Detect


def graph(path, sizes, batch="batch", rank=3, order=None, metadata=None, any_size=False):
    """An ONNX file with SCRFD's interface: nine outputs that are a known function of the frame.

    Each output is a constant plus 0.25 x the frame's mean, so that a batch mixed up would show.
    """
    generator = np.random.default_rng(0)
    height, width = sizes
    nodes = [helper.make_node("ReduceMean", ["x"], ["m"], axes=[1, 2, 3], keepdims=0),
             helper.make_node("Constant", [], ["q"], value=numpy_helper.from_array(np.float32(0.25))),
             helper.make_node("Mul", ["m", "q"], ["s"]),
             helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.array([-1, 1, 1]))),
             helper.make_node("Reshape", ["s", "one"], ["b"])]  # fmt: skip
    flat = helper.make_node("Constant", [], ["flat"], value=numpy_helper.from_array(np.array([-1, 1])))
    nodes += [flat] if rank == 2 else []
    outputs, tables = [], {}
    for stride in (8, 16, 32):
        anchors = -(-height // stride) * -(-width // stride) * 2
        for columns in (1, 4, 10):
            table = generator.random((anchors, columns)).astype(np.float32)
            table = table if columns == 1 else table * 3 + (0 if columns == 4 else -1.5)
            name = f"{('score', 'box', 'kps')[(1, 4, 10).index(columns)]}_{stride}"
            tables[columns, stride] = table
            nodes.append(helper.make_node("Constant", [], [f"c_{name}"], value=numpy_helper.from_array(table[None])))
            out = f"{name}3" if rank == 2 else name
            nodes.append(helper.make_node("Add", [f"c_{name}", "b"], [out]))
            if rank == 2:
                nodes.append(
                    helper.make_node(
                        "Constant", [], [f"f_{name}"], value=numpy_helper.from_array(np.array([-1, columns]))
                    )
                )
                nodes.append(helper.make_node("Reshape", [out, f"f_{name}"], [name]))
            shape = [anchors, columns] if rank == 2 else [batch, anchors, columns]
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    if order is not None:
        outputs = [outputs[i] for i in order]
    dims = [batch, 3, "?", "?"] if metadata or any_size else [batch, 3, height, width]
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)
    model = helper.make_model(
        helper.make_graph(nodes, "g", [entry], outputs), opset_imports=[helper.make_opsetid("", 13)]
    )
    model.ir_version = 8
    for key, value in (metadata or {}).items():
        prop = model.metadata_props.add()
        prop.key, prop.value = key, value
    onnx.save(model, path)
    return tables


def reference_detections(tables, mean, size, scale, threshold=0.5, overlap=0.4):
    """Decoding and NMS of one frame as plain loops: rows of (score, box, landmarks)."""
    rows = []
    for stride in (8, 16, 32):
        columns = -(-size[1] // stride)
        for k in range(len(tables[1, stride])):
            score, box, five = (tables[c, stride][k] + 0.25 * mean for c in (1, 4, 10))
            if score[0] < threshold:
                continue
            y, x = divmod(k // 2, columns)
            cx, cy = x * stride, y * stride
            box = [cx - box[0] * stride, cy - box[1] * stride, cx + box[2] * stride, cy + box[3] * stride]
            five = [(cx + five[2 * i] * stride, cy + five[2 * i + 1] * stride) for i in range(5)]
            rows.append((float(score[0]), np.array(box) / scale, np.array(five) / scale))
    rows.sort(key=lambda r: -r[0])
    kept = []
    for row in rows:
        for other in kept:
            a, b = row[1], other[1]
            both = max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1) * max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
            union = (a[2] - a[0] + 1) * (a[3] - a[1] + 1) + (b[2] - b[0] + 1) * (b[3] - b[1] + 1) - both
            if both / union > overlap:
                break
        else:
            kept.append(row)
    return kept


SHUFFLED = [4, 0, 8, 2, 6, 1, 5, 3, 7]


@pytest.mark.parametrize(
    "sizes, frame, options",
    [
        ((64, 96), (32, 48), dict()),  # rank 3, dynamic batch
        ((64, 96), (64, 50), dict(order=SHUFFLED)),  # letterboxed to the right; outputs in any order
        ((64, 96), (31, 50), dict()),  # 59.52 rows high: cut to 59, and the scale is the height's, as in InsightFace
        ((96, 64), (192, 100), dict(batch=1, rank=2)),  # frame by frame, as the released graphs go
        ((64, 64), (40, 64), dict(metadata={"input_size": "64"})),  # size from the metadata
        ((640, 640), (90, 160), dict(batch=1, rank=2, any_size=True)),  # as det_10g.onnx and scrfd_10g_bnkps.onnx
    ],
)
def test_detections_equal_plain_loops(tmp_path, sizes, frame, options):
    tables = graph(tmp_path / "d.onnx", sizes, **options)
    threshold, greys = (0.5, (-1.0, 0.2, 1.0)) if max(sizes) < 640 else (0.97, (0.6, 0.65, 0.7))  # plain loops are slow
    detector = FaceDetector(tmp_path / "d.onnx", CPU, threshold)
    assert detector.size == list(sizes) and detector.provider == CPU[0]
    assert detector.batched == (options.get("rank") != 2)
    found = detector(torch.stack([torch.full((3, *frame), c) for c in greys]))
    if frame[0] / frame[1] > sizes[0] / sizes[1]:
        h, w = sizes[0], int(sizes[0] / (frame[0] / frame[1]))
    else:
        h, w = int(sizes[1] * (frame[0] / frame[1])), sizes[1]
    scale = h / frame[0]
    assert len(found) == 3
    for faces, c in zip(found, greys, strict=True):
        letterbox = np.full((3, *sizes), -127.5 / 128)
        letterbox[:, :h, :w] = ((c + 1) * 127.5 - 127.5) / 128
        expected = reference_detections(tables, letterbox.mean(), sizes, scale, threshold)
        assert len(faces) == len(expected) > 3
        assert np.allclose(faces.scores, [r[0] for r in expected], atol=1e-5)
        assert np.allclose(faces.boxes, np.stack([r[1] for r in expected]), atol=1e-3)
        assert np.allclose(faces.landmarks, np.stack([r[2] for r in expected]), atol=1e-3)


def test_the_letterbox_is_top_left_and_rgb_is_kept(tmp_path):
    """What the network is given, caught on its way in."""
    graph(tmp_path / "d.onnx", (64, 64))
    detector = FaceDetector(tmp_path / "d.onnx", CPU)
    seen = []
    run = detector.session.run

    class Spy:
        def run(self, names, feed):
            seen.append(feed["x"])
            return run(names, feed)

    detector.session = Spy()
    frames = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1).repeat(1, 1, 32, 16)
    detector(frames)
    assert np.allclose(seen[0][0, :, 5, 5], [127.5 / 128, 0, -127.5 / 128])
    assert np.allclose(seen[0][0, :, :, 33:], -127.5 / 128) and seen[0].shape == (1, 3, 64, 64)


def test_faces_come_largest_first_and_one_without_a_similarity_is_none():
    five = turned(0.3, 0, (5.0, 5.0)).float()[0]
    one = torch.zeros(5, 2)

    def faces(*found):
        boxes = torch.tensor([[0, 0, side, side] for side, _ in found]).float().view(-1, 4)
        return Faces(boxes, torch.ones(len(found)), torch.stack([p for _, p in found] or [one])[: len(found)])

    two = alignable(faces((20, five), (40, five + 9)))
    assert torch.equal(two.landmarks, torch.stack([five + 9, five])) and two.boxes[:, 2].tolist() == [40, 20]
    assert len(alignable(faces())) == len(alignable(faces((50, one)))) == 0
    assert alignable(faces((9, one), (5, five))).boxes[:, 2].tolist() == [5]


def test_the_tiled_pass_finds_small_faces_and_keeps_large_ones():
    """Held-out faces of 16 px in frames of twice the detector's input; tests/bench_reward.py measures more of them."""
    paths = sorted((ASSETS / "clips/heldout").glob("*.json"))[::5]
    scenes, truth = face_scenes(paths, 16, 256)
    plain, tiled = FaceDetector(ASSETS / "detector.onnx"), FaceDetector(ASSETS / "detector.onnx", tiled=True)
    (recall, _), (recall_tiled, precision_tiled) = (found_faces(d(scenes), truth) for d in (plain, tiled))
    assert recall < 0.8 and recall_tiled > 0.9 and precision_tiled > 0.9
    large, _ = face_scenes(paths[:4], 50, 128)
    seen, again = plain(large), tiled(large)  # large faces need no second look
    assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(seen, again, strict=True))


@pytest.mark.parametrize("side", [16, 24, 35, 50, 80])
def test_held_out_faces_are_found_at_every_size(side):
    scenes, truth = face_scenes(sorted((ASSETS / "clips/heldout").glob("*.json"))[::12], side, 128)
    for tiled in (False, True):
        recall, precision = found_faces(FaceDetector(ASSETS / "detector.onnx", tiled=tiled)(scenes), truth)
        assert recall > 0.9 and precision > 0.9


def test_what_is_no_detector_is_named_with_its_outputs(tmp_path):
    with pytest.raises(UserError, match=r"none\.onnx: no such file"):
        FaceDetector(tmp_path / "none.onnx")
    (tmp_path / "torn.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"torn\.onnx: not a readable ONNX"):
        FaceDetector(tmp_path / "torn.onnx", CPU)
    graph(tmp_path / "few.onnx", (64, 64), order=[0, 1, 3, 4, 6, 7])  # scores and boxes only
    with pytest.raises(UserError, match=r"not an SCRFD.*it has score_8 \[1, 128, 1\]"):
        FaceDetector(tmp_path / "few.onnx", CPU)


def test_a_gpu_that_onnxruntime_cannot_use_is_told_of_with_the_remedy(tmp_path, monkeypatch, recwarn):
    graph(tmp_path / "d.onnx", (64, 64))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: CPU)
    assert FaceDetector(tmp_path / "d.onnx", CPU).provider == CPU[0] and not recwarn.list  # it was asked for
    with pytest.warns(UserWarning, match=r"d\.onnx: on the CPU.*pip install onnxruntime-gpu"):
        assert FaceDetector(tmp_path / "d.onnx").provider == CPU[0]


def test_a_graph_of_another_input_is_no_detector(tmp_path):
    import onnx

    value = onnx.helper.make_tensor_value_info
    ends = [value(n, onnx.TensorProto.FLOAT, [1, 512]) for n in "xy"]
    made = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(
        onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8),
        tmp_path / "r.onnx",
    )
    with pytest.raises(UserError, match=r"r\.onnx: not an SCRFD: its input is tensor\(float\) \[1, 512\]"):
        FaceDetector(tmp_path / "r.onnx", CPU)


# ------------------------------------------------------------------------------------------------------------
# Embed


def random_arcface(seed=0, layers=(1, 2, 1, 1), widths=(4, 6, 8, 10)):
    """A small IResNet in which every parameter and statistic matters."""
    torch.manual_seed(seed)
    model = ArcFace(layers, widths)
    for name, x in model.state_dict().items():
        if name.endswith("running_var"):
            x.uniform_(0.5, 2)
        elif x.is_floating_point() and x.dim() == 1:
            x.copy_(0.3 * torch.randn_like(x) + (1 if name.endswith("weight") else 0))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("layers, widths", [
    ((1, 2, 1, 1), (4, 6, 8, 10)), ((3, 4, 14, 3), (64, 128, 256, 512)), ((3, 13, 30, 3), (64, 128, 256, 512)),
])  # fmt: skip
def test_an_iresnet_in_onnx_reads_back_and_equals_onnxruntime(layers, widths, tmp_path):
    """torch's exporter folds a batch-norm into the convolution before it, as in InsightFace's files."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, crops = random_arcface(0, layers, widths), smooth(2, 112, 112).float()
    with torch.no_grad():  # keep the signal's size over a hundred layers
        for block in [m for m in model.modules() if hasattr(m, "bn3")]:
            block.bn3.weight.mul_(0.3)
    path = tmp_path / "w600k.onnx"
    model.requires_grad_(True)  # the plain layers, which are not folded already
    torch.onnx.export(model, (crops,), str(path), input_names=["x"], opset_version=17, dynamo=False)
    kinds = [n.op_type for n in onnx.load(str(path)).graph.node]
    blocks = sum(layers)
    assert kinds.count("BatchNormalization") == blocks + 2 and kinds.count("PRelu") == blocks + 1  # as released
    theirs = onnxruntime.InferenceSession(str(path), providers=CPU).run(None, {"x": crops.numpy()})[0]
    read = ArcFace.from_file(path)
    assert [len(getattr(read, f"layer{i}")) for i in range(1, 5)] == list(layers)
    ours = read(crops).numpy()
    assert theirs.std() > 0.1 and np.abs(ours - theirs).max() < 1e-4 * max(1, np.abs(theirs).max())
    torch.save(model.state_dict(), tmp_path / "backbone.pth")
    assert np.abs(ArcFace.from_file(tmp_path / "backbone.pth")(crops).numpy() - ours).max() < 1e-4 * max(
        1, np.abs(ours).max()
    )


def test_an_onnx_file_that_normalises_pixels_itself_takes_the_same_crops(tmp_path):
    """MXNet's exports begin with (x - 127.5) * 0.0078125; InsightFace then feeds them 0..255."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, crops = random_arcface().requires_grad_(True), smooth(2, 112, 112).float()
    torch.onnx.export(model, (crops,), str(tmp_path / "a.onnx"), input_names=["x"], opset_version=17, dynamo=False)
    graph = onnx.load(str(tmp_path / "a.onnx")).graph
    next(n for n in graph.node if n.op_type == "Conv").input[0] = "scaled"
    graph.initializer.extend(
        [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("m", 127.5), ("s", 2**-7))]
    )
    graph.node.insert(0, helper.make_node("Mul", ["centred", "s"], ["scaled"]))
    graph.node.insert(0, helper.make_node("Sub", ["x", "m"], ["centred"]))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=CPU)
    theirs = session.run(None, {"x": ((crops + 1) * 127.5).numpy()})[0]
    assert np.abs(ArcFace.from_file(tmp_path / "m.onnx")(crops).numpy() - theirs).max() < 1e-4
    graph.initializer[-2].float_data[:], graph.initializer[-2].raw_data = [], np.float32(100).tobytes()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"m\.onnx: does not normalise"):
        ArcFace.from_file(tmp_path / "m.onnx")


class Flat(torch.nn.Module):
    """Networks that are no IResNet."""

    def __init__(self, kind):
        super().__init__()
        conv = torch.nn.Conv2d(3, 6, 3, 2, 1) if kind != "grouped" else torch.nn.Conv2d(3, 6, 3, 2, 1, groups=3)
        act = torch.nn.ReLU() if kind == "landmarks" else torch.nn.PReLU(6)
        self.net = torch.nn.Sequential(conv, act, torch.nn.Flatten(), torch.nn.LazyLinear(212))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("kind, size, words", [
    ("landmarks", 112, "PRelu expected after .* there is Relu"), ("landmarks", 192, "a landmark model, not an ArcFace"),
    ("landmarks", 96, "an age and gender model"), ("landmarks", 128, r"takes \[3, 128, 128\]"),
    ("grouped", 112, "a MobileFaceNet"), ("short", 112, "BatchNormalization expected"),
])  # fmt: skip
def test_another_network_in_onnx_is_named_as_what_it_is(kind, size, words, tmp_path):
    model, x = Flat(kind).eval(), torch.zeros(1, 3, size, size)
    model(x)
    torch.onnx.export(model, (x,), str(tmp_path / "a.onnx"), opset_version=17, dynamo=False)
    with pytest.raises(UserError, match=words):
        ArcFace.from_file(tmp_path / "a.onnx")
    torn = (tmp_path / "a.onnx").read_bytes()[:-2000]
    (tmp_path / "torn.onnx").write_bytes(torn)
    with pytest.raises(UserError, match="torn.onnx: not"):
        ArcFace.from_file(tmp_path / "torn.onnx")


def test_another_file_of_insightface_s_folders_is_named_as_what_it_is(tmp_path):
    graph(tmp_path / "det_10g.onnx", (64, 64))
    with pytest.raises(UserError, match="det_10g.onnx: a face detector, not an ArcFace IResNet"):
        ArcFace.from_file(tmp_path / "det_10g.onnx")


def test_a_folded_network_gives_the_values_and_the_gradient_of_its_plain_layers():
    """Batch-norms go into convolutions and activations are not kept: nothing but that changes."""
    crops, results = smooth(2, 112, 112), []
    for model in (random_arcface().double(), fold_batch_norms(random_arcface().double())):
        x = crops.clone().requires_grad_()
        y = model(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        results += [y.detach(), grad]
    assert torch.allclose(results[0], results[2], rtol=1e-9) and torch.allclose(results[1], results[3], rtol=1e-9)
    with torch.autocast("cpu", torch.bfloat16):  # a caller's autocast does not reach the network
        assert torch.equal(model(crops), results[2])


def test_a_folded_network_keeps_the_inputs_of_its_prelus_only():
    kept = []
    x = smooth(2, 112, 112).float().requires_grad_()
    model = fold_batch_norms(random_arcface())
    weights = {w.data_ptr() for w in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    activations = [t for t in kept if t.dim() == 4 and t.data_ptr() not in weights and len(t) == 2]
    prelus = sum(isinstance(m, torch.nn.PReLU) for m in model.modules())
    assert len(activations) == prelus + 1 and activations[-1].shape[2:] == (7, 7)  # the last batch-norm's is small


def test_clip_image_encoder_equals_transformers_from_its_own_file(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, projection_dim=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=64, patch_size=16, hidden_act="quick_gelu",
    )  # fmt: skip
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    theirs.save_pretrained(tmp_path / "clip")
    ours = read_encoder(tmp_path / "clip/model.safetensors")
    crops = smooth(2, 64, 64).float()
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    with torch.no_grad():
        expected = theirs(((crops + 1) / 2 - mean) / std).image_embeds
    assert ours.size == 64 and (ours(crops) - expected).abs().max() < 1e-5
    state = {k: v for k, v in ours.state_dict().items() if "layers.1.mlp.fc1" not in k}
    write_safetensors(state, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="not a CLIP image encoder"):
        read_encoder(tmp_path / "bad.safetensors")


def test_iresnet50_has_the_released_layers():
    """53 convolutions and 25 PReLUs; of the batch-norms, 26 are not folded into a convolution by the export."""
    with torch.device("meta"):
        state = ArcFace((3, 4, 14, 3)).state_dict()
    assert sum(v.dim() == 4 for v in state.values()) == 53
    assert sum("prelu" in k for k in state) == 25
    folded = sum(k.endswith((".bn2.running_var", ".bn3.running_var", "downsample.1.running_var")) for k in state) + 1
    assert sum(k.endswith("running_var") for k in state) - folded == 26
    assert state["fc.weight"].shape == (512, 512 * 7 * 7) and state["layer2.0.conv2.weight"].shape == (
        128,
        128,
        3,
        3,
    )
    names = {"conv1.weight", "bn1.weight", "prelu.weight", "layer1.0.downsample.0.weight", "features.bias"}
    assert names <= set(state)


def test_weights_are_read_back_from_every_layout_with_the_size_from_their_shapes(tmp_path):
    model, crops = random_arcface(), smooth(2, 112, 112).float()
    expected = fold_batch_norms(random_arcface())(crops)
    write_safetensors(model.state_dict(), tmp_path / "a.safetensors")
    write_safetensors(
        {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()},
        tmp_path / "b.safetensors",
    )
    torch.save(model.state_dict(), tmp_path / "a.pth")
    for name, tolerance in (("a.safetensors", 0), ("a.pth", 0), ("b.safetensors", 2e-2)):  # fp16 has 11 bits
        again = ArcFace.from_file(tmp_path / name)
        assert not again.training and all(p.dtype == torch.float32 and not p.requires_grad for p in again.parameters())
        assert (again(crops) - expected).abs().max() <= tolerance


def test_what_is_no_arcface_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        ArcFace.from_file(tmp_path / "none.pth")
    state = random_arcface().state_dict()
    torch.save(dict(list(state.items())[:3]), tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"part\.pth: not an ArcFace IResNet"):
        ArcFace.from_file(tmp_path / "part.pth")
    torch.save({**state, "fc.weight": torch.zeros(512, 7)}, tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"fc\.weight is \(512, 7\)"):
        ArcFace.from_file(tmp_path / "wide.pth")


# ------------------------------------------------------------------------------------------------------------
# Score


def faces_of(seed=0, b=3, generated=5, true=7, d=16):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(b, generated, d, generator=g).double(), torch.randn(b, true, d, generator=g).double()
    return x, torch.rand(b, generated, generator=g) > 0.4, y, torch.rand(b, true, generator=g) > 0.4


def loops(x, mask, y, pool_mask, fsm):
    """FSM written as the paper says it."""
    rewards = []
    for b in range(len(x)):
        scores = []
        true = [j for j in range(y.shape[1]) if pool_mask[b, j]]
        for i in range(x.shape[1]):
            among = {"pool": true, "first": true[:1], "aligned": [j for j in true if j == i]}[fsm]
            if mask[b, i] and among:
                scores.append(sum(float(F.cosine_similarity(x[b, i], y[b, j], dim=0)) for j in among) / len(among))
        rewards.append(sum(scores) / len(scores) if scores else 0.0)
    return torch.tensor(rewards).double()


@pytest.mark.parametrize("fsm", ["pool", "first", "aligned"])
@pytest.mark.parametrize("seed", range(4))
def test_face_score_equals_plain_loops_with_missing_faces(fsm, seed):
    x, mask, y, pool_mask = faces_of(seed)
    if fsm == "aligned":
        y, pool_mask = y[:, : x.shape[1]], pool_mask[:, : x.shape[1]]
    if seed == 3:
        mask[0], pool_mask[1] = False, False
    ours = face_score(x, mask, y, pool_mask, fsm)
    assert torch.allclose(ours, loops(x, mask, y, pool_mask, fsm), atol=1e-12)
    assert ours.abs().max() <= 1


def test_faceless_frames_neither_score_nor_pass_a_gradient_whatever_stands_there():
    x, mask, y, pool_mask = faces_of()
    mask[1], pool_mask[2] = False, False
    clean = face_score(x, mask, y, pool_mask)
    x[~mask], y[~pool_mask] = torch.nan, torch.nan
    x.requires_grad_()
    ours = face_score(x, mask, y, pool_mask)
    ours.sum().backward()
    assert torch.equal(ours, clean) and ours[1] == 0 and ours[2] == 0
    assert not x.grad[~mask].any() and not x.grad[1:].any() and x.grad[0][mask[0]].all()


def test_the_gradient_through_align_embed_and_score_is_the_finite_difference():
    frames, model = smooth(3, 80, 80), random_arcface().double()
    landmarks = torch.cat([turned(0.4, a, (12.0, 14.0)) for a in (0, 10, -20)])
    _, _, pool, pool_mask = faces_of(b=1, d=512)

    def value(x):
        embeddings = model(align(x, landmarks))
        return face_score(embeddings[None], torch.tensor([[True, True, False]]), pool, pool_mask).sum()

    frames.requires_grad_()
    (grad,) = torch.autograd.grad(value(frames), frames)
    direction = torch.randn(frames.shape, generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        slope = (value(frames + 1e-6 * direction) - value(frames - 1e-6 * direction)) / 2e-6
    assert float((grad * direction).sum()) == pytest.approx(float(slope), rel=1e-4)  # PReLU's kinks
    assert grad[:2].any() and not grad[2].any() and not grad[:, :, 70:, 70:].any()  # no face; beyond the crops


def test_aligned_needs_as_many_true_frames_as_generated_ones():
    x, mask, y, pool_mask = faces_of()
    with pytest.raises(ValueError, match="5 generated, 7 true"):
        face_score(x, mask, y, pool_mask, "aligned")


# ------------------------------------------------------------------------------------------------------------
# Velocity KL


def test_velocity_kl_is_zero_with_zero_gradient_at_the_reference_and_grows_by_its_weight():
    v = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    kl = velocity_kl(v, v.detach().clone(), 0.4)
    kl.sum().backward()
    assert kl.shape == (2,) and not kl.any() and not v.grad.any()
    moved, omega = v.detach().clone(), 0.5 / 0.4**2
    moved[:, :, 1:] += 0.3
    moved[:, :, 0] += 50.0  # pinned: not looked at
    assert velocity_kl(moved, v.detach(), 0.4).tolist() == pytest.approx([omega * 0.09] * 2, rel=1e-5)
    assert (velocity_kl(moved, v.detach(), 0.4, free=slice(None)) > omega * 100).all()


def test_velocity_kl_is_per_unit_of_time_the_kl_of_two_samplers_steps():
    """A step of dx = v dsigma + sigma dW, from sigma to sigma - dt, with either velocity."""
    v, v_ref, x = torch.randn(3, 2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    sigma, dt = 0.7, 0.2
    step, step_ref = (torch.distributions.Normal(x - dt * w, sigma * dt**0.5) for w in (v, v_ref))
    exact = torch.distributions.kl_divergence(step, step_ref).flatten(1).mean(1)
    per_time = velocity_kl(v, v_ref, sigma, free=slice(None))
    assert (per_time * dt).tolist() == pytest.approx(exact.tolist(), rel=1e-12)


def test_velocity_kl_of_bf16_velocities_is_taken_in_fp32():
    g = torch.Generator().manual_seed(0)
    v, v_ref = (torch.randn(1, 4, 3, 8, 8, generator=g).bfloat16() for _ in range(2))
    ours = velocity_kl(v, v_ref, 0.5**0.5)
    exact = (v.double() - v_ref.double())[:, :, 1:].square().mean()
    assert ours.dtype == torch.float32 and float(ours) == pytest.approx(float(exact), rel=1e-5)  # bf16 alone: 4e-3


# ------------------------------------------------------------------------------------------------------------
# All together


def scripted(shown):
    """A detector that finds a face where `shown` [frames] says so."""
    five = turned(0.35, 5, (10.0, 12.0)).float()

    def detect(frames):
        assert len(frames) == len(shown)
        box, none = torch.tensor([[10.0, 12.0, 50.0, 55.0]]), slice(0, 0)
        full = Faces(box, torch.ones(1), five)
        return [full if s else Faces(full.boxes[none], full.scores[none], full.landmarks[none]) for s in shown]

    return detect


def test_a_clip_without_a_face_scores_zero_is_flagged_and_passes_no_gradient():
    shown = [True, False, True, False, False, False]  # two clips of three frames
    reward = FaceReward(scripted(shown), random_arcface())
    video = smooth(6, 64, 64).float().unflatten(0, (2, 3)).transpose(1, 2).contiguous().requires_grad_()
    pool, pool_mask = torch.randn(2, 4, 512), torch.ones(2, 4, dtype=torch.bool)
    score, info = reward.score(video, pool, pool_mask)
    score.sum().backward()
    assert info["missing"].tolist() == [False, True] and score[1] == 0 and score[0] != 0
    assert info["face_rate"].tolist() == pytest.approx([2 / 3, 0])
    assert video.grad[0, :, 0].any() and video.grad[0, :, 2].any() and not video.grad[0, :, 1].any()
    assert not video.grad[1].any()
    nobody, info = FaceReward(scripted([False] * 6), random_arcface()).score(video, pool, pool_mask)
    (grad,) = torch.autograd.grad(nobody.sum(), video)
    assert info["missing"].all() and not nobody.any() and not grad.any()


def test_frame_0_can_be_left_out_of_the_pool():
    video = smooth(3, 64, 64).float()[None].transpose(1, 2)
    pool, pool_mask = torch.randn(1, 4, 512), torch.ones(1, 4, dtype=torch.bool)

    def score(fsm="pool", **options):
        reward = FaceReward(scripted([True] * 3), random_arcface(), **options)
        return float(reward.score(video, pool, pool_mask, fsm)[0])

    _, info = FaceReward(scripted([True] * 3), random_arcface()).score(video, pool, pool_mask)
    cosine = F.cosine_similarity(info["embeddings"][0][:, None], pool[0][None], dim=-1)  # [3, 4]
    assert score() == pytest.approx(float(cosine.mean()), abs=1e-6)
    assert score(pool_first=False) == pytest.approx(float(cosine[:, 1:].mean()), abs=1e-6)
    # `first` compares with frame 0 whether or not the pool holds it
    assert score("first", pool_first=False) == pytest.approx(float(cosine[:, 0].mean()), abs=1e-6)


def two_people(swapped):
    """A detector of two faces a frame; in the `swapped` frames the other one is the larger."""
    left, right = turned(0.3, 0, (5.0, 8.0)).float(), turned(0.3, 8, (60.0, 40.0)).float()

    def detect(frames):
        sizes = [(30.0, 20.0) if not s else (20.0, 30.0) for s in swapped]
        return [
            Faces(
                torch.tensor([[5.0, 8.0, 5 + a, 8 + a], [60.0, 40.0, 60 + b, 40 + b]]),
                torch.ones(2),
                torch.cat([left, right]),
            )
            for a, b in sizes
        ]

    return detect


def test_each_of_two_people_is_scored_against_their_own_pool():
    """The larger face changes from frame to frame; who is who does not."""
    swapped = [False, True, True, False]
    still = smooth(1, 112, 112).float()
    video = still.repeat(4, 1, 1, 1)[None].transpose(1, 2).contiguous().requires_grad_()
    many = FaceReward(two_people(swapped), random_arcface())
    pool, mask = many.identities(video)
    assert pool.shape == (2, 4, 512) and mask.all()
    assert (pool[:, 1:] - pool[:, :1]).abs().max() < 1e-5 and (pool[0] - pool[1]).abs().max() > 0.1
    score, info = many.score(video, pool[None].detach(), mask[None])
    assert float(score) == pytest.approx(1, abs=1e-5) and info["mask"].all() and info["count"].eq(2).all()
    assert (info["boxes"][0, :, 0] == info["boxes"][0, 0, 0]).all()  # the first identity keeps its place
    crossed, _ = many.score(video, pool[None].flip(1).detach(), mask[None])
    assert float(crossed) == pytest.approx(1, abs=1e-5)  # an identity is found by its face, not by its number
    largest, _ = many.score(video, pool[None, 0].detach(), mask[None, 0])
    assert float(largest) < 0.9999  # the official choice compares the other person in two of the frames
    padded = torch.cat([pool, torch.zeros(1, 4, 512)])[None].detach(), torch.cat([mask, torch.zeros(1, 4).bool()])[None]
    assert float(many.score(video, *padded)[0]) == pytest.approx(1, abs=1e-5)  # an empty identity is nobody
    later = FaceReward(two_people(swapped), random_arcface(), pool_first=False)
    odd = pool[None].detach().clone()
    odd[:, :, 1:] = odd[:, :, 1:].flip(1)  # frame 0 says who is who, also where it is not in the pool
    assert float(later.score(video, odd, mask[None])[0]) < 0.9999
    (grad,) = torch.autograd.grad(many.score(video, pool.detach().roll(1, -1)[None], mask[None])[0].sum(), video)
    assert grad[0, :, :, 8:38, 5:38].any() and grad[0, :, :, 40:70, 60:90].any()


def test_faces_are_linked_over_time_whatever_their_order():
    a, b, c = F.normalize(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    frames = [torch.stack([a, b]), torch.stack([b, a]), torch.zeros(0, 64), torch.stack([b]), torch.stack([c, a, b])]
    noisy = [f + 0.05 * torch.randn(f.shape, generator=torch.Generator().manual_seed(1)) for f in frames]
    assert link_identities(noisy) == [[0, 1], [1, 0], [], [1], [2, 0, 1]]
    assert link_identities([]) == [] and link_identities([torch.zeros(0, 64)]) == [[]]


def test_a_clip_without_a_face_has_no_identities():
    pool, mask = FaceReward(scripted([False] * 3), random_arcface()).identities(torch.zeros(1, 3, 3, 64, 64))
    assert pool.shape == (0, 3, 512) and mask.shape == (0, 3)


@pytest.mark.parametrize("video", ["none", "nan", "small"])
def test_odd_clips_have_a_defined_result(video, reward):
    """No face at all; pixels that are not numbers; a frame smaller than the crop: score 0, or finite, never a crash."""
    clips = Clips(ASSETS / "data", "heldout")
    batch, frames = clips.batch([0]), to_tensor(clips.video(0)[:3])
    if video == "none":
        frames = torch.zeros_like(frames)
    elif video == "nan":
        frames = frames * torch.nan
    else:
        frames = F.interpolate(frames[0], scale_factor=0.5, mode="area")[None]
    frames.requires_grad_()
    score, info = reward.score(frames, batch["pool"], batch["pool_mask"])
    (grad,) = torch.autograd.grad(score.sum(), frames)
    assert score.isfinite().all()
    assert info["missing"].all() if video != "small" else grad.isfinite().all()
    if video != "small":
        assert score == 0 and not grad.nan_to_num(1.0).any()


def test_two_person_clips_keep_who_is_who(reward):
    """On held-out clips of two people, whose true landmarks are known: the right person in 99 % of frames."""
    right = total = 0
    for path in sorted((ASSETS / "clips/heldout").glob("*.json")):
        people = json.loads(path.read_text())["people"]
        if len(people) != 2:
            continue
        video = to_tensor(read_video(path.with_suffix(".mp4"))[0])
        pool, mask = reward.identities(video)
        assert len(pool) == 2
        anchors = torch.stack([p[m][0] for p, m in zip(pool, mask)])
        seen = reward.detect_and_embed(video, anchors[None])
        truth = torch.tensor([p["landmarks"] for p in people])  # [2, F, 5, 2]
        away = (seen["landmarks"][0][:, None] - truth[None]).norm(dim=-1).mean(-1)  # [identity, person, F]
        nearest = away.argmin(1)  # [identity, F]
        for k in range(2):
            who = nearest[k][seen["mask"][0, k]]
            right += int((who == who.mode().values).sum())
            total += len(who)
        assert nearest[0].mode().values != nearest[1].mode().values
    assert total > 100 and right >= 0.99 * total


def test_a_true_clip_scores_one_against_its_own_only_frame():
    reward = FaceReward(scripted([True]), random_arcface())
    video = smooth(1, 64, 64).float()[None].transpose(1, 2)
    seen = reward.detect_and_embed(video)
    score, _ = reward.score(video, seen["embeddings"], seen["mask"])
    assert float(score) == pytest.approx(1, abs=1e-5)


# ------------------------------------------------------------------------- the networks that ship


def test_a_true_clip_scores_high_against_itself_and_low_against_another(reward):
    clips = Clips(ASSETS / "data", "heldout")
    rows = clips.spread(6)
    batch = clips.batch(rows)
    same, other = [], []
    for k, row in enumerate(rows):
        video = to_tensor(clips.video(row))
        score, info = reward.score(video, batch["pool"][k : k + 1], batch["pool_mask"][k : k + 1])
        assert info["mask"].float().mean() > 0.9
        same.append(float(score))
        k = (k + 1) % len(rows)
        other.append(float(reward.score(video, batch["pool"][k : k + 1], batch["pool_mask"][k : k + 1])[0]))
    assert min(same) > max(other) and np.mean(same) > np.mean(other) + 0.3


def test_the_reward_has_a_gradient_at_the_pixels_of_the_face(reward):
    clips = Clips(ASSETS / "data", "heldout")
    video = to_tensor(clips.video(0)[:2]).requires_grad_()
    batch = clips.batch([1])
    score, info = reward.score(video, batch["pool"], batch["pool_mask"])
    score.sum().backward()
    assert torch.isfinite(video.grad).all()
    x, y = (int(z) for z in info["landmarks"][0, 0, 2])
    assert video.grad[0, :, 0, y - 2 : y + 3, x - 2 : x + 3].abs().sum() > 0


def test_grey_frames_show_no_face_and_metrics_say_so(reward):
    video = torch.zeros(1, 3, 5, 128, 128)
    info = reward.detect_and_embed(video)
    assert not info["mask"].any() and not info["embeddings"].any()
    metrics = clip_metrics(video, info, info)
    assert metrics == dict(facesim=None, facesim_from_1=None, face_rate=0.0, motion=None, tf=1.0)


def test_a_face_s_motion_is_its_landmarks_speed_in_its_own_size():
    boxes, points = torch.zeros(1, 4, 4), torch.rand(1, 1, 5, 2).repeat(1, 4, 1, 1)
    boxes[..., 2:] = torch.tensor([40.0, 10.0])  # a size of 20
    points[..., 0] += torch.tensor([0.0, 2, 9, 10])[:, None]  # 2, 7 and 1 px a frame
    info = dict(boxes=boxes, landmarks=points)
    for seen, motion in (
        ([True, True, True, True], pytest.approx(10 / 3 / 20)),
        ([True, True, False, True], pytest.approx(0.1)),  # only the first two are neighbours
        ([True, False, True, False], None),
    ):
        mask = torch.tensor([seen])
        assert clip_metrics(torch.zeros(1, 3, 4, 8, 8), info | dict(mask=mask))["motion"] == motion
