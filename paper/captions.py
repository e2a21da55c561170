"""Texts as images: prompts learned from captions alone, without a single photo (TaI-DPT, Guo et
al., CVPR 2023; paper, Tables 1, 2).

    python train.py --data scenes --images captions --matching global       the global prompts,
    matched with whole sentences
    python train.py --data scenes --images captions --matching dualcoop     the local prompts,
    matched with single words

CLIP puts texts and images into one space, so a caption's features stand in for an image's: the
sentence for the global feature x (D,), its words for the dense ones f (N, D). Its labels are the
categories that it names. What is learned is then applied to photos. The double-grained prompts of
TaI-DPT do not meet before inference, so they are two runs here, whose scores are averaged (`eval.py
RUN --ensemble RUN`). Unlike there, our dual prompts and Eq. 14 take the place of its ranking loss.
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
SAME = """
person, people, man, woman, boy, girl, child, children, kid, baby, guy, lady, player, skier, surfer, skateboarder, rider, crowd
airplane, aeroplane, plane, jet, airliner    |  bicycle, bike, cyclist          |  motorcycle, motorbike, motor bike, scooter, moped
car, suv, sedan, taxi, automobile            |  bus, minibus, double decker     |  train, locomotive, railway engine, tram
truck, lorry, pickup, fire engine, fire truck|  boat, boats, ship, ferry, canoe, sailboat, kayak, yacht
traffic light, traffic signal, stoplight     |  fire hydrant, hydrant           |  stop sign  |  parking meter  |  bench, park bench
bird, birds, pigeon, seagull, duck, goose, geese, parrot, owl, gull             |  cat, kitten, kitty  |  dog, puppy, hound
horse, horses, pony, foal                    |  sheep, lamb, ram, ewe           |  cow, cattle, bull, calf, ox, oxen  |  elephant
bear, polar bear  |  zebra  |  giraffe       |  backpack, rucksack, knapsack    |  umbrella, parasol    |  handbag, purse
tie, necktie, bow tie                        |  suitcase, luggage, baggage      |  frisbee, flying disc |  skis, ski  |  snowboard
sports ball, soccer ball, tennis ball, basketball, football, baseball, ball     |  kite  |  baseball bat |  baseball glove, mitt
skateboard  |  surfboard                     |  tennis racket, tennis racquet, racket, racquet          |  bottle  |  wine glass, wineglass
cup, mug, teacup  |  fork  |  knife  |  spoon  |  bowl  |  banana  |  apple  |  sandwich, burger, hamburger  |  orange, tangerine
broccoli  |  carrot  |  hot dog, hotdog      |  pizza  |  donut, doughnut       |  cake, cupcake        |  chair, armchair, stool
couch, sofa, loveseat, settee                |  potted plant, pottedplant, houseplant, house plant      |  bed
dining table, diningtable, table, desk       |  toilet, urinal                  |  tv, television, tvmonitor, tv monitor, monitor
laptop, notebook computer  |  mouse          |  remote, remote control          |  keyboard             |  cell phone, cellphone, smartphone, phone
microwave  |  oven, stove  |  toaster        |  sink, washbasin                 |  refrigerator, fridge, freezer  |  book, books
clock  |  vase  |  scissors                  |  teddy bear, teddy, stuffed bear |  hair drier, hair dryer, blow dryer  |  toothbrush
sun, sunshine  |  moon  |  cloud, clouds     |  flower, flowers, blossom        |  house, houses, cottage  |  tree  |  lamp
"""


def forms(phrase):
    """"fire truck" -> {("fire", "truck"), ("fire", "trucks")}: words of a phrase, its last one in
    the singular and the plural."""
    *before, word = words_of(phrase) or [""]
    return {(*before, word), (*before, plural(word))}


def plural(word):
    """As English forms it, most often."""
    if word.endswith("man"):
        return word[:-3] + "men"
    if re.search("[^aeiou]y$", word):
        return word[:-1] + "ies"
    if re.search("[^f]fe?$", word):
        return re.sub("fe?$", "ves", word)
    return word + ("es" if re.search("(s|x|z|sh|ch|o)$", word) else "s")


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())


def vocabulary(names):
    """{words of a phrase: category numbers}, from the names and the groups that hold them."""
    groups = [[" ".join(words_of(phrase)) for phrase in group.split(",")]
              for line in SAME.strip().splitlines() for group in line.split("|")]
    found = {}
    for c, name in enumerate(names):
        own = " ".join(words_of(name))
        if not own:
            raise UserError("captions are searched for words of the letters a to z, and the "
                            f"category {name!r} has none: rename it in the data")
        for phrase in {own}.union(*(group for group in groups if own in group)):
            for words in forms(phrase):
                found.setdefault(words, set()).add(c)
    # A longer phrase of another category takes its words with it: a hot dog is no dog, also where
    # "hot dog" is not asked for.
    return {words: set() for group in groups for phrase in group if " " in phrase
            for words in forms(phrase)} | found


def mentioned(text, phrases):
    """The categories that a caption names: the longest phrase at each place, left to right."""
    words, longest, found, i = words_of(text), max(map(len, phrases)), set(), 0
    while i < len(words):
        for length in range(min(longest, len(words) - i), 0, -1):
            if tuple(words[i: i + length]) in phrases:
                found |= phrases[tuple(words[i: i + length])]
                break
        i += length
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
        raise UserError(f"{file}: captions in COCO's format are needed (captions_train2014.json): "
                        f"{type(error).__name__} {error}") from None
    phrases = vocabulary(names)
    named = [(text, found) for text in texts if (found := mentioned(text, phrases))]
    if not named:
        raise UserError(f"{file}: none of its {len(texts)} captions names one of the categories: "
                        f"{', '.join(names[:5])}, ...")
    labels = np.full((len(named), len(names)), NEGATIVE, np.int8)  # what is not named is absent
    for row, (_, found) in zip(labels, named):
        row[list(found)] = POSITIVE
    texts_named = [text for text, _ in named]
    return Split("captions", texts_named, list(names), labels, prompts=split.prompts,
                 dropped={"captions that name no category": len(texts) - len(named)})


class Captions:
    """The feed of captions: yields index (B,), words f (B, N, D), sentences x (B, D)."""

    def __init__(self, split, clip, batch=128, seed=0, device="cpu", rank=0, world=1):
        self.split, self.clip, self.batch, self.seed = split, clip, batch, seed
        self.device, self.rank, self.world = device, rank, world
        self.waited = 0.0
        rows = []
        for text in split.paths:
            words = text.split()
            # a text that is too long loses its end
            while True:
                try:
                    rows.append(clip.tokenize([" ".join(words)])[0].int().cpu())
                    break
                except UserError:
                    words = words[: len(words) * 3 // 4]
        self.tokens = torch.stack(rows)  # (n, S)

    def __len__(self):
        return len(self.tokens)

    def batches(self, epoch, shuffle=True):
        for part in (epoch_order(len(self), epoch, self.seed) if shuffle
                     else torch.arange(len(self))).split(self.batch):
            part = torch.cat([part,
                              part[:1].expand(-len(part) % self.world)])[self.rank:: self.world]
            yield part.to(self.device), *self.encode(self.tokens[part].long().to(self.device))

    @torch.no_grad()
    def encode(self, tokens):
        """tokens (B, S) -> f (B, N, D), x (B, D). Every token is projected as CLIP projects the end
        of the text, which is x.

        f holds the words and the end, not the start, which is the same in all texts. N is that of
        the longest text of the batch, and a shorter one repeats itself, so that no padding has to
        be kept out of the softmax over the locations.
        """
        # (B,) the end of the text has the largest id
        eot = tokens.argmax(1)
        tokens = tokens[:, : int(eot.max()) + 1]
        h = self.clip.token_embedding(tokens) + self.clip.positional_embedding[: tokens.shape[1]]
        for block in self.clip.transformer.resblocks:
            h = block(h, causal=True)
        h = self.clip.ln_final(h) @ self.clip.text_projection  # (B, S, D)
        B, N = len(h), h.shape[1] - 1
        # (B, N) 1 ... eot, again and again
        place = 1 + torch.arange(N, device=h.device) % eot[:, None]
        rows = torch.arange(B, device=h.device)
        return h[rows[:, None], place].float(), h[rows, eot].float()
