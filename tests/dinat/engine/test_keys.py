"""Every key of the training configuration has a test in which changing it changes a number that is checked."""

import ast
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dinat.cli import flatten

ROOT = Path(__file__).parents[3]
CONFIGS, TESTS = ROOT / "configs", ROOT / "tests" / "dinat"
GROUPS = ("model", "data", "optimizer", "scheduler", "augment", "runtime", "logger")
SECTIONS = {"augment.erasing", "augment.mixup", "augment.transform", "checkpoint", "ema", *GROUPS}
TABLE = {
    "engine/test_cli.py::test_overrides_and_the_run_folder_reach_the_engine": "dir",
    "engine/test_cli.py::test_run_folders_are_by_name_and_time": "name",
    "engine/test_checkpoint.py::test_start_from_a_checkpoint": "model.checkpoint model.reset_head",
    "engine/test_distributed.py::test_device": "runtime.device",
    "engine/test_distributed.py::test_parameters_are_sharded_under_fsdp": "runtime.parallel",
    "engine/test_benchmarks.py::test_only_the_200_classes_compete": "data.benchmark",
    "engine/test_errors.py::test_label_beyond_the_head": "data.num_classes model.num_classes",
    "engine/test_found_data.py::test_orientation_is_a_choice_everywhere": "data.exif_transpose",
    "engine/test_errors.py::test_unreadable_image_under_the_fail_policy": "data.on_bad_image",
    "engine/test_optim.py::test_layer_decay": "optimizer.layer_decay",
    "engine/test_errors.py::test_unknown_task": "task",
    "engine/test_tasks.py::test_backbone_data_and_size_are_those_of_the_configuration": (
        "model.backbone data.kwargs data.eval_transform"
    ),
    "engine/test_optim.py::test_factors_of_named_parts": "optimizer.lr_scale",
    "engine/test_optim.py::test_length_in_updates": "scheduler.updates scheduler.warmup_updates",
    "engine/test_optim.py::test_milestones_in_epochs_and_in_updates": "scheduler.decay_milestones",
    "engine/test_optim.py::test_named_parts_are_spared_in_place_of_all_rules": "optimizer.no_decay",
    "engine/test_optim.py::test_optimizer_by_name": "optimizer.opt",
    "engine/test_optim.py::test_schedules": "scheduler.decay_rate scheduler.epochs scheduler.sched",
    "engine/test_optim.py::test_weight_decay_groups": "optimizer.decay_listed optimizer.weight_decay",
    "engine/test_report.py::test_wandb_is_told_which_run_it_is": "logger.mode logger.name logger.project",
    "engine/test_script.py::test_evaluated_every_second_epoch_and_at_the_end": "eval_every",
    "engine/test_script.py::test_parts_of_an_update_draw_different_numbers": "model.drop_path_rate",
    "engine/test_script.py::test_saved_every_second_update": "checkpoint.every_steps",
    "engine/test_script.py::test_stopped_in_the_middle_of_the_third_epoch":
        "checkpoint.every_epochs checkpoint.export resume",
    "engine/test_tasks.py::test_batch_norm_of_all_processes": "runtime.sync_batchnorm",
    "engine/test_train.py::test_compiled_model_keeps_its_names": "runtime.compile",
    "engine/test_train.py::test_trackers": "runtime.log_every",
    "engine/test_train.py::test_weights_of_another_model": "model.pretrained",
    "engine/test_update.py::test_arguments_of_the_optimizer":
        "optimizer.kwargs optimizer.kwargs.betas optimizer.kwargs.eps",
    "engine/test_update.py::test_average_of_the_weights": "ema.decay ema.warmup",
    "engine/test_update.py::test_batch_sizes": "batch_size eval_batch_size",
    "engine/test_update.py::test_clip_modes": "optimizer.clip_mode",
    "engine/test_update.py::test_clipped_step_is_as_long_as_the_bound": "optimizer.clip_grad",
    "engine/test_update.py::test_layout_and_recomputation": "runtime.channels_last runtime.grad_checkpointing",
    "engine/test_update.py::test_learning_rate_of_each_update":
        "scheduler.cooldown_epochs scheduler.min_lr scheduler.warmup_epochs scheduler.warmup_lr",
    "engine/test_update.py::test_loader_processes": "runtime.workers",
    "engine/test_update.py::test_loss_and_step": "augment.smoothing optimizer.lr runtime.dtype runtime.grad_accum",
    "engine/test_update.py::test_model_by_name_and_arguments": "model.kwargs model.name",
    "engine/test_update.py::test_seed": "seed",
    "data/test_scenes.py::test_number_and_size_of_digits": "data.kwargs.digits data.kwargs.digit_size",
    "data/test_scenes.py::test_later_digits_cover_earlier_ones_but_not_too_much": "data.kwargs.visible",
    "data/test_inputs.py::test_colours": "augment.transform.auto_augment augment.transform.color_jitter",
    "data/test_inputs.py::test_cutmix": "augment.mixup.cutmix_alpha",
    "data/test_inputs.py::test_erasing": "augment.erasing.mode",
    "data/test_inputs.py::test_erasing_probability_and_count": "augment.erasing.count augment.erasing.prob",
    "data/test_inputs.py::test_interpolation_of_the_crop": "augment.transform.interpolation",
    "data/test_inputs.py::test_mirrored": "augment.transform.hflip",
    "data/test_inputs.py::test_mixup": "augment.mixup.mixup_alpha",
    "data/test_inputs.py::test_mixup_or_cutmix_by_probability": "augment.mixup.prob augment.mixup.switch_prob",
    "data/test_inputs.py::test_mixup_share_by_batch_or_image": "augment.mixup.mode",
    "data/test_inputs.py::test_no_augmentation_is_the_whole_image": "augment.transform.no_aug",
    "data/test_inputs.py::test_preprocessing_is_the_models_unless_set": "data.img_size data.mean data.std",
    "data/test_inputs.py::test_resized_by_its_shorter_side_and_cropped": "data.crop_pct data.interpolation",
    "data/test_inputs.py::test_scale_and_ratio_of_the_crop": "augment.transform.ratio augment.transform.scale",
    "data/test_inputs.py::test_squashed": "data.crop_mode",
    "data/test_sources.py::test_class_map_of_the_user_wins": "data.class_map",
    "data/test_volumes.py::test_augmentation":
        "augment.transform.flip augment.transform.intensity augment.transform.shift",
    "engine/test_medmnist.py::test_the_test_split_is_evaluated_once": "data.test_split",
    "engine/test_several_labels.py::test_every_reader_with_several_labels": "data.labels",
    "data/test_sources.py::test_each_split_by_its_own_key": "data.root data.train_split data.val_split",
    "data/test_sources.py::test_what_timm_is_told":
        "data.download data.input_key data.name data.target_key data.train_samples data.val_samples",
}  # fmt: skip


