"""clip/model.py, clip/tokenizer.py: against a slow transcription of CLIP in this file, known ids,
sizes and logits."""
import copy
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
from clip.model import AttentionPool, resize_positions
from clip.weights import dimensions
from support import UserError

TEXTS = ["a photo of a cat", "two dogs", "a red boat on the sea behind a house"]
TEXT = dict(embed_dim=24, context_length=20, vocab_size=2514, text_width=128, text_heads=2,
            text_layers=2)
SMALL = {"resnet": dict(layers=(1, 2, 1, 1), vision_width=8, patch=None, resolution=64, **TEXT),
         "vit": dict(layers=3, vision_width=128, patch=16, resolution=48, **TEXT)}
kinds = pytest.mark.parametrize("kind", SMALL)


@functools.cache
def small(kind, half=False):
    """A state dict with random values that depend neither on torch's generator nor on CLIP's
    initialisation."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in clip.CLIP(**SMALL[kind]).state_dict().items()}
    rng, state = np.random.RandomState(0), {}
    for key in sorted(shapes):
        shape = shapes[key]
        if key.endswith("num_batches_tracked"):
            value = np.asarray(7)
        elif key.endswith("running_var"):
            value = rng.uniform(0.5, 2, shape)
        elif len(shape) < 2:  # gains, biases, class embedding
            value = rng.normal(0.1, 0.3, shape)
            if key.endswith("weight"):
                value = value + 0.8
            if key == "logit_scale":
                value = value + 3
        else:
            gain = 5 if "embedding" in key else 2 if len(shape) == 4 else 1
            value = rng.normal(0, gain * math.prod(shape[1:]) ** -0.5, shape)
        dtype = torch.long if key.endswith("tracked") else torch.float32
        state[key] = torch.as_tensor(value, dtype=dtype)
        if half and state[key].is_floating_point():
            state[key] = state[key].half()
    return state


def images(*size, n=2):
    """n images of noise around a colour of their own."""
    rng = np.random.RandomState(1)
    colours = rng.normal(size=(n, 3, 1, 1))
    return torch.as_tensor(2 * colours + rng.normal(size=(n, 3, *size)), dtype=torch.float32)


def close(got, want, tolerance=1e-5):
    """Largest deviation relative to the largest value."""
    assert got.shape == want.shape
    difference = (got - want).abs().max() / want.abs().max()
    assert difference <= tolerance, difference


# ---- the transcription: float64, one operation a line, torch's own multi-head attention, nothing
# shared with clip/

def mha(q, kv, heads, s, p, mask=None):
    """torch's attention, with one input projection (transformers) or three (attention pool)."""
    joint = p + "in_proj_weight" in s
    bias = s[p + "in_proj_bias"] if joint else torch.cat([s[p + f"{n}_proj.bias"] for n in "qkv"])
    out = p + ("out_proj" if joint else "c_proj")
    separate = {f"{n}_proj_weight": s.get(p + f"{n}_proj.weight") for n in "qkv"}
    return F.multi_head_attention_forward(
        q.transpose(0, 1), kv.transpose(0, 1), kv.transpose(0, 1), q.shape[-1], heads,
        s.get(p + "in_proj_weight"), bias, None, None, False, 0.0, s[out + ".weight"],
        s[out + ".bias"], training=False, need_weights=False, attn_mask=mask,
        use_separate_proj_weight=not joint, **separate)[0].transpose(0, 1)


def norm(x, s, p):
    return F.layer_norm(x, x.shape[-1:], s[p + ".weight"], s[p + ".bias"])


def block(x, s, p, heads, mask=None, values_only=False):
    y = norm(x, s, p + "ln_1")
    if values_only:  # an attention mask under which each token sees itself alone
        mask = torch.full((x.shape[1],) * 2, -math.inf, dtype=x.dtype).fill_diagonal_(0)
    x = x + mha(y, y, heads, s, p + "attn.", mask)
    y = F.linear(norm(x, s, p + "ln_2"), s[p + "mlp.c_fc.weight"], s[p + "mlp.c_fc.bias"])
    y = y / (1 + torch.exp(-1.702 * y))
    return x + F.linear(y, s[p + "mlp.c_proj.weight"], s[p + "mlp.c_proj.bias"])


def oracle_text(s, tokens):
    x = s["token_embedding.weight"][tokens] + s["positional_embedding"]
    mask = torch.full((tokens.shape[1],) * 2, -math.inf, dtype=x.dtype).triu(1)
    for i in range(2):
        x = block(x, s, f"transformer.resblocks.{i}.", 2, mask)
    return norm(x, s, "ln_final")[torch.arange(len(x)), tokens.argmax(1)] @ s["text_projection"]


