"""CLIP (Radford et al. 2021), the frozen backbone of TRM-ML: image features (global, dense) and text features.

Parameters carry the names of OpenAI's files, so their weights, open_clip's and our own small ones load into the same
class, and `build` infers the architecture from the tensors. What TRM-ML asks beyond the original:
- dense features f: one D-vector per location of the last map, at any input size (section 3.1 of the paper);
- prompts that enter the text encoder as embeddings, so that context tokens can be learned.

B images, T texts, S tokens, W text width, N = h*w locations (row-major), D joint dimension, C channels of the last map.

    model = clip.load("RN101")
    g = model.encode_text(model.tokenize(["a photo of a cat"]))      # (1, 512)
    image, f = model.encode(torch.randn(1, 3, 448, 448))             # (1, 512), (1, 196, 512)
"""
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from clip.tokenizer import tokenize
from support import UserError

ACTIVATIONS = {"quickgelu": lambda x: F.silu(1.702 * x) / 1.702, "gelu": F.gelu}  # silu(x) = x sigmoid(x)


def resize_positions(positions, h, w):
    """positions (1 + g*g, C) of a g x g grid behind one special token -> (1 + h*w, C), bicubic if the grid differs."""
    g = math.isqrt(len(positions) - 1)
    if (h, w) == (g, g):
        return positions
    grid = positions[1:].T.reshape(1, -1, g, g)                                                  # (1, C, g, g)
    grid = F.interpolate(grid.float(), size=(h, w), mode="bicubic", align_corners=False).to(positions.dtype)
    return torch.cat([positions[:1], grid.flatten(2)[0].T])                                      # (1 + h*w, C)


def attend(q, k, v, heads, causal=False):
    """q (B, S, C), k and v (B, S', C) already projected -> (B, S, C): softmax(q k^T / sqrt(C / heads)) v in each head."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))               # (B, heads, S, C/heads)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)  # (B, S, C)


class Bottleneck(nn.Module):
    """ResNet bottleneck whose stride is an average pool (anti-aliased), in the residual as in the shortcut."""

    def __init__(self, c_in, planes, stride):
        super().__init__()
        c_out = 4 * planes
        self.conv1, self.bn1 = nn.Conv2d(c_in, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(OrderedDict({
                "-1": nn.AvgPool2d(stride), "0": nn.Conv2d(c_in, c_out, 1, bias=False), "1": nn.BatchNorm2d(c_out)}))
        nn.init.zeros_(self.bn3.weight)  # every block starts as its shortcut

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.pool(F.relu(self.bn2(self.conv2(y)), inplace=True))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)), inplace=True)


class AttentionPool(nn.Module):
    """The global feature: attention from the mean of the map over the map. Its value and output projections alone,
    at each location, give the dense features (no mean token, no positions), as DualCoOp and TaI-DPT take them."""

    def __init__(self, grid, channels, heads, embed_dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, channels) / channels ** 0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, embed_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=channels ** -0.5)
        self.folded = None  # v_proj and c_proj in one map, see CLIP.fold

    def forward(self, x):
        """x (B, C, h, w) -> (B, D)"""
        h, w = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)                                                         # (B, N, C)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + resize_positions(self.positional_embedding, h, w)
        x = attend(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), self.heads)            # (B, 1, C)
        return self.c_proj(x[:, 0])

    def dense(self, x):
        """x (B, C, h, w) -> (B, N, D)"""
        x = x.flatten(2).transpose(1, 2)                                                         # (B, N, C)
        return self.c_proj(self.v_proj(x)) if self.folded is None else self.folded(x)


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, anti-aliased strides, attention pooling. Stride 32."""

    def __init__(self, layers, width, resolution, embed_dim):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        c_in = width
        for i, depth in enumerate(layers):
            planes, stride = width * 2 ** i, 1 if i == 0 else 2
            blocks = [Bottleneck(c_in if b == 0 else 4 * planes, planes, stride if b == 0 else 1) for b in range(depth)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            c_in = 4 * planes
        self.attnpool = AttentionPool(resolution // 32, c_in, max(1, c_in // 64), embed_dim)

    def grid(self, H, W):
        return (H + 1) // 2 // 16, (W + 1) // 2 // 16

    def trunk(self, x):
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(bn(conv(x)), inplace=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(F.avg_pool2d(x, 2)))))            # (B, C, h, w)

    def pool(self, x):
        return self.attnpool(x)

    def dense(self, x):
        return self.attnpool.dense(x)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, causal):
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attend(q, k, v, self.heads, causal))

    def last(self, x, at):
        """Causal attention for one query a text: token at[t] attends to tokens 0..at[t]. x (T, S, W), at (T,) -> (T, W)"""
        q, k, v = zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q = F.linear(x[torch.arange(len(x), device=x.device), at], *q)                           # (T, W)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, F.linear(x, *k), F.linear(x, *v)))
        s = torch.einsum("thc,tshc->ths", q, k) / q.shape[-1] ** 0.5                             # (T, heads, S)
        s = s.masked_fill((torch.arange(x.shape[1], device=x.device) > at[:, None])[:, None], -torch.inf)
        return self.out_proj(torch.einsum("ths,tshc->thc", s.softmax(-1).to(v.dtype), v).flatten(1))

    def values(self, x):
        """Each token attends to itself alone."""
        weight, bias = self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2]
        return self.out_proj(F.linear(x, weight, bias))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, activation):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.activation = activation

    def forward(self, x, causal=False, values_only=False, at=None):
        """x (B, S, C) -> the same, or with at (B,) only token at[b] of each: (B, C), as if causal."""
        y = self.ln_1(x)
        if at is not None:
            x = x[torch.arange(len(x), device=x.device), at] + self.attn.last(y, at)
        else:
            x = x + (self.attn.values(y) if values_only else self.attn(y, causal))
        return x + self.mlp["c_proj"](ACTIVATIONS[self.activation](self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, activation):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(layers))


