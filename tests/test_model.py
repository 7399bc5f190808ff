"""The networks against diffusers and transformers on random weights, and what they promise about caches and LoRA."""

import contextlib
import dataclasses
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cli import UserError
from model import (
    CONFIGS,
    UMT5,
    DiTConfig,
    HostInputs,
    LoRALinear,
    UMT5Config,
    VAEConfig,
    WanAttentionBlock,
    WanDiT,
    WanVAE,
    add_lora,
    convolve,
    lora_disabled,
    move_frozen,
    rope_apply,
    rope_table,
)
from weights import load_weights, merge_lora, save_lora, write_safetensors

SMALL = DiTConfig(
    dim=96,
    ffn_dim=160,
    num_heads=3,
    num_layers=2,
    in_dim=12,
    out_dim=12,
    freq_dim=32,
    text_dim=40,
    text_len=16,
)


def randomise(module, scale=0.3):
    """Random values everywhere, also where training starts at zero."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data = p.data + scale / p.shape[-1] ** 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


def same_weights(ours, theirs, folder, scale=0.3):
    """Random weights for a reference network; ours reads them from the file that it would write."""
    randomise(theirs, scale).eval().requires_grad_(False)
    save_file({k: v.clone() for k, v in theirs.state_dict().items()}, folder / "theirs.safetensors")
    load_weights(ours, folder / "theirs.safetensors")


def reference_dit(cfg):
    WanTransformer3DModel = pytest.importorskip("diffusers").WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=cfg.patch_size, num_attention_heads=cfg.num_heads, attention_head_dim=cfg.dim // cfg.num_heads,
        in_channels=cfg.in_dim, out_channels=cfg.out_dim, text_dim=cfg.text_dim, freq_dim=cfg.freq_dim,
        ffn_dim=cfg.ffn_dim, num_layers=cfg.num_layers, cross_attn_norm=True, eps=cfg.eps, rope_max_seq_len=64,
    )  # fmt: skip


def compare_dit(cfg, size, t, folder, dtype, tolerance):
    """Values, and gradients at latent, text and conditioning, of our DiT and diffusers'; t [2] or [2, F']."""
    ours, theirs = WanDiT(cfg).to(dtype), reference_dit(cfg).to(dtype)
    same_weights(ours, theirs, folder)
    ours.requires_grad_(False)
    extra = cfg.in_dim - cfg.out_dim
    inputs = [torch.randn(2, cfg.out_dim, *size), torch.randn(2, 16, 40), torch.randn(2, extra, *size)]
    a, b = ([v.to(dtype).requires_grad_() for v in inputs] for _ in range(2))
    v = ours(a[0], t, a[1], a[2] if extra else None)
    per_token = t if t.dim() == 1 else t.repeat_interleave(size[1] * size[2] // 4, 1)
    v_ref = theirs(torch.cat([b[0], b[2]], 1), per_token, b[1], return_dict=False)[0]
    assert (v - v_ref).abs().max() < tolerance
    probe = torch.randn_like(v)
    used = slice(None if extra else 2)
    ours_grad, theirs_grad = (torch.autograd.grad((u * probe).sum(), w[used]) for u, w in ((v, a), (v_ref, b)))
    for g, g_ref in zip(ours_grad, theirs_grad, strict=True):
        assert g_ref.abs().max() > 0.01 and (g - g_ref).abs().max() < tolerance


@pytest.mark.parametrize("size", [(3, 4, 6), (1, 10, 2), (5, 2, 8)])
def test_dit_equals_diffusers_with_per_frame_timesteps(size, tmp_path):
    t = torch.tensor([[0.0] + [875.0] * (size[0] - 1), [0.0] + [417.3] * (size[0] - 1)])
    compare_dit(SMALL, size, t, tmp_path, torch.float32, 1e-4)


@pytest.mark.parametrize("size", [(3, 4, 6), (2, 6, 2)])
def test_dit_equals_diffusers_with_the_conditioning_on_channels(size, tmp_path):
    cfg = dataclasses.replace(SMALL, in_dim=14, out_dim=5)
    compare_dit(cfg, size, torch.tensor([931.0, 24.0]), tmp_path, torch.float32, 1e-4)


def test_dit_equals_diffusers_in_fp64(tmp_path, monkeypatch):
    """Without the reference's casts to fp32, and at t = 0, whose embedding it cannot compute in more than fp32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    compare_dit(SMALL, (3, 4, 6), torch.zeros(2, dtype=torch.float64), tmp_path, torch.float64, 1e-9)


