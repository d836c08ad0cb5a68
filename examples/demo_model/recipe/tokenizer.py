"""A byte-level BPE tokenizer as CLIP's, small, learnt from what the captions are made of."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from examples.demo_model.recipe import captions
from examples.demo_model.recipe.grounds import NAMED
from examples.demo_model.recipe.settings import MAX_TOKENS, Workspace
from examples.demo_model.recipe.things import Thing, read_things

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
NUM_BYTES = 256


def learn_tokenizer(workspace: Workspace) -> dict[str, object]:
    """Leave the tokenizer where the exporter looks for it."""
    things = read_things(workspace.budget.num_things)
    tokenizer = make_tokenizer(things, workspace.budget.num_tokens)
    folder = workspace.trained("tokenizer")
    tokenizer.save_pretrained(folder)
    # The two files that other readers of CLIP's tokenizers ask for.
    tokenizer.backend_tokenizer.model.save(str(folder))
    words = {word for thing in things for name in (thing.name, *thing.synonyms, *thing.hangul) for word in name.split()}
    split = sorted(word for word in words if len(tokenizer.tokenize(word)) > 1)
    return {"num_tokens": len(tokenizer), "num_words": len(words), "num_words_in_pieces": len(split)}


def make_tokenizer(things: Sequence[Thing], num_tokens: int) -> Any:
    """Build a `CLIPTokenizer` of at most so many tokens; any text can be encoded with it, as bytes if need be."""
    merges = _learn_merges(list(corpus(things)), num_tokens)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters)]
    tokens += dict.fromkeys("".join(merge) for merge in merges)
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys((*tokens, START, END)))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def corpus(things: Sequence[Thing]) -> Iterator[str]:
    """Generate every text that captions are made of, names more often than the words around them."""
    for thing in things:
        yield from (thing.name, *thing.synonyms, *thing.hangul)
    for ground in NAMED:
        yield from (f"on a {ground.english} background", *(f"{colour} 배경에" for colour in ground.hangul))
        yield from (f"{colour} 배경의" for colour in ground.hangul)
    for english, hangul in captions.STYLE_WORDS.values():
        yield from (f"{english} style:", f"{hangul} 스타일:")
    yield from chain(captions.ENGLISH_BEFORE, captions.ENGLISH_ADJECTIVES, captions.ENGLISH_AFTER)
    yield from chain(captions.KOREAN_BEFORE, captions.KOREAN_AFTER, captions.KOREAN_LAST)
    yield from chain(captions.NEGATIVE_WORDS, captions.KOREAN_NEGATIVE, ("the", "an", "with", "배경"))


class Reader:
    """Captions to token ids. May be used by several threads at once."""

    def __init__(self, tokenizer: Any) -> None:
        self._end = tokenizer.eos_token_id
        # Its own copy with nothing left to set: `CLIPTokenizer.__call__` sets padding each time, under other threads.
        self._tokenizer: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.enable_padding(length=MAX_TOKENS, pad_id=self._end, pad_token=END)

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode the texts as the pipeline does: int64, shape (texts, MAX_TOKENS)."""
        return torch.tensor([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))])


def _learn_merges(texts: Sequence[str], num_tokens: int) -> list[tuple[str, str]]:
    """Compute the merges, most frequent first, for a vocabulary that also holds bytes, final bytes and two special
    tokens.
    """
    blank = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens - NUM_BYTES - 2,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
