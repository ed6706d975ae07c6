"""timm's reader of webdataset shards, but it gives images as they are stored; timm's passes over damaged ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from timm.data.readers.reader_wds import ReaderWds

from dinat.data.images import Encoded


class Shards(ReaderWds):
    """A reader of `(Encoded, class index)`, None for a label that is no number; those below 0 say that there is none.

    It replaces the last stages of timm's pipeline, which timm builds in a private method.
    """

    def _lazy_init(self) -> None:
        import webdataset

        super()._lazy_init()
        self.ds = webdataset.DataPipeline(*self.ds.pipeline[:-2], self.pick)  # without decoding and renaming

    def pick(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        key = self.target_key or self.split_info.alt_label
        for sample in samples:
            image = next((sample[ending] for ending in self.input_key.split(";") if ending in sample), b"")
            try:
                target = int(json.loads(sample["json"])[key] if key else sample["cls"])
            except (KeyError, TypeError, ValueError):
                target = None
            if target is None or target >= 0:
                yield {"image": Encoded(image, f"{sample['__url__']}: {sample['__key__']}"), "target": target}
