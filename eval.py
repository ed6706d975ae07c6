"""Evaluates a model: `python eval.py checkpoint=RUN [key=value ...]`; configs/eval.yaml says what there is.

Logs go to stderr; the last line on stdout is the result as JSON.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before PyTorch is loaded; why: dinat/cli.py

import hydra
from omegaconf import DictConfig

from dinat import cli


@hydra.main(version_base="1.3", config_path="configs", config_name="eval")
def main(cfg: DictConfig) -> float:
    """Returns top-1 (%) on the validation split."""
    return cli.eval_job(cfg)


if __name__ == "__main__":
    cli.run(main)
