"""The networks of Wan 2.2 image-to-video: presets, UMT5 text encoder, causal video VAE, diffusion transformer, LoRA.

What is unusual in them:
- DiT: every latent frame has a timestep of its own (the given first frame sits at t = 0 among noisy ones), so
  modulations are [B, F', 6, dim] and broadcast over a frame's tokens; q and k are RMS-normed over the whole width, not
  a head; cross-attention has an affine norm before it; modulation, norms and residual stream are in fp32.
- VAE: causal in time. The first frame is coded alone, then four frames to a latent frame. A module keeps no state: what
  its causal layers must remember of a clip's last chunk goes in and out as a list of tensors. So any chunking of a
  clip gives the same values, and checkpointing is safe.
- UMT5: every layer has a relative position bias of its own, and q is not scaled.
- LoRA: the untuned reference of the velocity KL is the same transformer with its LoRA switched off.
- Precision belongs to a network: with `compute_dtype` its forward pass runs under autocast, and what it returns is in
  fp32 all the same. Callers write no autocast, so that every backward pass runs outside of it.

What is left out of the released code: drawing latents from the VAE's posterior (its mean is what all use), dropout,
sequence parallelism, and the models of Wan 2.2 for text, sound or animation only.

Attribute names are the released checkpoints' native ones, so `state_dict()` is the native layout (weights.py reads the
others). The behaviour is that of github.com/Wan-Video/Wan2.2 (wan/modules); `tiny` differs from `wan5b` in numbers
only. In shapes, F counts frames of pixels and F' latent frames.
"""

import contextlib
import functools
import html
import math
import re
import types
import weakref
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cli import UserError

ASSETS = Path(__file__).parent / "assets"

# ---------------------------------------------------------------------------------------------------------------
# Presets. Field names are those of the released config.json.


@dataclass(frozen=True)
class DiTConfig:
    dim: int = 3072
    ffn_dim: int = 14336
    num_heads: int = 24
    num_layers: int = 30
    in_dim: int = 48
    out_dim: int = 48
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    dim: int = 160
    dec_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 2  # of pixels; 1: Wan 2.1's VAE, which has neither patches nor averaging shortcuts
    mean: tuple[float, ...] = field(default=(), repr=False)  # per latent channel; empty: 0
    std: tuple[float, ...] = field(default=(), repr=False)  # per latent channel; empty: 1

    @property
    def stride(self):
        """Pixels to a latent cell: (time, height, width)."""
        side = self.patch_size * 2 ** len(self.temporal_downsample)
        return 2 ** sum(self.temporal_downsample), side, side


@dataclass(frozen=True)
class UMT5Config:
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    vocab_size: int = 256384


@dataclass(frozen=True)
class Preset:
    """A model's three networks and how it is sampled by default."""

    dit: DiTConfig
    vae: VAEConfig
    text: UMT5Config
    fps: int
    frames: int  # 4n + 1
    size: tuple[int, int]  # height, width
    shift: float  # of the noise schedule
    steps: int
    cfg: float  # classifier-free guidance; 1 = off
    boundary: float | None = None  # sigma at which the low-noise expert takes over (A14B)
    folder: Path | None = None  # where its weights are, if they ship with the repo

    @property
    def shipped(self):
        """Do its weights ship with the repo? Then it is the tiny model, in fp32."""
        return self.folder is not None


# fmt: off
WAN22_MEAN = (
    -.2289, -.0052, -.1323, -.2339, -.2799,  .0174,  .1838,  .1557, -.1382,  .0542,  .2813,  .0891,
     .1570, -.0098,  .0375, -.1825, -.2246, -.1207, -.0698,  .5109,  .2665, -.2108, -.2158,  .2502,
    -.2055, -.0322,  .1109,  .1567, -.0729,  .0899, -.2799, -.1230, -.0313, -.1649,  .0117,  .0723,
    -.2839, -.2083, -.0520,  .3748,  .0152,  .1957,  .1433, -.2944,  .3573, -.0548, -.1681, -.0667)
WAN22_STD = (
     .4765, 1.0364,  .4514, 1.1677,  .5313,  .4990,  .4818,  .5013,  .8158, 1.0344,  .5894, 1.0901,
     .6885,  .6165,  .8454,  .4978,  .5759,  .3523,  .7135,  .6804,  .5833, 1.4146,  .8986,  .5659,
     .7069,  .5338,  .4889,  .4917,  .4069,  .4999,  .6866,  .4093,  .5709,  .6065,  .6415,  .4944,
     .5726, 1.2042,  .5458, 1.6887,  .3971, 1.0600,  .3943,  .5537,  .5444,  .4089,  .7468,  .7744)
WAN21_MEAN = (
    -.7571, -.7089, -.9113,  .1075, -.1745,  .9653, -.1517, 1.5508,
     .4134, -.0715,  .5517, -.3632, -.1922, -.9497,  .2503, -.2921)
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on

CONFIGS = {
    "tiny": Preset(
        dit=DiTConfig(dim=384, ffn_dim=1024, num_heads=6, num_layers=6, freq_dim=128, text_dim=128, text_len=48),
        vae=VAEConfig(dim=24, dec_dim=32, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True)),
        text=UMT5Config(dim=128, dim_attn=128, dim_ffn=256, num_heads=4, num_layers=2, vocab_size=512),
        fps=8, frames=17, size=(128, 128), steps=8, cfg=1.0, folder=ASSETS,
        shift=20.0,  # Wan's is 5; at 20 the last four of eight steps begin at sigma 0.95
    ),
    "wan5b": Preset(
        dit=DiTConfig(), vae=VAEConfig(mean=WAN22_MEAN, std=WAN22_STD), text=UMT5Config(),
        fps=24, frames=121, size=(704, 1280), shift=5.0, steps=50, cfg=5.0,
    ),
    "wan14b": Preset(
        dit=DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36, out_dim=16),
        vae=VAEConfig(dim=96, dec_dim=96, z_dim=16, temporal_downsample=(False, True, True), patch_size=1,
                      mean=WAN21_MEAN, std=WAN21_STD),
        text=UMT5Config(),
        fps=16, frames=81, size=(480, 832), shift=5.0, steps=40, cfg=3.5, boundary=0.9,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Precision


def full_precision(x):
    """fp32 from half types; fp32 and fp64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def autocast(network, x):
    """The autocast to a network's `compute_dtype` on the device of x; where that is None, an outer one stays.

    Casts of weights are not kept for a second use: of all weights they would be half the model's size again.
    """
    dtype = network.compute_dtype
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)


# ---------------------------------------------------------------------------------------------------------------
# UMT5 encoder


class T5LayerNorm(nn.Module):
    """RMS-norm, computed in fp32."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).type_as(self.weight)


