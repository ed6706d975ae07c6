"""timm's reader of webdataset shards, but it gives images as they are stored; timm's passes over damaged ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from timm.data.readers.reader_wds import ReaderWds

from dinat.data.images import Encoded


class Shards(ReaderWds):
    """A reader of `(Encoded, class index or list)`; a shard that ends early is one more of them, with its problem.

    It replaces stages of timm's pipeline, which timm builds in a private method. Labels below 0 stand for none.
    """

    def _lazy_init(self) -> None:
        import webdataset

        super()._lazy_init()
        self.broken: list[Encoded] = []
        stages = self.ds.pipeline[:-2]  # without decoding and renaming
        stages[-2 if self.is_training else -1] = webdataset.tarfile_to_samples(handler=self.note)
        self.ds = webdataset.DataPipeline(*stages, self.pick)

    def note(self, error: Exception) -> bool:
        """webdataset's handler. An error gets here with the shard's stream and address, some also before, without."""
        if len(error.args) == 3:
            reason, _, shard = error.args
            self.broken.append(Encoded(b"", shard, f"the shard cannot be read to its end: {reason}"))
        return True

    def pick(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        own = None if self.target_key == "cls" else self.target_key  # timm's default before it read keys of JSON files
        key = own or self.split_info.alt_label
        for sample in samples:
            yield from self.drain()
            image = next((sample[ending] for ending in self.input_key.split(";") if ending in sample), None)
            name, target = f"{sample['__url__']}: {sample['__key__']}", 0
            problem = f"it has no file ending in one of {self.input_key}" if image is None else None
            try:
                given = json.loads(sample["json"])[key] if key else sample["cls"]
                target = given if isinstance(given, list) else int(given)
            except (KeyError, TypeError, ValueError):
                problem = "its label is no number"
            if isinstance(target, list) or target >= 0:
                yield {"image": Encoded(image or b"", name, problem), "target": target}
        yield from self.drain()

    def drain(self) -> Iterator[dict[str, Any]]:
        while self.broken:
            yield {"image": self.broken.pop(), "target": 0}
