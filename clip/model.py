"""CLIP (Radford et al. 2021), the frozen backbone; parameters are named as in OpenAI's files.

TRM-ML asks for more than the original: dense features f, a D-vector for each location of the last
map (Sec. 3.1), and prompts that enter as embeddings, so that context tokens can be learned.
B images, T texts, S tokens, W text width, N = h*w locations (row-major), D joint dimension,
C channels of a map, or of a block's tokens.

    model = clip.load("RN101")
    g = model.encode_text(model.tokenize(["a photo of a cat"]))      # (1, 512)
    f, x = model.encode(torch.randn(1, 3, 448, 448))                 # (1, 196, 512), (1, 512)
"""
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from clip.tokenizer import tokenizer

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels in 0..1, as OpenAI normalised them
STD = (0.26862954, 0.26130258, 0.27577711)
ACTIVATIONS = {"quickgelu": lambda x: F.silu(1.702 * x) / 1.702,  # silu(x) = x sigmoid(x)
               "gelu": F.gelu}


def resize_positions(positions, h, w):
    """positions (1 + g*g, C), a special token and a g x g grid -> (1 + h*w, C), bicubic."""
    g = math.isqrt(len(positions) - 1)
    if (h, w) == (g, g):
        return positions
    grid = positions[1:].T.reshape(1, -1, g, g).float()  # (1, C, g, g)
    grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.to(positions.dtype).flatten(2)[0].T])  # (1 + h*w, C)


def attend(q, k, v, heads, causal=False):
    """q (B, S, C), k, v (B, S', C), projected -> (B, S, C): softmax(q k^T / sqrt(C/heads)) v."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, S, _)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).flatten(2)  # (B, S, C)


# ---- the ResNet

def conv(c_in, c_out, size=1, stride=1):
    return nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)


class Bottleneck(nn.Module):
    """ResNet bottleneck whose stride is an average pool, in the residual as in the shortcut."""

    def __init__(self, c_in, planes, stride):
        super().__init__()
        c_out = 4 * planes
        self.conv1, self.bn1 = conv(c_in, planes), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, c_out), nn.BatchNorm2d(c_out)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = nn.Identity()
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(OrderedDict({
                "-1": nn.AvgPool2d(stride), "0": conv(c_in, c_out), "1": nn.BatchNorm2d(c_out)}))
        nn.init.zeros_(self.bn3.weight)  # every block starts as its shortcut

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.pool(F.relu(self.bn2(self.conv2(y)), inplace=True))
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


class AttentionPool(nn.Module):
    """The global feature: the mean of the map attends to itself and the map. The value and output
    projections alone give the dense features (no mean token, no positions), as in TaI-DPT."""

    def __init__(self, grid, channels, embed_dim):
        super().__init__()
        self.heads = max(1, channels // 64)
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, channels) / channels**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, embed_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=channels ** -0.5)
        self.folded = None  # v_proj and c_proj in one map, see CLIP.fold

    def forward(self, x):
        """x (B, C, h, w) -> (B, D)"""
        positions = resize_positions(self.positional_embedding, *x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + positions
        x = attend(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), self.heads)  # (B, 1, C)
        return self.c_proj(x[:, 0])

    def dense(self, x):
        """x (B, C, h, w) -> (B, N, D)"""
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        return self.c_proj(self.v_proj(x)) if self.folded is None else self.folded(x)


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, pooled strides, attention pooling. Stride 32."""

    def __init__(self, layers, width, resolution, embed_dim):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = conv(3, half, 3, stride=2), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = conv(half, half, 3), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv(half, width, 3), nn.BatchNorm2d(width)
        c_in = width
        for i, depth in enumerate(layers):
            planes = width * 2 ** i
            blocks = [Bottleneck(c_in, planes, 1 if i == 0 else 2)]
            blocks += [Bottleneck(4 * planes, planes, 1) for _ in range(depth - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            c_in = 4 * planes
        self.attnpool = AttentionPool(resolution // 32, c_in, embed_dim)

    def grid(self, H, W):
        return (H + 1) // 2 // 16, (W + 1) // 2 // 16

    def trunk(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x)), inplace=True), 2)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, C, h, w)

    def pool(self, x):
        return self.attnpool(x)  # (B, D)

    def dense(self, x):
        return self.attnpool.dense(x)  # (B, N, D)


