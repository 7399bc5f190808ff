"""The main job in small: the step's gradient, its determinism, resuming, and the programs end to end."""

import dataclasses
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from data import Clips
from model import ASSETS, CONFIGS, UserError, add_lora, load_model, untuned
from reward import FaceReward, velocity_kl
from sample import noise_like, read_video, rollout, sigmas, to_tensor, velocity
from tests.test_cli import REPO, run

OPTIONS = train.TrainOptions(batch=2, micro_batch=2, lr=2e-3, window=2, sampling_steps=4, warmup=0, precision="fp32")


def job_of(wan, reward, **changes):
    """A `Run` of one process on the tiny model."""
    options = dataclasses.replace(OPTIONS, **changes)
    schedule = sigmas(options.sampling_steps, 5.0)
    return train.Run(wan, wan.dit, wan.dit, untuned(wan.dit), options, schedule, 1 / options.batch, reward)


@pytest.fixture(scope="module")
def scene():
    """The tiny model in a `Run`, two training clips with noise, and the LoRA's parameters."""
    wan, reward = load_model("tiny"), FaceReward.from_folder(ASSETS)
    clips = Clips(ASSETS / "data", "train")
    batch = clips.batch([0, 5])
    noise = torch.stack([noise_like(clips.latent_shape(wan.preset, 0), 3, k) for k in range(2)])
    torch.manual_seed(0)
    parameters = add_lora(wan.dit, 8)
    return job_of(wan, reward), batch, noise, parameters


def reset(parameters, B=0.0):
    for i, p in enumerate(parameters):
        p.data.fill_(B) if i % 2 else torch.nn.init.kaiming_uniform_(p.data, generator=torch.Generator().manual_seed(i))
        p.grad = None


def test_a_run_takes_its_noise_levels_from_shift():
    job = train.prepare(dataclasses.replace(OPTIONS, shift=2.0), 1, torch.device("cpu"))
    assert torch.equal(job.sigma, sigmas(4, 2.0)) and job.wan.preset.shift == 2.0  # held-out clips', and sft's
    job = train.prepare(OPTIONS, 1, torch.device("cpu"))
    assert torch.equal(job.sigma, sigmas(4, CONFIGS["tiny"].shift))


@pytest.mark.slow
def test_a_few_steps_raise_the_reward_on_their_own_noise(scene):
    job, batch, noise, parameters = scene
    reset(parameters)
    optimizer = torch.optim.Adam(parameters, lr=OPTIONS.lr)
    rewards = []
    for _ in range(4):
        rewards.append(np.mean([row["reward"] for row in train.ipro_step(job, batch, noise)]))
        optimizer.step()
        optimizer.zero_grad()
    assert rewards[-1] > rewards[0] + 0.01, rewards


def test_the_kl_and_its_gradient_are_zero_at_the_reference(scene):
    job, batch, noise, parameters = scene
    reset(parameters)
    x = rollout(job.wan.dit, noise, batch["first"], batch["context"], job.sigma, 1)[0]
    v = velocity(job.model, x, job.sigma[3], batch["context"])
    with torch.no_grad():
        v_ref = velocity(job.reference, x, job.sigma[3], batch["context"])
    kl = velocity_kl(v, v_ref, float(job.sigma[3]))
    grads = torch.autograd.grad(kl, parameters, allow_unused=True)
    assert float(kl.detach()) == 0 and all(g is None or not g.any() for g in grads)


def test_a_sample_without_a_face_trains_on_kl_alone(scene, monkeypatch):
    job, batch, noise, parameters = scene
    reset(parameters, 0.02)  # away from the reference, so that the KL has a gradient
    monkeypatch.setattr(job.wan.vae, "decode", lambda z, *_, **__: 0 * z.sum() + torch.zeros(len(z), 3, 17, 128, 128))
    rows = train.ipro_step(job, batch, noise)
    line = train.averaged(rows)
    assert line["missing"] == 2 and line["reward"] is None and line["face_rate"] == 0
    assert line["kl"] > 0 and any(p.grad.abs().max() > 0 for p in parameters)
    assert all(torch.isfinite(p.grad).all() for p in parameters)


def test_micro_batches_accumulate_the_whole_batch_s_gradient(scene):
    job, batch, noise, parameters = scene
    reset(parameters, 0.01)
    train.ipro_step(job, batch, noise)
    whole = [p.grad.clone() for p in parameters]
    reset(parameters, 0.01)
    for b in range(2):
        part = {k: v[b : b + 1] for k, v in batch.items()}
        train.ipro_step(job, part, noise[b : b + 1])
    largest = max(float(g.abs().max()) for g in whole)
    for p, g in zip(parameters, whole):  # fp32: other sizes of products move the landmarks a little
        assert (p.grad - g).abs().max() <= 5e-4 * largest