class T5RelativeEmbedding(nn.Module):
    """The bias that a layer adds to its attention logits, by the distance of two tokens."""

    def __init__(self, num_buckets, num_heads, max_distance=128):
        super().__init__()
        self.embedding = nn.Embedding(num_buckets, num_heads)
        self.num_buckets, self.max_distance = num_buckets, max_distance

    def forward(self, length):
        position = torch.arange(length, device=self.embedding.weight.device)
        offset = position[None] - position[:, None]
        half = self.num_buckets // 2  # one half for tokens before, one for tokens after
        exact = half // 2  # near distances have a bucket each, far ones share them logarithmically
        distance = offset.abs()
        far = (distance.clamp(min=1) / exact).log() / math.log(self.max_distance / exact) * (half - exact)
        bucket = torch.where(distance < exact, distance, (exact + far.long()).clamp(max=half - 1))
        bucket = bucket + (offset > 0) * half
        return self.embedding(bucket).permute(2, 0, 1)[None]  # [1, heads, L, L]


class T5Attention(nn.Module):
    def __init__(self, dim, dim_attn, num_heads):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim_attn, bias=False) for _ in range(3))
        self.o = nn.Linear(dim_attn, dim, bias=False)
        self.num_heads = num_heads

    def forward(self, x, bias):
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.type_as(q), scale=1.0)
        return self.o(x.transpose(1, 2).flatten(2))


class T5FeedForward(nn.Module):
    def __init__(self, dim, dim_ffn):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(dim, dim_ffn, bias=False)
        self.fc2 = nn.Linear(dim_ffn, dim, bias=False)

    def forward(self, x):
        return self.fc2(self.fc1(x) * self.gate(x))


class T5Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = T5LayerNorm(cfg.dim)
        self.attn = T5Attention(cfg.dim, cfg.dim_attn, cfg.num_heads)
        self.norm2 = T5LayerNorm(cfg.dim)
        self.ffn = T5FeedForward(cfg.dim, cfg.dim_ffn)
        self.pos_embedding = T5RelativeEmbedding(cfg.num_buckets, cfg.num_heads)

    def forward(self, x, mask):
        x = x + self.attn(self.norm1(x), self.pos_embedding(x.shape[1]) + mask)
        return x + self.ffn(self.norm2(x))


class UMT5(nn.Module):
    """Text encoder: `ids` [B, L] and `mask` [B, L] (1 = token, 0 = padding) to a context [B, L, dim], padding zero.

    Initial weights follow T5 (unit-variance logits without a scale on q). Source: wan/modules/t5.py.
    """

    def __init__(self, cfg):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(T5Block(cfg) for _ in range(cfg.num_layers))
        self.norm = T5LayerNorm(cfg.dim)
        for block in self.blocks:
            nn.init.normal_(block.attn.q.weight, std=(cfg.dim * cfg.dim_attn) ** -0.5)
            for layer in (block.attn.k, block.attn.v, block.ffn.gate[0], block.ffn.fc1):
                nn.init.normal_(layer.weight, std=cfg.dim**-0.5)
            nn.init.normal_(block.attn.o.weight, std=cfg.dim_attn**-0.5)
            nn.init.normal_(block.ffn.fc2.weight, std=cfg.dim_ffn**-0.5)
            nn.init.normal_(block.pos_embedding.embedding.weight, std=(2 * cfg.num_buckets * cfg.num_heads) ** -0.5)

    def forward(self, ids, mask):
        x = self.token_embedding(ids)
        blocked = (mask[:, None, None] == 0).type_as(x) * torch.finfo(x.dtype).min  # [B, 1, 1, L]
        for block in self.blocks:
            x = block(x, blocked)
        return self.norm(x) * mask[..., None].type_as(x)


