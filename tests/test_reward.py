"""Detection, alignment, embedding, scoring and the KL, each against something written another way."""

import io

import numpy as np
import pytest
import torch

from model import ASSETS, UserError, write_safetensors
from reward import (
    TEMPLATE,
    ArcFace,
    FaceDetector,
    FaceReward,
    align,
    clip_metrics,
    face_score,
    nms,
    similarity,
    velocity_kl,
)

LANDMARKS = torch.tensor(
    [[[40.0, 50], [70, 48], [55, 65], [44, 80], [66, 79]], [[90, 31], [101, 42], [90, 43], [80, 46], [88, 54]]]
)


# ------------------------------------------------------------------------------------------------ the mechanism


@pytest.mark.parametrize("fsm", ["pool", "first", "aligned"])
def test_face_score_equals_a_loop_over_faces_that_are_there(fsm):
    torch.manual_seed(0)
    x, y = torch.randn(4, 5, 8).double(), torch.randn(4, 5, 8).double()
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()
    pool_mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]]).bool()
    score = face_score(x, mask, y, pool_mask, fsm)
    for b in range(4):
        values = []
        for i in range(5):
            others = [j for j in range(5) if pool_mask[b, j]]
            others = {"pool": others, "first": others[:1], "aligned": [j for j in others if j == i]}[fsm]
            if mask[b, i] and others:
                cos = [float(x[b, i] @ y[b, j] / x[b, i].norm() / y[b, j].norm()) for j in others]
                values.append(sum(cos) / len(cos))
        assert float(score[b]) == pytest.approx(sum(values) / len(values) if values else 0, abs=1e-12)


def test_a_clip_without_faces_scores_zero_with_zero_gradient():
    x = torch.zeros(1, 3, 8, requires_grad=True)
    score = face_score(x, torch.zeros(1, 3).bool(), torch.randn(1, 3, 8), torch.ones(1, 3).bool())
    score.sum().backward()
    assert float(score) == 0 and not x.grad.any()


def test_the_gradient_of_the_score_equals_finite_differences():
    torch.manual_seed(1)
    x, y = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 6).double()
    mask, pool_mask = torch.tensor([[1, 0, 1], [1, 1, 1]]).bool(), torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]).bool()
    assert torch.autograd.gradcheck(lambda e: face_score(e, mask, y, pool_mask), (x,), rtol=1e-6)


def test_velocity_kl_weights_and_leaves_the_pinned_frame_out():
    torch.manual_seed(0)
    v, v_ref = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    mean = (v - v_ref)[:, :, 1:].square().mean()
    assert torch.allclose(velocity_kl(v, v_ref, 0.4), mean / (2 * 0.4**2))
    assert torch.allclose(velocity_kl(v, v_ref, 0.4, "dt", dt=0.1), mean * 0.1**2 / (2 * 0.4**2))
    assert torch.allclose(velocity_kl(v, v_ref, 0.4, "uniform"), mean)
    moved = v.clone()
    moved[:, :, 0] += 5
    assert torch.equal(velocity_kl(moved, v_ref, 0.4), velocity_kl(v, v_ref, 0.4))
    with pytest.raises(ValueError, match="sigma, dt or uniform"):
        velocity_kl(v, v_ref, 0.4, "none")


# ------------------------------------------------------------------------------------------------ alignment


def test_the_similarity_equals_scikit_images_and_exact_landmarks_land_on_the_template():
    transform = pytest.importorskip("skimage.transform")
    a, b, tx, ty = similarity(LANDMARKS)
    for k, points in enumerate(LANDMARKS.numpy()):
        theirs = transform.SimilarityTransform.from_estimate(points, TEMPLATE.numpy()).params
        ours = np.array([[a[k], -b[k], tx[k]], [b[k], a[k], ty[k]], [0, 0, 1]])
        assert np.abs(ours - theirs).max() < 1e-5  # theirs is estimated in fp32
    turned = (TEMPLATE.double() @ torch.tensor([[0.4, 0.3], [-0.3, 0.4]]).double() + torch.tensor([7.0, 20.0]))[None]
    a, b, tx, ty = similarity(turned)
    x, y = turned[0].unbind(-1)
    landed = torch.stack([a * x - b * y + tx, b * x + a * y + ty], -1)
    assert (landed - TEMPLATE).abs().max() < 1e-9


