"""The project in a program whose own modules are called as ours: `config`, `data`, `datasets`, ...

    sys.path.append("path/of/the/project/tools")
    from trm_ml import Predictor

Our modules find each other while this file is imported. Afterwards a name belongs to another module
where one is found: `from datasets import load_dataset` gives Hugging Face's, before or after.
(Workers of Predictor.predict have to be forked then: Linux's way below Python 3.14.)
"""
import importlib
import os
import sys
from importlib.machinery import PathFinder

HERE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
NAMES = ("clip", "config", "data", "datasets", "eval", "kernels", "losses", "memory", "paper",
         "support", "tools", "train", "trm")


def ours(name, spec):
    """Whether the spec, or None, of a module of this name is that of ours."""
    file = os.path.realpath(getattr(spec, "origin", None) or os.sep)
    return file in (os.path.join(HERE, f"{name}.py"), os.path.join(HERE, name, "__init__.py"))


def take(names):
    """Takes every module below these names out of sys.modules -> {name: module}."""
    return {name: sys.modules.pop(name) for name in list(sys.modules)
            if name.split(".")[0] in names}


others = take([name for name in NAMES
               if not ours(name, getattr(sys.modules.get(name), "__spec__", None))])
sys.path.insert(0, HERE)
try:
    Predictor = importlib.import_module("eval").Predictor
finally:
    sys.path.remove(HERE)
    sys.path.append(HERE)  # last, so that loader processes find our modules
    take([name for name in NAMES if not ours(name, PathFinder.find_spec(name))])
    sys.modules.update(others)
