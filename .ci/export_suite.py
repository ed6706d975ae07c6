"""Published architectures, exported and compared with themselves: `python .ci/export_suite.py [onnx] [pt2]`.

Minutes per model, so not in the tests.  Random weights, with bias tables large enough to matter; batches of 1, 2 and 3.
"""

import sys
import tempfile
import time
from pathlib import Path

import timm
import torch

import dinat  # noqa: F401  registers the models
from dinat.export import TOLERANCE, export

CASES = [
    ("nat_mini", (224, 224)),
    ("dinat_mini", (224, 224)),
    ("dinat_s_tiny", (224, 224)),
    ("dinat_isotropic_small", (224, 224)),
    ("dinat_mini", (256, 320)),
]


def load(path: Path):
    """What was written, as a function of images."""
    if path.suffix == ".pt2":
        return torch._inductor.aoti_load_package(str(path))
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def main(formats: list[str]) -> int:
    worst = 0.0
    for form in formats:
        for name, size in CASES:
            torch.manual_seed(0)
            model = timm.create_model(name, img_size=size).eval()
            for key, p in model.named_parameters():
                if key.endswith("rpb"):
                    torch.nn.init.normal_(p)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{name}.{form}"
                start = time.time()
                errors = [export(model, torch.randn(2, 3, *size), path)]
                seconds = time.time() - start
                run = load(path)
                for images in (torch.randn(1, 3, *size), torch.randn(3, 3, *size)):
                    expected = model(images)
                    errors.append((run(images) - expected).abs().max().item())
                worst = max(worst, *errors)
                print(
                    f"{form} {name} {size[0]}x{size[1]}: largest difference {max(errors):.1e}, "
                    f"logits' deviation {expected.std():.2f}, {path.stat().st_size / 1e6:.0f} MB, {seconds:.0f} s",
                    flush=True,
                )
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["onnx", "pt2"]))
