"""PPO in one file, in the way of CleanRL: torch, the vector environment and its masks."""

from time import process_time

import torch
from common import ENVS, ROLLOUT, STEPS, TASK, decisions, network, report
from torch import nn
from torch.distributions import Categorical

from servegym.envs import ServingVectorEnv

EPOCHS, CHUNKS, RATE, LAMBDA, CLIP, ENTROPY = 4, 4, 1e-3, 0.998, 0.2, 3e-3
torch.manual_seed(0)
env = ServingVectorEnv(ENVS, TASK, autoreset_mode="SameStep")


def policy(observations: torch.Tensor, masks: torch.Tensor) -> Categorical:
    """Return the distribution over legal actions."""
    return Categorical(logits=actor(observations).masked_fill(~masks, -1e9), validate_args=False)


actor, critic = network(len(env.features), len(env.task.actions)), network(len(env.features), 1)
weights = [*actor.parameters(), *critic.parameters()]
adam = torch.optim.Adam(weights, RATE, eps=1e-5)
updates = decisions(300_000) // ROLLOUT
began, seen = process_time(), torch.from_numpy(env.reset(seed=0)[0])
for update in range(updates):
    adam.param_groups[0]["lr"] = RATE * (1 - 0.9 * update / updates)
    rows = []
    for _ in range(STEPS):
        mask = torch.from_numpy(env.action_masks())
        with torch.no_grad():
            chosen, value = policy(seen, mask), critic(seen).squeeze(1)
        action = chosen.sample()
        after, reward, terminated, truncated, _ = env.step(action.numpy())
        ends = torch.from_numpy(terminated | truncated).float()
        gained = torch.from_numpy(reward).float()
        rows.append((seen, mask, action, chosen.log_prob(action), value, gained, ends))
        seen = torch.from_numpy(after)
    observed, masks, taken, old, values, rewards, over = map(torch.stack, zip(*rows, strict=True))
    advantages, last = torch.zeros_like(values), torch.zeros(ENVS)
    following = torch.cat([values[1:], critic(seen).detach().T])
    for t in reversed(range(STEPS)):  # generalized advantage estimation; the natural discount is 1
        last = rewards[t] - values[t] + (1 - over[t]) * (following[t] + LAMBDA * last)
        advantages[t] = last
    flat = [x.flatten(0, 1) for x in (observed, masks, taken, old, advantages, advantages + values)]
    for chunk in (c for _ in range(EPOCHS) for c in torch.randperm(ROLLOUT).chunk(CHUNKS)):
        o, m, a, log_old, gain, target = (x[chunk] for x in flat)
        now, gain = policy(o, m), (gain - gain.mean()) / (gain.std() + 1e-8)
        ratio = (now.log_prob(a) - log_old).exp()
        surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
        bonus = ENTROPY * (1 - update / updates) * now.entropy().mean()
        adam.zero_grad()
        (0.5 * (critic(o).squeeze(1) - target).square().mean() - surrogate - bonus).backward()
        nn.utils.clip_grad_norm_(weights, 0.5)
        adam.step()
report(actor, updates * ROLLOUT, process_time() - began)
