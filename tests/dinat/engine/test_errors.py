"""Every mistake that a user can make has a message that names it, before anything heavy starts."""

import math
import shutil

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from dinat import cli
from dinat.engine import evaluate, train
from dinat.engine.checkpoint import read_checkpoint
from dinat.engine.training import Trainer
from dinat.errors import UserError


@pytest.fixture
def refused(tiny, tmp_path, monkeypatch):
    """Checks the message of a training run that must be refused before its first update."""

    def refused(message, *overrides):
        monkeypatch.setattr(Trainer, "update", lambda *_: pytest.fail("training started"))
        with pytest.raises(UserError, match=message):
            train(tiny(*overrides), tmp_path / "run")
        assert not (tmp_path / "run").exists()  # nor is an empty run folder left behind

    return refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=dinat_pica", r"model\.name=dinat_pica: no such model\. Did you mean dinat_pico"),
        ("model.pretrained=dinat_pico.nonsense", r"model\.pretrained=dinat_pico\.nonsense: Invalid pretrained tag"),
        ("+model.kwargs.windows=3", r"model\.name=dinat_pico with model\.kwargs=.*windows"),
        ("model.checkpoint=/nowhere/x.pth", r"model\.checkpoint=/nowhere/x\.pth: no such file or folder"),
        ("data.root=/nowhere", r"data\.root=/nowhere: no such folder"),
        ("data.root=null", r"data\.root is not set"),
        ("data.train_split=learn", r"data\.train_split=learn: .* holds train, validation\. Use data\.train_split=\."),
        ("data.name=floder", r"data\.name=floder: no such dataset reader\. Known: digits, folder"),
        ("data=coco", r"data\.name=coco: no such dataset reader\..* Those of dense prediction need task=detection"),
        ("data.name=hfds//nowhere/at/all", r"data\.name=hfds//nowhere/at/all.*cannot be opened"),
        ("data.num_classes=12", r"class counts differ: the data set 10, data\.num_classes 12"),
        ("model.num_classes=7", r"class counts differ: the data set 10, model\.num_classes 7"),
        ("data.on_bad_image=ignore", r"data\.on_bad_image=ignore: no such choice\. Known: skip, fail"),
        ("runtime.device=0", r"runtime\.device=0: must be a text"),
        ("runtime.device=cudda", r"runtime\.device=cudda: no such device.* Did you mean cuda"),
        ("runtime.dtype=float8", r"runtime\.dtype=float8: no such precision\. Known: float32, bfloat16, float16"),
        ("runtime.parallel=tensor", r"runtime\.parallel=tensor: no such choice\. Known: ddp, fsdp"),
        ("batch_size=1000", r"batch_size=1000 is larger than the training set"),
        ("runtime.grad_accum=5", r"batch_size=24: not a multiple of 1 processes x runtime\.grad_accum=5"),
        ("optimizer.opt=adamm", r"optimizer\.opt=adamm: no such optimizer\. Did you mean adam"),
        ("+optimizer.kwargs.nonsense=1", r"optimizer\.kwargs=.*nonsense"),
        ("scheduler.epochs=1.5", r"epochs=1\.5: must be a whole number from 1 on; scheduler\.updates gives other"),
        ("scheduler.sched=none", r"scheduler\.sched=none: no schedule"),
        ("+scheduler.nonsense=1", r"scheduler=.*nonsense"),
        ("+augment.transform.nonsense=1", r"augment\.transform=.*nonsense"),
        ("resume=/nowhere", r"resume=/nowhere: no checkpoint there"),
        ("model.name=upernet", r"model\.name=upernet: is for dense prediction: task=detection, semantic or"),
        ("augment=dense", r"augment\.transform=\[.*\]: a list of steps is for dense prediction, a mapping"),
    ],
    ids=lambda value: value if "=" in value and "\\" not in value else "",
)
def test_wrong_setting(refused, override, message):
    refused(message, override)


def test_unknown_task(tiny, tmp_path):
    cfg = tiny()
    cfg.task = "clasification"
    with pytest.raises(UserError, match=r"task=clasification: no such task.*classification"):
        train(cfg, tmp_path / "run")


def test_missing_accelerator(refused):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    refused(r"runtime\.device=cuda: not on this machine, which has cpu\. Use ", "runtime.device=cuda")


def test_odd_batch_for_mixup(refused):
    refused(r"batch_size=15: 15 images per forward pass; mixup needs", "augment=imagenet", "batch_size=15")


def test_empty_class_folder(refused, digits_folder, tmp_path):
    shutil.copytree(digits_folder, tmp_path / "data")
    (tmp_path / "data" / "train" / "ten").mkdir()
    refused(r"class folder .*/train/ten holds no images", f"data.root={tmp_path}/data")


