"""A minimal CLIP: model.py, tokenizer.py, weights.py; features.py gives its dense features, batch by batch."""
from clip.model import CLIP, build
from clip.tokenizer import Tokenizer, tokenize
from clip.weights import load