def bn(x, s, p):
    return F.batch_norm(x, s[p + ".running_mean"], s[p + ".running_var"], s[p + ".weight"],
                        s[p + ".bias"])


def oracle_resnet(s, x):
    for i, (stride, pad) in enumerate([(2, 1), (1, 1), (1, 1)], 1):
        x = bn(F.conv2d(x, s[f"visual.conv{i}.weight"], stride=stride, padding=pad), s,
               f"visual.bn{i}").relu()
    x = F.avg_pool2d(x, 2)
    for layer, depth in enumerate(SMALL["resnet"]["layers"], 1):
        for b in range(depth):
            p, pool = f"visual.layer{layer}.{b}.", layer > 1 and b == 0
            y = bn(F.conv2d(x, s[p + "conv1.weight"]), s, p + "bn1").relu()
            y = bn(F.conv2d(y, s[p + "conv2.weight"], padding=1), s, p + "bn2").relu()
            y = F.avg_pool2d(y, 2) if pool else y
            y = bn(F.conv2d(y, s[p + "conv3.weight"]), s, p + "bn3")
            if b == 0:
                x = bn(F.conv2d(F.avg_pool2d(x, 2) if pool else x, s[p + "downsample.0.weight"]), s,
                       p + "downsample.1")
            x = (x + y).relu()
    x, p = x.flatten(2).transpose(1, 2), "visual.attnpool."
    dense = F.linear(x, s[p + "v_proj.weight"], s[p + "v_proj.bias"])
    dense = F.linear(dense, s[p + "c_proj.weight"], s[p + "c_proj.bias"])
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + s[p + "positional_embedding"]
    return mha(x[:, :1], x, 4, s, p)[:, 0], dense