def tokenize(prompts, tokenizer, text_len):
    """Prompts (a list of strings) to `ids` and `mask`, both [B, text_len].

    Cleaned as the reference does (HTML entities, white space, typographic quotes; text of a broken encoding, which
    the reference's ftfy also repairs, is not). Raises UserError where a prompt is longer than `text_len` tokens:
    cutting it silently would drop what it says last.
    """
    ids, mask = torch.zeros(2, len(prompts), text_len, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        clean = html.unescape(html.unescape(prompt))
        clean = re.sub("[\u201c-\u201f]", '"', re.sub("[\u02bc\u2018-\u201b]", "'", clean))
        clean = re.sub(r"\s+", " ", clean).strip()
        tokens = tokenizer.encode(clean).ids
        if len(tokens) > text_len:
            raise UserError(f"prompt is {len(tokens)} tokens, the model reads {text_len}; shorten: {clean[:60]!r}...")
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


# ---------------------------------------------------------------------------------------------------------------
# VAE: pixels [B, 3, F, H, W] to a latent [B, z, F', H/s, W/s] and back, by convolutions that see no future frame.
# `convolve` and `norm_silu` are what their names say; the section after this one tells what they save.


class CausalCache:
    """What the causal layers remember of a clip's earlier chunks, while a network runs over the next chunk.

    Layers run in a fixed order, so the memory is a plain list of tensors: each layer takes the next of `old` (None: the
    clip starts here) and appends to `new` what it wants to find at the next chunk.
    kv_hook: a function of an attention's keys and values [B T, H W, C] and of (H, W), which returns those to use.
    """

    def __init__(self, old, kv_hook=None):
        self.first, self.old, self.new, self.kv_hook = old is None, iter(old or ()), [], kv_hook

    def past(self, x, length):
        """The `length` frames before x [B, C, T, H, W], None at the clip's start; remembers the last ones up to x."""
        past = None if self.first else next(self.old)
        frames = x if past is None or x.shape[2] >= length else torch.cat([past, x], 2)
        tail = frames[:, :, -length:]
        self.new.append(F.pad(tail, (0, 0, 0, 0, length - tail.shape[2], 0)))
        return past


class CausalConv3d(nn.Conv3d):
    """3-D convolution that sees no future: x [B, C, T, H, W], `past` the kernel - 1 frames before it (None: zeros)."""

    def forward(self, x, past=None):
        kernel_t, kernel_h, kernel_w = self.kernel_size
        side = (kernel_h // 2, kernel_w // 2)
        if x.shape[2] == 1 and past is None:
            # all before a clip's first frame is zero: only the last tap counts; 12 % of the tiny decoder's time
            return convolve(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=side)[:, :, None]
        if past is not None:
            x = torch.cat([past.type_as(x), x], 2)
        elif kernel_t > 1:
            x = F.pad(x, (0, 0, 0, 0, kernel_t - 1, 0))
        return convolve(x, self.weight, self.bias, padding=(0, *side))


class RMS_norm(nn.Module):
    """x over its root mean square along the channels, times gamma; a pixel of zeros stays zero."""

    def __init__(self, dim, images=True):
        super().__init__()
        self.scale, self.gamma = dim**0.5, nn.Parameter(torch.ones(dim, 1, 1, *([] if images else [1])))

    def forward(self, x):
        norm = full_precision(x).square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()  # 3 times F.normalize's speed
        return x * norm.type_as(x) * (self.scale * self.gamma).type_as(x)


def causal(layers, x, cache):
    """Run norms, each with the SiLU that follows it, and causal convolutions, which take their past from the cache."""
    for layer in layers:
        if isinstance(layer, CausalConv3d):
            x = layer(x, cache.past(x, 2))
        elif isinstance(layer, RMS_norm):
            x = norm_silu(layer, x)
    return x


class ResidualBlock(nn.Module):
    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.residual = nn.Sequential(
            RMS_norm(in_dim, images=False), nn.SiLU(), CausalConv3d(in_dim, out_dim, 3),
            RMS_norm(out_dim, images=False), nn.SiLU(), nn.Dropout(0.0), CausalConv3d(out_dim, out_dim, 3),
        )  # fmt: skip
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x, cache):
        return self.shortcut(x) + causal(self.residual, x, cache)


class AttentionBlock(nn.Module):
    """Single-head self-attention within each frame."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.to_qkv, self.proj = RMS_norm(dim), nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x, cache):
        B, C, T, H, W = x.shape
        y = self.to_qkv(self.norm(x.transpose(1, 2).flatten(0, 1)))  # [B T, 3 C, H, W]
        q, k, v = y.flatten(2).transpose(1, 2).chunk(3, -1)  # [B T, H W, C]
        if cache.kv_hook is not None:
            k, v = cache.kv_hook(k, v, (H, W))
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        y = self.proj(y.transpose(1, 2).reshape(B * T, C, H, W))
        return x + y.unflatten(0, (B, T)).transpose(1, 2)


class Resample(nn.Module):
    """Halve or double height and width, and in the `3d` modes time too, the clip's first frame left out."""

    def __init__(self, dim, out_dim, mode):
        super().__init__()
        self.mode = mode
        if mode.startswith("up"):
            resize = nn.Upsample(scale_factor=2.0, mode="nearest-exact")
            self.resample = nn.Sequential(resize, nn.Conv2d(dim, out_dim, 3, padding=1))
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, out_dim, 3, stride=2))
        if mode == "upsample3d":
            self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1))
        elif mode == "downsample3d":
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x, cache):
        if self.mode == "upsample3d":
            x = self.double_time(x, cache)
        resize, conv = self.resample
        frames = resize(x.transpose(1, 2).flatten(0, 1))  # [B T, C, H, W]
        frames = convolve(frames, conv.weight, conv.bias, conv.stride, conv.padding)
        x = frames.unflatten(0, (len(x), -1)).transpose(1, 2)
        return self.halve_time(x, cache) if self.mode == "downsample3d" else x

    def double_time(self, x, cache):
        first, rest = (x[:, :, :1], x[:, :, 1:]) if cache.first else (x[:, :, :0], x)
        past = cache.past(rest, 2)  # without the first frame: to the time convolution it is zero
        if rest.shape[2]:
            rest = self.time_conv(rest, past).unflatten(1, (2, -1))  # [B, 2, C, T, H, W]
            rest = rest.movedim(1, 3).flatten(2, 3)  # [B, C, 2 T, H, W]: a frame's two halves are neighbours in time
        return torch.cat([first, rest], 2)

    def halve_time(self, x, cache):
        past = cache.past(x, 1)
        first, rest = (x[:, :, :1], x) if past is None else (x[:, :, :0], torch.cat([past, x], 2))
        if rest.shape[2] == 1:  # the clip's first frame alone
            return first
        conv = self.time_conv
        return torch.cat([first, convolve(rest, conv.weight, conv.bias, conv.stride)], 2)