# ---- the transformers of texts and images

class Attention(nn.MultiheadAttention):
    """The parameters of torch's attention, which CLIP uses in three ways."""

    def forward(self, x, causal):
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attend(q, k, v, self.num_heads, causal))

    def last(self, x, at):
        """Causal attention of one query a text, token at[t]: x (T, S, W), at (T,) -> (T, W)"""
        q, k, v = zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q = F.linear(x[torch.arange(len(x), device=x.device), at], *q)  # (T, W)
        k, v = F.linear(x, *k), F.linear(x, *v)  # (T, S, W)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        s = torch.einsum("thc,tshc->ths", q, k) / q.shape[-1] ** 0.5  # (T, heads, S)
        later = torch.arange(x.shape[1], device=x.device) > at[:, None]  # (T, S)
        s = s.masked_fill(later[:, None], -torch.inf).softmax(-1)
        return self.out_proj(torch.einsum("ths,tshc->thc", s.to(v.dtype), v).flatten(1))

    def values(self, x):
        """Each token attends to itself alone."""
        weight, bias = self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2]
        return self.out_proj(F.linear(x, weight, bias))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, mlp, activation):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, mlp), "c_proj": nn.Linear(mlp, width)})
        self.activation = activation

    def forward(self, x, causal=False, values_only=False, at=None):
        """x (B, S, C) -> (B, S, C); with at (B,) only the tokens at[b], causal -> (B, C)."""
        y = self.ln_1(x)
        if at is not None:
            x = x[torch.arange(len(x), device=x.device), at] + self.attn.last(y, at)
        elif values_only:
            x = x + self.attn.values(y)
        else:
            x = x + self.attn(y, causal)
        y = ACTIVATIONS[self.activation](self.mlp["c_fc"](self.ln_2(x)))
        return x + self.mlp["c_proj"](y)


def transformer(width, layers, *block):
    return nn.ModuleDict({"resblocks": nn.ModuleList(Block(width, *block) for _ in range(layers))})


class VisionTransformer(nn.Module):
    """Dense features: the last block takes the patch tokens with value-only attention, then they
    go through ln_post and proj as the class token does."""

    def __init__(self, width, layers, patch, resolution, embed_dim, *block):
        super().__init__()
        self.patch = patch
        scale = width ** -0.5
        tokens = (resolution // patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = transformer(width, layers, *block)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def grid(self, H, W):
        return H // self.patch, W // self.patch

    def trunk(self, x):
        x = self.conv1(x)  # (B, C, h, w)
        positions = resize_positions(self.positional_embedding, *x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], 1)  # (B, 1 + N, C)
        x = self.ln_pre(x + positions)
        for block in self.transformer.resblocks[:-1]:
            x = block(x)
        return x  # (B, 1 + N, C), before the last block

    def pool(self, x):
        x = self.transformer.resblocks[-1](x)
        return self.ln_post(x[:, 0]) @ self.proj  # (B, D)

    def dense(self, x):
        x = self.transformer.resblocks[-1](x[:, 1:], values_only=True)
        return self.ln_post(x) @ self.proj  # (B, N, D)


# ---- both together

