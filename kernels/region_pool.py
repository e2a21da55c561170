"""Category-aware regions F^r_c = sum_n sigmoid(energy_cn) f_n (Eq. 2, 4).

B images, C categories, N locations, D dims.

The cost at the paper's size (B 128, C 80, N 196, D 512) in bf16:
  forward   reads f 25.7 MB + energy 4.0 MB, writes F^r 10.5 MB = 40 MB; 2 B C N D = 2.06 GFLOP
  backward  reads f 25.7 + energy 4.0 + dF^r 10.5, writes d energy 4.0 = 44 MB; 2.06 GFLOP
An H200's memory needs 9.5 us for the first, 20 for both. Measured: 24 and 46.5 us; plain torch 22
and 58.6: cuBLAS's product alone takes 18, but the mask and its gradient are written and read back.
"""
import math

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import in_kernel_layout, interpreted, jit, operator, runs_triton, tl, triton


# ---- reference

def region_pool_reference(energy, f):
    mask = energy.sigmoid().to(f.dtype)  # Eq. 2   (B, C, N)
    return torch.bmm(mask, f)  # Eq. 4   (B, C, D)


# ---- kernels

INTERPRETED = tl.constexpr(interpreted())


@jit
def dot(a, b, acc):
    # the interpreter would multiply bfloat16's bits as integers; its products fit float32
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def pool_kernel(energy, f, out, C: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
                stride_c: tl.constexpr, stride_n: tl.constexpr,
                BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Programs: image x category block x dim block, the dim block fastest: the energies of an image
    are read from memory once, and from L2 by its other programs. Sizes are constants: so the
    compiler sees that a row of 200 energies is a multiple of 16 bytes, and reads 16 at a time."""
    blocks_c, blocks_d = tl.cdiv(C, BLOCK_C), tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    b = (pid // (blocks_c * blocks_d)).to(tl.int64)
    c = (pid // blocks_d) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        e = tl.load(energy + b * C * N + c[:, None] * stride_c + n[None, :] * stride_n,
                    # sigmoid(-inf) = 0: no share
                    mask=(c < C)[:, None] & (n < N)[None, :], other=float("-inf"))
        soft = tl.sigmoid(e.to(tl.float32)).to(f.dtype.element_ty)  # Eq. 2, rounded as torch does
        x = tl.load(f + b * N * D + n[:, None] * D + d[None, :],
                    mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        acc = dot(soft, x, acc)  # Eq. 4 on the tensor cores
    tl.store(out + b * C * D + c[:, None] * D + d[None, :], acc.to(out.dtype.element_ty),
             mask=(c < C)[:, None] & (d < D)[None, :])


@jit
def grad_kernel(grad, energy, f, out, C: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
                stride_c: tl.constexpr, stride_n: tl.constexpr,
                BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """d energy_cn = s (1 - s) <dF^r_c, f_n> with s = sigmoid(energy_cn) recomputed. Programs: image
    x location block x category block, the last fastest so that it finds f in L2. Locations are the
    rows: neighbouring threads then write neighbouring categories, as CARL's energies lie."""
    blocks_c, blocks_n = tl.cdiv(C, BLOCK_C), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    b = (pid // (blocks_c * blocks_n)).to(tl.int64)
    n = (pid // blocks_c) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        g = tl.load(grad + b * C * D + c[:, None] * D + d[None, :],
                    mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        x = tl.load(f + b * N * D + n[:, None] * D + d[None, :],
                    mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        acc = dot(x, tl.trans(g), acc)
    where = b * C * N + c[None, :] * stride_c + n[:, None] * stride_n
    inside = (c < C)[None, :] & (n < N)[:, None]
    s = tl.sigmoid(tl.load(energy + where, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + where, (acc * s * (1 - s)).to(out.dtype.element_ty), mask=inside)


# ---- operators of torch.library, and autograd

# The fastest of those tried on an H200 (docs/speed.md); no GPU from sm_80 on spills them.
GRAD_TILE = dict(BLOCK_C=64, BLOCK_N=64, BLOCK_D=64, num_warps=4, num_stages=3)


def pool_tile(C):
    return dict(BLOCK_C=min(64, max(16, triton.next_power_of_2(C))), BLOCK_N=32, BLOCK_D=256,
                num_warps=4, num_stages=3)


@operator("trm_ml::region_pool", mutates_args=())
def pool_op(energy: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    (B, C, N), D, energy = energy.shape, f.shape[2], in_kernel_layout(energy)
    out, how = f.new_empty(B, C, D), pool_tile(C)
    grid = (B * triton.cdiv(C, how["BLOCK_C"]) * triton.cdiv(D, how["BLOCK_D"]),)
    pool_kernel[grid](energy, f.contiguous(), out, C, N, D, *energy.stride()[1:], **how)
    return out


@operator("trm_ml::region_pool_grad", mutates_args=())
def grad_op(grad: torch.Tensor, energy: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    (B, C, N), D, energy = energy.shape, f.shape[2], in_kernel_layout(energy)
    out, how = torch.empty_like(energy), GRAD_TILE
    grid = (B * triton.cdiv(C, how["BLOCK_C"]) * triton.cdiv(N, how["BLOCK_N"]),)
    grad_kernel[grid](grad.contiguous(), energy, f.contiguous(), out, C, N, D,
                      *energy.stride()[1:], **how)
    return out


pool_op.register_fake(lambda energy, f: f.new_empty(*energy.shape[:2], f.shape[2]))
grad_op.register_fake(lambda grad, energy, f: torch.empty_like(in_kernel_layout(energy)))


def backward(ctx, grad):
    energy, f = ctx.saved_tensors  # the inputs alone: the mask is recomputed
    d_energy = grad_op(grad, energy, f) if ctx.needs_input_grad[0] else None
    # d f_n = sum_c sigmoid(energy_cn) dF^r_c
    d_f = pool_op(energy.mT, grad) if ctx.needs_input_grad[1] else None
    return d_energy, d_f


pool_op.register_autograd(backward, setup_context=lambda ctx, inputs, output:
                          ctx.save_for_backward(*inputs))


register_flop_formula([torch.ops.trm_ml.region_pool, torch.ops.trm_ml.region_pool_grad])(
    # the last two shapes are (B, C, N) of energy and (B, N, D) of f
    lambda *shapes, **_: 2 * math.prod(shapes[-2]) * shapes[-1][-1])


# ---- public function

def region_pool(energy, f):
    """F^r_c = sum_n sigmoid(energy_cn) f_n (Eq. 2, 4).

    energy  (B, C, N) float, before the sigmoid; differentiable
    f       (B, N, D) float; its gradient is computed only if it is asked for
    returns (B, C, D) in f's type; the kernel sums in float32. float32 f takes the reference, which
            returns autocast's type: cuBLAS is 1.5 times as fast forward, 5 times backward
    """
    if energy.ndim != 3 or f.ndim != 3 or energy.shape[::2] != f.shape[:2]:
        raise ValueError(f"expected energy (B, C, N) and f (B, N, D), got {tuple(energy.shape)} "
                         f"and {tuple(f.shape)}")
    half = f.dtype in (torch.bfloat16, torch.float16)
    return pool_op(energy, f) if half and runs_triton(energy) else region_pool_reference(energy, f)
