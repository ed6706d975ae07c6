"""timm's reader of Hugging Face streams, but it gives images as they are stored; timm's ends with a damaged one."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import fsspec
from timm.data.readers.reader_hfids import ReaderHfids

from dinat.data.images import Encoded


class HuggingFaceStream(ReaderHfids):
    """A reader of `(Encoded, class index)`. The stream is made in a private method of timm's, and told there."""

    def _lazy_init(self) -> None:
        super()._lazy_init()
        self.ds = self.ds.cast_column(self.input_key, datasets.Image(decode=False))

    def __iter__(self) -> Iterator[tuple[Encoded, int]]:
        for image, target in super().__iter__():
            data = image["bytes"]
            if data is None:
                with fsspec.open(image["path"], "rb") as file:
                    data = file.read()
            yield Encoded(data, image["path"]), target
