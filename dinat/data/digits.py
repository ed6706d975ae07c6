"""scikit-learn's handwritten digits: 1,797 real 8x8 images that ship with the package, so nothing is downloaded."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

HOLD_OUT = 0.2  # of the images, stratified by class
SPLIT_SEED = 0  # fixed: figures of different runs must be about the same hold-out


class Digits(Dataset):
    """The digits as RGB images of 8x8 pixels, `(PIL image, class 0-9)`.

    Args:
        split: "train" (1,437 images) or "validation" (the stratified hold-out of 360).
    """

    class_to_idx = {str(digit): digit for digit in range(10)}  # noqa: RUF012 - torchvision's attribute, never written

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, targets = load_digits(return_X_y=True)
        parts = train_test_split(np.arange(len(targets)), test_size=HOLD_OUT, stratify=targets, random_state=SPLIT_SEED)
        chosen = parts[0 if split == "train" else 1]
        self.images = (images[chosen].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)  # 17 grey levels
        self.targets = targets[chosen]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.targets[index])
