"""A minimal CLIP: model.py, tokenizer.py, weights.py; pretrain.py makes the small one that ships, `load("tiny")`."""
from .model import CLIP, build
from .tokenizer import ClipError, Tokenizer, tokenize
from .weights import load
