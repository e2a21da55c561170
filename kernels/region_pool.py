"""Category-aware regions F^r_c = sum_n sigmoid(energy_cn) f_n (Eq. 2, 4) and their matching with
the text (Eq. 1).

B images, C categories, N locations, D dims. Read in order: reference, kernels, operators and
autograd, public functions.

The cost at the paper's size (B 128, C 80, N 196, D 512) in bf16:
  forward   reads f 25.7 MB + energy 4.0 MB, writes F^r 10.5 MB = 40 MB; 2 B C N D = 2.06 GFLOP
  backward  reads f 25.7 + energy 4.0 + dF^r 10.5, writes d energy 4.0 = 44 MB; 2.06 GFLOP
  matching  reads f 25.7 + energy 4.0 + the text 0.2, writes 0.02 = 30 MB: F^r never reaches memory
51 operations a byte, where a GPU needs some 200 to be busy: it is memory-bound, the ideal time is
bytes / bandwidth. Plain torch also writes the mask, and in training its gradient, and reads each
back: fusing saves those four times 4 MB.
"""
import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import interpreted, jit, operator, runs_triton, tl, triton, wrap


# ---- reference

def region_pool_reference(energy, f):
    mask = energy.sigmoid().to(f.dtype)  # Eq. 2   (B, C, N)
    return torch.bmm(mask, f)  # Eq. 4   (B, C, D)


def region_pool_grad_reference(grad, energy, f):
    s = energy.sigmoid()  # (B, C, N)
    return torch.bmm(grad, f.mT).to(energy.dtype) * s * (1 - s)  # d energy


def region_match_reference(energy, f, g_pos, g_neg):
    wide = torch.promote_types(f.dtype, torch.float32)
    regions = region_pool_reference(energy, f).to(wide)  # (B, C, D)
    # cos(F, g+) - cos(F, g-) = F.(g+ - g-) / |F| for unit g   (C, D)
    difference = g_pos.to(wide) - g_neg.to(wide)
    return (regions * difference).sum(-1) / regions.norm(dim=-1).clamp(min=1e-12)


# ---- kernels

