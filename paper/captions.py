"""Prompts learned from captions alone, without a photo (TaI-DPT, Guo et al., CVPR 2023; Table 1).

    python train.py --data scenes --images captions --matching global      matched with sentences
    python train.py --data scenes --images captions --matching dualcoop    matched with words

CLIP has one space for texts and images, so a caption stands in for an image: the sentence for the
global feature x (D,), its words for the dense ones f (N, D); its labels are the categories that it
names. TaI-DPT's two kinds of prompts meet at inference alone: here they are two runs, whose scores
are averaged (`eval.py RUN --ensemble RUN`). Dual prompts and Eq. 14 replace its ranking loss.
"""
import os
from itertools import chain
from pathlib import Path

import numpy as np
import regex
import torch

from clip.features import epoch_order
from data import SCENES
from datasets.base import NEGATIVE, POSITIVE, Split, read_json
from support import UserError, refused

# Words that mean the same, a group a line. Those that mostly mean something else in captions
# ("glass", "bat") are left out. Names in the plural are NUS-WIDE's.
SAME = Path(__file__).with_name("words.txt")
# How English forms the plural, most often: the first ending that fits is replaced.
PLURALS = (("man$", "men"), ("(?<=[^aeiou])y$", "ies"), ("(?<=[^f])fe?$", "ves"),
           ("(?<=[sxzo])$|(?<=[sc]h)$", "es"), ("$", "s"))


def plain(text):
    """Its words, letters alone, between single blanks."""
    return " ".join(regex.findall("[a-z]+", text.lower()))


def forms(phrase):
    """"fire truck" -> {"fire truck", "fire trucks"}: a phrase and its plural."""
    ending, plural = next(rule for rule in PLURALS if regex.search(rule[0], phrase))
    return {phrase, regex.sub(ending, plural, phrase)}


def vocabulary(names):
    """{phrase: category numbers}: names, all phrases of the groups that hold them, plurals."""
    groups = [line.split(", ") for line in SAME.read_text(encoding="utf-8").splitlines()]
    # Longer phrases are known even where no category has their name: a hot dog is no dog.
    found = {form: set() for phrase in chain(*groups) for form in forms(phrase) if " " in form}
    for c, name in enumerate(names):
        own = plain(name)
        if not own:
            raise UserError(f"captions are searched for letters a-z, {name!r} has none: rename it")
        for phrase in {own}.union(*(group for group in groups if own in group)):
            for form in forms(phrase):
                found.setdefault(form, set()).add(c)
    return found


def mentioned(texts, phrases):
    """Yields for each caption the categories that it names, by the longest phrase at each place."""
    longest = regex.compile(r"\b\L<phrases>\b", phrases=list(phrases))
    for text in texts:
        yield set().union(*(phrases[phrase] for phrase in longest.findall(plain(text))))


def file_of(cfg):
    """The captions that a Config tells to learn from: a Path, there or not."""
    if not (cfg.captions or cfg.root or cfg.data == "scenes"):
        raise UserError("--images captions needs --captions FILE, or --root with "
                        "annotations/captions_train2014.json")
    return Path(cfg.captions or Path(cfg.root or SCENES, "annotations", "captions_train2014.json"))


def load(cfg, split, val=None):
    """COCO's captions_*.json -> data.Split for the categories of `split`; its `paths` are captions
    that name a category, of the first cfg.train_images images that are not in the split val."""
    file = file_of(cfg)
    raw = read_json(file)
    held = {os.path.basename(path) for path in val.paths} if val else ()
    with refused(f"{file} expected as COCO's captions_train2014.json"):
        images = [image["id"] for image in raw["images"] if image.get("file_name") not in held]
        wanted = set(images[:cfg.train_images])
        texts = [str(row["caption"]) for row in raw["annotations"] if row["image_id"] in wanted]
    phrases = vocabulary(split.names)
    labels = np.full((len(texts), len(split.names)), NEGATIVE, np.int8)  # not named: absent
    for row, found in zip(labels, mentioned(texts, phrases)):
        row[list(found)] = POSITIVE
    unused = ~(labels == POSITIVE).any(1)
    if unused.all():
        raise UserError(f"{file}: none of its {len(texts)} captions names one of the categories: "
                        f"{', '.join(split.names[:5])}, ...")
    return Split("captions", texts, list(split.names), labels, prompts=split.prompts, unused=unused,
                 dropped={"captions that name no category": int(unused.sum())}).used()


class Captions:
    """The loader of captions: yields index (B,), words f (B, N, D), sentences x (B, D)."""

    def __init__(self, split, encoder, batch=128, seed=0, device="cpu", rank=0, world=1):
        self.split, self.encoder, self.batch, self.seed = split, encoder, batch, seed
        self.device, self.rank, self.world = device, rank, world
        self.tokens = encoder.tokenize(split.paths, truncate=True).int().cpu()  # (n, S)

    def __len__(self):
        return len(self.tokens)

    def batches(self, epoch):
        for part in epoch_order(len(self), epoch, self.seed).split(self.batch):
            part = torch.cat([part, part[:1].expand(-len(part) % self.world)])
            longest = int(self.tokens[part].argmax(1).max()) + 1  # all processes gather as many
            part = part[self.rank::self.world]
            tokens = self.tokens[part, :longest].long().to(self.device)
            yield part.to(self.device), *self.encode(tokens)

    @torch.no_grad()
    def encode(self, tokens):
        """tokens (B, S) -> f (B, S - 1, D), x (B, D). Every token is projected as CLIP projects the
        end of the text, which is x. f holds the words and the end, not the start, which is the same
        in all texts; a text that is shorter than the longest repeats itself, so that no padding has
        to be kept out of the softmax over the locations."""
        eot = tokens.argmax(1)  # (B,) the end of the text has the largest id
        h = self.encoder.token_embedding(tokens)
        h = h + self.encoder.positional_embedding[:tokens.shape[1]]
        for block in self.encoder.transformer.resblocks:
            h = block(h, causal=True)
        h = self.encoder.ln_final(h) @ self.encoder.text_projection  # (B, S, D)
        B, N = len(h), h.shape[1] - 1
        place = 1 + torch.arange(N, device=h.device) % eot[:, None]  # (B, N) 1 ... eot, again ...
        rows = torch.arange(B, device=h.device)
        return h[rows[:, None], place].float(), h[rows, eot].float()