def test_validation_class_that_training_lacks(refused, digits_folder, tmp_path):
    shutil.copytree(digits_folder, tmp_path / "data")
    shutil.copytree(tmp_path / "data" / "validation" / "3", tmp_path / "data" / "validation" / "drei")
    refused(r"class folder .*/validation/drei is not among the 10 training classes", f"data.root={tmp_path}/data")


def test_no_images_at_all(refused, tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    refused(r"data\.root=.*cannot be opened: Found 0 images", f"data.root={tmp_path}/data")


def test_webdataset_without_shards(refused):
    refused(r"data\.root=/nowhere: no such directory of webdataset shards", "data.name=wds/x", "data.root=/nowhere")


def test_checkpoint_with_other_classes(refused, trained, tmp_path):
    from PIL import Image

    for split in ("train", "validation"):
        for name in "ab":
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(12):
                Image.new("RGB", (8, 8)).save(folder / f"{index}.png")
    refused(
        r"model\.checkpoint=.* has 10 classes, the data has 2\. Set model\.reset_head=true",
        f"data.root={tmp_path}/data", f"model.checkpoint={trained[0]}",
    )  # fmt: skip


def test_checkpoint_of_another_architecture(refused, trained):
    refused(
        r"model\.checkpoint=.* is of another architecture than this ResNet: \d+ entries differ \(lacks ",
        "model.name=resnet10t", "model.kwargs=null", f"model.checkpoint={trained[0]}/last.pt",
    )  # fmt: skip


@pytest.mark.parametrize("key", ["resume", "model.checkpoint"])
def test_damaged_checkpoint(refused, trained, tmp_path, key):
    path = tmp_path / "cut.pt"
    path.write_bytes((trained[0] / "last.pt").read_bytes()[:5000])
    refused(rf"{key}=.*cut\.pt: not a readable checkpoint", f"{key}={path}")


def test_resume_from_mere_weights(refused, trained, tmp_path):
    torch.save(read_checkpoint(trained[0] / "last.pt")["state_dict"], tmp_path / "weights.pt")
    refused(r"resume=.*not a training checkpoint.*model\.checkpoint=", f"resume={tmp_path}/weights.pt")


def test_resume_with_another_model(refused, trained):
    refused(r"resume=.* is of dinat_pico, model\.name=test_vit", "model.name=test_vit", "model.kwargs=null",
            f"resume={trained[0]}", "ema.decay=0.5")  # fmt: skip


def test_resume_with_another_batch(refused, trained):
    refused(r"resume=.*: an epoch had 5 updates and now has 2\. Keep the data and batch_size", "batch_size=60",
            f"resume={trained[0]}", "ema.decay=0.5")  # fmt: skip


def test_a_run_is_not_overwritten(trained, tiny):
    with pytest.raises(UserError, match=r"dir=.*: holds a run already\. Continue it with resume=auto"):
        train(tiny("ema.decay=0.5"), trained[0])


def test_unreadable_image_under_the_fail_policy(tiny, digits_folder, tmp_path):
    shutil.copytree(digits_folder, tmp_path / "data")
    (tmp_path / "data" / "train" / "4" / "05.png").write_text("not an image")
    cfg = tiny(f"data.root={tmp_path}/data", "data.on_bad_image=fail", "runtime.workers=1")
    with pytest.raises(UserError, match=r"unreadable image .*train/4/05\.png: cannot identify.*on_bad_image=skip"):
        train(cfg, tmp_path / "run")


def test_unreadable_image_is_skipped_and_logged(tiny, digits_folder, tmp_path):
    shutil.copytree(digits_folder, tmp_path / "data")
    (tmp_path / "data" / "train" / "4" / "05.png").write_text("not an image")
    train(tiny(f"data.root={tmp_path}/data", "scheduler.epochs=1", "scheduler.warmup_epochs=0"), tmp_path / "run")
    assert "skipped unreadable image" in (log := (tmp_path / "run" / "train.log").read_text())
    assert "train/4/05.png" in log


def test_nan_loss_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    update = Trainer.update

    def update_with_poison(self, batches):
        if self.step == 7:
            next(self.model.parameters()).data.fill_(math.nan)
        update(self, batches)

    monkeypatch.setattr(Trainer, "update", update_with_poison)
    message = r"the loss became nan by update \d+; training stopped\. The last good checkpoint is .*last\.pt\."
    with pytest.raises(UserError, match=message):
        train(tiny("scheduler.epochs=3"), tmp_path)
    kept = read_checkpoint(tmp_path / "last.pt")
    assert kept["step"] == 5
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())