def test_the_reward_clip_holds_for_each_clip_by_itself(scene):
    job, batch, noise, _ = scene
    (latent,) = rollout(job.wan.dit, noise, batch["first"], batch["context"], job.sigma)
    free, _ = train.reward_gradient(job, batch, noise, latent)
    norms = free.flatten(1).norm(dim=1)
    limit = float(norms.mean())  # between the two clips' norms
    assert norms.min() < limit < norms.max()
    clipping = dataclasses.replace(job, options=dataclasses.replace(job.options, reward_clip=limit / job.share))
    clipped, _ = train.reward_gradient(clipping, batch, noise, latent)
    assert torch.allclose(clipped, free * (limit / norms).clamp(max=1).view(-1, 1, 1, 1, 1), rtol=1e-5)


def test_held_out_clips_are_the_same_alone_and_together(scene):
    job, rows = scene[0], [4, 0, 7]
    sample = functools.partial(train.held_out, job.wan, job.reward, Clips(ASSETS / "data", "heldout"), rows, 1,
                               precision="fp32")  # fmt: skip
    (alone, videos), (together, again) = sample(), sample(at_once=2)
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-3) and one["face_rate"] > 0
    for one, other in zip(videos, again, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_the_memory_switches_leave_the_gradient_and_the_face_window_nearly_does(scene):
    job, batch, noise, parameters = scene
    grads = []
    for switches in ({}, dict(decode_frames=2), dict(decode_frames=2, face_window=1)):
        reset(parameters, 0.01)
        rows = train.ipro_step(dataclasses.replace(job, options=dataclasses.replace(job.options, **switches)),
                               batch, noise)  # fmt: skip
        assert not any(row["missing"] for row in rows)
        grads.append(torch.cat([p.grad.flatten() for p in parameters]))
    plain, streamed, windowed = grads
    assert (streamed - plain).norm() < 1e-3 * plain.norm()  # fp32: 1.7e-4 was seen; in fp64 the decode agrees to 1e-10
    assert torch.cosine_similarity(windowed, plain, dim=0) > 0.99


def test_only_the_drawn_frames_are_scored(scene):
    job, batch, noise, _ = scene
    looked = train.scored_frames(noise[0], 17, 4)
    assert len(looked) == 4 and torch.equal(looked, looked.unique())
    assert torch.equal(looked, train.scored_frames(noise[0], 17, 4))
    assert not torch.equal(looked, train.scored_frames(noise[1], 17, 4))
    video = to_tensor(Clips(ASSETS / "data", "train").video(batch["row"][0])).requires_grad_()
    score, info = job.reward.score(video, batch["pool"][:1], batch["pool_mask"][:1], only=looked)
    score.sum().backward()
    others = [i for i in range(17) if i not in looked]
    assert info["mask"][0, looked].all() and not info["mask"][0, others].any() and info["face_rate"] == 1
    assert not video.grad[:, :, others].any() and video.grad[:, :, looked].any()


def test_the_plan_runs_the_step_without_data_and_streaming_lowers_its_peak():
    from plan import simulate

    options = train.TrainOptions(model="tiny", sampling_steps=2, window=1)
    whole = simulate(options, 33, (128, 128))
    parts = simulate(dataclasses.replace(options, decode_frames=2), 33, (128, 128))
    dit = load_model("tiny").dit
    assert whole.sizes["transformer"] < 4 * sum(p.numel() for p in dit.parameters())  # bf16 but for the norms
    assert parts.peaks["decode"] < whole.peaks["decode"] and parts.flops["window"] == whole.flops["window"] > 0
    rests = simulate(dataclasses.replace(options, offload=True), 33, (128, 128))  # the network that is not at work
    for phase, network in (("rollout", "VAE"), ("decode", "transformer"), ("window", "VAE")):
        assert 0.7 < (whole.peaks[phase] - rests.peaks[phase]) / whole.sizes[network] <= 1, phase
    everything = dataclasses.replace(options, lora_rank=0)
    alone, shared = (simulate(dataclasses.replace(everything, gpus=n), 5, (128, 128)) for n in (1, 4))
    parts = ("transformer", "reference", "gradients", "optimizer")
    for name in parts:
        assert shared.sizes[name] == pytest.approx(alone.sizes[name] / 4, rel=0.01), name
    saved = 0.75 * sum(alone.sizes[name] for name in parts)
    assert 0.8 * saved < alone.peaks["optimizer"] - shared.peaks["optimizer"] < saved  # two gathered blocks come on top
    assert all(0 < shared.peaks[phase] < alone.peaks[phase] for phase in alone.peaks)


def test_the_step_data_are_a_function_of_seed_and_step():
    clips = Clips(ASSETS / "data", "train")
    seen = [train.batch_at(clips, OPTIONS, step, range(2))["row"] for step in range(len(clips) // 2)]
    assert len({row for rows in seen for row in rows}) == len(clips) // 2 * 2  # an epoch repeats nothing
    assert seen[3] == train.batch_at(clips, OPTIONS, 3, range(2))["row"]
    assert seen[3][1:] == train.batch_at(clips, OPTIONS, 3, range(1, 2))["row"]  # another rank's part


def test_the_ranks_share_a_batch_without_overlap_and_refuse_one_that_does_not_divide():
    options = dataclasses.replace(OPTIONS, batch=12, micro_batch=2)
    parts = [[k for numbers in train.samples_of(options, rank, 3) for k in numbers] for rank in range(3)]
    assert [k for part in parts for k in part] == list(range(12)) and all(len(p) == 4 for p in parts)
    with pytest.raises(UserError, match="--batch 12 is no multiple of 10"):
        train.samples_of(options, 0, 5)


def test_muon_takes_the_blocks_matrices_and_adam_what_is_left():
    dit, options = load_model("tiny").dit.requires_grad_(True), dataclasses.replace(OPTIONS, optimizer="muon")
    muon, adam = train.optimizers(options, dit)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adam, torch.optim.Adam)
    taken = [p for optimizer in (muon, adam) for group in optimizer.param_groups for p in group["params"]]
    assert len(taken) == len(set(taken)) == len(list(dit.parameters()))
    lora = add_lora(dit, 4)  # all of it matrices: nothing is left
    (muon,) = train.optimizers(options, dit)
    assert isinstance(muon, torch.optim.Muon) and set(muon.param_groups[0]["params"]) == set(lora)


@pytest.mark.parametrize("broken", ["reward", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(scene, broken, monkeypatch):
    job, _, _, parameters = scene
    reset(parameters, 0.01)
    clips, steppers = Clips(ASSETS / "data", "train"), train.optimizers(job.options, job.tuned)
    scored = job.reward.score

    factors = iter([1.0, float("nan")])  # the second sample's is not finite

    def score(video, *rest):
        value, info = scored(video, *rest)
        return value * next(factors), info

    if broken == "reward":
        monkeypatch.setattr(job.reward, "score", score)
    else:
        parameters[0].register_hook(lambda g: g * float("inf"))
    before = [p.detach().clone() for p in parameters]
    line = train.take_step(job, clips, 0, [range(0, 1), range(1, 2)], steppers)
    assert line["skipped"] and all(torch.equal(p, q) for p, q in zip(parameters, before))
    if broken == "gradient":
        parameters[0]._backward_hooks.clear()
    else:
        monkeypatch.undo()
    line = train.take_step(job, clips, 0, [range(0, 1), range(1, 2)], steppers)
    assert not line["skipped"] and not any(torch.equal(p, q) for p, q in zip(parameters, before))


# --------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    """Eight clips' latents, of noise: enough for runs whose steps take a tenth of a second."""
    folder, g = tmp_path_factory.mktemp("set"), torch.Generator().manual_seed(0)
    with open(folder / "index.jsonl", "w") as index:
        for i in range(8):
            latent = torch.randn(48, 2, 4, 4, generator=g)
            save_file(dict(latent=latent, first=latent[:, :1].clone(), context=torch.randn(3, 128, generator=g)),
                      folder / f"{i}.safetensors")  # fmt: skip
            print(json.dumps(dict(clip=str(i), split="train", cache=f"{i}.safetensors", caption="a", frames=5,
                                  size=[32, 32])), file=index)  # fmt: skip
    return folder


KILLS = int(os.environ.get("KILLS", 4))  # KILLS=20 pytest -k killed: a longer trial than CI's
STEPS = 3 * KILLS
SFT = "--objective sft --lora_rank 4 --batch 4 --micro_batch 1 --save_every 1 --lr 1e-3 --seed 3".split()


def launch(ranks):
    """How a program starts: as one process (0), or as torchrun's `ranks`, which meet at a port that is free."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node {ranks}".split() if ranks else ()
    return [sys.executable, *torchrun]


def sft(cwd, data, *more, out="out", ranks=0, **popen):
    """Start a short supervised run, of one process or of torchrun's `ranks`; returns it."""
    command = [*launch(ranks), REPO / "train.py", *SFT, "--steps", STEPS, "--data", data, "--out", out, *more]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.Popen([str(c) for c in command], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **popen)  # fmt: skip


def weights(path):
    return load_file(path / "lora.safetensors")


def assert_equal(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for k in a:
        assert (a[k] - b[k]).abs().max() <= tolerance * a[k].abs().max(), k


GRADIENT = """
import dataclasses, sys, torch, train
from data import Clips
from model import ASSETS
from reward import FaceReward
from safetensors.torch import save_file
rank, ranks, device = train.start_ranks()
torch.manual_seed(0)
lora_rank, *graphs = map(int, sys.argv[1:])
options = train.TrainOptions(batch=4, micro_batch=1, window=2, sampling_steps=3, lora_rank=lora_rank, precision="fp32")
job = train.prepare(options, ranks, device)
job.reward = FaceReward.from_folder(ASSETS)
with torch.no_grad():
    for name, p in job.tuned.named_parameters():
        if "lora_B" in name:
            p.fill_(0.01)
clips = Clips(ASSETS / "data", "train")
whole = lambda g: (g.full_tensor() if hasattr(g, "full_tensor") else g).contiguous()
for kept in graphs:
    job.options = dataclasses.replace(options, kept_graphs=kept)
    line = train.take_step(job, clips, 0, train.samples_of(options, rank, ranks), [])
    grads = {n: whole(p.grad) for n, p in job.tuned.named_parameters() if p.requires_grad}
    grads["log"] = torch.tensor([line["reward"], line["kl"], line["grad_norm"]])
    if rank == 0:
        save_file(grads, f"{ranks}-ranks-{kept}-kept.safetensors")
    job.model.zero_grad()
train.leave_ranks()
"""


def gradients(folder, lora_rank, graphs, ranks=0):
    """The gradient and the log of a step that so many ranks make, by how many graphs they keep."""
    (folder / "gradient.py").write_text(GRADIENT)
    environment = os.environ | dict(PYTHONPATH=str(REPO), OMP_NUM_THREADS="1")  # as torchrun sets it
    command = [*launch(ranks), "gradient.py", str(lora_rank), *map(str, graphs)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [load_file(folder / f"{max(ranks, 1)}-ranks-{kept}-kept.safetensors") for kept in graphs]


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank, graphs", [(4, (0, 1)), (0, (0, 2))])  # under DDP; all weights, under FSDP2
def test_two_ranks_have_the_gradient_of_one(tmp_path, lora_rank, graphs):
    # of a kept step the LoRA is computed apart, of another one it is added to the weights: like is compared with like
    ones = gradients(tmp_path, lora_rank, graphs) if lora_rank else gradients(tmp_path, lora_rank, graphs[:1]) * 2
    for one, two in zip(ones, gradients(tmp_path, lora_rank, graphs, ranks=2), strict=True):
        assert one.keys() == two.keys()
        assert torch.allclose(one["log"], two["log"], rtol=1e-5, atol=1e-7)
        names = one.keys() - {"log"}
        largest = max(float(one[name].abs().max()) for name in names)
        assert largest > 0
        for name in names:  # fp32: sums in another order
            assert (one[name] - two[name]).abs().max() <= 1e-5 * largest, name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, small_set):
    folder = tmp_path_factory.mktemp("unbroken")
    run_ = sft(folder, small_set)
    text, _ = run_.communicate()
    assert run_.returncode == 0, text
    return weights(folder / "out")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_unbroken_run_s_weights(tmp_path, small_set, unbroken):
    """SIGKILL at random moments, three steps to a kill."""
    rng, resume, codes = random.Random(0), (), []
    for _ in range(KILLS):
        run_ = sft(tmp_path, small_set, *resume)
        for line in run_.stdout:  # the bar's first output: training is about to begin
            if "sft:" in line:
                break
        time.sleep(rng.uniform(0, 0.4))
        run_.send_signal(signal.SIGKILL)
        codes.append(run_.wait())
        resume = ("--resume",) if (tmp_path / "out/options.json").exists() else ()
    run_ = sft(tmp_path, small_set, *resume)
    text, _ = run_.communicate()
    assert run_.returncode == 0 and -signal.SIGKILL in codes, (codes, text)
    assert not list((tmp_path / "out/checkpoints").glob("*.part"))
    assert_equal(weights(tmp_path / "out"), unbroken)


@pytest.mark.slow
def test_tensorboard_reads_the_log_of_a_resumed_run(tmp_path, small_set):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for more in (("--steps", 3), ("--steps", 5, "--resume")):
        text, _ = (run_ := sft(tmp_path, small_set, *more)).communicate()
        assert run_.returncode == 0, text
    board = accumulator.EventAccumulator(str(tmp_path / "out/tensorboard"))
    board.Reload()
    rows = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(5))
    for name in ("loss", "grad_norm"):
        events = board.Scalars(name)
        assert [e.step for e in events] == list(range(5))
        assert np.allclose([e.value for e in events], [row[name] for row in rows])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, small_set, unbroken):
    run_ = sft(tmp_path, small_set)
    run_.communicate()
    newest = sorted((tmp_path / "out/checkpoints").iterdir())[-1]
    torn = next(newest.glob("*.distcp"))
    torn.write_bytes(torn.read_bytes()[:-100])
    (tmp_path / "out/lora.safetensors").unlink()
    run_ = sft(tmp_path, small_set, "--resume")
    text, _ = run_.communicate()
    assert run_.returncode == 0 and f"{newest.name}: damaged" in text, text
    assert f"going on from step {STEPS - 1}" in text, text
    assert_equal(weights(tmp_path / "out"), unbroken)
    for file in (tmp_path / "out/checkpoints").glob("*/*.distcp"):  # all of them
        file.write_bytes(file.read_bytes()[:-100])
    log = (tmp_path / "out/log.jsonl").read_text()
    run_ = sft(tmp_path, small_set, "--resume")
    text, _ = run_.communicate()
    assert run_.returncode == 2 and "no checkpoint in it is whole" in text, text
    assert (tmp_path / "out/log.jsonl").read_text() == log


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on_with_other_ranks(tmp_path, small_set, unbroken):
    run_ = sft(tmp_path, small_set, "--steps", 400, ranks=2)
    while not list((tmp_path / "out/checkpoints").glob("step-??????")):
        time.sleep(0.2)
        assert run_.poll() is None, run_.stdout.read()
    run_.send_signal(signal.SIGTERM)  # to torchrun, which passes it on
    text, _ = run_.communicate()
    assert "stopped by a signal after step" in text, text
    newest = sorted((tmp_path / "out/checkpoints").iterdir())[-1]
    assert json.loads((newest / "manifest.json").read_text())["step"] < 400
    run_ = sft(tmp_path, small_set, "--resume", "--steps", 4000)  # one rank reads what two wrote
    for line in run_.stdout:
        if "going on from step" in line:
            break
    while list((tmp_path / "out/checkpoints").glob(newest.name)):  # until further steps' checkpoints took its place
        time.sleep(0.2)
        assert run_.poll() is None
    run_.send_signal(signal.SIGINT)
    text, _ = run_.communicate()
    assert run_.returncode == 0 and "stopped by a signal after step" in text, text


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_with_its_name(tmp_path, small_set):
    run_ = sft(tmp_path, small_set, "--steps", 4000, ranks=2)
    while not list((tmp_path / "out/checkpoints").glob("step-??????")):
        time.sleep(0.2)
        assert run_.poll() is None, run_.stdout.read()
    children = subprocess.run(["pgrep", "-P", str(run_.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    text, _ = run_.communicate(timeout=120)
    assert run_.returncode != 0 and "exitcode  : -9" in text and "rank      : " in text, text


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(tmp_path, small_set):
    run_ = sft(tmp_path, small_set, "--steps", 3)
    run_.communicate()
    newest = sorted((tmp_path / "out/checkpoints").iterdir())[-1]

    def no_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # files end here, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    run_ = sft(tmp_path, small_set, "--resume", "--steps", 6, preexec_fn=no_room)
    text, _ = run_.communicate()
    assert run_.returncode == 2 and f"the last whole checkpoint is out/checkpoints/{newest.name}" in text, text
    assert [p.name for p in sorted((tmp_path / "out/checkpoints").iterdir())][-1] == newest.name
    assert train.newest_checkpoint(tmp_path / "out/checkpoints") == newest


@pytest.mark.slow
def test_a_run_that_cannot_step_stops_and_a_clip_that_cannot_be_read_is_replaced(tmp_path, small_set):
    data = tmp_path / "set"
    shutil.copytree(small_set, data)
    (data / "2.safetensors").write_bytes(b"torn")
    run_ = sft(tmp_path, data, "--steps", 2)
    text, _ = run_.communicate()
    assert run_.returncode == 0 and "2.safetensors: not readable" in text, text
    for file in data.glob("*.safetensors"):
        save_file(dict(latent=torch.full((48, 2, 4, 4), torch.nan), first=torch.zeros(48, 1, 4, 4),
                       context=torch.zeros(3, 128)), file)  # fmt: skip
    run_ = sft(tmp_path, data, "--max_skips", 3, out="nan")
    text, _ = run_.communicate()
    assert run_.returncode == 2 and "3 steps in a row without a finite" in text, text
    assert not any(v.any() for k, v in weights(tmp_path / "nan/checkpoints/step-000003").items() if "lora_B" in k)
    assert all(json.loads(line)["skipped"] for line in (tmp_path / "nan/log.jsonl").read_text().splitlines())


QUICK = "--steps 3 --batch 1 --micro_batch 1 --sampling_steps 2 --window 1 --eval_clips 2 --save_every 2".split()
QUICK += ["--watch_every", "2", "--judge", ASSETS]  # the judge: the reward's own networks


def lines(out):
    """A run's log but for its times."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a quick run."""
    folder = tmp_path_factory.mktemp("trained")
    done = run("train.py", *QUICK, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "before" in done.stdout and "after" in done.stdout
    return folder / "out"


@pytest.mark.slow
def test_train_sample_and_eval_run(tmp_path, trained):
    assert (trained / "watch/step-000002.mp4").stat().st_size > 1000
    rows = [row for row in lines(trained) if "held_out" not in row]
    assert len(rows) == 3
    assert {"reward", "face_rate", "kl", "motion", "grad_norm", "missing"} <= set(rows[0])
    assert all(abs(row["judge"] - row["reward"]) < 0.01 for row in rows)  # its pools are of the clips, not cached
    frames, _ = read_video(trained / "before_after.mp4")
    assert frames.shape == (17, 2 * 128, 3 * 128, 3)
    assert Image.open(trained / "curves.png").size[0] > 500
    assert any(v.any() for k, v in weights(trained).items() if "lora_B" in k)

    shutil.copytree(trained, tmp_path / "out")
    done = run("eval.py", "--clips", 2, "--sampling_steps", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for row in ("VAE", "base", "LoRA"):
        assert row in done.stdout
    assert (tmp_path / "eval/eval.mp4").exists()
    assert len(json.loads((tmp_path / "eval/eval.json").read_text())["base"]) == 2

    whole = ("--lora", ASSETS / "dit.safetensors", "--out", "same", "--clips", 1, "--sampling_steps", 1)
    done = run("eval.py", *whole, "--judge", ASSETS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    same = json.loads((tmp_path / "same/eval.json").read_text())
    assert same["LoRA"] == same["base"] and same["base"][0]["judge"] == same["base"][0]["facesim"]

    Image.fromarray(frames[0, :128, :128]).save(tmp_path / "face.png")
    done = run("sample.py", "--image", "face.png", "--prompt", "a man nods", "--steps", 2, "--lora",
               "out/lora.safetensors", "--out", "clip.mp4", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    clip, fps = read_video(tmp_path / "clip.mp4")
    assert clip.shape == (17, 128, 128, 3) and fps == 16
    assert np.abs(clip[0].astype(int) - frames[0, :128, :128]).mean() < 12  # the given frame, through VAE and H.264


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_a_resumed_one_ends_where_it_does(tmp_path, trained):
    assert run("train.py", *QUICK, "--out", "again", cwd=tmp_path).returncode == 0
    shutil.copytree(tmp_path / "again", tmp_path / "cut")
    (tmp_path / "cut/lora.safetensors").unlink()
    shutil.rmtree(tmp_path / "cut/checkpoints/step-000003")  # as if killed after the checkpoint of step 2
    done = run("train.py", "--out", "cut", "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "going on from step 2" in done.stdout, done.stderr
    for name in ("again", "cut"):
        assert_equal(weights(tmp_path / name), weights(trained))
        assert lines(tmp_path / name) == lines(trained)
    done = run("train.py", "--lr", 1, "--out", "cut", "--resume", cwd=tmp_path)
    assert done.returncode == 2 and "--lr" in done.stderr