def oracle_vit(s, x):
    x = F.conv2d(x, s["visual.conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([s["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = x + s["visual.positional_embedding"]
    x = norm(x, s, "visual.ln_pre")
    for i in range(2):
        x = block(x, s, f"visual.transformer.resblocks.{i}.", 2)
    last = "visual.transformer.resblocks.2."
    out = norm(block(x, s, last, 2), s, "visual.ln_post") @ s["visual.proj"]
    dense = norm(block(x, s, last, 2, values_only=True), s, "visual.ln_post") @ s["visual.proj"]
    return out[:, 0], dense[:, 1:]


def oracle(kind, x, tokens):
    s = {k: v.double() for k, v in small(kind).items()}
    image = {"resnet": oracle_resnet, "vit": oracle_vit}[kind]
    return *image(s, x.double()), oracle_text(s, tokens)


# ---- the model

# exp(logit_scale) * cosine of two images and three texts, computed by the transcription above.
LOGITS = {"resnet": [[-2.35295, -1.30001, -1.83933], [-1.08802, -0.46143, -0.53209]],
          "vit": [[-4.13384, -2.91932, -1.92749], [-4.45182, -6.43391, -2.82191]]}


def logits(model, image, text):
    return model["logit_scale"].exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


@kinds
def test_equals_the_slow_transcription_and_the_recorded_logits(kind):
    model = clip.build(small(kind))
    x, tokens = images(model.resolution, model.resolution), model.tokenize(TEXTS)
    image, dense, text = oracle(kind, x, tokens)
    with torch.no_grad():
        close(model.encode_image(x).double(), image)
        close(model.encode_dense(x).double(), dense)
        close(model.encode_text(tokens).double(), text)
        both = model.encode_dense(x), model.encode_image(x)
        assert all(torch.equal(a, b) for a, b in zip(model.encode(x), both))
        got = logits(model.state_dict(), model.encode_image(x), model.encode_text(tokens))
    torch.testing.assert_close(got, torch.tensor(LOGITS[kind]), atol=2e-4, rtol=0)


@kinds
@pytest.mark.parametrize("size", [(64, 64), (97, 150), (32, 224)])
def test_folded_equals_unfolded(kind, size):
    model = clip.build(small(kind))
    folded = copy.deepcopy(model).fold()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters()) and not folded.training
    for got, want in zip(folded.encode(images(*size)), model.encode(images(*size))):
        close(got, want)
    wide = copy.deepcopy(model).double()
    pixels = images(*size).double()
    for got, want in zip(copy.deepcopy(wide).fold().encode(pixels), wide.encode(pixels)):
        assert (got - want).abs().max() < 1e-12 * max(1, want.abs().max())
    again = copy.deepcopy(folded).fold()
    assert torch.equal(again.encode_dense(images(*size)), folded.encode_dense(images(*size)))


@kinds
def test_any_size(kind):
    model = clip.build(small(kind), fold=True)
    for size in [(32, 32), (48, 48), (63, 95), (64, 31 + 2), (100, 260)]:
        h, w = model.grid(*size)
        dense, image = model.encode(images(*size, n=1))
        assert image.shape == (1, 24) and dense.shape == (1, h * w, 24)
        assert image.isfinite().all() and dense.isfinite().all()


def test_locations_are_row_major_and_local():
    """A change in the bottom right corner changes the last location most and the first ones of a
    wide image not at all."""
    model = clip.build(small("resnet"))
    x = images(64, 640, n=1)
    y = x.clone()
    y[..., 32:, 608:] += 3
    change = (model.encode_dense(y) - model.encode_dense(x)).norm(dim=-1)[0].view(2, 20)
    assert change.argmax() == 39 and change[:, :10].max() == 0


def test_positions():
    p = torch.randn(1 + 49, 6)
    assert resize_positions(p, 7, 7) is p
    q = resize_positions(p, 5, 9)
    assert q.shape == (46, 6) and torch.equal(q[0], p[0])
    # the row number, constant along the columns
    p[1:] = torch.arange(7.0).repeat_interleave(7)[:, None]
    q = resize_positions(p, 14, 3)[1:].view(14, 3, 6)
    assert torch.allclose(q, q[:, :1, :1].expand_as(q), atol=1e-5) and (q[1:] > q[:-1] - 1e-2).all()
    # bicubic is not exact on a ramp
    assert torch.allclose(q[4:10, 0, 0], torch.arange(4, 10) / 2 - 0.25, atol=0.06)


@kinds
def test_cut_text_equals_uncut_and_nothing_after_the_end_matters(kind):
    model = clip.build(small(kind))
    tokens = model.tokenize(TEXTS)
    eot = tokens.argmax(1)
    with torch.no_grad():
        embeddings = model.token_embedding(tokens)
        whole = model.encode_prompts(embeddings, eot)
        close(model.encode_text(tokens), whole)
        for row, end in zip(embeddings, eot):
            row[end + 1:] = 100 * torch.randn_like(row[end + 1:])
        close(model.encode_prompts(embeddings, eot), whole)


def test_gradient_through_prompts():
    model = clip.build(small("vit"), fold=True).double()
    embeddings = torch.randn(2, 5, 128, dtype=torch.double, requires_grad=True)
    eot = torch.tensor([2, 4])
    model.encode_prompts(embeddings, eot).square().sum().backward()
    assert (embeddings.grad[0, 3:] == 0).all() and (embeddings.grad[0, :3] != 0).any(1).all()
    assert (embeddings.grad[1] != 0).any(1).all()
    assert torch.autograd.gradcheck(lambda e: model.encode_prompts(e, eot), embeddings,
                                    fast_mode=True)


# embed_dim, resolution, layers, vision_width, patch, text_width, and the published number of
# parameters
NINE = {
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 512, 102_007_137),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 512, 119_688_033),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 640, 178_300_601),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 768, 290_979_217),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 1024, 623_258_305),
    "ViT-B/32": (512, 224, 12, 768, 32, 512, 151_277_313),
    "ViT-B/16": (512, 224, 12, 768, 16, 512, 149_620_737),
    "ViT-L/14": (768, 224, 24, 1024, 14, 768, 427_616_513),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 768, 427_944_193),
}


@pytest.mark.parametrize("name", NINE)
def test_openai_architectures_have_their_size_and_are_inferred(name):
    d, resolution, layers, width, patch, text, size = NINE[name]
    shape = dict(embed_dim=d, resolution=resolution, layers=layers, vision_width=width,
                 patch=patch, context_length=77, vocab_size=49408, text_width=text, text_layers=12,
                 text_mlp=4 * text, **({"vision_mlp": 4 * width} if patch else {}))
    with torch.device("meta"):
        model = clip.CLIP(**shape)
    assert sum(p.numel() for p in model.parameters()) == size
    assert dimensions(model.state_dict()) == shape | dict(layers=layers if patch else list(layers))
    if name == "RN101":  # what Table 5 of the paper counts as frozen
        out = model.token_embedding.weight.numel()
        out += model.visual.attnpool.positional_embedding.numel()
        assert round((size - out) / 2 ** 20, 2) == 89.92