class VisionTransformer(nn.Module):
    """Dense features: the patch tokens after the last block with value-only attention (its attention is replaced by
    out_proj(v_proj(ln_1(x))), residual and MLP as usual), then ln_post and proj, the path the class token takes."""

    def __init__(self, layers, width, patch, resolution, embed_dim, activation):
        super().__init__()
        self.patch = patch
        scale = width ** -0.5
        heads = 16 if width == 1280 else max(1, width // 64)  # 64 wide in all but open_clip's ViT-H
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((resolution // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def grid(self, H, W):
        return H // self.patch, W // self.patch

    def trunk(self, x):
        """x (B, 3, H, W) -> all blocks but the last, (B, 1 + N, C)"""
        x = self.conv1(x)                                                                        # (B, C, h, w)
        h, w = x.shape[-2:]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = self.ln_pre(x + resize_positions(self.positional_embedding, h, w))
        for block in self.transformer.resblocks[:-1]:
            x = block(x)
        return x

    def pool(self, x):
        return self.ln_post(self.transformer.resblocks[-1](x)[:, 0]) @ self.proj                 # (B, D)

    def dense(self, x):
        return self.ln_post(self.transformer.resblocks[-1](x[:, 1:], values_only=True)) @ self.proj  # (B, N, D)


class CLIP(nn.Module):
    """CLIP from plain dimensions, with CLIP's own initialisation.

    embed_dim: D. resolution: native image size. layers: blocks of each of the four stages (a ResNet) or the number of
    blocks (a ViT). vision_width: channels of the stem (even) or of the tokens. patch: ViT only. text_heads: None for heads
    of 64 channels, the only choice that `build` can infer. activation: "quickgelu" (OpenAI's) or "gelu".
    Attributes: D, W, context_length, vocab_size, resolution, and from `load` the name and the sha256 of the file."""

    def __init__(self, embed_dim, resolution, layers, vision_width, patch, context_length, vocab_size, text_width,
                 text_heads=None, text_layers=12, activation="quickgelu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(f"activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        self.D, self.W = embed_dim, text_width
        self.context_length, self.vocab_size, self.resolution = context_length, vocab_size, resolution
        self.sha256, self.name = "", ""
        if isinstance(layers, int):
            self.visual = VisionTransformer(layers, vision_width, patch, resolution, embed_dim, activation)
        else:
            self.visual = ModifiedResNet(layers, vision_width, resolution, embed_dim)
        self.transformer = Transformer(text_width, text_layers, text_heads or max(1, text_width // 64), activation)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(text_width ** -0.5 * torch.randn(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.transformer.resblocks:  # outputs that enter the residual stream shrink with depth
            nn.init.normal_(block.attn.in_proj_weight, std=text_width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=text_width ** -0.5 * (2 * text_layers) ** -0.5)
            nn.init.normal_(block.mlp["c_fc"].weight, std=(2 * text_width) ** -0.5)
            nn.init.normal_(block.mlp["c_proj"].weight, std=text_width ** -0.5 * (2 * text_layers) ** -0.5)

    def tokenize(self, texts):
        """list of T strings -> (T, context_length) int64. A text that is too long raises UserError."""
        return tokenize(texts, self.context_length, self.vocab_size).to(self.positional_embedding.device)

    def embed(self, tokens):
        """tokens (T, S) -> (T, S, W), without positions."""
        return self.token_embedding(tokens)

    def encode_prompts(self, embeddings, eot):
        """embeddings (T, S, W), S up to context_length, without positions; eot (T,) index of the end-of-text token
        -> (T, D), not normalised. Differentiable in embeddings."""
        x = embeddings + self.positional_embedding[:embeddings.shape[1]]                         # (T, S, W)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x, causal=True)
        return self.ln_final(last(x, at=eot)) @ self.text_projection  # of the last block only one token is asked

    def encode_text(self, tokens):
        """tokens (T, S) -> (T, D). The causal mask keeps what follows the end-of-text token from mattering, so all texts
        are cut after the longest."""
        eot = tokens.argmax(1)  # end of text is the last id of the vocabulary
        tokens = tokens[:, :int(eot.max()) + 1]
        return self.encode_prompts(self.embed(tokens), eot)

    def grid(self, H, W):
        """Rows and columns of the dense features of an H x W image: N = h * w."""
        return self.visual.grid(H, W)

    def trunk(self, x):
        H, W = x.shape[-2:]
        if 0 in self.grid(H, W):
            raise UserError(f"images of {H} x {W} pixels are too small for a single feature: "
                            f"enlarge them, best to {self.resolution} x {self.resolution} or more")
        return self.visual.trunk(x)

    def encode_image(self, x):
        """x (B, 3, H, W), CLIP-normalised, any size -> the global feature (B, D), not normalised."""
        return self.visual.pool(self.trunk(x))

    def encode_dense(self, x):
        """x (B, 3, H, W) -> the dense features f (B, N, D), not normalised."""
        return self.visual.dense(self.trunk(x))

    def encode(self, x):
        """x (B, 3, H, W) -> global (B, D) and dense (B, N, D), from one pass of the trunk."""
        x = self.trunk(x)
        return self.visual.pool(x), self.visual.dense(x)

    @torch.no_grad()
    def fold(self):
        """The same outputs from fewer operations, for a CLIP that stays frozen: BatchNorm goes into the convolutions,
        v_proj and c_proj into one map for the dense features, images into channels-last order. In place; returns self."""
        self.eval()
        for module in list(self.visual.modules()):
            for conv, bn in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
                if isinstance(getattr(module, bn, None), nn.BatchNorm2d):
                    setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, bn)))
                    setattr(module, bn, nn.Identity())
        pool = getattr(self.visual, "attnpool", None)
        if pool is not None and pool.folded is None:
            v, c = pool.v_proj, pool.c_proj
            pool.folded = nn.Linear(v.in_features, c.out_features, device=v.weight.device)
            pool.folded.weight.copy_(c.weight.double() @ v.weight.double())
            pool.folded.bias.copy_(c.weight.double() @ v.bias.double() + c.bias)
        return self.requires_grad_(False).to(memory_format=torch.channels_last)


def dimensions(sd):
    """state dict with OpenAI's names -> the keyword arguments of CLIP, read off the shapes."""
    def depth(prefix):  # number of consecutive blocks prefix0., prefix1., ...
        return len({k[len(prefix):].split(".")[0] for k in sd if k.startswith(prefix)})

    text_width, embed_dim = sd["text_projection"].shape
    d = dict(embed_dim=embed_dim, text_width=text_width, context_length=len(sd["positional_embedding"]),
             vocab_size=len(sd["token_embedding.weight"]), text_layers=depth("transformer.resblocks."))
    if "visual.proj" in sd:
        width, _, patch, _ = sd["visual.conv1.weight"].shape
        grid = math.isqrt(len(sd["visual.positional_embedding"]) - 1)
        return d | dict(layers=depth("visual.transformer.resblocks."), vision_width=width, patch=patch,
                        resolution=grid * patch)
    grid = math.isqrt(len(sd["visual.attnpool.positional_embedding"]) - 1)
    return d | dict(layers=tuple(depth(f"visual.layer{i}.") for i in (1, 2, 3, 4)), patch=None, resolution=32 * grid,
                    vision_width=len(sd["visual.layer1.0.conv1.weight"]))


def build(state_dict, fold=False, activation="quickgelu"):
    """state_dict: OpenAI's names -> CLIP in evaluation mode, float32, with its own copy of the tensors.
    Tensors missing, left over or of the wrong shape raise UserError."""
    skipped = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # archives carry these, no weights
    sd = {k: v.detach() for k, v in state_dict.items() if k not in skipped and not k.endswith("num_batches_tracked")}
    try:
        shape = dimensions(sd)
    except (KeyError, ValueError, TypeError) as e:  # a tensor missing, or one without the axes it should have
        raise UserError(f"not a CLIP with OpenAI's parameter names, {e} is missing or odd among {len(sd)} tensors "
                        f"({', '.join(list(sd)[:3])}, ...)") from None
    if empty := [k for k, v in sd.items() if not v.numel()]:
        raise UserError(f"{empty[0]} has no elements: expected the tensors of a trained CLIP")
    with torch.device("meta"):  # shapes alone: nothing is initialised only to be overwritten
        model = CLIP(**shape, activation=activation).eval()
    want = {k: v.shape for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    wrong = [f"{k} missing" for k in want if k not in sd] + [f"{k} unexpected" for k in sd if k not in want]
    wrong += [f"{k} is {tuple(sd[k].shape)}, expected {tuple(want[k])}" for k in want
              if k in sd and sd[k].shape != want[k]]
    wrong += [f"{k} is {sd[k].dtype}, expected dense floating-point numbers" for k in want if k in sd and not (
        sd[k].is_floating_point() and sd[k].layout == torch.strided and sd[k].device.type != "meta" and not sd[k].is_quantized)]
    wrong += [] if wrong else [f"{k} is not finite everywhere" for k in want if not sd[k].float().isfinite().all()]
    if wrong:
        raise UserError(f"{len(wrong)} tensors do not fit the architecture that the others show: {'; '.join(wrong[:4])}"
                        + ("; ..." if len(wrong) > 4 else ""))
    try:  # layers that are missing altogether, widths that no number of heads divides
        with torch.device("meta"), torch.no_grad():
            model.encode(torch.empty(1, 3, model.resolution, model.resolution))
            model.encode_prompts(torch.empty(1, 3, model.W), torch.zeros(1, dtype=torch.long))
    except Exception as e:
        raise UserError(f"no CLIP has tensors of these sizes ({shape}): {e}") from None
    counters = {k: torch.tensor(0) for k in model.state_dict() if k.endswith("num_batches_tracked")}
    model.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in sd.items()} | counters, assign=True)
    return model.fold() if fold else model
