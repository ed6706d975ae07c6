"""What is done to volumes before a model sees them."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dinat.data.volumes import resize, train_transform
from dinat.errors import UserError

SIZE = (1, 6, 7, 8)
VOLUME = np.random.default_rng(0).integers(1, 200, SIZE[1:]).astype(np.uint8)
STILL = {"flip": [], "shift": 0, "intensity": 0.0}


def drawn(options: dict, times: int = 24) -> set[bytes]:
    transform = train_transform(SIZE, {**STILL, **options})
    return {transform(VOLUME).numpy().tobytes() for _ in range(times)}


def test_augmentation():
    """Each option does its own and nothing else."""
    as_it_is = VOLUME.tobytes()
    assert drawn({}) == drawn({"no_aug": True}) == {as_it_is}
    assert drawn({"flip": ["width"]}) == {as_it_is, VOLUME[..., ::-1].tobytes()}
    assert drawn({"flip": ["depth"]}) == {as_it_is, VOLUME[::-1].tobytes()}
    brightened = train_transform(SIZE, {**STILL, "intensity": 0.2})
    factors = [brightened(VOLUME).double().sum().item() / VOLUME.sum() for _ in range(20)]
    assert 0.79 < min(factors) < 0.9
    assert 1.1 < max(factors) < 1.21
    moved = {}
    for d in (-1, 0, 1):
        for h in (-1, 0, 1):
            for w in (-1, 0, 1):
                padded = np.pad(VOLUME, 1)
                moved[padded[1 - d : 7 - d, 1 - h : 8 - h, 1 - w : 9 - w].tobytes()] = (d, h, w)
    found = drawn({"shift": 1}, times=300)
    assert found == set(moved)


def test_draws_follow_the_seed():
    transform = train_transform(SIZE, {"flip": ["height"], "shift": 2, "intensity": 0.3})
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(transform(VOLUME))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_resized():
    """Each voxel is the mean of those that it covers; a ramp stays a ramp."""
    large = np.random.default_rng(1).integers(0, 256, (24, 28, 32)).astype(np.uint8)
    means = large.reshape(6, 4, 7, 4, 8, 4).mean((1, 3, 5))
    torch.testing.assert_close(resize(large, SIZE)[0].double(), torch.from_numpy(means), atol=0.51, rtol=0)
    ramp = np.arange(0, 40, 2, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    assert resize(ramp, (1, 10, 4, 4))[0, :, 0, 0].tolist() == list(range(1, 40, 4))
    assert resize(ramp, (1, 20, 9, 2))[0, :, 5, 1].tolist() == ramp[:, 0, 0].tolist()


@pytest.mark.parametrize("options", [{"hflip": 0.5}, {"flip": ["left"]}])
def test_other_options_are_refused(options):
    with pytest.raises(
        UserError, match=r"augment\.transform=.* for volumes there are flip \(a list of depth, height, "
    ):
        train_transform(SIZE, OmegaConf.to_container(OmegaConf.create(options)))
