"""A minimal CLIP: model, tokenizer, weights. `clip.load("tiny")` is the small one that ships; see model.py and weights.py."""
from .model import CLIP, build
from .tokenizer import ClipError, Tokenizer, tokenize

fold = CLIP.fold