def test_dit_pads_the_context_with_zeros_and_takes_one_timestep_a_sample():
    dit = randomise(WanDiT(SMALL)).double()
    x, context = torch.randn(2, 12, 2, 4, 4).double(), torch.randn(2, 5, 40).double()
    padded = torch.cat([context, torch.zeros(2, 11, 40).double()], 1)
    a = dit(x, torch.tensor([300.0, 20.0]), context)
    b = dit(x, torch.tensor([[300.0, 300.0], [20.0, 20.0]]), padded)
    assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_rotation_that_is_compiled_is_the_complex_one():
    """Traced by Dynamo, as for Inductor, and run without generated code, so that no compiler is needed."""
    x, table = torch.randn(2, 12, 3, 24, dtype=torch.float64), rope_table((3, 2, 2), 24, "cpu")
    compiled = torch.compile(rope_apply, backend="eager", fullgraph=True)(x, table)
    assert torch.allclose(compiled, rope_apply(x, table), rtol=1e-12, atol=1e-12)


def test_dit_names_a_wrong_size():
    with pytest.raises(ValueError, match="12, F', h, w"):
        WanDiT(SMALL)(torch.zeros(1, 12, 2, 5, 4), torch.zeros(1), torch.zeros(1, 4, 40))
    with pytest.raises(ValueError, match="context"):
        WanDiT(SMALL)(torch.zeros(1, 12, 2, 4, 4), torch.zeros(1), torch.zeros(1, 17, 40))


VAE_SMALL = VAEConfig(dim=8, dec_dim=12, z_dim=6, num_res_blocks=1)
VAE21_SMALL = VAEConfig(dim=8, dec_dim=8, z_dim=6, patch_size=1)


