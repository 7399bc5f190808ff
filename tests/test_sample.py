"""The sampler's schedule, pinning and window gradient; pictures and clips on disk."""

import json
import shutil
import subprocess
import weakref

import av
import numpy as np
import pytest
import torch
from PIL import Image

from cli import UserError
from model import CONFIGS, DiTConfig, Experts, WanDiT
from reward import velocity_kl
from sample import (
    advance,
    best_size,
    cover_and_crop,
    fresh_noise,
    guided,
    latent_size,
    read_picture,
    read_video,
    rollout,
    seeded_noise,
    sigmas,
    to_frames,
    to_tensor,
    unipc,
    velocity,
    window_backward,
    with_first_frame,
    write_video,
)  # fmt: skip

CFG = DiTConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4, freq_dim=16, text_dim=8, text_len=6)


@pytest.fixture
def scene():
    """A random fp64 DiT with every weight in play, noise, first frame and context for two clips."""
    torch.manual_seed(0)
    dit = WanDiT(CFG).double()
    for p in dit.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    noise, first = torch.randn(2, 4, 3, 4, 4).double(), torch.randn(2, 4, 1, 4, 4).double()
    return dit, noise, first, torch.randn(2, 6, 8).double()


def run_backward(steps, penalty=None):
    """Go through `window_backward` as a training step does; returns the gradient at x_{N-K}."""
    for i, x, v, loss in steps:
        (loss if penalty is None else loss + penalty(v, x.detach(), i)).backward()
    return x.grad


def test_sigmas_are_the_published_schedule():
    expected = [1, 0.972, 0.9375, 0.893, 0.833, 0.75, 0.625, 0.417, 0]
    assert sigmas(8, 5.0).tolist() == pytest.approx(expected, abs=5e-4)
    assert sigmas(4, 1.0).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_sigmas_equal_diffusers_flow_match_scheduler():
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 9)[:-1])
    assert torch.allclose(scheduler.sigmas.double(), sigmas(8, 5.0), atol=1e-6)  # theirs are fp32


@pytest.mark.parametrize("steps, shift", [(1, 5.0), (2, 5.0), (3, 2.0), (8, 5.0), (50, 5.0)])
def test_unipc_equals_diffusers_scheduler(steps, shift):
    """The velocity is a nonlinear function of latent and time, so that every coefficient shows."""
    scheduler = pytest.importorskip("diffusers").UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
    )
    scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])  # the original's; diffusers' own differ
    first, noise = torch.randn(1, 2, 1, 2, 2), torch.randn(1, 2, 3, 2, 2)

    def dit(x, t, context):
        return torch.sin(3 * x) + t[:, None, :, None, None] / 1000 - x.roll(1, 2)

    x = with_first_frame(noise, first)
    for t in scheduler.timesteps:
        v = velocity(dit, x, t / 1000, None)
        x = with_first_frame(scheduler.step(v, t, x).prev_sample, first)
    ours = unipc(dit, noise.double(), first, None, steps, shift)
    assert (ours - x).abs().max() < 2e-4  # the scheduler computes its coefficients in fp32


def test_guidance_mixes_two_velocities_and_off_is_the_model(scene):
    dit, noise, _, context = scene
    null = torch.randn(1, 6, 8).double()
    t = torch.full((2, 3), 500.0)
    a, b = dit(noise, t, context), dit(noise, t, null.expand(2, -1, -1))
    assert torch.allclose(guided(dit, null, 3.5)(noise, t, context), b + 3.5 * (a - b))
    assert torch.allclose(guided(dit, null, 1.0)(noise, t, context), a)


