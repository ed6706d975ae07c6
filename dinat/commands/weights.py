"""`dinat download`, `verify`, `convert` and `push`: weights fetched, checked, brought to another layout, published."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from huggingface_hub import HfApi, ModelCard
from timm.models import PretrainedCfg, get_arch_name
from timm.models._hub import get_cache_dir
from torch import Tensor, nn

from dinat import checkpoints, dense
from dinat.card import model_card
from dinat.checkpoints import Shape
from dinat.checkpoints.fetching import sha256_of
from dinat.checkpoints.layouts import method_of
from dinat.commands.catalogue import Model, console, find, full_name, ours
from dinat.commands.convert_dense import convert_dense
from dinat.data.images import ImageError, open_image
from dinat.dense.folder import write_files
from dinat.errors import CheckpointError, UserError
from dinat.files import read_json, write_text
from dinat.published import LOGITS, LOGITS_IMAGE

CacheDir = Annotated[Path | None, typer.Option(help="Instead of the caches of huggingface_hub and torch.hub.")]
Sha256 = Annotated[str | None, typer.Option(metavar="HEX", help="The only hash of the file to accept.")]
MODEL_FILES = ("config.json", "model.safetensors")
CARD = "README.md"


class Layout(str, Enum):
    """What `dinat convert` writes."""

    timm = "timm"
    huggingface = "huggingface"
    huggingface_dinat = "huggingface-dinat"


def get(cfg: PretrainedCfg, cache_dir: Path | None, sha256: str | None = None, force: bool = False) -> Path:
    """The file with the weights of a model, downloaded if need be and verified."""
    places = checkpoints.sources(cfg)
    if not places:
        raise UserError(f"MODEL {full_name(cfg)}: there are no published weights of it.")
    if sha256 and (len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef")):
        raise UserError(f"--sha256 {sha256}: not 64 hexadecimal digits.")
    return checkpoints.download(places, cache_dir, sha256, force)


def download(
    model: Model,
    cache_dir: CacheDir = None,
    sha256: Sha256 = None,
    force: Annotated[bool, typer.Option("--force", help="Transfer again what is in the cache.")] = False,
) -> None:
    """Fetch a model's weights into the cache."""
    path = get(find(model), cache_dir, sha256, force)
    console.print(f"{path}\nsha256 {sha256_of(path)}", soft_wrap=True)


def verify(
    model: Model,
    cache_dir: CacheDir = None,
    sha256: Sha256 = None,
    image: Annotated[Path | None, typer.Option(help=f"A copy of {LOGITS_IMAGE}.")] = None,
) -> None:
    """Check a model's weights: hash, structure, known logits."""
    cfg = find(model)
    name, path = full_name(cfg), get(cfg, cache_dir, sha256)
    console.print(f"file       {path}\nhash       ok, {sha256_of(path)}", soft_wrap=True)
    create = dense.create_model if name in dense.PUBLISHED else timm.create_model
    network = create(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path))).eval()
    bad = [key for key, value in network.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise CheckpointError(f"{path}: {bad[0]} holds values that are not finite.")
    console.print(f"structure  ok, {len(network.state_dict())} tensors, {network.num_classes} classes")
    if name not in LOGITS:
        console.print("logits     none are known of this model")
        return
    logits = known_image_logits(network, image)
    error = (logits[:3] - torch.tensor(LOGITS[name])).abs().max().item()
    if error > 1e-3:
        raise CheckpointError(f"{path}: the logits begin {logits[:3].tolist()}, not {list(LOGITS[name])}.")
    console.print(f"logits     ok, within {error:.0e} of those published")


def known_image_logits(network: nn.Module, image: Path | None) -> Tensor:
    """Logits (classes,) of the image that published logits belong to, squashed to the model's size."""
    if image is None:
        image = Path(get_cache_dir()) / Path(LOGITS_IMAGE).name
        if not image.exists():
            try:
                torch.hub.download_url_to_file(LOGITS_IMAGE, str(image), progress=False)
            except OSError as error:
                raise UserError(f"{LOGITS_IMAGE}: {error}. Give a copy of it with --image.") from error
    try:
        picture = open_image(image)
    except ImageError as error:
        raise UserError(f"{image}: {error}.") from error
    config = timm.data.resolve_data_config(model=network) | {"crop_pct": 1.0, "crop_mode": "squash"}
    with torch.inference_mode():
        return network(timm.data.create_transform(**config)(picture)[None])[0]


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A checkpoint in any of the known layouts.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A folder, made if need be.")],
    model: Annotated[
        str | None,
        typer.Option(help="Architecture, where the weights leave it open; a published dense model, to keep its head."),
    ] = None,
    to: Annotated[
        Layout,
        typer.Option(help="A model folder of timm (of ours, with a head), or of transformers, perhaps with its DiNAT."),
    ] = Layout.timm,
) -> None:
    """Convert weights of any layout to a model folder."""
    if model in dense.PUBLISHED:
        console.print(convert_dense(source, folder, model, to.value), soft_wrap=True)
        write_text(folder / CARD, str(card_of(folder)))
        return
    checkpoint = checkpoints.read_checkpoint(source)
    state = checkpoints.to_native(checkpoint)
    shape = Shape.of(state)
    name = find(model).architecture if model else architecture_of(shape, source)
    arguments: dict[str, Any] = dict(num_classes=shape.num_classes, in_chans=shape.in_chans)
    windows = [max(window) for window in shape.kernel_size]
    network = timm.create_model(name, device="meta")
    if not network.full_attention and windows != [level.blocks[0].attn.kernel_size[0] for level in network.levels]:
        arguments["kernel_size"] = windows[0] if len(set(windows)) == 1 else windows
    if shape.stage_norm:
        arguments["stage_norm"] = True
    network = timm.create_model(name, **arguments)
    try:
        network.load_state_dict(checkpoints.fit(state, network))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    if to is not Layout.timm:
        write_huggingface(network, name, shape, folder)
    else:
        from dinat.tasks.models import export  # takes a second to import

        del arguments["num_classes"]
        export(network, folder, {"input_size": (shape.in_chans, *network.img_size[-2:])}, arguments, [])
        write_text(folder / CARD, str(card_of(folder)))
    console.print(f"{name}: {len(state)} tensors, {shape.num_classes} classes, in {folder}", soft_wrap=True)
    if head := method_of(checkpoint):
        console.print(
            f"the head, of the method {head}, is left out: --model {head}_{name}.DATA keeps it", soft_wrap=True
        )