def reference_vae(cfg):
    AutoencoderKLWan = pytest.importorskip("diffusers").AutoencoderKLWan

    extra = {} if cfg.patch_size == 1 else dict(
        is_residual=True, decoder_base_dim=cfg.dec_dim, patch_size=2, in_channels=12, out_channels=12,
        scale_factor_spatial=16,
    )  # fmt: skip
    return AutoencoderKLWan(
        base_dim=cfg.dim, z_dim=cfg.z_dim, dim_mult=list(cfg.dim_mult), num_res_blocks=cfg.num_res_blocks,
        temperal_downsample=list(cfg.temporal_downsample), latents_mean=[0.0] * cfg.z_dim,
        latents_std=[1.0] * cfg.z_dim, **extra,
    )  # fmt: skip


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("cfg, frames, size", [
    (VAE_SMALL, 1, (32, 48)), (VAE_SMALL, 5, (16, 32)), (VAE_SMALL, 13, (48, 16)),
    (VAE21_SMALL, 1, (16, 24)), (VAE21_SMALL, 9, (24, 8)),
])  # fmt: skip
def test_vae_equals_diffusers_in_values_and_input_gradients(cfg, frames, size, dtype, tolerance, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the reference resizes in fp32
    ours, theirs = WanVAE(cfg).to(dtype), reference_vae(cfg).to(dtype)
    same_weights(ours, theirs, tmp_path, 0.1)
    ours.requires_grad_(False)

    def compare(f, f_ref, x):
        a, b = (x.detach().clone().requires_grad_() for _ in range(2))
        out, ref = f(a), f_ref(b)
        inside = ref.detach().abs() < 0.999  # the reference clamps pixels to [-1, 1], ours does not
        assert inside.float().mean() > 0.5 and ((out - ref) * inside).abs().max() < tolerance
        probe = torch.randn_like(out) * inside
        g, g_ref = (torch.autograd.grad((v * probe).sum(), u)[0] for v, u in ((out, a), (ref, b)))
        assert (g - g_ref).abs().max() < tolerance * g_ref.abs().max()
        return out.detach()

    video = torch.rand(1, 3, frames, *size, dtype=dtype) * 2 - 1
    latent = compare(ours.encode, lambda v: theirs.encode(v).latent_dist.mode(), video)
    side = cfg.stride[1]
    assert latent.shape == (1, 6, (frames - 1) // 4 + 1, size[0] // side, size[1] // side)
    compare(ours.decode, lambda z: theirs.decode(z).sample, latent)


@pytest.mark.parametrize("cuts", [(1, 1, 1, 1), (2, 2), (1, 3), (3, 1)])
def test_vae_decodes_the_same_in_any_chunks(cuts):
    vae = randomise(WanVAE(VAE_SMALL), 0.1).double()
    latent = torch.randn(2, 6, 4, 2, 3).double()
    caches, parts = None, []
    for chunk in latent.split(cuts, 2):
        part, caches = vae.decode_chunk(chunk, caches)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, 2), vae.decode_chunk(latent)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_decoding_in_recomputed_chunks_has_the_same_values_and_gradient(frames):
    vae = randomise(WanVAE(VAE_SMALL), 0.1).double().requires_grad_(False)
    a, b = (torch.randn(1, 6, 4, 2, 3, generator=torch.Generator().manual_seed(0)).double() for _ in range(2))
    whole, parts = vae.decode_chunk(a.requires_grad_())[0], vae.decode(b.requires_grad_(), frames)
    assert torch.allclose(whole, parts, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(whole)
    (whole * probe).sum().backward()
    (parts * probe).sum().backward()
    assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_a_frozen_vae_keeps_less_for_the_same_gradient():
    vae = randomise(WanVAE(VAE_SMALL), 0.1).double()
    latent, kept, grads = torch.randn(1, 6, 2, 2, 3).double().requires_grad_(), [], []
    weights = {p.untyped_storage().data_ptr() for p in vae.parameters()}
    for trained in (True, False):
        vae.requires_grad_(trained)
        storages = {}

        def pack(x, storages=storages):
            if x.untyped_storage().data_ptr() not in weights:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = vae.decode(latent).square().sum()
        kept.append(sum(s.nbytes() for s in storages.values()))
        grads.append(torch.autograd.grad(loss, latent)[0])
    assert torch.allclose(*grads, rtol=1e-10, atol=1e-12)
    assert kept[1] < 0.5 * kept[0], kept


def test_a_windowed_decode_keeps_the_gradient_within_its_window():
    vae = randomise(WanVAE(VAE_SMALL), 0.1).double().requires_grad_(False)
    latent = torch.randn(1, 6, 3, 3, 4).double().requires_grad_()
    video = vae.decode(latent)
    probe = torch.zeros_like(video)
    probe[:, :, 2:5, 17:30, 20:40] = torch.randn(1, 3, 3, 13, 20).double()
    assert vae.gradient_window(probe, 0) == (slice(0, 2), slice(1, 2), slice(1, 3))
    (whole,) = torch.autograd.grad(video, latent, probe)

    def windowed(margin, frames, probe=probe):
        return torch.autograd.grad(vae.decode(latent, frames, margin), latent, probe)[0]

    assert torch.equal(vae.decode(latent, None, 0), video)
    for frames in (None, 1):
        assert torch.allclose(windowed(4, frames), whole, rtol=1e-9, atol=1e-12)  # the window is the frame
    near = windowed(0, None)
    assert near[:, :, :2, 1:2, 1:3].any() and not near[:, :, :, 0].any() and not near[:, :, 2].any()
    assert not windowed(1, None, 0 * probe).any()


def test_a_windowed_decode_attends_to_the_whole_frame(monkeypatch):
    torch.manual_seed(0)
    vae = randomise(WanVAE(VAE_SMALL), 0.3).double().requires_grad_(False)
    latent = torch.randn(1, 6, 2, 12, 12).double().requires_grad_()
    video = vae.decode(latent)
    probe = torch.zeros_like(video)
    probe[..., 80:112, 80:112] = torch.randn(1, 3, 5, 32, 32).double()
    (whole,) = torch.autograd.grad(video, latent, probe)

    def off():
        (near,) = torch.autograd.grad(vae.decode(latent, None, 4), latent, probe)
        return float((near - whole).norm() / whole.norm())

    attending = off()
    monkeypatch.setattr("model.set_into_frame", lambda keys_values, frame, window, halo, k, v, size: (k, v))
    alone = off()
    assert attending < 0.7 * alone, (attending, alone)


def test_checkpointed_blocks_have_the_same_gradient():
    dit = randomise(WanDiT(SMALL)).double()
    x, t, context = torch.randn(1, 12, 2, 4, 4).double(), torch.tensor([300.0]), torch.randn(1, 5, 40).double()
    grads = []
    on_host, plain = HostInputs(), contextlib.nullcontext
    for dit.checkpointing, dit.saved_inputs in ((False, plain), (True, plain), (True, on_host.hooks)):
        dit.zero_grad()
        dit(x, t, context).square().sum().backward()
        grads.append([p.grad.clone() for p in dit.parameters()])
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(*grads))


def test_a_block_keeps_its_widest_layer_once(monkeypatch):
    """What the GELU gives is computed again in the backward pass, and of the rest only the LoRA's narrow products."""
    dit = WanDiT(SMALL)
    add_lora(dit, 2)
    block, wide, grads, work = randomise(dit).double().blocks[0], [], [], []
    e, rope = torch.randn(1, 2, 6, SMALL.dim).double(), rope_table((2, 2, 2), SMALL.dim // SMALL.num_heads, "cpu")
    x, context = torch.randn(1, 8, SMALL.dim).double().requires_grad_(), torch.randn(1, 5, SMALL.dim).double()
    for layer in block.ffn[:2]:
        layer.register_forward_hook(lambda *call: wide.append(StorageWeakRef(call[-1].untyped_storage())))
    y = block(x, e, rope, context)
    assert [storage.expired() for storage in wide] == [False, True]  # before the GELU, after it
    trained = [x, *(p for p in block.parameters() if p.requires_grad)]
    for feed_forward in (WanAttentionBlock.feed_forward, lambda self, x: self.ffn(x)):
        monkeypatch.setattr(WanAttentionBlock, "feed_forward", feed_forward)
        with FlopCounterMode(display=False) as counter:
            y = block(x, e, rope, context)
            y.square().sum().backward()
        work.append(counter.get_total_flops())
        grads.append([p.grad for p in trained])
        for p in trained:
            p.grad = None
    assert all(map(torch.equal, *grads))
    assert work[0] - work[1] == 2 * 8 * 2 * (SMALL.ffn_dim + SMALL.dim), work


@pytest.mark.parametrize("shape, kernel, stride, padding", [
    ((2, 3, 9, 8), (4, 3, 3, 3), 2, 1), ((2, 3, 8, 9), (4, 3, 1, 1), (2, 1), 0),
    ((1, 3, 5, 7, 6), (4, 3, 3, 3, 3), 1, (0, 1, 1)), ((1, 3, 6, 4, 5), (4, 3, 3, 1, 1), (2, 1, 1), 0),
])  # fmt: skip
def test_a_frozen_convolution_has_the_gradient_of_any_stride_and_padding_and_keeps_no_input(
    shape, kernel, stride, padding
):
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in (shape, kernel, (4,)))
    x.requires_grad_()
    plain = (nn.functional.conv2d if x.dim() == 4 else nn.functional.conv3d)(x, weight, bias, stride, padding)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y.shape) or y, lambda y: y):
        frozen = convolve(x, weight, bias, stride, padding)
    assert torch.equal(frozen, plain) and kept == [weight.shape]
    probe = torch.randn_like(plain)
    (g,), (g_ref,) = torch.autograd.grad(frozen, x, probe), torch.autograd.grad(plain, x, probe)
    assert torch.allclose(g, g_ref, rtol=1e-12, atol=1e-12)


