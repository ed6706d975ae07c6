"""A published dense model of each method at full size on photographs: `python .ci/dense_suite.py [NAME ...]`.

On 600 x 800 and 300 x 200 pixels, where dilated windows are wider than the map and layers pad it. Weights are random:
what every layer gives must be finite, and results not empty and of the right sizes. Three minutes on one core and 4.3
GiB of memory, so not in the tests.
"""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from dinat_kernels.modules import NeighborhoodAttention2d
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms.functional import normalize, to_tensor

import dinat.dense

MODELS = (
    "mask_rcnn_dinat_mini.coco", "cascade_mask_rcnn_dinat_mini.coco", "upernet_dinat_mini.ade20k",
    "mask2former_dinat_large.cityscapes_instance", "oneformer_dinat_large.cityscapes",
)  # fmt: skip
SIZES = ((600, 800), (300, 200))
THRESHOLDS = ("score_threshold", "object_threshold", "overlap_threshold")


def check(result: dict, size: tuple[int, int], classes: int) -> str:
    """What was found, in words."""
    (name,) = {"semantic", "panoptic", "masks"} & result.keys()
    found = result[name]
    assert tuple(found.shape[-2:]) == size, (found.shape, size)
    if name == "semantic":
        assert 0 <= found.min() <= found.max() < classes
        return f"{len(found.unique())} classes"
    labels = result["labels"].tolist() if name == "masks" else [s["label"] for s in result["segments"]]
    assert labels
    assert all(0 <= label < classes for label in labels)
    if name == "masks":
        assert result["scores"].isfinite().all()
        assert result["boxes"].isfinite().all()
    return f"{len(labels)} {'objects' if name == 'masks' else 'segments'}"


def tensors(output: Any) -> Iterator[torch.Tensor]:
    """All there are in what a module gives."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from tensors(part)


def demand_finite(model: torch.nn.Module) -> None:
    """Has every layer fail that gives what is not finite."""
    for name, layer in model.named_modules():

        def check(layer: torch.nn.Module, inputs: tuple, output: Any, name: str = name) -> None:
            assert all(tensor.isfinite().all() for tensor in tensors(output)), f"{name}: not finite"

        layer.register_forward_hook(check)


def count_padding(model: torch.nn.Module) -> list[str]:
    """Names of the layers that pad their map, gathered while the model runs."""
    padding: list[str] = []
    for name, layer in model.named_modules():
        if isinstance(layer, NeighborhoodAttention2d):

            def note(layer: NeighborhoodAttention2d, inputs: tuple, name: str = name) -> None:
                reach = (k * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
                if any(side < least for side, least in zip(inputs[0].shape[1:3], reach, strict=True)):
                    padding.append(name)

            layer.register_forward_pre_hook(note)
    return padding


@torch.no_grad()
def main() -> None:
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for name in sys.argv[1:] or MODELS:
        torch.manual_seed(0)
        model, row = dinat.dense.create_model(name).eval(), dinat.dense.PUBLISHED[name]
        padding = count_padding(model)
        demand_finite(model)
        for threshold in THRESHOLDS:
            if hasattr(model, threshold):
                setattr(model, threshold, 0.0)  # random weights are sure of nothing
        for photograph, (height, width) in zip(photographs, SIZES, strict=True):
            pixels = to_tensor(photograph.resize((width, height)))
            image = normalize(pixels, row.preprocessing["mean"], row.preprocessing["std"])
            start = time.time()
            (result,) = model.predict([image])
            found = check(result, (height, width), len(row.classes))
            told = (
                name, f"{height} x {width}", found, f"{len(padding)} layers pad", f"{time.time() - start:.0f} s",
                f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB so far",
            )  # fmt: skip
            print("  ".join(told), flush=True)
            assert padding or height > 512  # what UPerNet's dilations are for
            padding.clear()


if __name__ == "__main__":
    main()
