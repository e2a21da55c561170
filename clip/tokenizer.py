"""CLIP's tokenizer: byte-level byte-pair encoding over lower-cased, cleaned text.

The vocabulary is ordered: 256 byte symbols, the same 256 that end a word (`</w>`), one symbol a merge, start of text,
end of text. Merges are ordered by frequency, so a smaller vocabulary is a prefix of the same table: its size is
`512 + merges + 2`. Nothing in a text stands for start or end: "<|endoftext|>" is read as the characters it has.

    >>> Tokenizer().encode("a photo of a cat")
    [320, 1125, 539, 320, 2368]
"""
import functools
import gzip
import html
import pathlib

import ftfy
import regex
import torch
from support import UserError

MERGES = pathlib.Path(__file__).with_name("bpe_merges.txt.gz")
FULL = 512 + 48894 + 2  # the vocabulary of OpenAI's models
# English contractions, runs of letters, single digits, runs of anything else that is not white space.
WORDS = regex.compile(r"'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def byte_symbols():
    """One printable character for each byte 0..255, in vocabulary order: printable Latin-1 bytes stand for themselves,
    the other 68 (controls, spaces, soft hyphen) are numbered from U+0100 on. Returns {byte: character}."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def clean(text):
    """Repairs mis-decoded unicode, undoes (twice) escaped HTML, collapses white space, lower-cases."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


class Tokenizer:
    """vocab_size: 514 (bytes alone) to 49408 (CLIP's own)."""

    def __init__(self, vocab_size=FULL):
        if not 514 <= vocab_size <= FULL:
            raise UserError(f"the vocabulary has to hold 514 to {FULL} tokens, not {vocab_size}: "
                            "the weights do not belong to CLIP's tokenizer")
        lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()[:vocab_size - 514]
        merges = [tuple(line.split()) for line in lines]
        self.bytes = byte_symbols()
        symbols = list(self.bytes.values())
        symbols += [s + "</w>" for s in symbols]
        symbols += ["".join(pair) for pair in merges]
        self.ids = dict(zip(symbols, range(len(symbols))))
        self.rank = dict(zip(merges, range(len(merges))))
        self.start, self.end = vocab_size - 2, vocab_size - 1
        self.words = {}  # word -> ids, filled as words come

    def merge(self, word):
        """Byte symbols of one word -> its tokens: the most frequent pair is joined everywhere, until none is left."""
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if best not in self.rank:
                break
            joined, i = [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i:i + 2]) == best else 1
                joined.append("".join(parts[i:i + step]))
                i += step
            parts = joined
        return parts

    def encode(self, text):
        """str -> list of ids, without start and end."""
        ids = []
        for word in WORDS.findall(clean(text)):
            if word not in self.words:
                symbols = "".join(self.bytes[b] for b in word.encode("utf-8"))
                self.words[word] = [self.ids[part] for part in self.merge(symbols)]
            ids += self.words[word]
        return ids

    def __call__(self, texts, context_length):
        """texts: list of T strings -> (T, context_length) int64: start, ids, end, zeros. A text too long is refused."""
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > context_length:
                raise UserError(f"a text may have {context_length} tokens (start and end included), "
                                f"this one has {len(ids)}: {text[:60]!r}; shorten it")
            row[:len(ids)] = torch.tensor(ids)
        return tokens


@functools.lru_cache(maxsize=4)
def tokenizer(vocab_size=FULL):
    """The tokenizer of that vocabulary size; the table is read once."""
    return Tokenizer(vocab_size)


def tokenize(texts, context_length=77, vocab_size=FULL):
    """texts: list of T strings (or one) -> (T, context_length) int64, as `Tokenizer.__call__`."""
    return tokenizer(vocab_size)([texts] if isinstance(texts, str) else texts, context_length)
