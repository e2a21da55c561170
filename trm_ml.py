"""The project in a program that uses other packages called `clip` or `datasets`, too.

    sys.path.append("path/of/the/project")
    from trm_ml import Predictor

Our modules find our folders of these names while this file is imported; afterwards the names are
free again: `from datasets import load_dataset` gives Hugging Face's package, before or after.
"""
import importlib
import sys
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)


def taken():
    """Takes every module below `clip` and `datasets` out of sys.modules -> {name: module}."""
    return {name: sys.modules.pop(name) for name in list(sys.modules)
            if name.split(".")[0] in ("clip", "datasets")}


others = taken()
sys.path.insert(0, HERE)
try:
    Predictor = importlib.import_module("eval").Predictor
finally:
    sys.path.remove(HERE)
    taken()
    sys.modules.update(others)
