"""Which path runs: Triton on a GPU, plain torch elsewhere. train.py --kernels chooses once."""
import os
import shutil
from types import SimpleNamespace

import torch
from torch.autograd import forward_ad

from support import UserError

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # macOS, Windows: everything runs on the references, and chosen() says so
    triton, tl, jit = None, SimpleNamespace(constexpr=bool), lambda fn: fn
operator = torch.library.custom_op  # triton_op would import Inductor, a second at every start
_path = "auto"
# Triton builds its launchers with a C compiler; on Windows it brings its own
COMPILER = bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
                or os.name == "nt")


def interpreted():
    """True when Triton's kernels run in its interpreter, on CPU tensors: how they are tested."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def unfit():
    """Why the kernels cannot run on the current GPU, or ""."""
    if triton is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than sm_80"  # tiles of half precision spill (compiled.csv)
    return "" if COMPILER else "Triton needs a C compiler: install gcc"


def use(path):
    """Choose "auto" (Triton for CUDA tensors), "reference" or "triton" -> the earlier choice."""
    global _path
    if path == "triton" and unfit() and not interpreted():
        raise UserError(f"kernels: triton was asked for, but {unfit()}; use auto")
    earlier, _path = _path, path
    return earlier


def runs_triton(x):
    """Whether an operation on tensor x launches a Triton kernel."""
    if _path == "reference" or x.dtype == torch.float64:
        return False  # the kernels sum in float32
    if forward_ad._current_level >= 0:  # torch.func.jvp: the kernels have no forward gradient
        return False
    if x.is_cuda:  # Triton launches on the current GPU, wherever x is
        return x.get_device() == torch.cuda.current_device() and not unfit()
    return _path == "triton" and interpreted()


def in_kernel_layout(energy):
    """Energies (B, C, N) as the kernels read them: contiguous, or the transpose of that, as CARL
    gives them and as the gradient of f pools with them."""
    return energy if energy.mT.is_contiguous() else energy.contiguous()


def chosen():
    """One line: the path in use and why."""
    if _path != "auto":
        return f"kernels: {_path} (asked for)"
    return f"kernels: reference ({unfit()})" if unfit() else "kernels: triton (CUDA device found)"
