"""Trains a model: `python train.py [group=option ...] [key=value ...]`; configs/train.yaml says what there is.

Without arguments it trains a small DiNAT on handwritten digits. On 8 GPUs: `torchrun --nproc-per-node=8 train.py`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before PyTorch is loaded; why: dinat/cli.py

import hydra
from omegaconf import DictConfig

from dinat import cli


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float:
    """Returns top-1 (%) on the validation split, which a Hydra sweeper maximises."""
    return cli.train_job(cfg)


if __name__ == "__main__":
    cli.run(main)