def card_of(folder: Path) -> ModelCard:
    """The card of a model folder that came without one."""
    from dinat.tasks import find_task  # takes a second to import

    task = read_json(folder / "config.json").get("task", "classification")
    return model_card(folder, find_task(task).hub_task)


def architecture_of(shape: Shape, source: Path) -> str:
    """The only architecture of ours with these shapes. Raises UserError for none or several."""

    def body(shape: Shape) -> tuple:
        rank = len(shape.kernel_size[0])
        return rank, shape.embed_dim, shape.depths, shape.num_heads, shape.mlp_ratio, shape.layer_scale

    shapes = {
        name: Shape.of(timm.create_model(name, device="meta").state_dict())
        for name in dict.fromkeys(map(get_arch_name, ours()))
    }
    fitting = [name for name in shapes if body(shapes[name]) == body(shape)]
    fitting = [name for name in fitting if shapes[name].kernel_size == shape.kernel_size] or fitting
    if len(fitting) != 1:
        choice = f"may be any of {', '.join(fitting)}" if fitting else "is none of our models"
        raise UserError(f"{source}: by its shapes this {choice}. Say which with --model.")
    return fitting[0]


def write_huggingface(network: nn.Module, name: str, shape: Shape, folder: Path) -> None:
    """model.safetensors and config.json for transformers' NAT or DiNAT."""
    if network.isotropic or "dinat_s" in name:
        raise UserError(f"--to huggingface: transformers has NAT and DiNAT, no such model as {name}.")
    family = "nat" if name.startswith("nat") else "dinat"
    head = "ForImageClassification" if shape.num_classes else "Backbone"
    (window,) = {max(window) for window in shape.kernel_size}
    config = {
        "architectures": [family.capitalize() + head],
        "model_type": family,
        "num_channels": shape.in_chans,
        "patch_size": 4,
        "embed_dim": shape.embed_dim,
        "depths": list(shape.depths),
        "num_heads": list(shape.num_heads),
        "kernel_size": window,
        "mlp_ratio": shape.mlp_ratio,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "layer_scale_init_value": 1e-5 if shape.layer_scale else 0.0,
        "id2label": {str(i): f"LABEL_{i}" for i in range(shape.num_classes)},
        "label2id": {f"LABEL_{i}": i for i in range(shape.num_classes)},
    }
    if family == "dinat":
        config["dilations"] = network.dilations
    if not shape.num_classes:
        config["out_features"] = [f"stage{i + 1}" for i in range(len(shape.depths))]
    state = network.state_dict()
    if not shape.num_classes:  # backbones have no final norm there
        state = {key: value for key, value in state.items() if not key.startswith("norm.")}
    state = checkpoints.to_huggingface(state, f"{family}." if shape.num_classes else "")
    write_files(state, json.dumps(config, indent=2) + "\n", folder)


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with model.safetensors and config.json.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="organization/name on the Hugging Face hub.")],
    really: Annotated[bool, typer.Option("--yes", help="Do it; without this, only say what would be done.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    licence: Annotated[str | None, typer.Option("--license", help="The hub's word for it, such as mit.")] = None,
) -> None:
    """Publish a model folder on the Hugging Face hub, with a model card."""
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"DIR {folder}: holds no {' and no '.join(missing)}.")
    checkpoints.read_checkpoint(folder / "model.safetensors")
    card = ModelCard.load(folder / CARD) if (folder / CARD).is_file() else card_of(folder)
    if licence:
        card.data.license = licence
    files = [*MODEL_FILES, CARD]
    sizes = [*((folder / name).stat().st_size for name in MODEL_FILES), len(str(card).encode())]
    for name, size in zip(files, sizes, strict=True):
        console.print(f"{'upload' if really else 'would upload'} {name}, {size / 1e6:.1f} MB")
    if not card.data.license:
        console.print(f"{CARD} states no licence; --license ID does.")
    if not really:
        console.print(f"to {repo} ({'private' if private else 'public'} if it is new). Add --yes to do it.")
        return
    if licence or not (folder / CARD).is_file():
        write_text(folder / CARD, str(card))
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files)
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, of a bad name ValueErrors
        raise UserError(f"REPO {repo}: {' '.join(str(error).split())}") from error
    console.print(commit.commit_url, soft_wrap=True)