def average_down(x, out_dim, ft, fs):
    """Space-time to channels, then the mean of neighbouring ones; [B, C, T, H, W] to [B, out, T/ft, H/fs, W/fs]."""
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % ft, 0))
    B, C, T, H, W = x.shape
    x = x.view(B, C, T // ft, ft, H // fs, fs, W // fs, fs).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(B, out_dim, -1, T // ft, H // fs, W // fs).mean(2)


def duplicate_up(x, out_dim, ft, fs, first):
    """Repeat channels, then channels to space-time; the clip's first frame is not doubled in time."""
    x = x.repeat_interleave(out_dim * ft * fs * fs // x.shape[1], 1)
    x = x.unflatten(1, (out_dim, ft, fs, fs)).permute(0, 1, 5, 2, 6, 3, 7, 4)  # [B, out, T, ft, H, fs, W, fs]
    x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return x[:, :, ft - 1 :] if first else x


class Down_ResidualBlock(nn.Module):
    def __init__(self, in_dim, out_dim, num_res_blocks, down, down_time):
        super().__init__()
        self.factors = out_dim, 1 + down_time, 1 + down
        blocks = [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(num_res_blocks)]
        if down:
            blocks.append(Resample(out_dim, out_dim, "downsample3d" if down_time else "downsample2d"))
        self.downsamples = nn.Sequential(*blocks)

    def forward(self, x, cache):
        shortcut = average_down(x, *self.factors)
        for block in self.downsamples:
            x = block(x, cache)
        return x + shortcut


class Up_ResidualBlock(nn.Module):
    def __init__(self, in_dim, out_dim, num_res_blocks, up, up_time, halve=False):
        super().__init__()
        self.factors = (out_dim, 1 + up_time, 2) if up else None
        blocks = [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(num_res_blocks + 1)]
        if up:
            mode = "upsample3d" if up_time else "upsample2d"
            blocks.append(Resample(out_dim, out_dim // 2 if halve else out_dim, mode))
        self.upsamples = nn.Sequential(*blocks)

    def forward(self, x, cache):
        shortcut = duplicate_up(x, *self.factors, cache.first) if self.factors else 0
        for block in self.upsamples:
            x = block(x, cache)
        return x + shortcut


class Encoder3d(nn.Module):
    """Patchified pixels [B, 3 p², F, H/p, W/p] and caches to (mean, log-variance) [B, 2 z, F', h, w] and caches."""

    def __init__(self, cfg):
        super().__init__()
        dims = [cfg.dim * m for m in (1, *cfg.dim_mult)]
        down = len(cfg.temporal_downsample)
        self.conv1 = CausalConv3d(3 * cfg.patch_size**2, dims[0], 3)
        stages = [
            Down_ResidualBlock(a, b, cfg.num_res_blocks, i < down, i < down and cfg.temporal_downsample[i])
            for i, (a, b) in enumerate(pairwise(dims))
        ]
        if cfg.patch_size == 1:  # Wan 2.1: the same blocks in one row, without the averaging shortcuts
            stages = [block for stage in stages for block in stage.downsamples]
        self.downsamples = nn.Sequential(*stages)
        self.middle = nn.Sequential(
            ResidualBlock(dims[-1], dims[-1]), AttentionBlock(dims[-1]), ResidualBlock(dims[-1], dims[-1])
        )
        self.head = nn.Sequential(RMS_norm(dims[-1], images=False), nn.SiLU(), CausalConv3d(dims[-1], 2 * cfg.z_dim, 3))

    def forward(self, x, caches=None):
        cache = CausalCache(caches)
        x = causal([self.conv1], x, cache)
        for block in (*self.downsamples, *self.middle):
            x = block(x, cache)
        return causal(self.head, x, cache), cache.new


class Decoder3d(nn.Module):
    """Latents [B, z, F', h, w] and caches to patchified pixels [B, 3 p², F, H/p, W/p] and caches."""

    def __init__(self, cfg):
        super().__init__()
        dims = [cfg.dec_dim * m for m in (cfg.dim_mult[-1], *cfg.dim_mult[::-1])]
        up_time = cfg.temporal_downsample[::-1]
        self.conv1 = CausalConv3d(cfg.z_dim, dims[0], 3)
        self.middle = nn.Sequential(
            ResidualBlock(dims[0], dims[0]), AttentionBlock(dims[0]), ResidualBlock(dims[0], dims[0])
        )
        wan21, up = cfg.patch_size == 1, len(up_time)
        stages = [
            Up_ResidualBlock(a // 2 if wan21 and i else a, b, cfg.num_res_blocks, i < up, i < up and up_time[i], wan21)
            for i, (a, b) in enumerate(pairwise(dims))
        ]
        if wan21:
            stages = [block for stage in stages for block in stage.upsamples]
        self.upsamples = nn.Sequential(*stages)
        self.head = nn.Sequential(
            RMS_norm(dims[-1], images=False), nn.SiLU(), CausalConv3d(dims[-1], 3 * cfg.patch_size**2, 3)
        )

    def forward(self, x, caches=None, kv_hook=None):
        cache = CausalCache(caches, kv_hook)
        x = causal([self.conv1], x, cache)
        for block in (*self.middle, *self.upsamples):
            x = block(x, cache)
        return causal(self.head, x, cache), cache.new


class WanVAE(nn.Module):
    """Wan's causal video autoencoder, 2.2's or (patch_size 1) 2.1's. Source: wan/modules/vae2_2.py, vae2_1.py.

    `encode`: video [B, 3, F, H, W] in [-1, 1], F = 4n+1, to the latent's mean [B, z, 1+n, H/s, W/s], normalised
    by the config's `mean` and `std`. `decode` inverts it; values are not clamped, so that gradients pass. Both give
    fp32 (fp64 for an fp64 model). Raises ValueError where F is not 4n+1 or H, W are no multiples of the stride.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.compute_dtype = None  # of autocast in `encode`, `decode_chunk` and what calls them
        self.encoder = Encoder3d(cfg)
        self.conv1 = CausalConv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1)
        self.conv2 = CausalConv3d(cfg.z_dim, cfg.z_dim, 1)
        self.decoder = Decoder3d(cfg)
        self.set_scale()

    def set_scale(self, mean=(), std=()):
        """Set the latents' mean and deviation per channel: constants, not in the state_dict (as released).

        Absent ones are the config's, or where that has none 0 and 1.
        """
        for name, value, default in (("mean", mean or self.cfg.mean, 0.0), ("std", std or self.cfg.std, 1.0)):
            value = torch.tensor(value or [default] * self.cfg.z_dim, dtype=torch.float32).view(-1, 1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def moments(self, video, frames=None):
        """Mean and log-variance of the unnormalised latent, both [B, z, F', h, w].

        `frames`: how many are in work at a time after the first, a multiple of the stride (None: all of them).
        """
        ft, fh, fw = self.cfg.stride
        B, C, T, H, W = video.shape
        if C != 3 or (T - 1) % ft or H % fh or W % fw:
            raise ValueError(f"video must be [B, 3, {ft}n+1, {fh}a, {fw}b], got {tuple(video.shape)}")
        p = self.cfg.patch_size
        x = video.view(B, 3, T, H // p, p, W // p, p).permute(0, 1, 6, 4, 2, 3, 5)
        x = x.reshape(B, 3 * p * p, T, H // p, W // p).type_as(self.conv1.weight)
        caches, latents = None, []
        with autocast(self, x):
            for chunk in [x] if frames is None or T == 1 else [x[:, :, :1], *x[:, :, 1:].split(frames, 2)]:
                latent, caches = self.encoder(chunk, caches)
                latents.append(latent)
            return full_precision(self.conv1(torch.cat(latents, 2))).chunk(2, 1)

    def encode(self, video):
        return (self.moments(video, self.cfg.stride[0])[0] - self.mean) / self.std

    def decode_chunk(self, latent, caches=None, kv_hook=None):
        """Decode latent frames [B, z, n, h, w] that follow those in `caches`; returns pixels and the new caches."""
        with autocast(self, latent):
            x = self.conv2((latent * self.std + self.mean).type_as(self.conv2.weight))
            x, caches = self.decoder(x, caches, kv_hook)  # [B, 3 p², F, H/p, W/p]
        p = self.cfg.patch_size
        x = full_precision(x).unflatten(1, (3, p, p)).permute(0, 1, 4, 5, 3, 6, 2)  # [B, 3, F, H/p, p, W/p, p]
        return x.flatten(5, 6).flatten(3, 4), caches

    def decode_frames(self, latent, caches=None, kv_hooks=None):
        """`decode_chunk` of one latent frame after the other, each with its kv_hook: one frame's activations at a time.

        On a CPU, at 256x256, it takes 0.7 of the time of all frames in one pass.
        """
        video = []
        for frame, kv_hook in zip(latent.split(1, 2), kv_hooks or [None] * latent.shape[2], strict=True):
            pixels, caches = self.decode_chunk(frame, caches, kv_hook)
            video.append(pixels)
        return torch.cat(video, 2), caches

    def decode(self, latent, frames=None, margin=None):
        """Pixels [B, 3, F, H, W] of a latent [B, z, F', h, w].

        frames, margin: for a smaller graph, with the weights as constants. `frames`: one latent frame's graph is alive
        at a time, from caches kept every so many latent frames (`StreamedDecode`); None: all graphs at once. `margin`:
        the gradient is kept within so many latent cells around the faces (`WindowedDecode`); None: everywhere.
        """
        if margin is not None:
            return WindowedDecode.apply(latent, self, frames, margin)
        return self.decode_frames(latent)[0] if frames is None else StreamedDecode.apply(latent, self, frames)

    def gradient_window(self, grad, margin):
        """The latent cells under a non-zero gradient at the pixels [B, 3, F, H, W]: slices (time, rows, columns).

        Rows and columns are `margin` cells larger on each side; time starts at 0, the decoder being causal. None where
        the gradient is zero.
        """
        places = (grad != 0).any(1).any(0).nonzero()  # of [F, H, W]
        if not len(places):
            return None
        ft, fh, fw = self.cfg.stride
        (_, last), *spans = torch.stack(places.aminmax(dim=0), 1).tolist()
        cells = [slice(max(0, a // s - margin), b // s + 1 + margin) for (a, b), s in zip(spans, (fh, fw))]
        return slice(0, (last + ft - 1) // ft + 1), *cells


# ---------------------------------------------------------------------------------------------------------------
# A frozen decoder keeps less. The gradient at a layer's input needs the layer's weights, and where the layer is linear
# nothing else; autograd keeps the input too, for the weights' gradient, and every tensor between two functions. The
# graph of the tiny decoder, of 17 frames of 256x256, is 68 MB; without FrozenConv 207, without FrozenNormSiLU 132.


def conv_nd(x, weight, bias=None, stride=1, padding=0):
    """F.conv2d or F.conv3d, by the weight's dimensions; a small fp32 clip on a CPU goes to oneDNN.

    torch's own rule (use_mkldnn in Convolution.cpp) keeps a single clip of at most 20480 values a column from it, and
    such a clip then decodes 2.5 times slower.
    """
    if weight.dim() == 4:
        return F.conv2d(x, weight, bias, stride, padding)
    small = len(x) == 1 and x[..., 0].numel() <= 20480 and stride == 1
    plain = type(x) is torch.Tensor and x.device.type == "cpu" and x.dtype == torch.float32  # plan.py's are fake
    if small and plain and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
        ones = (1, 1, 1)
        return torch.mkldnn_convolution(x.contiguous(), weight.contiguous(), bias, padding, ones, ones, 1)
    return F.conv3d(x, weight, bias, stride, padding)


class FrozenConv(torch.autograd.Function):
    """A 2-D or 3-D convolution with constant weights, by their dimensions: the graph keeps the weights only."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype, ctx.stride, ctx.padding = x.shape, x.dtype, stride, padding
        return conv_nd(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.saved_tensors[0].type_as(grad)
        if weight.dim() == 5 and ctx.stride == 1 and grad.device.type == "cpu":
            # a convolution's transpose is one with the mirrored kernel
            padding = [k - 1 - p for k, p in zip(weight.shape[2:], ctx.padding)]
            grad = conv_nd(grad, weight.transpose(0, 1).flip(2, 3, 4), None, 1, padding)
        else:
            backward = nn.grad.conv2d_input if weight.dim() == 4 else nn.grad.conv3d_input
            grad = backward(ctx.shape, weight, grad, ctx.stride, ctx.padding)
        return grad.to(ctx.dtype), None, None, None, None


def convolve(x, weight, bias=None, stride=1, padding=0):
    """Convolve; where only x wants a gradient the graph keeps no input (`FrozenConv`)."""
    if x.requires_grad and not weight.requires_grad:
        return FrozenConv.apply(x, weight, bias, stride, padding)
    return conv_nd(x, weight, bias, stride, padding)


class FrozenNormSiLU(torch.autograd.Function):
    """RMS_norm with constant weights (scale times gamma), then SiLU: the graph keeps x, not the two tensors between."""

    @staticmethod
    def forward(ctx, x, weight):
        norm = full_precision(x).square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()
        ctx.save_for_backward(x, norm, weight)
        return F.silu(x * norm.type_as(x) * weight)

    @staticmethod
    def backward(ctx, grad):
        x, norm, weight = ctx.saved_tensors
        grad = torch.ops.aten.silu_backward(grad, x * norm.type_as(x) * weight) * weight
        # d(x / |x|) = (dx - x <x, dx> / |x|²) / |x|, of which only the inner product needs fp32
        along = (full_precision(grad) * x).sum(1, keepdim=True) * norm**3
        return grad * norm.type_as(x) - x * along.type_as(x), None


def norm_silu(norm, x):
    """F.silu(norm(x)) of an RMS_norm; `FrozenNormSiLU` where only x wants a gradient."""
    if x.requires_grad and not norm.gamma.requires_grad:
        return FrozenNormSiLU.apply(x, (norm.scale * norm.gamma).type_as(x))
    return F.silu(norm(x))


# ---------------------------------------------------------------------------------------------------------------
# Decoding with a small graph: one latent frame at a time, or only the cells that the gradient comes from


class StreamedDecode(torch.autograd.Function):
    """WanVAE.decode with one latent frame's graph alive at a time; exactly its gradient.

    Forward keeps the caches where groups of `frames` latent frames meet. Backward takes the groups from last to first:
    decodes one again for the caches between its frames, then each frame, last to first, with its graph: (gradient at
    its pixels, at the caches it leaves) to (gradient at its latent, at the caches it found). Of F' frames' caches, F' /
    frames + frames are in memory, each half of what a frame's graph is; sqrt(F') is best.
    """

    @staticmethod
    def forward(ctx, latent, vae, frames, kv_hooks=None):
        ctx.vae, ctx.groups, caches, video = vae, [], None, []
        for start in range(0, latent.shape[2], frames):
            group = slice(start, start + frames)
            inputs = latent[:, :, group], caches, kv_hooks and kv_hooks[group]
            if ctx.needs_input_grad[0]:
                ctx.groups.append(inputs)
            pixels, caches = vae.decode_frames(*inputs)
            video.append(pixels)
        return torch.cat(video, 2)

    @staticmethod
    def backward(ctx, grad):
        latent_grads, cache_grads = [], []  # of the caches that the frame in work leaves; none after the last frame
        while ctx.groups:
            latent, caches, kv_hooks = ctx.groups.pop()
            frames = list(zip(latent.split(1, 2), kv_hooks or [None] * latent.shape[2]))
            caches_before = [caches]  # of each frame of the group
            for x, kv_hook in frames[:-1]:
                caches_before.append(ctx.vae.decode_chunk(x, caches_before[-1], kv_hook)[1])
            del caches
            for x, kv_hook in reversed(frames):
                with torch.enable_grad():
                    inputs = [y.detach().requires_grad_() for y in (x, *(caches_before.pop() or ()))]
                    pixels, caches_after = ctx.vae.decode_chunk(inputs[0], inputs[1:] or None, kv_hook)
                grad, pixels_grad = grad.split([grad.shape[2] - pixels.shape[2], pixels.shape[2]], 2)
                pairs = zip([pixels, *caches_after], [pixels_grad, *cache_grads])
                outputs, output_grads = zip(*[(y, g) for y, g in pairs if y.requires_grad])
                x_grad, *cache_grads = torch.autograd.grad(outputs, inputs, output_grads, materialize_grads=True)
                latent_grads.insert(0, x_grad)
                del inputs, pixels, caches_after, pairs, outputs
        return torch.cat(latent_grads, 2), None, None, None


class WindowedDecode(torch.autograd.Function):
    """WanVAE.decode whose gradient passes through the latent window under the pixels' non-zero gradient only.

    A face reward's gradient at the pixels is zero outside the faces' crops. The window (`gradient_window`) is one box
    around all of them, in every frame and clip, decoded again as a clip of its own. An approximation: at the window's
    border convolutions meet zeros instead of the frame (cosine to the whole gradient 0.996 at a margin of 4 with Wan
    2.2's decoder: docs/results.md). Attention, which sees all, has the keys and values of the first pass outside.
    """

    @staticmethod
    def forward(ctx, latent, vae, frames, margin):
        ctx.save_for_backward(latent)
        ctx.vae, ctx.frames, ctx.margin, ctx.keys_values = vae, frames, margin, []

        def keep(k, v, size):
            ctx.keys_values.append((k.clone(), v.clone()))  # views would keep the queries too
            return k, v

        return vae.decode_frames(latent, kv_hooks=[keep] * latent.shape[2])[0]

    @staticmethod
    def backward(ctx, grad):
        (latent,) = ctx.saved_tensors
        latent_grad = torch.zeros_like(latent)
        window = ctx.vae.gradient_window(grad, ctx.margin)
        if window is None:
            return latent_grad, None, None, None
        (t, y, x), (fh, fw) = window, ctx.vae.cfg.stride[1:]
        halo = min(ctx.margin, 3)
        kv_hooks = [partial(set_into_frame, kv, latent.shape[3:], (y, x), halo) for kv in ctx.keys_values[t]]
        with torch.enable_grad():
            part = latent[:, :, t, y, x].detach().requires_grad_()
            if ctx.frames:
                video = StreamedDecode.apply(part, ctx.vae, ctx.frames, kv_hooks)
            else:
                video, _ = ctx.vae.decode_frames(part, kv_hooks=kv_hooks)
        grad = grad[:, :, : video.shape[2], y.start * fh : y.stop * fh, x.start * fw : x.stop * fw]
        latent_grad[:, :, t, y, x] = torch.autograd.grad(video, part, grad)[0]
        return latent_grad, None, None, None


def set_into_frame(keys_values, frame, window, halo, k, v, size):
    """A window's keys and values [B, cells, C], of (rows, columns) `size`, set into the whole frame's `keys_values`.

    Not its outermost `halo` cells: the three convolutions before the attention met the window's border there, not the
    frame's content. At the frame's own border no cells are left out.
    """
    inner = [slice(halo * (s.start > 0), n - halo * (s.stop < whole)) for s, n, whole in zip(window, size, frame)]
    rows, columns = (slice(s.start + i.start, s.start + i.stop) for s, i in zip(window, inner))
    out = []
    for whole, part in zip(keys_values, (k, v)):
        whole = whole.unflatten(1, frame).clone()  # [B, h, w, C]
        whole[:, rows, columns] = part.unflatten(1, size)[:, inner[0], inner[1]]
        out.append(whole.flatten(1, 2))
    return out


# ---------------------------------------------------------------------------------------------------------------
# DiT


class Linear32(nn.Linear):
    """A linear layer that computes in fp32 whatever the model's precision is, inside autocast too."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(full_precision(x), full_precision(self.weight), full_precision(self.bias))


class WanRMSNorm(nn.Module):
    """RMS-norm over the whole width, computed and returned in fp32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(full_precision(x), self.weight.shape, full_precision(self.weight), self.eps)


class WanLayerNorm(nn.LayerNorm):
    """Layer-norm, computed and returned in fp32."""

    def forward(self, x):
        y = full_precision(x)
        weight, bias = (None, None) if self.weight is None else (self.weight.type_as(y), self.bias.type_as(y))
        return F.layer_norm(y, self.normalized_shape, weight, bias, self.eps)


def rope_table(grid, head_dim, device):
    """The rotations (cos, sin) [F'·h·w, 1, head_dim/2, 2] by (time, height, width), in fp64."""
    c = head_dim // 2
    arange = functools.partial(torch.arange, dtype=torch.float64, device=device)
    positions = torch.meshgrid(*map(arange, grid), indexing="ij")  # three of [F', h, w]
    parts = c - 2 * (c // 3), c // 3, c // 3
    angle = torch.cat([p[..., None] * 10000.0 ** -(arange(n) / n) for p, n in zip(positions, parts)], -1)
    angle = angle.flatten(0, 2)[:, None]
    return torch.stack([angle.cos(), angle.sin()], -1)


def rope_apply(x, table):
    """Rotate neighbouring pairs of x [B, L, heads, head_dim], which the norm before left in fp32 or fp64."""
    x = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # Inductor generates no code for complex numbers
        (a, b), (cos, sin) = x.unbind(-1), table.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(table)).flatten(-2)


class WanAttention(nn.Module):
    """Self-attention, with positions by `rope`; or attention to a context."""

    def __init__(self, dim, num_heads, eps):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = WanRMSNorm(dim, eps), WanRMSNorm(dim, eps)

    def forward(self, x, context=None, rope=None):
        source = x if context is None else context
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(source)), self.v(source)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))  # [B, L, heads, head_dim]
        if rope is not None:
            q, k = rope_apply(q, rope), rope_apply(k, rope)
        y = F.scaled_dot_product_attention(*(y.to(v.dtype).transpose(1, 2) for y in (q, k, v)))
        return self.o(y.transpose(1, 2).flatten(2))  # [B, L, dim]


class WanAttentionBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        dim = cfg.dim
        self.norm1 = WanLayerNorm(dim, cfg.eps, elementwise_affine=False)
        self.self_attn = WanAttention(dim, cfg.num_heads, cfg.eps)
        self.norm3 = WanLayerNorm(dim, cfg.eps)
        self.cross_attn = WanAttention(dim, cfg.num_heads, cfg.eps)
        self.norm2 = WanLayerNorm(dim, cfg.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, cfg.ffn_dim), nn.GELU("tanh"), nn.Linear(cfg.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x, e, rope, context):
        """x [B, L, dim] and modulations e [B, F', 6, dim], both fp32; context [B, text_len, dim] in the precision
        that matrices are multiplied in."""
        dtype, frames = context.dtype, e.shape[1]
        e = (self.modulation + e)[:, :, :, None].unbind(2)  # shift, scale, gate twice; each [B, F', 1, dim]

        def per_frame(y):
            return y.unflatten(1, (frames, -1))  # [B, F', tokens of a frame, dim]

        y = torch.addcmul(e[0], per_frame(self.norm1(x)), 1 + e[1])
        y = self.self_attn(y.flatten(1, 2).to(dtype), rope=rope)
        x = torch.addcmul(per_frame(x), per_frame(y), e[2]).flatten(1, 2)
        x = x + self.cross_attn(self.norm3(x).to(dtype), context)
        y = torch.addcmul(e[3], per_frame(self.norm2(x)), 1 + e[4])
        y = self.feed_forward(y.flatten(1, 2).to(dtype))
        return torch.addcmul(per_frame(x), per_frame(y), e[5]).flatten(1, 2)

    def feed_forward(self, x):
        """`ffn`; the graph keeps the wide layer once, before the GELU, which is applied again in the backward pass: a
        sixth less memory of a block, and a step takes as long (tests/bench_step.py)."""
        x = self.ffn[0](x)
        trained = any(p.requires_grad for p in self.ffn[2].parameters())  # a frozen layer's input is not kept anyway
        if not (trained and torch.is_grad_enabled()):
            return self.ffn[1:](x)
        return checkpoint(lambda x: self.ffn[2](self.ffn[1](x)), x, use_reentrant=False, preserve_rng_state=False)


class Head(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm = WanLayerNorm(cfg.dim, cfg.eps, elementwise_affine=False)
        self.head = Linear32(cfg.dim, math.prod(cfg.patch_size) * cfg.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)

    def forward(self, x, e):
        """x [B, L, dim], e [B, F', dim], both fp32."""
        shift, scale = (self.modulation + e[:, :, None])[:, :, :, None].unbind(2)  # [B, F', 1, dim]
        y = self.norm(x).unflatten(1, (e.shape[1], -1)) * (1 + scale) + shift
        return self.head(y.flatten(1, 2))


class WanDiT(nn.Module):
    """Wan 2.2's diffusion transformer: the velocity of a noisy latent. Source: wan/modules/model.py.

    x [B, C, F', h, w]; t [B] or [B, F'], 1000·sigma; context [B or 1, L ≤ text_len, text_dim], zero-padded here to
    text_len; y [B, C_y, F', h, w], joined to x on channels (A14B). Gives the velocity v_theta(x, t) [B, out_dim, F',
    h, w] in fp32 (fp64 for an fp64 model). Raises ValueError where a size does not fit the config.

    compute_dtype: of autocast in the forward pass (None: none of its own). checkpointing: the graph keeps each block's
    input only, and the block is computed again in the backward pass. saved_inputs: a function that gives the context in
    which those inputs are saved; to keep them on the host, HostInputs().hooks.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.compute_dtype, self.checkpointing, self.saved_inputs = None, False, contextlib.nullcontext
        dim = cfg.dim
        self.patch_embedding = nn.Conv3d(cfg.in_dim, dim, cfg.patch_size, stride=cfg.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(cfg.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear32(cfg.freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanAttentionBlock(cfg) for _ in range(cfg.num_layers))
        self.head = Head(cfg)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for embedding in (self.text_embedding, self.time_embedding):
            for layer in (embedding[0], embedding[2]):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def embed_time(self, t, frames):
        """The time embedding [B, F', dim] and the six modulations [B, F', 6, dim] of t [B] or [B, F']."""
        t = t[:, None].expand(-1, frames) if t.dim() == 1 else t
        half = self.cfg.freq_dim // 2
        rate = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
        angle = t.double()[..., None] * rate
        weight = full_precision(self.time_embedding[0].weight)
        e = self.time_embedding(torch.cat([angle.cos(), angle.sin()], -1).type_as(weight))
        return e, self.time_projection(e).unflatten(-1, (6, -1))

    def forward(self, x, t, context, y=None):
        cfg, p = self.cfg, self.cfg.patch_size
        x = x if y is None else torch.cat([x, y], 1)
        B, C, *size = x.shape
        if C != cfg.in_dim or any(n % k for n, k in zip(size, p)):
            raise ValueError(f"latent must be [B, {cfg.in_dim}, F', h, w] in multiples of {p}, got {tuple(x.shape)}")
        if context.shape[1] > cfg.text_len or context.shape[2] != cfg.text_dim:
            raise ValueError(f"context must be [B, at most {cfg.text_len}, {cfg.text_dim}], got {tuple(context.shape)}")
        grid = [n // k for n, k in zip(size, p)]
        with autocast(self, x):
            e, modulation = self.embed_time(t, grid[0])
            dtype = self.patch_embedding.weight.dtype
            x = self.patch_embedding(x.to(dtype)).flatten(2).transpose(1, 2)
            x = x.type_as(modulation).contiguous()  # [B, L, dim]; else each norm of each block would copy it
            context = F.pad(context.to(dtype), (0, 0, 0, cfg.text_len - context.shape[1]))
            context = self.text_embedding(context).expand(B, -1, -1)  # [B, text_len, dim]
            rope = rope_table(grid, cfg.dim // cfg.num_heads, x.device).to(x.dtype)
            for block in self.blocks:
                if self.checkpointing and torch.is_grad_enabled():
                    with self.saved_inputs():  # of the arguments it is given x only, which is the block's own
                        x = checkpoint(block, x, e=modulation, rope=rope, context=context, use_reentrant=False)
                else:
                    x = block(x, modulation, rope, context)
            x = self.head(x, e).view(B, *grid, *p, cfg.out_dim)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(B, cfg.out_dim, *size)


# ---------------------------------------------------------------------------------------------------------------
# --offload: what is not at work waits on the host


def sharded(network):
    """True if FSDP2 shards the network's parameters; such a network is never moved."""
    return any(hasattr(p, "full_tensor") for p in network.parameters())


def move_frozen(network, device):
    """Move a network's frozen weights; the trained ones stay where their gradients and the optimizer's state are.

    A frozen weight never changes, so the host keeps one copy, pinned where there is CUDA: to let a network go copies
    nothing, and to bring it back is one pass at the bus's speed that nobody on the host waits for.
    """
    device = torch.device(device)
    for p in network.parameters():
        if p.requires_grad or p.device.type == device.type:
            continue
        if not hasattr(p, "on_host"):
            p.on_host = torch.empty(p.shape, dtype=p.dtype, pin_memory=torch.cuda.is_available()).copy_(p.data)
        p.data = p.on_host if device.type == "cpu" else p.on_host.to(device, non_blocking=True)


class HostInput(types.SimpleNamespace):
    """A tensor that waits on the host: its buffer and device, the copy that is on its way back, and the one before."""


class HostInputs:
    """Keeps block inputs for the backward pass in pinned memory of the host; give `hooks` to WanDiT.saved_inputs.

    Copies go over a stream of their own: out while the next block runs, and back during the backward pass of the block
    after it, which comes first. A buffer is used again when the graph has let its tensor go. Without CUDA a plain copy.
    """

    def __init__(self):
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.free = {}  # buffers by (shape, dtype)
        self.newest = lambda: None  # a weak reference to the input that was kept last

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def beside(self):
        """The context in which work goes to the copying stream."""
        return torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()

    def pack(self, x):
        free = self.free.setdefault((x.shape, x.dtype), [])
        buffer = free.pop() if free else torch.empty(x.shape, dtype=x.dtype, pin_memory=self.stream is not None)
        kept = HostInput(buffer=buffer, device=x.device, back=None, before=self.newest)
        weakref.finalize(kept, free.append, buffer)
        self.newest = weakref.ref(kept)
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())  # until x is computed
            x.record_stream(self.stream)
        with self.beside():
            buffer.copy_(x, non_blocking=True)
        return kept

    def fetch(self, kept):
        """Begin to bring an input back."""
        with self.beside():
            kept.back = torch.empty_like(kept.buffer, device=kept.device).copy_(kept.buffer, non_blocking=True)
            kept.done = self.stream and self.stream.record_event()

    def unpack(self, kept):
        if kept.back is None:
            self.fetch(kept)
        x, kept.back = kept.back, None
        if self.stream:
            torch.cuda.current_stream().wait_event(kept.done)
            x.record_stream(torch.cuda.current_stream())
        before = kept.before()
        if before is not None and before.back is None:
            self.fetch(before)  # its block's backward pass is the next
        return x


class Experts(nn.Module):
    """I2V-A14B's two transformers as one: timesteps from 1000·boundary up go to `high`, the others to `low`.

    load(name) gives an expert when it is first needed; unless `keep`, the other one is let go first. With `offload` the
    frozen weights of the expert that is not at work wait on the host, and those of the one at work come to the latent's
    device; sharded experts stay.
    """

    def __init__(self, cfg, boundary, load, keep=True):
        super().__init__()
        self.cfg, self.boundary, self.load, self.keep, self.offload = cfg, boundary, load, keep, False

    def expert(self, name):
        """Return the expert of that name; it is loaded on first use."""
        if name not in self._modules:
            if not self.keep:
                self._modules.clear()
            self.add_module(name, self.load(name))
        return self._modules[name]

    def move_expert(self, name, device):
        """The expert of that name, with `offload` on the device and the other one on the host."""
        expert = self.expert(name)
        if self.offload and not sharded(self):
            for module in self.children():
                move_frozen(module, device if module is expert else "cpu")
        return expert

    def forward(self, x, t, context, y=None):
        expert = self.move_expert("high" if float(t.max()) >= 1000 * self.boundary else "low", x.device)
        return expert(x, t, context, y)


# ---------------------------------------------------------------------------------------------------------------
# LoRA: what is tuned of a frozen network

LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")  # of both attentions, and the feed-forward layers


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a low-rank update: W x + (alpha/rank) B A x; B starts at zero.

    Source: arXiv 2106.09685. `weight` and `bias` keep their names, so a state_dict holds the native ones.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.enabled = alpha / rank, True
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        exact = x.dtype == self.weight.dtype == self.lora_A.dtype and not torch.is_autocast_enabled(x.device.type)
        if exact and not torch.is_grad_enabled():  # a fifth of the sampler's time less; bf16 would round B A away
            return F.linear(x, torch.addmm(self.weight, self.lora_B, self.lora_A, alpha=self.scale), self.bias)
        low = self.scale * F.linear(x, self.lora_A.type_as(x))  # [..., rank]
        update = F.linear(low, self.lora_B.type_as(x), self.bias)  # [..., out]
        # The update goes into the wide product's sum, which is rounded once. Added to a product that bf16 has rounded,
        # one of 6e-4 of it, as large as the official recipe's, was left a third of its size; now all of it is, on
        # average. The wide product last: a checkpoint computes again only as far as the backward pass needs a tensor.
        return torch.addmm(update.flatten(0, -2), x.flatten(0, -2), self.weight.T).view_as(update)


def lora_layers(model):
    """The LoRA layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def add_lora(model, rank, alpha=None, targets=LORA_TARGETS):
    """Freeze a model and put a LoRA on every linear layer of its blocks whose name ends in one of `targets`.

    `alpha` defaults to `rank` (scale 1). Returns the new parameters, fp32. Raises ValueError if nothing matches, or the
    model has a LoRA already.
    """
    if lora_layers(model):
        raise ValueError("the model has a LoRA already: merge it into the weights (merge_lora) first")
    model.requires_grad_(False)
    endings = tuple("." + target for target in targets)
    layers = {name: layer for name, layer in model.named_modules()
              if isinstance(layer, nn.Linear) and name.startswith("blocks.") and name.endswith(endings)}  # fmt: skip
    if not layers:
        raise ValueError(f"no linear layer of {type(model).__name__}'s blocks is called {' or '.join(targets)}")
    for name, layer in layers.items():
        model.set_submodule(name, LoRALinear(layer, rank, rank if alpha is None else alpha))
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


@contextlib.contextmanager
def lora_disabled(model):
    """Inside, the model is the untuned reference: its velocity v_ref costs no second copy of the weights."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True
