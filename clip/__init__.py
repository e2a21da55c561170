"""A minimal CLIP: model.py, tokenizer.py, weights.py, and pretrain.py for the small one that ships as `load("tiny")`."""
from .model import CLIP, build
from .tokenizer import ClipError, Tokenizer, tokenize
from .weights import load

fold = CLIP.fold
