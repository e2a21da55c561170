"""CLIP's tokenizer: byte-level byte-pair encoding over lower-cased, cleaned text.

The vocabulary: 256 byte symbols, the same 256 that end a word (`</w>`), one symbol per merge, start
of text, end of text. Merges are ordered by frequency: 512 + merges + 2 tokens take the first ones.
No text stands for start or end: "<|endoftext|>" is read as the characters it has.

    >>> Tokenizer().encode("a photo of a cat")
    [320, 1125, 539, 320, 2368]
"""
import functools
import gzip
import html
from pathlib import Path

import ftfy
import regex
import torch

from support import UserError

MERGES = Path(__file__).with_name("bpe_merges.txt.gz")
FULL = 512 + 48894 + 2  # the vocabulary of OpenAI's models
# English contractions, runs of letters, single digits, runs of anything else but white space.
WORDS = regex.compile(r"'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


class Tokenizer:
    """vocab_size: 514 (bytes alone) to 49408 (CLIP's own)."""

    def __init__(self, vocab_size=FULL):
        if not 514 <= vocab_size <= FULL:  # weights of another tokenizer
            raise UserError(f"expected a vocabulary of 514 to {FULL} tokens, got {vocab_size}")
        lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines[:vocab_size - 514]]
        # Printable Latin-1 bytes stand for themselves, the other 68 are numbered from U+0100 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        symbols = [chr(code) for code in (*printable, *range(256, 324))]
        self.bytes = dict(zip(printable + others, symbols))
        symbols += [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.start, self.end = vocab_size - 2, vocab_size - 1

    @functools.cache
    def word(self, word):
        """Ids of a word: the most frequent pair is joined, until no pair is in the table."""
        text = " " + "  ".join(self.bytes[byte] for byte in word.encode("utf-8")) + "</w> "
        while True:
            parts = text.split()  # each stands between two blanks of its own
            pairs = zip(parts, parts[1:])
            best = min(pairs, key=lambda pair: self.rank.get(pair, FULL), default=None)
            if best not in self.rank:
                return [self.ids[part] for part in parts]
            text = text.replace(" {}  {} ".format(*best), " {}{} ".format(*best))

    def encode(self, text):
        """str -> list of ids, without start and end."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))  # repaired; escaped once or twice
        return [i for word in WORDS.findall(text.lower()) for i in self.word(word)]

    def __call__(self, texts, context_length, truncate=False):
        """list of T strings -> (T, context_length) int64: start, ids, end, zeros."""
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text), self.end]
            if truncate:
                ids[context_length - 1:-1] = []
            if len(ids) > context_length:
                raise UserError(f"a text may have {context_length} tokens (start and end "
                                f"included), this one has {len(ids)}: {text[:60]!r}; shorten it")
            row[:len(ids)] = torch.tensor(ids)
        return tokens


tokenizer = functools.lru_cache(Tokenizer)  # the table is read once