def test_weights_that_became_nan_are_not_saved(tiny, tmp_path, monkeypatch):
    """The loss of the update that spoils the weights is still finite; the save that follows must notice."""
    update = Trainer.update

    def update_then_poison(self, batches):
        update(self, batches)
        if self.step == 8:
            next(self.model.parameters()).data[0] = math.inf

    monkeypatch.setattr(Trainer, "update", update_then_poison)
    with pytest.raises(UserError, match=r"a weight became infinite or NaN by update 8"):
        train(tiny("checkpoint.every_steps=1"), tmp_path)
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 7


@pytest.mark.parametrize("section", ["data", "model"])
def test_label_beyond_the_head(tiny, digits_folder, tmp_path, section):
    pytest.importorskip("webdataset")
    import webdataset

    (tmp_path / "wds").mkdir()
    with webdataset.TarWriter(str(tmp_path / "wds" / "s-0.tar")) as writer:
        for index, path in enumerate(sorted(digits_folder.glob("train/*/*.png"))):
            label = path.parent.name.encode()
            writer.write({"__key__": f"{index:04d}", "png": path.read_bytes(), "cls": label})
    cfg = tiny(
        "data=webdataset", f"data.root={tmp_path}/wds", "data.num_classes=null",
        f"{section}.num_classes=4", "data.train_split='s-{0..0}.tar|120'",
        "data.val_split='s-{0..0}.tar|120'",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"the data has a label \d, the model 4 classes\. Set data\.num_classes"):
        train(cfg, tmp_path / "run")


# ---- evaluation ----


def test_evaluation_without_data(evaluation, trained, tmp_path):
    for name in ("model.safetensors", "config.json"):
        shutil.copy(trained[0] / name, tmp_path / name)
    with pytest.raises(UserError, match=r"data is not chosen, and the checkpoint does not tell"):
        evaluate(evaluation(f"checkpoint={tmp_path}"))


def test_evaluation_of_nothing(evaluation):
    with pytest.raises(UserError, match=r"model\.name is not set, and the checkpoint does not tell"):
        evaluate(evaluation("data=digits"))
    with pytest.raises(UserError, match=r"upernet_dinat_min\.ade20k: is for .* Did you mean upernet_dinat_mini\.a"):
        evaluate(evaluation("data=digits", "model.name=upernet_dinat_min.ade20k"))
    with pytest.raises(UserError, match=r"checkpoint=/nowhere: no such file or folder"):
        evaluate(evaluation("data=digits", "checkpoint=/nowhere"))


def test_evaluation_of_a_folder_of_another_library(evaluation, trained, tmp_path):
    shutil.copy(trained[0] / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinat"}')
    with pytest.raises(UserError, match=r"model\.name is not set, and the checkpoint does not tell"):
        evaluate(evaluation("data=digits", f"checkpoint={tmp_path}"))


def test_evaluation_on_other_classes(evaluation):
    with pytest.raises(UserError, match=r"class counts differ: the model has 1000, the data 10"):
        evaluate(evaluation("data=digits", "model.name=dinat_pico"))


# ---- the command line ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=dinat_tinny"], "experiment=dinat_tinny: no such choice. Did you mean dinat_tiny, "),
        (["data=xyz"], "data=xyz: no such choice. Known: ade20k, as_trained, "),
        (["data.root=/data/图像"], "Write 'data.root=\"/data/图像\"'"),
        (["checkpoint=runs/epoch=3.ckpt"], "Write 'checkpoint=\"runs/epoch=3.ckpt\"'"),
        (["+model.kwargs.x={a"], "+model.kwargs.x={a: the value has characters that need quotes. Write"),
        (["batch_size"], "missing EQUAL"),  # Hydra's own words, where quotes are not what lacks
        (["test.flip=true"], "test.flip: not a setting of this command; the other of train.py and eval.py has it."),
        (["optimizer.lr_scale={head: 2}"], "optimizer.lr_scale.head: new in optimizer.lr_scale. Write ++"),
        (["dir=/dev/null/run"], "/dev/null/run: Not a directory."),
    ],
)
def test_misspelt_command_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        cli.train()
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("value", ["/data/图像", "epoch=3.ckpt", 'a="b"', "a b\\", '\\"', "it's = that"])
def test_the_quotes_that_are_advised_give_the_value(value):
    override = OverridesParser.create().parse_override(cli.quoted(f"data.root={value}"))
    assert (override.key_or_group, override.value()) == ("data.root", value)


def test_one_message_and_status_2(python, command_line, tmp_path):
    done = python("train.py", *command_line, "model.name=dinat_pica", f"dir={tmp_path}/run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: model.name=dinat_pica: no such model. Did you mean")
    assert not (tmp_path / "run").exists()