def test_crops_equal_a_reference_warp_where_faces_are_enlarged():
    transform = pytest.importorskip("skimage.transform")
    torch.manual_seed(0)
    frames = torch.nn.functional.interpolate(torch.rand(2, 3, 32, 40) * 2 - 1, (128, 160), mode="bicubic").clamp(-1, 1)
    crops = align(frames, LANDMARKS)
    for frame, points, crop in zip(frames, LANDMARKS.numpy(), crops, strict=True):
        matrix = transform.SimilarityTransform.from_estimate(points, TEMPLATE.numpy())
        picture = (frame.permute(1, 2, 0).numpy() + 1) / 2
        warped = transform.warp(picture, matrix.inverse, output_shape=(112, 112), order=1, cval=0)
        inside = transform.warp(np.ones_like(picture), matrix.inverse, output_shape=(112, 112), order=0) > 0
        assert np.abs((crop.permute(1, 2, 0).numpy() + 1) / 2 - warped)[inside].mean() < 1 / 255
    assert crops.min() >= -1  # outside the frame is black


def test_a_face_larger_than_the_crop_is_averaged_not_skipped():
    stripes = torch.zeros(1, 3, 512, 512)
    stripes[..., ::2] = 1  # finer than the crop can hold: the mean is what is right
    crop = align(stripes, TEMPLATE[None] * 4 + 20)
    assert (crop[..., 8:-8, 8:-8] - 0.5).abs().max() < 0.05


def test_the_gradient_reaches_the_face_only_and_equals_finite_differences():
    frame = torch.rand(1, 1, 40, 40, dtype=torch.float64, requires_grad=True)
    points = TEMPLATE[None].double() * 0.12 + 9
    probe = torch.randn(1, 1, 112, 112, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: (align(f, points) * probe).sum(), (frame,), rtol=1e-6)
    (align(frame, points) * probe).sum().backward()
    assert frame.grad[0, 0, 10:21, 10:21].abs().min() > 0
    outside = frame.grad.clone()
    outside[..., 8:24, 8:24] = 0  # the crop's corners are at 9 and 22.4
    assert not outside.any()


def test_one_frame_may_hold_several_faces():
    frames = torch.rand(3, 3, 128, 160)
    crops = align(frames, LANDMARKS, torch.tensor([2, 2]))
    assert torch.allclose(crops[1:], align(frames[2:], LANDMARKS[1:]), atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.0])
def test_landmarks_that_give_no_similarity_are_refused(bad):
    with pytest.raises(ValueError, match="landmarks"):
        align(torch.zeros(1, 3, 8, 8), torch.full((1, 5, 2), bad))


# ------------------------------------------------------------------------------------------------ networks


def test_arcface_equals_its_onnx_export_and_is_read_back_from_a_state_dict(tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    model = ArcFace((1, 2, 1, 1), (8, 8, 12, 16)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.running_mean)
    crops = torch.rand(3, 3, 112, 112) * 2 - 1
    write_safetensors({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "a.pth")
    expected = model(crops)
    for name in ("a.safetensors", "a.pth"):
        read = ArcFace.from_file(tmp_path / name)
        assert torch.equal(read(crops), expected) and not any(p.requires_grad for p in read.parameters())
    graph = io.BytesIO()
    torch.onnx.export(model, (crops,), graph, dynamo=False)
    session = onnxruntime.InferenceSession(graph.getvalue(), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {session.get_inputs()[0].name: crops.numpy()})[0]
    assert np.abs(theirs - expected.detach().numpy()).max() < 1e-4  # fp32


def test_a_file_that_is_no_arcface_is_named(tmp_path):
    write_safetensors({"fc.weight": torch.zeros(2, 2)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="odd.safetensors: not an ArcFace"):
        ArcFace.from_file(tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="no such file"):
        ArcFace.from_file(tmp_path / "none.pth")


def test_nms_equals_the_plain_loop():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 60, (80, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (80, 2))], 1)
    scores = rng.random(80)
    kept = []
    for i in np.argsort(-scores):
        for j in kept:
            w = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0])
            h = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1])
            inter = max(w, 0) * max(h, 0)
            area = sum((boxes[k, 2] - boxes[k, 0]) * (boxes[k, 3] - boxes[k, 1]) for k in (i, j))
            if inter / (area - inter) > 0.4:
                break
        else:
            kept.append(i)
    assert nms(boxes, scores, 0.4).tolist() == kept


