"""Texts as OneFormer reads them: tokens of CLIP (arXiv:2103.00020), of the task and of sentences about an image."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import Tensor

from dinat.errors import UserError

Tokenizer = Callable[[list[str]], Tensor]

CONTEXT = 77  # tokens of a text
# of "the task is ...": what predictions read, without the package
TASK_TOKENS = {
    "panoptic": (49406, 518, 10549, 533, 1072, 24755, 49407),
    "semantic": (49406, 518, 10549, 533, 29119, 1550, 49407),
    "instance": (49406, 518, 10549, 533, 34572, 49407),
}


def _clip() -> Tokenizer:
    from open_clip.tokenizer import SimpleTokenizer  # with the vocabulary in its wheel

    return SimpleTokenizer(context_length=CONTEXT)


TOKENIZERS = {"clip": _clip}


@cache
def find_tokenizer(name: str) -> Tokenizer:
    """One of `TOKENIZERS`: texts to int64 (texts, 77) with zeros at the end.

    Raises:
        UserError: its package is not installed.
    """
    try:
        return TOKENIZERS[name]()
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UserError(
            f'tokenizer={name} needs {package}, not installed here: pip install "dinat[dense]". '
            "model.kwargs.tokenizer=null trains without texts."
        ) from error
