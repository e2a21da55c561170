"""Texts as images: prompts learned from captions alone, without a photo (TaI-DPT, Guo et al., CVPR
2023; paper, Tables 1, 2).

    python train.py --data scenes --images captions --matching global      matched with sentences
    python train.py --data scenes --images captions --matching dualcoop    matched with words

CLIP puts texts and images into one space, so a caption's features stand in for an image's: the
sentence for the global feature x (D,), its words for the dense ones f (N, D). Its labels are the
categories that it names. TaI-DPT's two kinds of prompts do not meet before inference, so they are
two runs here, whose scores are averaged (`eval.py RUN --ensemble RUN`). Unlike there, our dual
prompts and Eq. 14 take the place of its ranking loss.
"""
import re
from pathlib import Path

import numpy as np
import torch

from clip.features import epoch_order
from data import SCENES
from datasets.base import NEGATIVE, POSITIVE, Split, read_json
from support import UserError

# Words that mean the same, a group a line; a category is named by every word of the groups that
# hold its own name, and by their plurals. Plural names are those of NUS-WIDE. Words that mostly
# mean something else in captions ("glass", "bat") are left out.
SAME = Path(__file__).with_name("words.txt")
# How English forms the plural, most often: the first ending that fits is replaced.
PLURALS = (("man$", "men"), ("(?<=[^aeiou])y$", "ies"), ("(?<=[^f])fe?$", "ves"),
           ("(?<=[sxzo])$|(?<=[sc]h)$", "es"), ("$", "s"))


def words_of(text):
    return re.findall("[a-z]+", text.lower())


def forms(phrase):
    """"fire truck" -> {("fire", "truck"), ("fire", "trucks")}: the words of a phrase, its last one
    in the singular and the plural."""
    words = words_of(phrase)
    ending, plural = next(rule for rule in PLURALS if re.search(rule[0], words[-1]))
    return {tuple(words), (*words[:-1], re.sub(ending, plural, words[-1]))}


def vocabulary(names):
    """{words of a phrase: category numbers}, from the names and the groups that hold them."""
    groups = [line.split(", ") for line in SAME.read_text(encoding="utf-8").splitlines()]
    # A longer phrase of another category takes its words with it: a hot dog is no dog, also where
    # "hot dog" is not asked for.
    found = {words: set() for group in groups for phrase in group for words in forms(phrase)
             if len(words) > 1}
    for c, name in enumerate(names):
        own = " ".join(words_of(name))
        if not own:
            raise UserError(f"captions are searched for the letters a to z, the category {name!r} "
                            "has none: rename it in the data")
        for phrase in {own}.union(*(group for group in groups if own in group)):
            for words in forms(phrase):
                found.setdefault(words, set()).add(c)
    return found


def mentioned(text, phrases):
    """The categories that a caption names: the longest phrase at each place, left to right."""
    words, longest, found = words_of(text), max(map(len, phrases)), set()
    while words:
        length = next((n for n in range(longest, 0, -1) if tuple(words[:n]) in phrases), 1)
        found.update(phrases.get(tuple(words[:length]), ()))
        words = words[length:]
    return found


def load(cfg, split):
    """COCO's captions_*.json -> data.Split for the categories of `split`; its `paths` are the
    captions of the first cfg.train_images images, those that name a category."""
    names = split.names
    file = cfg.captions or Path(cfg.root or SCENES, "annotations", "captions_train2014.json")
    raw = read_json(file)
    try:
        wanted = {image["id"] for image in raw["images"][:cfg.train_images]}
        texts = [str(row["caption"]) for row in raw["annotations"] if row["image_id"] in wanted]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} expected as COCO's captions_train2014.json: {error}") from None
    phrases = vocabulary(names)
    named = [(text, found) for text in texts if (found := mentioned(text, phrases))]
    if not named:
        raise UserError(f"{file}: none of its {len(texts)} captions names one of the categories: "
                        f"{', '.join(names[:5])}, ...")
    labels = np.full((len(named), len(names)), NEGATIVE, np.int8)  # what is not named is absent
    for row, (_, found) in zip(labels, named):
        row[list(found)] = POSITIVE
    return Split("captions", [text for text, _ in named], list(names), labels,
                 prompts=split.prompts,
                 dropped={"captions that name no category": len(texts) - len(named)})


def tokens_of(clip, text):
    """(S,) tokens of a caption; one that is too long loses its end."""
    try:
        return clip.tokenize([text])[0].int().cpu()
    except UserError:
        words = text.split()
        return tokens_of(clip, " ".join(words[:len(words) * 3 // 4]))


class Captions:
    """The loader of captions: yields index (B,), words f (B, N, D), sentences x (B, D)."""

    def __init__(self, split, clip, batch=128, seed=0, device="cpu", rank=0, world=1):
        self.split, self.clip, self.batch, self.seed = split, clip, batch, seed
        self.device, self.rank, self.world = device, rank, world
        self.waited = 0.0
        self.tokens = torch.stack([tokens_of(clip, text) for text in split.paths])  # (n, S)

    def __len__(self):
        return len(self.tokens)

    def batches(self, epoch):
        for part in epoch_order(len(self), epoch, self.seed).split(self.batch):
            part = torch.cat([part, part[:1].expand(-len(part) % self.world)])
            part = part[self.rank::self.world]
            yield part.to(self.device), *self.encode(self.tokens[part].long().to(self.device))

    @torch.no_grad()
    def encode(self, tokens):
        """tokens (B, S) -> f (B, N, D), x (B, D). Every token is projected as CLIP projects the end
        of the text, which is x.

        f holds the words and the end, not the start, which is the same in all texts. N is that of
        the longest text of the batch, and a shorter one repeats itself, so that no padding has to
        be kept out of the softmax over the locations.
        """
        eot = tokens.argmax(1)  # (B,) the end of the text has the largest id
        tokens = tokens[:, :int(eot.max()) + 1]  # (B, S)
        h = self.clip.token_embedding(tokens) + self.clip.positional_embedding[:tokens.shape[1]]
        for block in self.clip.transformer.resblocks:
            h = block(h, causal=True)
        h = self.clip.ln_final(h) @ self.clip.text_projection  # (B, S, D)
        B, N = len(h), h.shape[1] - 1
        place = 1 + torch.arange(N, device=h.device) % eot[:, None]  # (B, N) 1 ... eot, again ...
        rows = torch.arange(B, device=h.device)
        return h[rows[:, None], place].float(), h[rows, eot].float()