INTERPRETED = tl.constexpr(interpreted())


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    # the interpreter would multiply bfloat16's bits as integers; its products fit float32
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def pool_tile(energy, f, b, c, d, C, N, D, stride_c, stride_n, BLOCK_N: tl.constexpr,
              PRECISION: tl.constexpr):
    """One (BLOCK_C, BLOCK_D) tile of F^r in float32; energy and f are read in blocks of BLOCK_N
    locations."""
    acc = tl.zeros([c.shape[0], d.shape[0]], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        e = tl.load(energy + b * C * N + c[:, None] * stride_c + n[None, :] * stride_n,
                    # sigmoid(-inf) = 0: no share
                    mask=(c < C)[:, None] & (n < N)[None, :], other=float("-inf"))
        mask = tl.sigmoid(e.to(tl.float32)).to(f.dtype.element_ty)  # Eq. 2, rounded as torch does
        x = tl.load(f + b * N * D + n[:, None] * D + d[None, :],
                    mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        acc = dot(mask, x, acc, PRECISION)  # Eq. 4 on the tensor cores
    return acc


@jit
def pool_kernel(energy, f, out, C, N, D, stride_c, stride_n,
                BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                PRECISION: tl.constexpr):
    """Programs: image x category block x dim block. The dim block runs fastest, so the energies of
    an image are read from memory once and from L2 by its other programs; with C <= BLOCK_C every
    row of f is read exactly once."""
    blocks_c, blocks_d = tl.cdiv(C, BLOCK_C), tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    b = (pid // (blocks_c * blocks_d)).to(tl.int64)
    c = (pid // blocks_d) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = pool_tile(energy, f, b, c, d, C, N, D, stride_c, stride_n, BLOCK_N, PRECISION)
    tl.store(out + b * C * D + c[:, None] * D + d[None, :], acc.to(out.dtype.element_ty),
             mask=(c < C)[:, None] & (d < D)[None, :])


@jit
def grad_kernel(grad, energy, f, out, C, N, D,
                BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                PRECISION: tl.constexpr):
    """d energy_cn = s (1 - s) <dF^r_c, f_n> with s = sigmoid(energy_cn) recomputed. Programs: image
    x category block x location block, the category block fastest so that it finds f in L2."""
    blocks_c, blocks_n = tl.cdiv(C, BLOCK_C), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    b = (pid // (blocks_c * blocks_n)).to(tl.int64)
    n = (pid // blocks_c) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        g = tl.load(grad + b * C * D + c[:, None] * D + d[None, :],
                    mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        x = tl.load(f + b * N * D + n[:, None] * D + d[None, :],
                    mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        acc = dot(g, tl.trans(x), acc, PRECISION)
    where = b * C * N + c[:, None] * N + n[None, :]
    inside = (c < C)[:, None] & (n < N)[None, :]
    s = tl.sigmoid(tl.load(energy + where, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + where, (acc * s * (1 - s)).to(out.dtype.element_ty), mask=inside)


@jit
def match_kernel(energy, f, g_pos, g_neg, out, C, N, D, stride_c, stride_n,
                 BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                 PRECISION: tl.constexpr):
    """Pool, norm and both dot products: <F^r_c, g_pos_c - g_neg_c> / |F^r_c|. Programs: image x
    category block."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(0) // blocks_c).to(tl.int64)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    product = tl.zeros([BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        region = pool_tile(energy, f, b, c, d, C, N, D, stride_c, stride_n, BLOCK_N, PRECISION)
        inside = (c < C)[:, None] & (d < D)[None, :]
        pos = tl.load(g_pos + c[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        neg = tl.load(g_neg + c[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        product += tl.sum(region * (pos - neg), 1)
        square += tl.sum(region * region, 1)
    tl.store(out + b * C + c, product / tl.maximum(tl.sqrt(square), 1e-12), mask=c < C)


# ---- operators and autograd

def blocks(C, dtype):
    """Tile sizes. 128 categories x 64 dims reads f once for C <= 128 and, over 8 warps, fits 128
    registers a thread. float32 products are IEEE, on the ordinary units, unless
    torch.set_float32_matmul_precision asks for TF32 tensor cores: the same switch and the same
    default as torch.matmul. bfloat16 and float16 products are exact either way."""
    ieee = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    rows = min(64 if ieee else 128, max(16, 1 << (int(C) - 1).bit_length()))
    return dict(BLOCK_C=rows, BLOCK_N=32, BLOCK_D=64, PRECISION="ieee" if ieee else "tf32",
                num_warps=8 if rows >= 64 else 4, num_stages=3)


def match_blocks(C, dtype):
    """Fewer categories a program than `blocks`, so that there are more programs. On the tensor
    cores 8 warps (with triton 3.6 four would spill); the sums of IEEE products need the registers
    of 4 (eight would spill)."""
    how = blocks(min(C, 32), dtype)
    return how | dict(num_warps=4 if how["PRECISION"] == "ieee" else 8)


def dense(energy):
    """The kernels want energies contiguous, or the transpose of that (the gradient of f pools with
    it)."""
    return energy if energy.transpose(1, 2).is_contiguous() else energy.contiguous()


def launch_pool(energy, f):
    (B, C, N), D, energy = energy.shape, f.shape[2], dense(energy)
    out, how = f.new_empty(B, C, D), blocks(C, f.dtype)
    grid = (B * triton.cdiv(C, how["BLOCK_C"]) * triton.cdiv(D, how["BLOCK_D"]),)
    wrap(pool_kernel)[grid](energy, f.contiguous(), out, C, N, D, energy.stride(1),
                            energy.stride(2), **how)
    return out


def launch_grad(grad, energy, f):
    (B, C, N), D = energy.shape, f.shape[2]
    out, how = torch.empty_like(energy, memory_format=torch.contiguous_format), blocks(C, f.dtype)
    grid = (B * triton.cdiv(C, how["BLOCK_C"]) * triton.cdiv(N, how["BLOCK_N"]),)
    wrap(grad_kernel)[grid](grad.contiguous(), energy.contiguous(), f.contiguous(), out, C, N, D,
                            **how)
    return out


def launch_match(energy, f, g_pos, g_neg):
    (B, C, N), D, energy = energy.shape, f.shape[2], dense(energy)
    out, how = f.new_empty(B, C, dtype=torch.float32), match_blocks(C, f.dtype)
    grid = (B * triton.cdiv(C, how["BLOCK_C"]),)
    wrap(match_kernel)[grid](energy, f.contiguous(), g_pos.contiguous(), g_neg.contiguous(), out, C,
                             N, D,
                                    energy.stride(1), energy.stride(2), **how)
    return out


# Operators of torch.library: torch.compile and the FLOP counter know them, and see through them to
# the Triton kernel (triton_op, so Inductor launches it without Python in between). On CPU tensors
# they are the reference, except where a test forces Triton's interpreter.

@operator("trm_ml::region_pool", mutates_args=())
def pool_op(energy: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    return launch_pool(energy, f) if energy.is_cuda else region_pool_reference(energy, f)


@operator("trm_ml::region_pool_grad", mutates_args=())
def grad_op(grad: torch.Tensor, energy: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    return launch_grad(grad, energy, f) if energy.is_cuda else region_pool_grad_reference(grad,
                                                                                          energy, f)


@operator("trm_ml::region_match", mutates_args=())
def match_op(energy: torch.Tensor, f: torch.Tensor, g_pos: torch.Tensor,
             g_neg: torch.Tensor) -> torch.Tensor:
    return launch_match(energy, f, g_pos,
                        g_neg) if energy.is_cuda else region_match_reference(energy, f, g_pos,
                                                                             g_neg)


# its own kernel: traced for torch.compile, the interpreter would meet fake tensors
def on_cpu(op, launch, reference):
    op.register_kernel("cpu")(lambda
                              *args: (launch if runs_triton(args[0]) else reference)(*args))


on_cpu(pool_op, launch_pool, region_pool_reference)
on_cpu(grad_op, launch_grad, region_pool_grad_reference)
on_cpu(match_op, launch_match, region_match_reference)
pool_op.register_fake(lambda energy, f: f.new_empty(*energy.shape[:2], f.shape[2]))
grad_op.register_fake(lambda grad, energy,
                      f: torch.empty_like(energy, memory_format=torch.contiguous_format))
match_op.register_fake(lambda energy, f, g_pos, g_neg:
                       f.new_empty(*energy.shape[:2],
                                   dtype=torch.promote_types(f.dtype, torch.float32)))


def backward(ctx, grad):
    energy, f = ctx.saved_tensors  # the inputs alone: the mask is recomputed
    d_energy = grad_op(grad, energy, f) if ctx.needs_input_grad[0] else None
    # d f_n = sum_c sigmoid(energy_cn) dF^r_c
    d_f = pool_op(energy.mT, grad) if ctx.needs_input_grad[1] else None
    return d_energy, d_f


pool_op.register_autograd(backward, setup_context=lambda ctx, inputs,
                          output: ctx.save_for_backward(*inputs))


@register_flop_formula([torch.ops.trm_ml.region_pool, torch.ops.trm_ml.region_match])
def pool_flops(energy, f, *args, out_shape=None, **kwargs):
    return 2 * energy[0] * energy[1] * energy[2] * f[2]


@register_flop_formula(torch.ops.trm_ml.region_pool_grad)
def grad_flops(grad, energy, f, *args, out_shape=None, **kwargs):
    return pool_flops(energy, f)


# ---- public functions

def check(energy, f, *text):
    if energy.ndim != 3 or f.ndim != 3 or energy.shape[::2] != f.shape[:2]:
        raise ValueError(f"expected energy (B, C, N) and f (B, N, D), got {tuple(energy.shape)} "
                         f"and {tuple(f.shape)}")
    for g in text:
        if g.shape != (energy.shape[1], f.shape[2]):
            raise ValueError(f"expected text features (C, D) = {(energy.shape[1], f.shape[2])}, "
                             f"got {tuple(g.shape)}")


def region_pool(energy, f):
    """F^r_c = sum_n sigmoid(energy_cn) f_n (Eq. 2, 4).

    energy  (B, C, N) float32, bfloat16 or float16, before the sigmoid; differentiable
    f       (B, N, D) any of these types; the gradient is computed only if it is asked for (CLIP is
            frozen)
    returns (B, C, D) in f's type; sums are float32
    """
    check(energy, f)
    return pool_op(energy, f) if runs_triton(energy) else region_pool_reference(energy, f)


@torch.no_grad()
def region_match(energy, f, g_pos, g_neg, scale):
    """scale * (cos(F^r_c, g_pos_c) - cos(F^r_c, g_neg_c)) (Eq. 1 on Eq. 4): inference, without a
    gradient.

    energy, f       as region_pool
    g_pos, g_neg    (C, D), unit length
    scale           1/tau, a number or a tensor of one element
    returns         logits (B, C) float32
    """
    check(energy, f, g_pos, g_neg)
    match = match_op if runs_triton(energy) else region_match_reference
    return scale * match(energy, f, g_pos, g_neg)