class Weight:
    """What `move_frozen` touches of a parameter, which unlike one may go to the meta device."""

    def __init__(self, data, requires_grad=False):
        self.data, self.requires_grad = data, requires_grad

    device, shape, dtype = (property(lambda self, name=name: getattr(self.data, name)) for name in
                            ("device", "shape", "dtype"))  # fmt: skip


def test_what_goes_to_the_host_are_frozen_weights_and_the_host_copies_them_once():
    """A trained one would lose what is hooked to it. (With one device at hand, meta stands for the other.)"""
    frozen, trained = Weight(torch.randn(3)), Weight(torch.randn(3), True)
    network, value = types.SimpleNamespace(parameters=lambda: (frozen, trained)), frozen.data.clone()
    move_frozen(network, "meta")
    copy = frozen.on_host
    assert frozen.data.is_meta and not trained.data.is_meta and not hasattr(trained, "on_host")
    for _ in range(2):
        move_frozen(network, "cpu")
        assert frozen.data is copy and torch.equal(copy, value)
        move_frozen(network, "meta")
        assert frozen.data.is_meta and frozen.on_host is copy


def test_inputs_on_the_host_use_their_buffers_again():
    on_host, w = HostInputs(), torch.randn(8, 8, requires_grad=True)
    seen = []

    def step():
        x = torch.ones(4, 8)
        for _ in range(3):
            with on_host.hooks():
                x = checkpoint(lambda x: (x @ w).sin(), x, use_reentrant=False)
        grad = torch.autograd.grad(x.sum(), w, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(x.sum(), w)[0], grad)  # a graph may be gone through twice
        (free,) = [buffers for (shape, _), buffers in on_host.free.items() if shape == (4, 8)]
        seen.append({buffer.data_ptr() for buffer in free})

    for _ in range(3):
        step()
    assert seen[0] and seen[1] == seen[0] == seen[2] and len(seen[0]) == 3


