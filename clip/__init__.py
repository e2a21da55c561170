"""A minimal CLIP: its model, tokenizer and weights; features.py gives its dense features."""
from clip.model import CLIP
from clip.tokenizer import Tokenizer
from clip.weights import build, load