def test_two_experts_switch_at_the_boundary_and_take_the_conditioning_on_channels():
    """Every step from t = 900 up is the high-noise expert's, and nothing is pinned: the picture is in y."""
    cfg = DiTConfig(
        dim=48, ffn_dim=64, num_heads=2, num_layers=1, in_dim=10, out_dim=4, freq_dim=16, text_dim=8, text_len=6
    )
    made = {name: WanDiT(cfg).requires_grad_(False) for name in ("high", "low")}
    for module in made.values():
        torch.nn.init.normal_(module.head.head.weight, std=0.1)
    asked = []
    for name, module in made.items():
        module.register_forward_hook(lambda m, inputs, out, name=name: asked.append((name, float(inputs[1].max()))))
    loads = []
    experts = Experts(cfg, 0.9, lambda name: loads.append(name) or made[name], keep=False)
    noise, y, context = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 6, 3, 4, 4), torch.randn(1, 6, 8)
    (x,) = rollout(experts, noise, None, context, sigmas(8, 5.0), y=y)
    assert [n for n, _ in asked] == ["high"] * 3 + ["low"] * 5 and loads == ["high", "low"]
    assert list(experts._modules) == ["low"]  # the other one was let go
    assert not torch.equal(x[:, :, 0], noise[:, :, 0])
    expected, s = noise, sigmas(8, 5.0).tolist()
    for i in range(8):
        v = made["high" if s[i] >= 0.9 else "low"](expected, torch.full((1,), 1000 * s[i]), context, y)
        expected = expected + (s[i + 1] - s[i]) * v
    assert torch.allclose(x, expected, atol=1e-5)


def test_the_window_gradient_without_pinning_equals_autograd_through_both_experts():
    cfg = DiTConfig(
        dim=48, ffn_dim=64, num_heads=2, num_layers=1, in_dim=10, out_dim=4, freq_dim=16, text_dim=8, text_len=6
    )
    torch.manual_seed(0)
    made = {name: WanDiT(cfg).double() for name in ("high", "low")}
    for p in [p for module in made.values() for p in module.parameters()]:
        p.data = p.data + 0.1 * torch.randn_like(p)
    made["high"].requires_grad_(False)
    experts = Experts(cfg, 0.9, made.get)
    noise, y, context = (torch.randn(1, *s).double() for s in ((4, 3, 4, 4), (6, 3, 4, 4), (6, 8)))
    s, probe = sigmas(6, 5.0), torch.randn(1, 4, 3, 4, 4).double()
    latents = rollout(experts, noise, None, context, s, 5, y=y)
    grad = run_backward(window_backward(experts, latents, s, context, probe, y=y))
    ours = [p.grad.clone() for p in made["low"].parameters()]
    made["low"].zero_grad()
    start = x = latents[0].clone().requires_grad_()
    for i in range(1, 6):
        x = x + float(s[i + 1] - s[i]) * velocity(experts, x, s[i], context, y)
    (x * probe).sum().backward()
    assert torch.allclose(grad, start.grad, rtol=1e-9, atol=1e-12)
    for a, p in zip(ours, made["low"].parameters()):
        assert torch.allclose(a, p.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name, picture, size", [
    ("wan5b", (1280, 704), (704, 1280)), ("wan5b", (704, 1280), (1280, 704)), ("wan5b", (1000, 1000), (928, 960)),
    ("wan5b", (1920, 817), (608, 1440)), ("wan14b", (832, 480), (480, 832)), ("wan14b", (1000, 1000), (624, 624)),
])  # fmt: skip
def test_the_output_takes_the_pictures_shape_at_the_presets_area(name, picture, size):
    """Expected sizes from running the original's best_output_size (5B) and the A14B pipeline's formula."""
    assert best_size(CONFIGS[name], *picture) == size


@pytest.mark.parametrize("window", [0, 1, 3, 5])
def test_rollout_pins_the_first_frame_in_every_latent_and_after_the_last_step(scene, window):
    dit, noise, first, context = scene
    latents = rollout(dit, noise, first, context, sigmas(5, 5.0), window)
    assert len(latents) == window + 1
    for x in latents:
        assert torch.equal(x[:, :, :1], first)
        assert not x.requires_grad