def test_vae_is_causal_and_holds_no_state():
    vae = randomise(WanVAE(VAE_SMALL), 0.1).double()
    vae.requires_grad_(False)

    def state():  # everything that any of its modules holds
        held = {n: vars(m) | m._parameters | m._buffers for n, m in vae.named_modules()}
        return {(n, k): (id(v), repr(v)) for n, values in held.items() for k, v in values.items()}

    before = state()
    latent = torch.randn(1, 6, 3, 2, 2).double()
    changed = latent.clone()
    changed[:, :, 2] += 1
    a, b = vae.decode(latent), vae.decode(changed)
    assert torch.equal(a[:, :, :5], b[:, :, :5]) and not torch.equal(a[:, :, 5:], b[:, :, 5:])
    vae.decode(latent.requires_grad_(), 1).sum().backward()
    vae.decode(latent, 2, 0)[:, :, :3].sum().backward()
    assert state() == before and torch.equal(vae.decode(latent), a)


@pytest.mark.parametrize("how", [(), (1,), (2,), (None, 4), (1, 4)])
def test_a_vae_that_computes_in_bf16_gives_fp32_and_the_gradient_of_autocast_around_its_forward_pass(how):
    vae = randomise(WanVAE(VAE_SMALL), 0.1).requires_grad_(False)
    a, b = (torch.randn(1, 6, 3, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = vae.decode(a)
    vae.compute_dtype = torch.bfloat16
    video = vae.decode(b, *how)
    assert video.dtype == torch.float32 and torch.equal(video, expected)
    probe = torch.randn_like(video)
    (g,), (g_ref,) = torch.autograd.grad(video, b, probe), torch.autograd.grad(expected, a, probe)
    # sums over frames come in another order; to be computed in fp32 by mistake is 20 times as far off
    assert g.dtype == torch.float32 and (g - g_ref).norm() <= 2e-3 * g_ref.norm()
    latent = vae.encode(torch.rand(1, 3, 5, 32, 32))
    assert latent.dtype == torch.float32 and vae.double().encode(torch.rand(1, 3, 5, 32, 32)).dtype == torch.float64


def test_a_dit_computes_in_the_precision_it_is_given_and_leaves_an_outer_autocast_alone_without_one():
    dit = randomise(WanDiT(SMALL))
    x, t, context = torch.randn(1, 12, 2, 4, 4), torch.tensor([300.0]), torch.randn(1, 5, 40)
    exact, kinds = dit(x, t, context), []
    hook = dit.blocks[0].ffn[0].register_forward_hook(lambda *call: kinds.append(call[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        outer = dit(x, t, context)
    dit.compute_dtype = torch.bfloat16
    half = dit(x, t, context)
    dit.compute_dtype = torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dit(x, t, context), exact)
    hook.remove()
    assert kinds == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert half.dtype == torch.float32 and torch.equal(half, outer) and not torch.equal(half, exact)


def test_the_residual_stream_is_contiguous():
    dit, strides = WanDiT(SMALL), []
    for block in dit.blocks:
        block.register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0].is_contiguous()))
    dit(torch.randn(2, 12, 2, 4, 4), torch.tensor([300.0]), torch.randn(1, 5, 40))
    assert strides == [True] * SMALL.num_layers


def test_vae_scale_normalises_and_is_undone():
    scaled = dataclasses.replace(VAE_SMALL, mean=(0.5,) * 6, std=(2.0,) * 6)
    plain, vae = randomise(WanVAE(VAE_SMALL)), WanVAE(scaled)
    vae.load_state_dict(plain.state_dict())
    video = torch.rand(1, 3, 5, 16, 16)
    assert torch.allclose(vae.encode(video) * 2 + 0.5, plain.encode(video), atol=1e-5)
    latent = torch.randn(1, 6, 2, 1, 1)
    assert torch.allclose(vae.decode(latent), plain.decode(latent * 2 + 0.5), atol=1e-5)


def test_vae_names_a_wrong_frame_count():
    with pytest.raises(ValueError, match="4n\\+1"):
        WanVAE(VAE_SMALL).encode(torch.zeros(1, 3, 4, 16, 16))


def test_umt5_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    cfg = UMT5Config(dim=48, dim_attn=32, dim_ffn=80, num_heads=4, num_layers=3, vocab_size=100)
    theirs = transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=100, d_model=48, d_kv=8, d_ff=80, num_heads=4, num_layers=3, feed_forward_proj="gated-gelu",
        dropout_rate=0.0, relative_attention_num_buckets=32, relative_attention_max_distance=128,
    )).eval()  # fmt: skip
    ours = UMT5(cfg)
    same_weights(ours, theirs, tmp_path, 1.0)
    ids = torch.randint(0, 100, (2, 150))
    mask = (torch.arange(150) < torch.tensor([[150], [37]])).long()
    reference = theirs(ids, mask).last_hidden_state * mask[..., None]
    assert (ours(ids, mask) - reference).abs().max() < 1e-4  # fp32
    assert (ours.double()(ids, mask) - reference).abs().max() < 1e-4


