"""A published dense model of each method at full size on photographs: `python .ci/dense_suite.py [NAME ...]`.

On 600 x 800 and 300 x 200 pixels, where dilated windows are wider than the map and layers pad it. Weights are random:
outputs must be finite and of the right sizes. Some minutes on one core, so not in the tests.
"""

import sys
import time

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


def check(result: dict, size: tuple[int, int], classes: int) -> str:
    """What was found, in words."""
    (name,) = {"semantic", "panoptic", "masks"} & result.keys()
    found = result[name]
    assert tuple(found.shape[-2:]) == size, (found.shape, size)
    if name == "semantic":
        assert 0 <= found.min() <= found.max() < classes
        return f"{len(found.unique())} classes"
    labels = result["labels"].tolist() if name == "masks" else [s["label"] for s in result["segments"]]
    assert all(0 <= label < classes for label in labels)
    if name == "masks":
        assert result["scores"].isfinite().all()
        assert result["boxes"].isfinite().all()
    return f"{len(labels)} {'objects' if name == 'masks' else 'segments'}"


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
        if row.task == "detection" and hasattr(model, "score_threshold"):
            model.score_threshold = 0.0  # random weights are sure of nothing
        for photograph, (height, width) in zip(photographs, SIZES, strict=True):
            pixels = to_tensor(photograph.resize((width, height)))
            image = normalize(pixels, row.preprocessing["mean"], row.preprocessing["std"])
            start = time.time()
            (result,) = model.predict([image])
            found = check(result, (height, width), len(row.classes))
            seconds = time.time() - start
            print(f"{name}  {height} x {width}  {found}  {len(padding)} layers pad  {seconds:.0f} s", flush=True)
            assert padding or height > 512  # what UPerNet's dilations are for
            padding.clear()


if __name__ == "__main__":
    main()
