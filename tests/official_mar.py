"""The official MAR and its KL-16 autoencoder as functions of state dicts under the official names."""

import math

import torch
from torch.nn import functional as F


def trunk_weights(width=32, heads=4, layers=2, tokens=16, channels=4, buffer=3, classes=5, head=24, blocks=2,
                  generator=None):  # fmt: skip
    """A random state dict with the shapes and names of the official file."""
    shapes = {
        "class_emb.weight": (classes, width), "fake_latent": (1, width), "mask_token": (1, 1, width),
        "encoder_pos_embed_learned": (1, buffer + tokens, width),
        "decoder_pos_embed_learned": (1, buffer + tokens, width),
        "diffusion_pos_embed_learned": (1, tokens, width),
    }  # fmt: skip

    def linear(name, rows, columns):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name, size):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (size,), (size,)

    linear("z_proj", width, channels)
    linear("decoder_embed", width, width)
    for name in ("z_proj_ln", "encoder_norm", "decoder_norm"):
        norm(name, width)
    for part in ("encoder", "decoder"):
        for i in range(layers):
            block = f"{part}_blocks.{i}"
            norm(f"{block}.norm1", width)
            norm(f"{block}.norm2", width)
            linear(f"{block}.attn.qkv", 3 * width, width)
            linear(f"{block}.attn.proj", width, width)
            linear(f"{block}.mlp.fc1", 4 * width, width)
            linear(f"{block}.mlp.fc2", width, 4 * width)
    net = "diffloss.net"
    linear(f"{net}.time_embed.mlp.0", head, 256)
    linear(f"{net}.time_embed.mlp.2", head, head)
    linear(f"{net}.cond_embed", head, width)
    linear(f"{net}.input_proj", head, channels)
    for i in range(blocks):
        norm(f"{net}.res_blocks.{i}.in_ln", head)
        linear(f"{net}.res_blocks.{i}.mlp.0", head, head)
        linear(f"{net}.res_blocks.{i}.mlp.2", head, head)
        linear(f"{net}.res_blocks.{i}.adaLN_modulation.1", 3 * head, head)
    linear(f"{net}.final_layer.linear", 2 * channels, head)
    linear(f"{net}.final_layer.adaLN_modulation.1", 2 * head, head)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def _block(w, name, x, heads):
    size, length, width = x.shape
    qkv = _linear(w, f"{name}.attn.qkv", _norm(w, f"{name}.norm1", x))
    q, k, v = qkv.reshape(size, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    attention = (q * (width // heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
    x = x + _linear(w, f"{name}.attn.proj", (attention @ v).transpose(1, 2).reshape(size, length, width))
    hidden = F.gelu(_linear(w, f"{name}.mlp.fc1", _norm(w, f"{name}.norm2", x)))
    return x + _linear(w, f"{name}.mlp.fc2", hidden)


def trunk(w, tokens, mask, embedding, heads):
    """Conditions z (B, N, D) of tokens (B, N, c), with 1 in the mask (B, N) where they are unknown."""
    buffer = w["encoder_pos_embed_learned"].shape[1] - tokens.shape[1]
    x = _linear(w, "z_proj", tokens)
    x = torch.cat([embedding[:, None].repeat(1, buffer, 1), x], 1) + w["encoder_pos_embed_learned"]
    full = torch.cat([torch.zeros(len(mask), buffer), mask], 1)
    seen = (1 - full).nonzero(as_tuple=True)
    x = _norm(w, "z_proj_ln", x)[seen].reshape(len(mask), -1, x.shape[-1])
    for i in range(sum(name.endswith("norm1.weight") and name.startswith("encoder") for name in w)):
        x = _block(w, f"encoder_blocks.{i}", x, heads)
    x = _linear(w, "decoder_embed", _norm(w, "encoder_norm", x))
    padded = w["mask_token"].repeat(len(mask), full.shape[1], 1)
    padded[seen] = x.reshape(-1, x.shape[-1])
    x = padded + w["decoder_pos_embed_learned"]
    for i in range(sum(name.endswith("norm1.weight") and name.startswith("decoder") for name in w)):
        x = _block(w, f"decoder_blocks.{i}", x, heads)
    return _norm(w, "decoder_norm", x)[:, buffer:] + w["diffusion_pos_embed_learned"]


def head(w, x, t, z):
    """The head's output (R, 2 c) for tokens (R, c), timesteps (R) and conditions (R, D)."""
    net = "diffloss.net"
    args = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = _linear(w, f"{net}.time_embed.mlp.0", torch.cat([args.cos(), args.sin()], -1))
    y = _linear(w, f"{net}.time_embed.mlp.2", F.silu(time)) + _linear(w, f"{net}.cond_embed", z)
    x = _linear(w, f"{net}.input_proj", x)
    for i in range(sum(name.endswith("in_ln.weight") for name in w)):
        block = f"{net}.res_blocks.{i}"
        shift, scale, gate = _linear(w, f"{block}.adaLN_modulation.1", F.silu(y)).chunk(3, -1)
        h = _norm(w, f"{block}.in_ln", x) * (1 + scale) + shift
        x = x + gate * _linear(w, f"{block}.mlp.2", F.silu(_linear(w, f"{block}.mlp.0", h)))
    shift, scale = _linear(w, f"{net}.final_layer.adaLN_modulation.1", F.silu(y)).chunk(2, -1)
    return _linear(
        w, f"{net}.final_layer.linear", F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    )


class Shapes(dict):
    """The shapes of an autoencoder's tensors, layer by layer."""

    def conv(self, name, out, inside, size=3):
        self[f"{name}.weight"], self[f"{name}.bias"] = (out, inside, size, size), (out,)

    def norm(self, name, size):
        self[f"{name}.weight"], self[f"{name}.bias"] = (size,), (size,)

    def resnet(self, name, inside, out):
        self.norm(f"{name}.norm1", inside)
        self.conv(f"{name}.conv1", out, inside)
        self.norm(f"{name}.norm2", out)
        self.conv(f"{name}.conv2", out, out)
        if inside != out:
            self.conv(f"{name}.nin_shortcut", out, inside, 1)

    def attention(self, name, size):
        self.norm(f"{name}.norm", size)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", size, size, 1)

    def half(self, name, first, inside, last, end, out):
        """What encoder and decoder have alike."""
        self.conv(f"{name}.conv_in", first, inside)
        self.resnet(f"{name}.mid.block_1", last, last)
        self.attention(f"{name}.mid.attn_1", last)
        self.resnet(f"{name}.mid.block_2", last, last)
        self.norm(f"{name}.norm_out", end)
        self.conv(f"{name}.conv_out", out, end)


def vae_weights(channels=(32, 64), blocks=1, latent=4, generator=None):
    """A random state dict of the autoencoder; the encoder attends at its lowest level."""
    shapes, last, inside = Shapes(), channels[-1], channels[0]
    shapes.half("encoder", inside, 3, last, last, 2 * latent)
    shapes.half("decoder", last, latent, last, inside, 3)
    for i, size in enumerate(channels):
        for j in range(blocks):
            shapes.resnet(f"encoder.down.{i}.block.{j}", inside, size)
            inside = size
            if i == len(channels) - 1:
                shapes.attention(f"encoder.down.{i}.attn.{j}", size)
        if i < len(channels) - 1:
            shapes.conv(f"encoder.down.{i}.downsample.conv", size, size)
    for i, size in reversed(list(enumerate(channels))):
        for j in range(blocks + 1):
            shapes.resnet(f"decoder.up.{i}.block.{j}", inside, size)
            inside = size
        if i:
            shapes.conv(f"decoder.up.{i}.upsample.conv", size, size)
    shapes.conv("quant_conv", 2 * latent, 2 * latent, 1)
    shapes.conv("post_quant_conv", latent, latent, 1)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _conv(w, name, x, **options):
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options)


def _group(w, name, x):
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def _resnet(w, name, x):
    h = _conv(w, f"{name}.conv1", F.silu(_group(w, f"{name}.norm1", x)), padding=1)
    h = _conv(w, f"{name}.conv2", F.silu(_group(w, f"{name}.norm2", h)), padding=1)
    return h + (_conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)


def _attention(w, name, x):
    h = _group(w, f"{name}.norm", x)
    q, k, v = (_conv(w, f"{name}.{part}", h).flatten(2) for part in "qkv")
    weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
    return x + _conv(w, f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))


def _middle(w, name, x):
    x = _attention(w, f"{name}.attn_1", _resnet(w, f"{name}.block_1", x))
    return _resnet(w, f"{name}.block_2", x)


def vae_encode(w, x, levels=2, blocks=1):
    """The moments (B, 2 C, h, w) of images (B, 3, H, W)."""
    x = _conv(w, "encoder.conv_in", x, padding=1)
    for i in range(levels):
        for j in range(blocks):
            x = _resnet(w, f"encoder.down.{i}.block.{j}", x)
            if f"encoder.down.{i}.attn.{j}.q.weight" in w:
                x = _attention(w, f"encoder.down.{i}.attn.{j}", x)
        if i < levels - 1:
            x = _conv(w, f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = F.silu(_group(w, "encoder.norm_out", _middle(w, "encoder.mid", x)))
    return _conv(w, "quant_conv", _conv(w, "encoder.conv_out", x, padding=1))


def vae_decode(w, x, levels=2, blocks=1):
    """Images (B, 3, H, W) of latents (B, C, h, w)."""
    x = _conv(w, "decoder.conv_in", _conv(w, "post_quant_conv", x), padding=1)
    x = _middle(w, "decoder.mid", x)
    for i in reversed(range(levels)):
        for j in range(blocks + 1):
            x = _resnet(w, f"decoder.up.{i}.block.{j}", x)
        if i:
            x = _conv(w, f"decoder.up.{i}.upsample.conv", F.interpolate(x, scale_factor=2.0), padding=1)
    return _conv(w, "decoder.conv_out", F.silu(_group(w, "decoder.norm_out", x)), padding=1)