def test_rollout_is_the_plain_euler_solution(scene):
    dit, noise, first, context = scene
    s = sigmas(3, 5.0)
    x = with_first_frame(noise, first)
    for i in range(3):
        t = 1000 * s[i] * torch.tensor([[0.0, 1, 1]] * 2, dtype=torch.float64)
        x = torch.cat([first, (x + (s[i + 1] - s[i]) * dit(x, t, context))[:, :, 1:]], 2)
    assert torch.allclose(rollout(dit, noise, first, context, s)[0], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_window_gradient_equals_autograd_through_the_last_steps(scene, window):
    dit, noise, first, context = scene
    s, calls = sigmas(4, 5.0), []
    latents = rollout(dit, noise, first, context, s, window)
    target = torch.randn_like(noise)
    references = [torch.randn_like(noise) for _ in s]

    def penalty(v, x, i):
        return 0.1 * (i + 1) * (v - references[i])[:, :, 1:].square().mean()

    # the chain written out: start where the window starts, keep the graph of all its steps
    x = start = latents[0].clone().requires_grad_()
    loss = 0
    for i in range(4 - window, 4):
        v = velocity(dit, x, s[i], context)
        loss = loss + penalty(v, x, i)
        x = with_first_frame(x + float(s[i + 1] - s[i]) * v, first)
    assert torch.allclose(x, latents[-1], rtol=1e-12, atol=1e-12)
    loss = loss + (x * target).sum()
    expected = torch.autograd.grad(loss, [start, *dit.parameters()])

    with dit.register_forward_hook(lambda *_: calls.append(0)):
        at_start = run_backward(window_backward(dit, latents, s, context, target), penalty)
    assert len(calls) == window
    for p, e in zip(dit.parameters(), expected[1:], strict=True):
        assert (p.grad - e).norm() <= 1e-9 * e.norm()
    free = expected[0].clone()
    free[:, :, :1] = 0  # the first frame is given: what reaches it is dropped
    at_start = torch.cat([0 * at_start[:, :, :1], at_start[:, :, 1:]], 2)
    assert (at_start - free).norm() <= 1e-9 * free.norm()


def test_the_kl_s_gradient_passes_through_v_s_latent_and_not_through_the_reference_s(scene):
    """What `velocity_kl` says of a step's gradient: the official code's, not the whole chain's nor one at fixed x."""
    dit, noise, first, context = scene
    torch.manual_seed(1)
    reference = WanDiT(CFG).double().requires_grad_(False)
    for p in reference.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    s = sigmas(4, 5.0)
    latents = rollout(dit, noise, first, context, s, 3)

    def chain(of_v, of_reference):
        x, loss = latents[0], 0
        for i in range(1, 4):
            v = velocity(dit, x, s[i], context)
            seen = v if of_v else velocity(dit, x.detach(), s[i], context)
            v_ref = velocity(reference, x if of_reference else x.detach(), s[i], context)
            loss = loss + velocity_kl(seen, v_ref, float(s[i])).sum()
            x = with_first_frame(x + float(s[i + 1] - s[i]) * v, first)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(dit.parameters()))])

    def penalty(v, x, i):
        with torch.no_grad():
            v_ref = velocity(reference, x, s[i], context)
        return velocity_kl(v, v_ref, float(s[i])).sum()

    run_backward(window_backward(dit, latents, s, context, torch.zeros_like(noise)), penalty)
    ours = torch.cat([p.grad.flatten() for p in dit.parameters()])
    assert (ours - chain(True, False)).norm() <= 1e-9 * ours.norm()
    for other in (chain(True, True), chain(False, False)):
        assert (ours - other).norm() > 1e-3 * ours.norm()


def test_window_backward_keeps_one_step_graph_alive(scene):
    dit, noise, first, context = scene
    s = sigmas(4, 5.0)
    latents = rollout(dit, noise, first, context, s, 4)
    saved, found = weakref.WeakSet(), []

    class Saved:  # what a graph keeps of a tensor; gone when the graph is
        def __init__(self, x):
            self.x = x
            saved.add(self)

    dit.register_forward_pre_hook(lambda *_: found.append(len(saved)))
    dit.register_forward_hook(lambda *_: found.append(len(saved)))
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda held: held.x):
        run_backward(window_backward(dit, latents, s, context, torch.ones_like(noise)))
    before, after = found[::2], found[1::2]
    assert before == [0] * 4 and min(after) > 50 and not saved


def test_a_window_longer_than_the_rollout_is_refused(scene):
    dit, noise, first, context = scene
    with pytest.raises(ValueError, match="window is 5"):
        rollout(dit, noise, first, context, sigmas(4, 5.0), 5)


def test_noise_depends_on_its_seeds_only():
    assert torch.equal(seeded_noise((3, 4), 1, 2), seeded_noise((3, 4), 1, 2))
    assert not torch.equal(seeded_noise((3, 4), 1, 2), seeded_noise((3, 4), 2, 1))
    assert abs(seeded_noise((100000,), 5).std() - 1) < 0.02


