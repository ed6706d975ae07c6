"""Models for other runtimes: ONNX, and PyTorch's ahead-of-time compiled packages.

Both come from `torch.export`, in which the attention consists of plain ATen operations: what is written runs without
this package. The image size is fixed, as are the dilations; the batch size stays open.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Literal

import timm
import torch
from torch import Tensor, nn

from dinat.errors import UserError, nearest

TOLERANCE = 1e-4  # largest difference between the outputs of a model and of its export, float32


def export(model: nn.Module, images: Tensor, path: str | Path, *, dynamic_batch: bool = True) -> float:
    """Write `model` to `path`, and run what was written.

    Args:
        model: a model of this package, its `features_only` form, or a UPerNet of `dinat.dense`; it runs in evaluation
            mode. The detectors there do not export: how many proposals they have depends on the image.
        images: an example (batch, channels, height, width) in the dtype and on the device of the model.
        path: ends in ".onnx" (for ONNX Runtime and others) or ".pt2" (compiled by AOTInductor for this kind of machine,
            which takes a C++ compiler here; `torch._inductor.aoti_load_package` loads it).
        dynamic_batch: whether the result takes any batch size, or only that of `images`.

    Returns:
        The largest absolute difference between the outputs of `model` and of what was written, for `images`.

    Raises:
        UserError: another ending, or packages that ONNX needs are missing.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise UserError(f"path={path}: must end in .onnx or .pt2.")
    if path.suffix == ".onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f'ONNX needs {" and ".join(missing)}, not installed here: pip install "dinat[onnx]".')
    if dynamic_batch and len(images) == 1:  # which would be taken for a fixed size
        images = images.repeat(2, 1, 1, 1)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(images)
            dynamic_shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
            write_and_run = _onnx if path.suffix == ".onnx" else _pt2
            outputs = write_and_run(model, images, dynamic_shapes, path)
    finally:
        model.train(training)
    expected = [expected] if isinstance(expected, Tensor) else expected
    return max((o.float() - e.float()).abs().max().item() for o, e in zip(outputs, expected, strict=True))


def _onnx(model: nn.Module, images: Tensor, dynamic_shapes: tuple | None, path: Path) -> list[Tensor]:
    """Write the file, and return what ONNX Runtime makes of `images`."""
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):  # older onnxscripts print there what they rewrote
        program = torch.onnx.export(
            model, (images,), dynamo=True, dynamic_shapes=dynamic_shapes, input_names=["images"], verbose=False
        )
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x).to(images.device) for x in session.run(None, {"images": images.cpu().numpy()})]


def _pt2(model: nn.Module, images: Tensor, dynamic_shapes: tuple | None, path: Path) -> list[Tensor]:
    """Write the package, and return what it makes of `images`."""
    program = torch.export.export(model, (images,), dynamic_shapes=dynamic_shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    outputs = torch._inductor.aoti_load_package(str(path))(images)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def command(
    model: str,
    format: Literal["onnx", "pt2"] = "onnx",
    output: Path | None = None,
    img_size: tuple[int, int] | None = None,
    batch_size: int | None = None,
    pretrained: bool = True,
) -> None:
    """Write MODEL for another runtime, and compare what was written with it.

    MODEL is a name as in `dinat list`, or local-dir:RUN for a run folder. The file is MODEL.FORMAT unless --output is
    given. A size other than the model's own (--img-size HEIGHT WIDTH) recomputes the dilations.
    """
    if not model.startswith("local-dir:") and not timm.is_model(model):
        raise UserError(f"{model}: no such model.{nearest(model, timm.list_models())}")
    path = output or Path(f"{Path(model.removeprefix('local-dir:')).name}.{format}")
    size = {} if img_size is None else {"img_size": img_size}
    network = timm.create_model(model, pretrained=pretrained, **size)
    images = torch.randn(batch_size or 2, network.in_chans, *network.img_size)
    difference = export(network, images, path, dynamic_batch=batch_size is None)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, largest difference {difference:.1e}")
    if difference > TOLERANCE:
        raise UserError(f"{path} differs from {model} by {difference:.1e}, more than {TOLERANCE}.")
