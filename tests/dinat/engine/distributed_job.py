"""What test_distributed.py runs on two processes; started by torchrun, results as JSON in the folder given.

Usage: distributed_job.py CONFIGS OUTPUT, with CONFIGS a JSON file of {job: {"kind": ..., "cfg": ...}}. Kinds: eval;
train; stop, training in which process 1 alone is told to stop after two updates; facts, training that also tells the
facts that random draws were derived from; contrast, OneFormer's loss of every second row of `queries` and `texts`.
"""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.optim.optimizer import register_optimizer_step_post_hook

from dinat import distributed
from dinat.data import scenes
from dinat.engine import Interrupted, evaluate, train, training

jobs, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
rank = int(os.environ["RANK"])
trainers = []
dist.init_process_group("gloo", timeout=timedelta(seconds=100))  # once: the jobs share it


class Observed(training.Trainer):
    """Keeps itself, so that the weights of every process can be looked at."""

    def __init__(self, *args):
        super().__init__(*args)
        trainers.append(self)

    def export(self):
        state = self.model.state_dict()
        self.parts = sum(hasattr(tensor, "full_tensor") for tensor in state.values())
        self.final = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in state.values()]
        return super().export()


def stopped(cfg, run):
    """After how many updates a run ends of which one process is sent a signal."""
    steps = []

    def stop(*_):
        steps.append(1)
        if rank == 1 and len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)

    handle = register_optimizer_step_post_hook(stop)
    try:
        train(cfg, run)
    except Interrupted as interrupted:
        return {"stopped": str(interrupted), "steps": len(steps)}
    finally:
        handle.remove()
    return {"stopped": None, "steps": len(steps)}


def facts(cfg, run):
    """What seeds were derived from in a run."""
    found, sequence = [], np.random.SeedSequence
    np.random.SeedSequence = lambda facts: (found.append(facts[1:]), sequence(facts))[1]  # the first is their number
    train(cfg, run)
    np.random.SeedSequence = sequence
    return found


def contrast(cfg, run):
    """The loss, and its gradients."""
    from dinat.dense.mask2former import OneFormerCriterion

    criterion = OneFormerCriterion(3, None, {}, 0.1, 64, 3.0, 0.75, contrastive_temperature=0.5)
    queries, texts = (torch.tensor(cfg[name])[rank::2].requires_grad_() for name in ("queries", "texts"))
    loss = criterion.loss_contrastive(queries, texts)["loss_contrastive"]
    loss.backward()
    gradients = {"queries": queries.grad, "texts": texts.grad, "scale": criterion.logit_scale.grad}
    return {"loss": loss.item(), **{name: gradient.tolist() for name, gradient in gradients.items()}}


training.Trainer = Observed
scenes.VALIDATION_SCENES = 7  # divides by nothing
distributed.SHARDED_NUMEL = 100  # blocks of the tiny model are to be sharded like those of a large one
for name, job in jobs.items():
    cfg = OmegaConf.create(job["cfg"])
    # every process proposes a folder of its own; that of rank 0 must win
    run = output / (name if rank == 0 else f"{name}-of-rank-{rank}")
    if job["kind"] == "eval":
        result = evaluate(cfg)
    elif job["kind"] in ("stop", "facts", "contrast"):
        result = {"stop": stopped, "facts": facts, "contrast": contrast}[job["kind"]](cfg, run)
    else:
        score = train(cfg, run)
        final = trainers[-1].final
        result = {"score": score, "norm": sum(tensor.double().sum().item() for tensor in final)}
        result["sharded"] = trainers[-1].parts
    (output / f"{name}.{rank}.json").write_text(json.dumps(result))
dist.destroy_process_group()