def test_lora_starts_at_the_reference_is_switched_off_saved_and_merged(tmp_path):
    dit, plain = (randomise(WanDiT(SMALL)).double() for _ in range(2))
    plain.load_state_dict(dit.state_dict())
    x, t, context = (
        torch.randn(1, 12, 2, 4, 4).double(),
        torch.tensor([500.0]),
        torch.randn(1, 6, 40).double(),
    )
    base = dit(x, t, context)
    names = set(dit.state_dict())
    parameters = add_lora(dit, 4, alpha=8)
    assert len(parameters) == 2 * 2 * 10 and all(p.requires_grad for p in parameters)
    assert sum(p.requires_grad for p in dit.parameters()) == len(parameters)
    assert names <= set(dit.state_dict())
    assert torch.equal(dit(x, t, context), base)
    for p in parameters:
        p.data = p.data + 0.1 * torch.randn_like(p)
    tuned = dit(x, t, context)
    assert (tuned - base).abs().max() > 1e-3
    with lora_disabled(dit):
        assert torch.equal(dit(x, t, context), base)
    save_lora(dit, tmp_path / "lora.safetensors")
    assert merge_lora(plain, tmp_path / "lora.safetensors") == (20, [])
    assert (plain(x, t, context) - tuned).abs().max() < 1e-6  # the file is fp32


