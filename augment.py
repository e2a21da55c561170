"""Images to tensors: decoding, CLIP's normalisation, and the training augmentation of TaI-DPT (section 4.1 of the paper:
"consistent with TaI-DPT"). PIL and numpy only; all randomness comes from the `random.Random` that is passed in.

H, W the image's height and width in pixels.
"""
import numpy as np
import torch
from PIL import Image

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # CLIP's, on 0..1
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def squash(image, size):
    """The test transform: bicubic to size x size without keeping the aspect ratio, no crop."""
    return image.resize((size, size), Image.BICUBIC)


def normalise(image):
    """RGB PIL image -> (3, H, W) float32, CLIP-normalised."""
    pixels = torch.from_numpy(np.array(image))                    # (H, W, 3) uint8
    return pixels.permute(2, 0, 1).float().div_(255).sub_(MEAN).div_(STD).contiguous()


def flip(image, rng):
    return image.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
