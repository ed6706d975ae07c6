"""Mask2Former and OneFormer: the models of transformers on any timm backbone, with post-processing as originally.

Papers: Masked-attention Mask Transformer for Universal Image Segmentation - https://arxiv.org/abs/2112.01527,
OneFormer: One Transformer to Rule Universal Image Segmentation - https://arxiv.org/abs/2211.06220.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import scipy  # noqa: F401  the matching of queries and objects needs it, and says so late
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
)
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss
from transformers.models.oneformer.modeling_oneformer import OneFormerLoss

from dinat.errors import UserError

from . import postprocess
from .backbone import TimmConfig, load_pretrained
from .features import Features
from .model import DenseModel, Target, pad_to
from .texts import CONTEXT, TASK_TOKENS, TOKENIZERS, Tokenizer, find_tokenizer

IGNORED = 255
TASKS = {"panoptic": "panoptic", "semantic": "semantic", "instance": "instance", "detection": "instance"}


class Universal(DenseModel):
    """Queries that each give a class and a mask.

    `network` is the model of transformers, with its `save_pretrained`.

    Args:
        num_classes: of segments.
        backbone: name of a timm model; `backbone_kwargs` are its arguments, see `dinat.dense.features.Features`.
        pretrained_backbone: start from the backbone's pretrained weights.
        task: "panoptic", "semantic" or "detection" (of instances): what it is trained for and predicts by default.
        things: per class, whether it has instances; all have by default.
        queries: number of them.
        width: channels of pixel decoder and decoder, a multiple of 32; `encoder_layers`, `decoder_layers` and the
            widths of their MLPs, `encoder_mlp` and `decoder_mlp`; `heads` of both. The loss of the queries before the
            first layer counts as one of `decoder_layers`.
        points: at which the loss compares masks.
        object_threshold, overlap_threshold: see `postprocess.panoptic`.
        instances: per image, at most.
        combine_first: semantic maps are combined from the queries at the network's resolution and then resized; if
            not, masks are resized first. By default as originally: first for models of the task "semantic".
    """

    tasks = ("panoptic", "semantic", "detection")

    def __init__(
        self,
        num_classes: int,
        task: str | None,
        things: Sequence[bool] | None,
        network: nn.Module,
        pretrained_backbone: bool,
        size_divisor: int,
        object_threshold: float,
        overlap_threshold: float,
        instances: int,
        combine_first: bool | None,
    ) -> None:
        encoder = network.model.pixel_level_module.encoder
        super().__init__(num_classes, task, encoder.features.pretrained_cfg, size_divisor)
        self.things = [True] * num_classes if things is None else [bool(thing) for thing in things]
        if len(self.things) != num_classes:
            raise UserError(f"things has {len(self.things)} entries: must be one per class, {num_classes}.")
        self.network = network
        self.object_threshold, self.overlap_threshold, self.instances = object_threshold, overlap_threshold, instances
        self.combine_first = self.task == "semantic" if combine_first is None else combine_first
        if pretrained_backbone:
            load_pretrained(encoder)

    @property
    def backbone(self) -> nn.Module:
        return self.network.model.pixel_level_module.encoder

    def run(self, batch: Tensor, tasks: Sequence[str], **kwargs: Any) -> Any:
        """transformers' output for a padded batch, of which each image is to serve one of "panoptic", ..."""
        raise NotImplementedError

    def outputs(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of classes (batch, queries, num_classes + 1) and of masks (batch, queries, height / 4, width / 4)."""
        found = self.run(batch, [TASKS[self.task]] * len(batch))
        return found.class_queries_logits, found.masks_queries_logits

    def predictions(
        self, batch: Tensor, frames: Sequence[tuple], sizes: Sequence[tuple], task: str | None = None
    ) -> list[dict]:
        task = self.task if task is None else task
        if task not in TASKS:
            raise UserError(f"task={task}: {self.method} predicts {', '.join(TASKS)}.")
        predict = {"panoptic": self._panoptic, "semantic": self._semantic, "instance": self._instances}[TASKS[task]]
        return [predict(*found) for found in self._found(TASKS[task], batch, frames, sizes)]

    def scores(self, batch: Tensor, frames: Sequence[tuple], sizes: Sequence[tuple]) -> list[Tensor]:
        """Of all queries, class probability times mask, summed."""
        return [self._scores(*found) for found in self._found("semantic", batch, frames, sizes)]

    def maps(self, batch: Tensor) -> Tensor:
        found = self.run(batch, ["semantic"] * len(batch))
        masks = postprocess.resize(found.masks_queries_logits.float(), tuple(batch.shape[-2:]))
        return torch.stack([postprocess.semantic(*one) for one in zip(found.class_queries_logits, masks, strict=True)])

    def _found(self, task: str, batch: Tensor, frames: Sequence[tuple], sizes: Sequence[tuple]) -> Iterator[tuple]:
        """Logits of classes and masks, padded size, frame and size of the result of each image."""
        found = self.run(batch, [task] * len(batch))
        padded = [tuple(batch.shape[-2:])] * len(batch)
        return zip(found.class_queries_logits, found.masks_queries_logits, padded, frames, sizes, strict=True)

    def _semantic(self, *found: Any) -> dict:
        return {"semantic": self._scores(*found).argmax(0)}

    def _scores(self, logits: Tensor, masks: Tensor, padded: tuple, frame: tuple, size: tuple) -> Tensor:
        masks = postprocess.fit_masks(masks, padded, frame, None if self.combine_first else size)
        scores = postprocess.semantic(logits, masks)
        return postprocess.resize(scores[None], size)[0]

    def _panoptic(self, logits: Tensor, masks: Tensor, padded: tuple, frame: tuple, size: tuple) -> dict:
        masks = postprocess.fit_masks(masks, padded, frame, size)
        found = postprocess.panoptic(logits, masks, self.things, self.object_threshold, self.overlap_threshold)
        return dict(zip(("panoptic", "segments"), found, strict=True))

    def _instances(self, logits: Tensor, masks: Tensor, padded: tuple, frame: tuple, size: tuple) -> dict:
        masks = postprocess.fit_masks(masks, padded, frame, size)
        return postprocess.instances(logits, masks, self.things, self.instances)

    def segments(self, target: Target, task: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What the queries are to find: masks float (n, *size) and labels (n,), for one of "panoptic", ..."""
        if task == "semantic" and "semantic" in target:
            plain = target["semantic"].as_subclass(Tensor)
            labels = plain.unique()
            labels = labels[labels != IGNORED].long()
            masks = plain == labels[:, None, None]
        elif "panoptic" in target:
            masks = target["panoptic"].as_subclass(Tensor) == target["segment_ids"][:, None, None]
            labels = target["labels"]
        elif "masks" not in target:
            raise UserError(f"the data has no masks, which {self.method} is trained with for the task {task}.")
        else:
            masks, labels = target["masks"].as_subclass(Tensor), target["labels"]
        if task == "semantic" and "semantic" not in target:
            classes = labels.unique()
            masks = torch.stack([masks[labels == c].any(0) for c in classes]) if len(classes) else masks
            labels = classes
        if task == "instance":
            of_things = torch.tensor(self.things, device=labels.device)[labels]
            masks, labels = masks[of_things], labels[of_things]
        return pad_to(masks.float(), *size), labels


def distributed() -> bool:
    """Whether this is one of several processes that train a model together."""
    return dist.is_available() and dist.is_initialized()


class SharedCount:
    """The mean number of masks per process, by which the original divides; mixed into transformers' criteria."""

    def get_num_masks(self, class_labels: Sequence[Tensor], device: torch.device) -> Tensor:
        count = torch.tensor(float(sum(map(len, class_labels))), device=device)
        if distributed():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        return count.clamp(min=1)


class Mask2FormerCriterion(SharedCount, Mask2FormerLoss):
    pass


class OneFormerCriterion(SharedCount, OneFormerLoss):
    def loss_contrastive(self, contrastive_queries_logits: Tensor, text_queries: Tensor) -> dict[str, Tensor]:
        """An image's queries are to be nearest to its own texts among those of all processes, and the reverse.

        As in the original; transformers compares within a process only. Both are (images, queries, width).
        """
        queries, texts = (F.normalize(x.flatten(1), dim=-1) for x in (contrastive_queries_logits, text_queries))
        scale = self.logit_scale.exp().clamp(max=100)
        own = torch.arange(len(queries), device=queries.device)
        if distributed():
            own += dist.get_rank() * len(queries)
        of_images = F.cross_entropy(scale * queries @ gather(texts).T, own)
        return {"loss_contrastive": of_images + F.cross_entropy(scale * texts @ gather(queries).T, own)}


class Gather(torch.autograd.Function):
    """Rows of all processes, as many of each, by rank; the gradient is that of the sum of the processes' losses."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(rows: Tensor) -> Tensor:
    """(rows, width) of this process, to those of all (processes * rows, width), by rank."""
    return Gather.apply(rows) if distributed() else rows


def in_float(layers: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: logits.float() for name, logits in layer.items()} for layer in layers]


def summed(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """One entry for each kind of loss, the sum over the decoder's layers."""
    kinds = {"cross_entropy": "class", "mask": "mask", "dice": "dice", "contrastive": "contrastive"}
    parts = {name: [x for key, x in losses.items() if key.startswith(f"loss_{kind}")] for kind, name in kinds.items()}
    return {f"loss_{name}": sum(part).sum() for name, part in parts.items() if part}


class AnyBackbone(Mask2FormerConfig):
    """transformers warns of any backbone but Swin."""

    backbones_supported = (TimmConfig.model_type,)


class Mask2Former(Universal):
    """Mask2Former; arguments as of `Universal`."""

    method = "mask2former"

    def __init__(
        self,
        num_classes: int = 133,
        backbone: str = "dinat_mini",
        backbone_kwargs: dict[str, Any] | None = None,
        pretrained_backbone: bool = False,
        task: str | None = None,
        size_divisor: int = 32,
        things: Sequence[bool] | None = None,
        queries: int = 100,
        width: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        encoder_mlp: int = 1024,
        decoder_layers: int = 10,
        decoder_mlp: int = 2048,
        dropout: float = 0.0,
        points: int = 12544,
        object_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        instances: int = 100,
        combine_first: bool | None = None,
    ) -> None:
        strides = check_sizes(backbone, backbone_kwargs, width, heads)
        config = AnyBackbone(
            backbone_config=TimmConfig(backbone, backbone_kwargs),
            num_labels=num_classes,
            num_queries=queries,
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            num_attention_heads=heads,
            encoder_layers=encoder_layers,
            encoder_feedforward_dim=encoder_mlp,
            decoder_layers=decoder_layers,
            dim_feedforward=decoder_mlp,
            dropout=dropout,
            train_num_points=points,
            feature_strides=strides,
            common_stride=strides[0],
        )
        network = Mask2FormerForUniversalSegmentation(config)
        network.criterion = Mask2FormerCriterion(config, network.weight_dict)
        super().__init__(
            num_classes, task, things, network, pretrained_backbone, size_divisor,
            object_threshold, overlap_threshold, instances, combine_first,
        )  # fmt: skip

    def run(self, batch: Tensor, tasks: Sequence[str], **kwargs: Any) -> Any:
        return self.network(batch, **kwargs)

    def losses(self, batch: Tensor, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        task = TASKS[self.task]
        masks, labels = zip(*(self.segments(target, task, batch.shape[-2:]) for target in targets), strict=True)
        found = self.run(batch, [], output_auxiliary_logits=True)
        with torch.autocast(batch.device.type, enabled=False):
            losses = self.network.get_loss_dict(
                found.masks_queries_logits.float(),
                found.class_queries_logits.float(),
                list(masks),
                list(labels),
                in_float(found.auxiliary_logits),
            )
        return summed(losses)


class OneFormer(Universal):
    """OneFormer: one model for all tasks, told which by a sentence.

    A model of the task "panoptic" is trained for one drawn per image. With a `tokenizer`, as originally, it has a text
    encoder too, and learns to tell the texts about an image from those about others; predictions read no texts.

    Args (besides those of `Universal`):
        query_layers: of the transformer that makes the first queries.
        tokenizer: "clip" for CLIP's, from the package open_clip_torch, which is imported when training begins; or a
            function of texts, to int64 (texts, 77) with zeros at the end. None to train without the contrast.
        class_names: for the texts; their encoder has `text_layers`, and `text_context` learned texts of its own.
        task_shares: how often a model of the task "panoptic" is trained for "semantic", "instance" and "panoptic".
    """

    method = "oneformer"

    def __init__(
        self,
        num_classes: int = 133,
        backbone: str = "dinat_mini",
        backbone_kwargs: dict[str, Any] | None = None,
        pretrained_backbone: bool = False,
        task: str | None = None,
        size_divisor: int = 32,
        things: Sequence[bool] | None = None,
        queries: int = 150,
        width: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        encoder_mlp: int = 1024,
        decoder_layers: int = 10,
        decoder_mlp: int = 2048,
        query_layers: int = 2,
        dropout: float = 0.1,
        points: int = 12544,
        object_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        instances: int = 100,
        combine_first: bool | None = None,
        tokenizer: str | Tokenizer | None = None,
        class_names: Sequence[str] | None = None,
        text_layers: int = 6,
        text_context: int = 16,
        task_shares: Sequence[float] = (0.33, 0.33, 0.34),
    ) -> None:
        strides = check_sizes(backbone, backbone_kwargs, width, heads)
        if len(task_shares) != 3 or min(task_shares) < 0 or abs(sum(task_shares) - 1) > 1e-6:
            raise UserError(f"task_shares={list(task_shares)}: give three numbers from 0, with the sum 1.")
        if tokenizer is not None:
            check_texts(tokenizer, class_names, num_classes, width, queries, text_context)
        config = OneFormerConfig(
            backbone_config=TimmConfig(backbone, backbone_kwargs),
            num_labels=num_classes,
            num_queries=queries,
            conv_dim=width,
            mask_dim=width,
            hidden_dim=width,
            num_attention_heads=heads,
            encoder_layers=encoder_layers,
            encoder_feedforward_dim=encoder_mlp,
            decoder_layers=decoder_layers,
            dim_feedforward=decoder_mlp,
            query_dec_layers=query_layers,
            dropout=dropout,
            train_num_points=points,
            strides=strides,
            common_stride=strides[0],
            task_seq_len=CONTEXT,
            is_training=tokenizer is not None,
            text_encoder_width=width,
            text_encoder_num_layers=text_layers,
            text_encoder_n_ctx=text_context,
        )
        network = OneFormerForUniversalSegmentation(config)
        network.criterion = OneFormerCriterion(
            num_classes,
            network.matcher,
            network.weight_dict,
            config.no_object_weight,
            config.train_num_points,
            config.oversample_ratio,
            config.importance_sample_ratio,
            None if tokenizer is None else config.contrastive_temperature,
        )
        super().__init__(
            num_classes, task, things, network, pretrained_backbone, size_divisor,
            object_threshold, overlap_threshold, instances, combine_first,
        )  # fmt: skip
        self.tokenizer, self.class_names, self.task_shares = tokenizer, class_names, tuple(task_shares)
        if tokenizer is not None:
            for layer in network.model.text_mapper.text_encoder.transformer.layers:
                layer.self_attn.register_forward_pre_hook(_look_back, with_kwargs=True)

    def train(self, mode: bool = True) -> OneFormer:
        """Texts and the pixel decoder's dropout are for training, which transformers leaves to the configuration."""
        super().train(mode)
        self.network.model.is_training = mode and self.tokenizer is not None
        for layer in self.network.model.pixel_level_module.decoder.encoder.layers:
            layer.is_training = mode
        return self

    def run(self, batch: Tensor, tasks: Sequence[str], **kwargs: Any) -> Any:
        tokens = torch.zeros(len(batch), CONTEXT, device=batch.device)
        for row, task in zip(tokens, tasks, strict=True):
            row[: len(TASK_TOKENS[task])] = torch.tensor(TASK_TOKENS[task], dtype=row.dtype, device=row.device)
        return self.network(batch, tokens, **kwargs)

    def losses(self, batch: Tensor, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        tasks = [TASKS[self.task]] * len(targets)
        if self.task == "panoptic":
            limits = torch.tensor(self.task_shares).cumsum(0)[:-1]
            drawn = torch.bucketize(torch.rand(len(targets)), limits, right=True).tolist()
            tasks = [("semantic", "instance", "panoptic")[i] for i in drawn]
        truth = [self.segments(t, task, batch.shape[-2:]) for t, task in zip(targets, tasks, strict=True)]
        masks, labels = zip(*truth, strict=True)
        inputs = {}
        if self.tokenizer is not None:
            texts = [self.texts(x.tolist(), task) for x, task in zip(labels, tasks, strict=True)]
            different = sorted(set(chain(*texts)))  # a few, which are read once
            tokenize = find_tokenizer(self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer
            inputs["text_inputs"] = tokenize(different).to(batch.device)
        found = self.run(batch, tasks, output_auxiliary_logits=True, **inputs)
        text_queries = None
        if self.tokenizer is not None:
            places = {text: place for place, text in enumerate(different)}
            index = torch.tensor([[places[text] for text in one] for one in texts], device=batch.device)
            text_queries = self.with_context(found.text_queries[index]).float()
        with torch.autocast(batch.device.type, enabled=False):
            losses = self.network.get_loss_dict(
                found.masks_queries_logits.float(),
                found.class_queries_logits.float(),
                found.transformer_decoder_contrastive_queries.float(),
                list(masks),
                list(labels),
                text_queries,
                in_float(found.auxiliary_predictions),
                calculate_contrastive_loss=self.tokenizer is not None,
            )
        return summed(losses)

    def with_context(self, text_queries: Tensor) -> Tensor:
        """(batch, texts, width) and the learned texts, which belong to every image."""
        context = self.network.model.text_mapper.prompt_ctx
        if context is None:
            return text_queries
        return torch.cat([text_queries, context.weight.expand(len(text_queries), -1, -1)], dim=1)

    def texts(self, labels: Sequence[int], task: str) -> list[str]:
        """A sentence for each segment, in the order of the classes, and sentences about the task up to the queries."""
        count = self.network.config.num_queries - self.network.config.text_encoder_n_ctx
        texts = [f"a photo with a {self.class_names[label]}" for label in sorted(labels)][:count]
        article = "an" if task == "instance" else "a"
        return texts + [f"{article} {task} photo"] * (count - len(texts))


def _look_back(attention: nn.MultiheadAttention, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The causal mask of the text encoder, which transformers makes but does not pass."""
    length = args[0].shape[0]
    mask = torch.full((length, length), float("-inf"), device=args[0].device, dtype=args[0].dtype).triu(1)
    return args, kwargs | {"attn_mask": mask}


def check_texts(
    tokenizer: str | Tokenizer, class_names: Sequence[str] | None, num_classes: int, width: int, queries: int,
    text_context: int,
) -> None:  # fmt: skip
    """Raises UserError for what OneFormer cannot make texts of, or not read them with."""
    if isinstance(tokenizer, str) and tokenizer not in TOKENIZERS:
        raise UserError(f"tokenizer={tokenizer}: no such tokenizer. Known: {', '.join(TOKENIZERS)}.")
    if class_names is None or len(class_names) != num_classes:
        raise UserError(f"class_names={class_names}: a tokenizer needs the names of the {num_classes} classes.")
    if queries <= text_context:
        raise UserError(f"queries={queries}: with a tokenizer, must be more than text_context={text_context}.")
    if width % 64:
        raise UserError(f"width={width}: with a tokenizer, must be a multiple of 64.")


def check_sizes(backbone: str, backbone_kwargs: dict[str, Any] | None, width: int, heads: int) -> list[int]:
    """The strides of the backbone's maps. Raises UserError for what the pixel decoder cannot take."""
    with torch.device("meta"):
        strides = Features(backbone, **(backbone_kwargs or {})).strides
    if len(strides) < 3 or any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
        raise UserError(
            f"backbone={backbone}: must have at least three feature maps, each half as large as the one before; "
            f"strides: {strides}."
        )
    if width % 32 or width % heads:
        raise UserError(f"width={width}: must be a multiple of 32 and of heads={heads}.")
    return strides
