"""PPO by TorchRL: its collector, advantages and loss; rows are reset by ``reset_mask``."""

from time import process_time

import torch
from common import ENVS, ROLLOUT, TASK, decisions, network, report
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper
from torchrl.modules import MaskedCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from servegym.envs import ServingVectorEnv, VectorMaskInObservation

EPOCHS, CHUNKS, RATE = 4, 4, 1e-3
torch.manual_seed(0)
rows = ServingVectorEnv(ENVS, TASK, autoreset_mode="Disabled")
env = GymWrapper(VectorMaskInObservation(rows), categorical_action_encoding=True)
env.set_seed(0)
actor = network(len(rows.features), len(rows.task.actions))
seen = ["observation", "action_mask"]
masked = TensorDictModule(lambda o, m: (actor(o), m.bool()), seen, ["logits", "mask"])
masked.actor = actor  # so that its weights are found
policy = ProbabilisticActor(
    masked, ["logits", "mask"], distribution_class=MaskedCategorical, return_log_prob=True
)
critic = ValueOperator(network(len(rows.features), 1), ["observation"])
numbers = {"clip_epsilon": 0.2, "entropy_coeff": 3e-3, "critic_coeff": 0.5}
loss = ClipPPOLoss(policy, critic, **numbers, loss_critic_type="l2", normalize_advantage=True)
advantage = GAE(gamma=1.0, lmbda=0.998, value_network=critic)
adam = torch.optim.Adam(loss.parameters(), RATE)
total = decisions(300_000)
frames = {"frames_per_batch": ROLLOUT, "total_frames": total}
began = process_time()
collector = Collector(env, policy, **frames, auto_register_policy_transforms=False)
for update, data in enumerate(collector):
    adam.param_groups[0]["lr"] = RATE * (1 - 0.9 * update * ROLLOUT / total)
    with torch.no_grad():
        advantage(data)
    flat = data.reshape(-1)
    for chunk in (c for _ in range(EPOCHS) for c in torch.randperm(ROLLOUT).chunk(CHUNKS)):
        losses = loss(flat[chunk])
        adam.zero_grad()
        (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
        nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
        adam.step()
report(actor, total, process_time() - began)
