"""A small tokenizer, with tokens that templates write."""

import functools

import tokenizers

from mtpd_jax.data.tokenizer import Tokenizer

VOCABULARY, END = 320, 0


@functools.cache
def tokenizer_json(begins=False):
    """A byte-level tokenizer of a few words; perhaps with a token that it puts before a text."""
    words = ["the cat sat on the mat, naïve as ever; a dog ran by 🐈"] * 9
    ours = Tokenizer.train(words, VOCABULARY - 4, "<|endoftext|>", 10_000)
    library = tokenizers.Tokenizer.from_str(ours.to_json())
    library.add_special_tokens(["<s>", "<|turn|>", "<|done|>"])
    if begins:
        begin = library.token_to_id("<s>")
        library.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", begin)])
    return library.to_str()
