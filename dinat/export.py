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

from dinat import dense
from dinat.errors import UserError, nearest

TOLERANCE = 1e-4  # largest difference between the outputs of a model and of its export, float32


def export(model: nn.Module, images: Tensor, path: str | Path, *, dynamic_batch: bool = True) -> float:
    """Write `model` to `path`, and run what was written.

    Args:
        model: a model of this package, its `features_only` form, or one of `dinat.dense`; it runs in evaluation mode.
        images: an example (batch, channels, *sides) in the dtype and on the device of the model.
        path: ends in ".onnx" (for ONNX Runtime and others) or ".pt2" (compiled by AOTInductor for this kind of machine,
            which takes a C++ compiler here; `torch._inductor.aoti_load_package` loads it).
        dynamic_batch: whether the result takes any batch size, or only that of `images`.

    Returns:
        The largest absolute difference between the outputs of `model` and of what was written, for `images`.

    Raises:
        UserError: another ending, a folder that is not there, packages that ONNX needs are missing, or a detector,
            which cannot be exported.
    """
    path = Path(path)
    if reason := getattr(model, "not_exported", ""):
        raise UserError(f"{type(model).__name__} cannot be exported: {reason}.")
    if path.suffix not in (".onnx", ".pt2"):
        raise UserError(f"path={path}: must end in .onnx or .pt2.")
    if not path.parent.is_dir():
        raise UserError(f"path={path}: there is no folder {path.parent}.")
    if path.suffix == ".onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f'ONNX needs {" and ".join(missing)}, not installed here: pip install "dinat[onnx]".')
    if dynamic_batch and len(images) == 1:  # which would be taken for a fixed size
        images = torch.cat([images, images])
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
    given. A size other than the model's own (--img-size HEIGHT WIDTH) recomputes the dilations; models for dense
    prediction have none of their own, and are exported for this size and the batch size (2 unless given).
    """
    if not model.startswith("local-dir:") and not timm.is_model(model) and not dense.is_dense(model):
        raise UserError(f"{model}: no such model.{nearest(model, [*timm.list_models(), *dense.PUBLISHED])}")
    path = output or Path(f"{Path(model.removeprefix('local-dir:')).name}.{format}")
    if dense.is_dense(model):
        network, dynamic = dense.create_model(model, pretrained=pretrained), False
        if img_size is None or any(side % network.size_divisor for side in img_size):
            raise UserError(
                f"--img-size {img_size}: {model} takes any size and is exported for one. Give HEIGHT WIDTH, multiples "
                f"of {network.size_divisor}."
            )
        images = torch.randn(batch_size or 2, 3, *img_size)
    else:
        size = {} if img_size is None else {"img_size": img_size}
        try:
            network, dynamic = timm.create_model(model, pretrained=pretrained, **size), batch_size is None
        except (TypeError, ValueError) as error:
            raise UserError(f"--img-size {img_size}: {model} does not take it: {error}") from error
        images = torch.randn(batch_size or 2, network.in_chans, *network.img_size)
    difference = export(network, images, path, dynamic_batch=dynamic)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, largest difference {difference:.1e}")
    if difference > TOLERANCE:
        raise UserError(f"{path} differs from {model} by {difference:.1e}, more than {TOLERANCE}.")