def test_initialisation():
    torch.manual_seed(0)
    model = clip.CLIP(**SMALL["resnet"])
    assert math.isclose(model.logit_scale.exp().item(), 1 / 0.07, rel_tol=1e-5)
    assert (model.visual.layer2[0].bn3.weight == 0).all()
    for parameter, std in [(model.token_embedding.weight, 0.02), (model.positional_embedding, 0.01),
                           (model.text_projection, 128 ** -0.5),
                           (model.transformer.resblocks[0].attn.in_proj_weight, 128 ** -0.5),
                           (model.transformer.resblocks[1].attn.out_proj.weight, 128 ** -0.5 / 2),
                           (model.transformer.resblocks[1].mlp["c_fc"].weight, 256 ** -0.5),
                           (model.visual.attnpool.v_proj.weight, 256 ** -0.5)]:
        assert math.isclose(parameter.std().item(), std, rel_tol=0.1)


# ---- the tokenizer

@pytest.mark.parametrize("text, ids", [
    ("a photo of a cat", [320, 1125, 539, 320, 2368]),
    ("a diagram", [320, 22697]),
    ("  Traffic   LIGHT\n", [3399, 1395]),
    ("12 monkeys", [272, 273, 15781]),
    ("don't WE'LL", [847, 713, 649, 1342]),
    ("Café au lait", [15304, 2566, 572, 585]),
    ("ﬁancé", [34039]),  # a ligature, repaired by ftfy
    # HTML entities, escaped once and twice
    ("&lt;b&gt; dog &amp;amp; cat", [283, 321, 285, 1929, 261, 2368]),
    ("😀", [7334]),
    ("日本語", [39121, 44353, 34002, 508]),
    ("", []),
])
def test_known_ids(text, ids):
    """Ids of CLIP's own vocabulary, checked with another implementation (open_clip 3.3)."""
    assert clip.Tokenizer().encode(text) == ids
    assert clip.Tokenizer()([text], 12).tolist() == [[49406, *ids, 49407] + [0] * (10 - len(ids))]


def test_small_vocabulary_is_a_prefix():
    full, half = clip.Tokenizer(), clip.Tokenizer(2514)
    assert len(half.rank) == 2000 and (half.start, half.end) == (2512, 2513)
    common = {k: v for k, v in half.ids.items() if v < 2512}
    assert common == {k: v for k, v in full.ids.items() if v < 2512}
    for text in ["a photo of a cat", "extraordinary 日本語 😀", "&amp; x"]:
        ids = half.encode(text)
        assert max(ids) < 2512
        names = {v: k for k, v in half.ids.items()}
        raw = "".join(names[i] for i in ids).replace("</w>", "")
        back = bytes({s: b for b, s in half.bytes.items()}[c] for c in raw).decode("utf-8")
        assert back == text.replace(" ", "").replace("&amp;", "&")
    assert clip.Tokenizer(514).encode("ab") == [full.ids["a"], full.ids["b</w>"]]  # bytes alone
    for size in (513, 49409):
        with pytest.raises(UserError, match="514 to 49408"):
            clip.Tokenizer(size)


def test_a_text_that_is_too_long_is_named():
    with pytest.raises(UserError, match="8 tokens .* has 9: 'one two three"):
        clip.Tokenizer()(["a cat", "one two three four five six seven"], 8)


def test_channels_last_input_gives_the_same_features():
    model = clip.build(small("resnet"), fold=True)
    x = images(64, 96)
    close(model.encode_dense(x.to(memory_format=torch.channels_last)), model.encode_dense(x))


def test_the_attention_pool_asks_with_the_mean_and_looks_at_all():
    """Against torch's own attention, with weights that leave it spread over the locations: the mean
    has a position of its own, and is looked at like any other token."""
    torch.manual_seed(0)
    pool, x = AttentionPool(2, 128, 24).double(), torch.randn(3, 128, 2, 2).double()
    tokens = x.flatten(2).transpose(1, 2)  # (3, 4, 128)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.positional_embedding
    close(pool(x), mha(tokens[:, :1], tokens, 2, pool.state_dict(), "")[:, 0])


def test_positions_are_resized_bicubically_and_by_shape():
    """A cubic spline goes below zero beside a lone peak; 2 x 8 is not 4 x 4."""
    positions = torch.zeros(17, 1)
    positions[6] = 1.0
    assert resize_positions(positions, 8, 8).min() < 0
    assert resize_positions(positions, 2, 8)[1:].max() < 1


def test_text_may_fill_the_context_and_is_unescaped_twice():
    tokens = clip.tokenizer.tokenizer(49408)
    ids = tokens.encode("a photo of a cat")
    assert tokens(["a photo of a cat"], len(ids) + 2).all()  # start, five words, end
    with pytest.raises(UserError, match="shorten it"):
        tokens(["a photo of a cat"], len(ids) + 1)
    # with a "<" ftfy leaves the text as it is
    assert tokens.encode("< cat &amp;amp; dog") == tokens.encode("< cat & dog")