def test_every_key_has_one(compose):
    """Of the defaults, and of every option of every group; what a model's `kwargs` are is its own affair."""
    keys = set(flatten(OmegaConf.to_container(compose(), resolve=False)))
    for path in (path for group in GROUPS for path in (CONFIGS / group).glob("*.yaml")):
        option = OmegaConf.to_container(OmegaConf.load(path))
        option.pop("defaults", None)
        keys |= set(flatten({path.parent.name: option}))
    covered = {key for keys in TABLE.values() for key in keys.split()}
    assert {key for key in keys - SECTIONS if not key.startswith("model.kwargs.")} == covered


@pytest.mark.parametrize("node", TABLE)
def test_that_one_exists_and_sets_the_key(node):
    """Its text, decorators and the constants that it uses included, has each of the keys, at least their last part."""
    path, _, name = node.partition("::")
    text = (TESTS / path).read_text()
    tree = ast.parse(text)
    (function,) = (one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == name)
    used = {one.id for one in ast.walk(function) if isinstance(one, ast.Name)}
    constants = [one for one in tree.body if isinstance(one, ast.Assign) and one.targets[0].id in used]
    pieces = [ast.get_source_segment(text, one) for one in (*function.decorator_list, function, *constants)]
    for key in TABLE[node].split():
        assert re.search(rf"\b{key.rpartition('.')[2]}\b", "\n".join(pieces)), key