class CLIP(nn.Module):
    """CLIP with its own initialisation. layers: blocks of each of the four stages (a ResNet) or
    their number (a ViT). vision_width: channels of the stem (even) or of the tokens. patch,
    vision_heads, vision_mlp: of a ViT. *_heads: None for 64 channels per head, in a ViT 16 heads at
    most. *_mlp: None for four times the width. mean, std: of its pixels; name, sha256: `load`'s."""

    def __init__(self, embed_dim, resolution, layers, vision_width, patch, context_length,
                 vocab_size, text_width, text_layers=12, text_heads=None, text_mlp=None,
                 vision_heads=None, vision_mlp=None, activation="quickgelu"):
        super().__init__()
        self.D, self.W, self.resolution = embed_dim, text_width, resolution
        self.context_length, self.vocab_size = context_length, vocab_size
        self.name, self.sha256, self.mean, self.std = "", "", MEAN, STD
        self.activation = activation
        if patch is None:
            self.visual = ModifiedResNet(layers, vision_width, resolution, embed_dim)
        else:
            heads = vision_heads or max(1, min(16, vision_width // 64))
            self.visual = VisionTransformer(vision_width, layers, patch, resolution, embed_dim,
                                            heads, vision_mlp or 4 * vision_width, activation)
        heads = text_heads or max(1, text_width // 64)
        self.transformer = transformer(text_width, text_layers, heads, text_mlp or 4 * text_width,
                                       activation)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(text_width ** -0.5 * torch.randn(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        small = text_width ** -0.5 * (2 * text_layers) ** -0.5  # the residual stream stays small
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=text_width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=small)
            nn.init.normal_(block.mlp["c_fc"].weight, std=(2 * text_width) ** -0.5)
            nn.init.normal_(block.mlp["c_proj"].weight, std=small)

    def tokenize(self, texts, truncate=False):
        """T strings -> (T, context_length) int64. A text that is too long is refused, or cut."""
        device = self.positional_embedding.device
        return tokenizer(self.vocab_size)(texts, self.context_length, truncate).to(device)

    def encode_prompts(self, embeddings, eot):
        """embeddings (T, S, W), S up to context_length, without positions; eot (T,) index of the
        end-of-text token -> (T, D), not normalised. Differentiable in embeddings."""
        x = embeddings + self.positional_embedding[:embeddings.shape[1]]  # (T, S, W)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x, causal=True)
        x = last(x, at=eot)  # (T, W): of the last block one token is asked
        return self.ln_final(x) @ self.text_projection

    def encode_text(self, tokens):
        """tokens (T, S) -> (T, D). What follows the end-of-text token cannot matter under the
        causal mask, so all texts are cut after the longest."""
        eot = tokens.argmax(1)  # end of text is the last id of the vocabulary
        tokens = tokens[:, :int(eot.max()) + 1]
        return self.encode_prompts(self.token_embedding(tokens), eot)

    def grid(self, H, W):
        """Rows and columns of the dense features of an H x W image: N = h * w."""
        return self.visual.grid(H, W)

    def encode_image(self, x):
        """x (B, 3, H, W), normalised by mean and std, any size -> global (B, D), not normalised."""
        return self.visual.pool(self.visual.trunk(x))

    def encode_dense(self, x):
        """x (B, 3, H, W) -> the dense features f (B, N, D), not normalised."""
        return self.visual.dense(self.visual.trunk(x))

    def encode(self, x):
        """x (B, 3, H, W) -> dense (B, N, D) and global (B, D), from one pass of the trunk."""
        x = self.visual.trunk(x)
        return self.visual.dense(x), self.visual.pool(x)

    @torch.no_grad()
    def fold(self):
        """Fewer operations for a CLIP that stays frozen: BatchNorm goes into the convolutions,
        v_proj and c_proj into one map, weights into channels-last order. In place."""
        self.eval()
        for module in list(self.visual.modules()):
            children = list(module.named_children())
            for (conv_name, conv), (bn_name, bn) in zip(children, children[1:]):
                if isinstance(bn, nn.BatchNorm2d):
                    setattr(module, conv_name, fuse_conv_bn_eval(conv, bn))
                    setattr(module, bn_name, nn.Identity())
        if isinstance(self.visual, ModifiedResNet):
            pool = self.visual.attnpool
            v, c = pool.v_proj, pool.c_proj
            pool.folded = nn.Linear(v.in_features, c.out_features).to(v.weight)
            pool.folded.weight.copy_(c.weight.double() @ v.weight.double())
            pool.folded.bias.copy_(c.weight.double() @ v.bias.double() + c.bias)
        return self.requires_grad_(False).to(memory_format=torch.channels_last)