def test_latent_size_refuses_frame_counts_that_are_not_4n_plus_1():
    tiny = CONFIGS["tiny"]
    assert latent_size(tiny, 17, (128, 128))[0] == 5
    assert latent_size(CONFIGS["wan5b"], 121, (704, 1280)) == (31, 44, 80)
    assert latent_size(CONFIGS["wan14b"], 81, (480, 832)) == (21, 60, 104)
    with pytest.raises(UserError, match="nearest is 17"):
        latent_size(tiny, 16, (128, 128))
    with pytest.raises(UserError, match="multiples of 32"):
        latent_size(CONFIGS["wan5b"], 121, (720, 1280))


def test_fit_covers_and_crops_the_centre():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    out = cover_and_crop(image, (64, 64))
    assert out.shape == (64, 64, 3) and (out[:, 4:-4] == (0, 0, 255)).all()


def test_video_survives_the_codec_and_the_tensor_round_trip(tmp_path):
    y, x = np.mgrid[:64, :96]
    frames = np.stack([np.stack([x * 2, y * 3, 0 * x + 8 * k], -1) for k in range(9)]).astype(np.uint8)
    write_video(tmp_path / "a.mp4", frames, 8)
    back, fps = read_video(tmp_path / "a.mp4")
    assert back.shape == frames.shape and fps == 8
    assert np.abs(back.astype(int) - frames).mean() < 3  # H.264 at 4:2:0
    assert np.array_equal(to_frames(to_tensor(frames)), frames)
    assert not list(tmp_path.glob("*.part"))


def test_unreadable_pictures_and_videos_are_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    for call, name in ((read_picture, "bad.png"), (read_video, "bad.mp4")):
        with pytest.raises(UserError, match=name):
            call(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        read_picture(tmp_path / "none.png")


# ------------------------------------------------------------------------- fresh noise at every step; BT.709

TINY = DiTConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=1, in_dim=4, out_dim=4, freq_dim=16, text_dim=8, text_len=6
)


def renoise_scene(kind):
    """A DiT in fp64, noise, the first frame's latent or y, context, and the noise of 4 steps."""
    torch.manual_seed(0)
    dit = WanDiT(TINY if kind == "first" else DiTConfig(**{**vars(TINY), "in_dim": 7}))
    for p in dit.parameters():
        p.data = p.data + 0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5
    noise, context = torch.randn(2, 4, 3, 4, 4).double(), torch.randn(2, 6, 8).double()
    first = torch.randn(2, 4, 1, 4, 4).double() if kind == "first" else None
    y = None if kind == "first" else torch.randn(2, 3, 3, 4, 4).double()
    fresh = [*(torch.randn(2, 4, 3, 4, 4).double() for _ in range(3)), None]
    return dit.double(), noise, first, y, context, fresh


def test_the_schedule_is_turbos():
    """1000, 750, 500, 250 through shift 5."""
    t = torch.tensor([1000.0, 750.0, 500.0, 250.0], dtype=torch.float64) / 1000
    assert torch.allclose(sigmas(4, 5.0), torch.cat([5 * t / (1 + 4 * t), t.new_zeros(1)]))


@pytest.mark.parametrize("kind", ["first", "y"])
def test_a_rollout_with_fresh_noise_predicts_the_data_and_noises_it_again(kind):
    dit, noise, first, y, context, fresh = renoise_scene(kind)
    sigma = sigmas(4, 5.0)
    latents = rollout(dit, noise, first, context, sigma, 4, y, fresh=fresh)
    x = with_first_frame(noise, first)
    with torch.no_grad():
        for i in range(4):
            assert torch.equal(latents[i], x)
            x0 = x - float(sigma[i]) * velocity(dit, x, sigma[i], context, y)
            x = x0 if i == 3 else (1 - float(sigma[i + 1])) * x0 + float(sigma[i + 1]) * fresh[i]
            x = with_first_frame(x, first)
    assert torch.allclose(latents[4], x, rtol=1e-12, atol=1e-12)
    euler = rollout(dit, noise, first, context, sigma, 0, y)
    assert torch.equal(euler[0], rollout(dit, noise, first, context, sigma, 0, y, fresh=[None] * 4)[0])
    assert (euler[0] - latents[4]).abs().max() > 0.1


