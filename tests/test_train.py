"""The main job in small: the step's gradient, its determinism, resuming, and the programs end to end."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from data import Clips
from model import ASSETS, add_lora, load_model, lora_disabled
from reward import FaceReward, velocity_kl
from sample import latent_size, noise_like, read_video, rollout, sigmas, velocity
from tests.test_cli import run

OPTIONS = train.TrainOptions(batch=2, lr=2e-3, window=2, sampling_steps=4)


@pytest.fixture(scope="module")
def scene():
    """The tiny model, its reward and two training clips with noise."""
    wan, reward = load_model("tiny"), FaceReward.from_folder(ASSETS)
    batch = Clips(ASSETS / "data", "train").batch([0, 5])
    shape = wan.preset.dit.out_dim, *latent_size(wan.preset, 17, (128, 128))
    noise = torch.stack([noise_like(shape, 3, k) for k in range(2)])
    torch.manual_seed(0)
    parameters = add_lora(wan.dit, 8)
    start = [p.detach().clone() for p in parameters]
    yield wan, reward, batch, noise, parameters
    for p, value in zip(parameters, start, strict=True):
        p.data.copy_(value)


def reset(parameters):
    for i, p in enumerate(parameters):
        p.data.zero_() if i % 2 else torch.nn.init.kaiming_uniform_(p.data, generator=torch.Generator().manual_seed(i))
        p.grad = None


@pytest.mark.slow
def test_a_few_steps_raise_the_reward_on_their_own_noise(scene):
    wan, reward, batch, noise, parameters = scene
    reset(parameters)
    optimizer = torch.optim.Adam(parameters, lr=OPTIONS.lr)
    rewards = []
    for _ in range(6):
        rewards.append(train.ipro_step(wan, reward, batch, OPTIONS, sigmas(4, 5.0), noise)["reward"])
        optimizer.step()
        optimizer.zero_grad()
    assert rewards[-1] > rewards[0] + 0.01, rewards


def test_the_kl_and_its_gradient_are_zero_at_the_reference(scene):
    wan, _, batch, noise, parameters = scene
    reset(parameters)
    s = sigmas(4, 5.0)
    x = rollout(wan.dit, noise, batch["first"], batch["context"], s, 1)[0]
    v = velocity(wan.dit, x, s[3], batch["context"])
    with torch.no_grad(), lora_disabled(wan.dit):
        v_ref = velocity(wan.dit, x, s[3], batch["context"])
    kl = velocity_kl(v, v_ref, float(s[3]))
    grads = torch.autograd.grad(kl, parameters, allow_unused=True)
    assert float(kl.detach()) == 0 and all(g is None or not g.any() for g in grads)


def test_a_sample_without_a_face_trains_on_kl_alone(scene, monkeypatch):
    wan, reward, batch, noise, parameters = scene
    reset(parameters)
    for p in parameters[1::2]:
        p.data += 0.02  # away from the reference, so that the KL has a gradient
    monkeypatch.setattr(wan.vae, "decode", lambda latent: 0 * latent.sum() + torch.zeros(1, 3, 17, 128, 128))
    row = train.ipro_step(wan, reward, batch, OPTIONS, sigmas(4, 5.0), noise)
    assert row["missing"] == 2 and row["reward"] is None and row["face_rate"] == 0
    assert row["kl"] > 0 and any(p.grad.abs().max() > 0 for p in parameters)
    assert all(torch.isfinite(p.grad).all() for p in parameters)


def test_the_step_data_are_a_function_of_seed_and_step():
    clips = Clips(ASSETS / "data", "train")
    seen = [train.batch_at(clips, OPTIONS, step)[1] for step in range(len(clips) // 2)]
    assert len({row for rows in seen for row in rows}) == len(clips) // 2 * 2  # an epoch repeats nothing
    assert seen[3] == train.batch_at(clips, OPTIONS, 3)[1]


QUICK = [
    "--steps",
    3,
    "--batch",
    1,
    "--sampling_steps",
    2,
    "--window",
    1,
    "--eval_clips",
    2,
    "--save_every",
    2,
]


@pytest.mark.slow
def test_train_sample_and_eval_run_and_the_same_seed_gives_the_same_log(tmp_path):
    logs = []
    for name in ("a", "b"):
        done = run("train.py", *QUICK, "--out", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "before" in done.stdout and "after" in done.stdout
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    assert len(logs[0]) == 3 and logs[0] == logs[1]
    assert {"reward", "face_rate", "kl", "motion", "grad_norm", "missing"} <= set(logs[0][0])
    frames, _ = read_video(tmp_path / "a/before_after.mp4")
    assert frames.shape == (17, 2 * 128, 3 * 128, 3)
    assert Image.open(tmp_path / "a/curves.png").size[0] > 500
    assert any(v.any() for k, v in load_file(tmp_path / "a/lora.safetensors").items() if "lora_B" in k)

    shutil.move(tmp_path / "a", tmp_path / "out")
    done = run("eval.py", "--clips", 2, "--sampling_steps", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for row in ("VAE", "base", "LoRA"):
        assert row in done.stdout
    assert (tmp_path / "eval/eval.mp4").exists() and len(
        json.loads((tmp_path / "eval/eval.json").read_text())["base"]
    ) == 2

    Image.fromarray(frames[0, :128, :128]).save(tmp_path / "face.png")
    done = run("sample.py", "--image", "face.png", "--prompt", "a man nods", "--steps", 2, "--lora",
               "out/lora.safetensors", "--out", "clip.mp4", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    clip, fps = read_video(tmp_path / "clip.mp4")
    assert clip.shape == (17, 128, 128, 3) and fps == 8
    assert np.abs(clip[0].astype(int) - frames[0, :128, :128]).mean() < 12  # the given frame, through VAE and H.264


@pytest.mark.slow
def test_a_resumed_run_ends_where_the_unbroken_one_does(tmp_path):
    assert run("train.py", *QUICK, "--out", "whole", cwd=tmp_path).returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/lora.safetensors").unlink()  # as if killed after the checkpoint of step 2
    done = run("train.py", *QUICK, "--out", "cut", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    a, b = (load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    done = run("train.py", *QUICK, "--lr", 1, "--out", "cut", "--resume", cwd=tmp_path)
    assert done.returncode == 2 and "--lr" in done.stderr
