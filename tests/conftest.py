"""Before any test: the project on the path, few threads, and Triton's interpreter where there is no
GPU."""
import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # has to be set before triton is imported
# under pytest -n each process has one core
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

gpu = pytest.mark.skipif(not GPU, reason="GPU case: no CUDA device")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers(config):
    """One process more than cores: many tests wait for others that they have started."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture
def triton_path():
    """Force the Triton kernels (in the interpreter without a GPU) for one test; the earlier choice
    always returns."""
    pytest.importorskip("triton", reason="triton is not installed")
    import kernels
    earlier = kernels.use("triton")
    yield "cuda" if GPU else "cpu"
    kernels.use(earlier)


@pytest.fixture(autouse=True)
def exact_float32():
    """No test inherits from another that float32 products may be TF32: on a GPU it would show."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def small_worlds_may_choose(monkeypatch):
    """A dozen validation images choose the best epoch in tests; test_train.py has the real rule."""
    monkeypatch.setattr("eval.ENOUGH", 0)


def pytest_terminal_summary(terminalreporter):
    skipped = [r for r in terminalreporter.stats.get("skipped", [])
               if "GPU case" in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} GPU cases skipped: no CUDA device; kernels "
                                    "were checked by the interpreter and the compiler only",
                                    yellow=True)


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """(folder of COCO's layout, its training annotations)"""
    import fake_datasets
    root = tmp_path_factory.mktemp("coco")
    fake_datasets.coco(root)
    return root, json.loads((root / "annotations/instances_train2014.json").read_text())
