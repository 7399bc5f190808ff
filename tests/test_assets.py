"""The tiny world's own trainer, assets/diffusion.py: order of batches, Muon, the average, resuming, mirror images."""

import copy
import json
import sys

import numpy as np
import pytest
import torch

from model import ASSETS, DiTConfig, VAEConfig, WanDiT, WanVAE

sys.path.insert(0, str(ASSETS))
import diffusion

TINY = DiTConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_dim=4, out_dim=4, freq_dim=16, text_dim=8, text_len=4
)


class Random:
    """As diffusion.Latents: seven latents and contexts of noise."""

    device = torch.device("cpu")

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(7, 4, 2, 4, 4, generator=generator)
        self.contexts = torch.randn(7, 4, 8, generator=generator)

    def __len__(self):
        return len(self.latents)

    def batch(self, rows):
        return self.latents[rows], self.contexts[rows]


def untrained():
    torch.manual_seed(0)
    return WanDiT(TINY)


def fit(dit, folder, clips):
    return diffusion.fit(dit, Random(), folder, lambda average, full: {}, clips=clips, batch=4, micro=2)


def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion, "DECAY", 1e-9)  # else the rate depends on where the run is to end
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = fit(untrained(), tmp_path / "whole", 24)
    fit(untrained(), tmp_path / "parts", 12)
    torch.manual_seed(1)
    resumed = fit(WanDiT(TINY), tmp_path / "parts", 24)  # whatever it begins with, the checkpoint counts
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    rows = [json.loads(line) for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()]
    assert [row["clips"] for row in rows] == [12, 24]


def test_training_lowers_the_loss_and_frame_0_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion, "RATE", 0.02)  # so that a hundred steps are enough
    monkeypatch.setattr(diffusion, "WARMUP", 10)
    data, dit = Random(), untrained()
    latent, context = data.batch(np.arange(7))
    noise, sigma = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1)), torch.full((7,), 0.5)
    with torch.no_grad():
        before = diffusion.flow_loss(dit, latent, context, sigma, noise)
        other = noise.clone()
        other[:, :, 0] += 1
        assert torch.equal(before, diffusion.flow_loss(dit, latent, context, sigma, other))
    average = fit(dit, tmp_path, 400)
    with torch.no_grad():
        after = diffusion.flow_loss(average, latent, context, sigma, noise)
    assert after.mean() < 0.9 * before.mean()


def test_an_epoch_meets_every_clip_once_and_a_step_depends_on_seed_and_number_only():
    data = Random()
    drawn = [diffusion.step_inputs(data, 3, step, 4) for step in range(7)]  # 28 clips: four epochs
    rows = [int((data.latents == x).flatten(1).all(1).nonzero()) for latent, *_ in drawn for x in latent]
    assert all(sorted(rows[k : k + 7]) == list(range(7)) for k in range(0, 28, 7))
    assert all(torch.equal(a, b) for a, b in zip(drawn[2], diffusion.step_inputs(data, 3, 2, 4)))
    for _, _, sigma, _ in drawn:  # one in each quarter of u
        u = sigma / (diffusion.SHIFT - (diffusion.SHIFT - 1) * sigma)
        assert (4 * u).long().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (96, 48)])
def test_muon_is_torchs(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    pair = (
        diffusion.Muon([ours], 1e-2),
        torch.optim.Muon([theirs], 1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()  # torch's works in bf16


def test_muon_takes_the_blocks_matrices_and_adam_what_is_left():
    dit = untrained()
    taken = [[p for group in o.param_groups for p in group["params"]] for o in diffusion.optimizers(dit)]
    assert {id(p) for p in taken[0]} == {id(p) for p in dit.blocks.parameters() if p.dim() == 2}
    assert sorted(map(id, taken[0] + taken[1])) == sorted(map(id, dit.parameters()))


def test_a_mirror_image_swaps_left_and_right_and_a_killed_encoding_goes_on(tmp_path):
    assert diffusion.mirrored("one on the left turns right, leftover") == "one on the right turns left, leftover"
    torch.manual_seed(0)
    cfg = VAEConfig(dim=8, dec_dim=8, z_dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,))
    vae = WanVAE(cfg).requires_grad_(False)
    clips = np.random.default_rng(0).integers(0, 256, (9, 5, 3, 16, 16), np.uint8)
    latents = np.array(diffusion.encode_clips(vae, clips, tmp_path / "a.npy", True))
    video = torch.from_numpy(clips[8:]).transpose(1, 2).float() / 127.5 - 1
    for row, x in ((16, video), (17, video.flip(-1))):
        assert np.abs(latents[row] - vae.encode(x)[0].numpy()).max() < 0.02  # stored in fp16
    cut = copy.deepcopy(latents)
    cut[16:] = 0
    np.save(tmp_path / "b.npy", cut)
    assert np.array_equal(diffusion.encode_clips(vae, clips, tmp_path / "b.npy", True), latents)
