"""What test_distributed.py runs on two processes; started by torchrun, results as JSON in the folder given.

Usage: distributed_job.py CONFIGS OUTPUT, with CONFIGS a JSON file of {job: {"kind": "train" | "eval", "cfg": ...}}.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from omegaconf import OmegaConf

from dinat import distributed
from dinat.engine import evaluate, train, training

jobs, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
rank = int(os.environ["RANK"])
trainers = []
dist.init_process_group("gloo")  # once: the jobs share it


class Observed(training.Trainer):
    """Keeps itself, so that the weights of every process can be looked at."""

    def __init__(self, *args):
        super().__init__(*args)
        trainers.append(self)

    def export(self):
        state = self.model.state_dict()
        self.final = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in state.values()]
        return super().export()


training.Trainer = Observed
distributed.SHARDED_NUMEL = 100  # blocks of the tiny model are to be sharded like those of a large one
for name, job in jobs.items():
    cfg = OmegaConf.create(job["cfg"])
    if job["kind"] == "eval":
        result = evaluate(cfg)
    else:
        # every process proposes a folder of its own; that of rank 0 must win
        top1 = train(cfg, output / (name if rank == 0 else f"{name}-of-rank-{rank}"))
        final = trainers[-1].final
        result = {"top1": top1, "norm": sum(tensor.double().sum().item() for tensor in final)}
    (output / f"{name}.{rank}.json").write_text(json.dumps(result))
dist.destroy_process_group()
