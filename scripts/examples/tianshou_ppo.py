"""PPO by Tianshou: its vector environment of single environments, its collector and trainer."""

from time import process_time
from typing import Any

import torch
from common import ENVS, ROLLOUT, TASK, decisions, network, report
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory, LRSchedulerFactoryLinear
from tianshou.data import Batch, Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from torch import nn

from servegym.envs import MaskInObservation, ServingEnv

torch.manual_seed(0)
single = ServingEnv(TASK)


class Network(nn.Module):
    """Of Dict observations: logits of the legal actions, or the value of a state."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.network = network(len(single.features), outputs)

    def forward(self, obs: Batch, state: object = None, info: object = None) -> Any:
        out = self.network(torch.as_tensor(obs.obs))
        if out.shape[1] == 1:
            return out
        return out.masked_fill(torch.as_tensor(obs.mask) == 0, -1e9), state


env = DummyVectorEnv([lambda: MaskInObservation(ServingEnv(TASK), "obs", "mask")] * ENVS)
env.seed(list(range(ENVS)))
actor, critic = Network(len(single.task.actions)), Network(1)
policy = DiscreteActorPolicy(actor=actor, action_space=single.action_space)
total = decisions(150_000)
rate = LRSchedulerFactoryLinear(1, total, ROLLOUT)
adam = AdamOptimizerFactory(1e-3, eps=1e-5).with_lr_scheduler_factory(rate)
words = {"gamma": 1.0, "gae_lambda": 0.998, "ent_coef": 3e-3, "max_grad_norm": 0.5}
ppo = PPO(policy=policy, critic=critic, optim=adam, max_batchsize=ROLLOUT, **words)
buffer = VectorReplayBuffer(ROLLOUT, ENVS)
buffer.hasnull = lambda: False  # metrics that an episode cannot have are NaN in its last info
began = process_time()
ppo.run_training(
    OnPolicyTrainerParams(
        training_collector=Collector(ppo, env, buffer),
        max_epochs=1,
        epoch_num_steps=total,
        collection_step_num_env_steps=ROLLOUT,
        update_step_num_repetitions=4,
        batch_size=ROLLOUT // 4,
        verbose=False,
    )
)
report(actor.network, total, process_time() - began)