def test_without_a_graph_a_lora_is_added_to_the_weights_but_not_to_rounded_ones(monkeypatch):
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(32, 24).double(), 4, alpha=8).double(), torch.randn(5, 32).double()
    nn.init.normal_(layer.lora_B)
    tuned = layer(x)
    assert (tuned - nn.functional.linear(x, layer.weight, layer.bias)).abs().max() > 0.1
    added, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *inputs, **how: added.append(inputs[0].shape) or addmm(*inputs, **how))
    with torch.no_grad():
        assert (layer(x) - tuned).abs().max() < 1e-12 and added == [layer.weight.shape]
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.float(), 1e-4 * layer.lora_B.float()  # lost in bf16 weights
    layer.weight.data, layer.bias.data = layer.weight.bfloat16(), layer.bias.bfloat16()
    tuned = layer(x.bfloat16())
    with torch.no_grad():
        assert torch.equal(layer(x.bfloat16()), tuned)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        tuned = layer(x.float())
        with torch.no_grad():
            assert torch.equal(layer(x.float()), tuned) and added.count(layer.weight.shape) == 1


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_a_fine_lora_is_not_rounded_away_in_bf16(how):
    """Of an update of 6e-4 of the weights' norm all is in the layer's output, on average over outputs."""
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(256, 256), 8, alpha=8), torch.randn(4096, 256).bfloat16()
    nn.init.normal_(layer.lora_B)
    layer.lora_B.data *= 6e-4 * layer.weight.norm() / (layer.lora_B @ layer.lora_A).norm()
    update = x.float() @ layer.lora_A.T @ layer.lora_B.T
    if how == "weights":
        layer.weight.data, layer.bias.data = layer.weight.bfloat16(), layer.bias.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        tuned = layer(x)
        layer.enabled = False
        found = tuned.float() - layer(x).float()
    survives = (found * update).sum() / update.square().sum()
    assert tuned.dtype == torch.bfloat16 and abs(survives - 1) < 0.02, survives  # its standard error is 0.002


def test_a_lora_of_another_model_is_refused(tmp_path):
    dit = WanDiT(SMALL)
    add_lora(dit, 2)
    save_lora(dit, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="ffn|attn"):
        merge_lora(WanDiT(dataclasses.replace(SMALL, dim=48)), tmp_path / "lora.safetensors")
    write_safetensors({"something.else": torch.zeros(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="nothing to merge"):
        merge_lora(WanDiT(SMALL), tmp_path / "odd.safetensors")


def test_loading_names_missing_unexpected_and_misshaped_keys(tmp_path):
    state = WanDiT(SMALL).state_dict()
    del state["head.modulation"]
    state["extra"] = torch.zeros(1)
    state["head.head.bias"] = torch.zeros(7)
    write_safetensors(state, tmp_path / "dit.safetensors")
    with pytest.raises(UserError) as error:
        load_weights(WanDiT(SMALL), tmp_path / "dit.safetensors")
    for words in ("1 missing (head.modulation)", "1 unexpected (extra)", "head.head.bias [7], wanted [48]"):
        assert words in str(error.value)
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "dit.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="torn.safetensors"):
        load_weights(WanDiT(SMALL), tmp_path / "torn.safetensors")


def test_the_released_sizes():
    """Parameter counts of the released checkpoints (facts of Wan 2.2): 5.0 B and 14.3 B an expert."""
    with torch.device("meta"):
        count = {n: sum(p.numel() for p in WanDiT(CONFIGS[n].dit).parameters()) / 1e9 for n in ("wan5b", "wan14b")}
        vae = sum(p.numel() for p in WanVAE(CONFIGS["wan5b"].vae).parameters()) / 1e6
    assert count["wan5b"] == pytest.approx(5.0, abs=0.01) and count["wan14b"] == pytest.approx(14.29, abs=0.01)
    assert vae == pytest.approx(704.7, abs=0.1)  # 2.8 GB in fp32