@pytest.mark.parametrize("kind, window", [("first", 3), ("y", 2), ("first", 4), ("y", 1)])
def test_its_window_gradient_is_autograds(kind, window):
    """Of sum(probe x_N) and a penalty on each step's velocity, through the truncated chain, in fp64."""
    dit, noise, first, y, context, fresh = renoise_scene(kind)
    sigma, probe = sigmas(4, 5.0), torch.randn(2, 4, 3, 4, 4).double()
    latents = rollout(dit, noise, first, context, sigma, window, y, fresh=fresh)
    x, loss = latents[0], 0
    for i in range(4 - window, 4):
        v = velocity(dit, x, sigma[i], context, y)
        loss = loss + 0.1 * v.square().sum()
        x = with_first_frame(advance(x, v, sigma[i], sigma[i + 1], fresh[i]), first)
    parameters = [p for p in dit.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss + (probe * x).sum(), parameters)
    dit.zero_grad()
    steps = []
    for i, _, v, part in window_backward(dit, latents, sigma, context, probe, y, fresh):
        (part + 0.1 * v.square().sum()).backward()
        steps.append(i)
    assert steps == list(range(3, 3 - window, -1))
    for p, g in zip(parameters, expected, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-9, atol=1e-10)


def test_fresh_noise_is_the_samples_own_and_new_at_every_step():
    a, b = fresh_noise((1, 2, 3), 4, (7, 1)), fresh_noise((1, 2, 3), 4, (7, 2))
    assert a[-1] is None and len(a) == 4
    both = fresh_noise((2, 2, 3), 4, (7, 1), (7, 2))
    assert all(torch.equal(x, torch.cat([y, z])) for x, y, z in zip(both[:3], a, b))
    drawn = [seeded_noise((1, 2, 3), 7, 1), *a[:3], *b[:3]]
    assert not any(torch.equal(p, q) for i, p in enumerate(drawn) for q in drawn[:i])


COLOURS = ((200, 60, 40), (40, 160, 70), (30, 60, 200), (235, 235, 235), (16, 16, 16), (224, 172, 138))


def clip(path):
    frames = np.zeros((4, 64, 32 * len(COLOURS), 3), np.uint8)
    for i, colour in enumerate(COLOURS):
        frames[:, :, 32 * i : 32 * i + 32] = colour
    write_video(path, frames, 8)
    return frames


def middles(frames):
    return np.stack([frames[:, 16:48, 32 * i + 8 : 32 * i + 24].mean((0, 1, 2)) for i in range(len(COLOURS))])


def test_a_written_clip_says_that_it_is_bt709_and_reads_back(tmp_path):
    frames = clip(tmp_path / "clip.mp4")
    back, fps = read_video(tmp_path / "clip.mp4")
    assert back.shape == frames.shape and fps == 8
    assert np.abs(middles(back) - COLOURS).max() <= 2  # limited range's steps, and swscale's fast rounding
    with av.open(str(tmp_path / "clip.mp4")) as container:
        about = container.streams.video[0].codec_context
        assert (about.colorspace, about.color_range, about.color_primaries, about.color_trc) == (1, 1, 1, 1)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="compares with the ffmpeg program")
@pytest.mark.parametrize("matrix", ["", ":in_color_matrix=bt709"])  # by the file's own word; by what players assume
def test_ffmpeg_shows_the_colours_that_were_written(matrix, tmp_path):
    frames = clip(tmp_path / "clip.mp4")
    height, width = frames.shape[1:3]
    scale = f"scale=flags=accurate_rnd+full_chroma_int{matrix},format=rgb24"
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "clip.mp4", "-vf", scale, "-f", "rawvideo", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    shown = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
    assert np.abs(middles(shown) - COLOURS).max() <= 1  # limited range's steps
    command = ["ffprobe", "-v", "error", "-show_streams", "-of", "json", tmp_path / "clip.mp4"]
    stream = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["streams"][0]
    names = ("color_space", "color_range", "color_primaries", "color_transfer")
    assert [stream[n] for n in names] == ["bt709", "tv", "bt709", "bt709"]


def test_a_picture_of_16_bit_grey_is_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    seen = np.asarray(read_picture(tmp_path / "grey.png"))
    assert seen.shape == (4, 64, 3) and np.abs(seen[0, :, 0] - ramp[0] / 257).max() <= 0.5
