"""FSDP2 as accelerate applies it, which it does on GPUs only; here by hand, on two processes that talk by gloo."""

import dataclasses
import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rope_probe import load_model
from rope_probe.distillation import CrossEntropy, Divergence, Training, train_phase
from tests import zoo
from tests.leaving import leave
from tests.test_distillation import PHASE, fresh

SPLIT = dataclasses.replace(PHASE, terms=(CrossEntropy(0.3), Divergence(0.7)), matrix_lr=None, steps=6)


class Sharding(Accelerator):
    """accelerate's place in Training, with its FSDP2 steps done here."""

    def prepare(self, student, *optimizers, device_placement):
        mesh = init_device_mesh("cpu", (self.num_processes,))
        names = {parameter: name for name, parameter in student.named_parameters()}
        layers = [module for module in student.modules() if type(module).__name__ in student._no_split_modules]
        for module in [*layers, student]:
            fully_shard(module, mesh=mesh)
        sharded = dict(student.named_parameters())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [sharded[names[parameter]] for parameter in group["params"]]
        return student, *optimizers

    def no_sync(self, model):
        return nullcontext()

    def clip_grad_norm_(self, parameters, norm):
        return torch.nn.utils.clip_grad_norm_(list(parameters), norm)


def shards():
    torch.set_num_threads(1)
    accelerator, teacher = Sharding(cpu=True), load_model(zoo.llama())
    training = Training(fresh(), SPLIT, seed=0, teachers={"teacher": teacher}, accelerator=accelerator)
    losses = [training.advance(measure=True) for _ in range(3)]
    kept = [{name: x.clone() for name, x in part.items()} for part in (training.weights(), training.state())]
    sizes = gather_object([sum(map(len, kept))])
    weights, state = broadcast_object_list(kept)
    losses += [training.advance(measure=True) for _ in range(3)]
    again = fresh()
    again.original_model.load_state_dict(weights)
    resumed = Training(again, SPLIT, seed=0, teachers={"teacher": teacher}, accelerator=accelerator)
    resumed.restore(3, state)
    more = [resumed.advance(measure=True) for _ in range(3)]
    if accelerator.is_main_process:
        print(json.dumps({"losses": losses, "resumed": more, "sizes": sizes}), flush=True)
    leave(accelerator)


def test_two_shards_have_the_losses_of_one_process_and_are_resumed_exactly():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, "-m", "tests.test_sharded"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["resumed"] == told["losses"][3:]
    assert told["sizes"][0] > 0
    assert told["sizes"][1] == 0  # whole tensors are on the first process alone
    history, _ = train_phase(fresh(), SPLIT, seed=0, teacher=load_model(zoo.llama()))
    for ours, theirs in zip(told["losses"], history, strict=True):
        assert {key: ours[key] for key in theirs} == pytest.approx(theirs, abs=1e-5)


if __name__ == "__main__":
    shards()