def test_the_nine_outputs_are_decoded_as_a_plain_loop_over_anchors_does():
    detector = FaceDetector(ASSETS / "detector.onnx")
    detector.size, detector.overlap = [64, 96], 1.0  # no suppression: every anchor above the threshold is compared
    rng = np.random.default_rng(0)
    outputs, expected = [], []
    for stride in (8, 16, 32):
        n = (64 // stride) * (96 // stride) * 2
        score, box, points = rng.random((n, 1)) ** 8, rng.random((n, 4)), rng.standard_normal((n, 10))
        outputs += [score, box, points]
        for row in range(64 // stride):
            for column in range(96 // stride):
                for anchor in range(2):
                    k = (row * (96 // stride) + column) * 2 + anchor
                    if score[k, 0] >= 0.5:
                        x, y = column * stride, row * stride
                        a, b, c, d = box[k] * stride
                        five = [(x + points[k, 2 * p] * stride, y + points[k, 2 * p + 1] * stride) for p in range(5)]
                        expected.append(
                            (score[k, 0], np.array([x - a, y - b, x + c, y + d]) / 0.5, np.array(five) / 0.5)
                        )
    outputs = [outputs[i].astype(np.float32) for i in (4, 0, 8, 1, 2, 3, 5, 6, 7)]  # in no particular order
    (faces,) = detector.decode(outputs, 1, 0.5)
    expected.sort(key=lambda e: -e[0])
    assert len(faces) == len(expected) > 5
    for k, (score, box, points) in enumerate(expected):
        assert faces.scores[k] == pytest.approx(score, abs=1e-6)
        assert np.abs(faces.boxes[k].numpy() - box).max() < 1e-3
        assert np.abs(faces.landmarks[k].numpy() - points).max() < 1e-3


def test_a_graph_that_is_no_scrfd_is_named_with_what_it_has(tmp_path):
    torch.onnx.export(torch.nn.Linear(3, 2), (torch.zeros(1, 3),), str(tmp_path / "odd.onnx"), dynamo=False)
    with pytest.raises(UserError, match=r"odd.onnx: not an SCRFD.*\[1, 2\]"):
        FaceDetector(tmp_path / "odd.onnx")
    (tmp_path / "torn.onnx").write_bytes(b"torn")
    with pytest.raises(UserError, match="torn.onnx: not a readable ONNX"):
        FaceDetector(tmp_path / "torn.onnx")
    with pytest.raises(UserError, match="no such file"):
        FaceDetector(tmp_path / "none.onnx")


# ------------------------------------------------------------------------------------------------ all together


@pytest.fixture(scope="module")
def reward():
    return FaceReward.from_folder(ASSETS)


def test_a_true_clip_scores_high_against_itself_and_low_against_another(reward):
    from data import Clips

    clips = Clips(ASSETS / "data", "heldout")
    rows = clips.spread(6)
    batch = clips.batch(rows)
    same, other = [], []
    from sample import to_tensor

    for k, row in enumerate(rows):
        video = to_tensor(clips.video(row))
        score, info = reward.score(video, batch["pool"][k : k + 1], batch["pool_mask"][k : k + 1])
        assert info["mask"].float().mean() > 0.9
        same.append(float(score))
        k = (k + 1) % len(rows)
        other.append(float(reward.score(video, batch["pool"][k : k + 1], batch["pool_mask"][k : k + 1])[0]))
    assert min(same) > max(other) and np.mean(same) > np.mean(other) + 0.3


def test_the_reward_has_a_gradient_at_the_pixels_of_the_face(reward):
    from data import Clips
    from sample import to_tensor

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
    info = reward.look(video)
    assert not info["mask"].any() and not info["embeddings"].any()
    metrics = clip_metrics(np.full((5, 128, 128, 3), 127, np.uint8), info, info)
    assert metrics == dict(facesim=None, face_rate=0.0, motion=None, tf=1.0)
