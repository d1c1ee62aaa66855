"""A policy with memory: CartPole without its velocities, by PPO over a MambaStack, or over an LSTM of equal size."""

import argparse
import importlib
import sys

import torch
from torch import nn

from mambakit.nn import MambaStack

parser = argparse.ArgumentParser()
parser.add_argument("--updates", type=int, default=100)
parser.add_argument("--lstm", action="store_true")
arguments = parser.parse_args()
if importlib.util.find_spec("gymnasium") is None:
    sys.exit("this example plays gymnasium's CartPole: pip install gymnasium")
gymnasium = importlib.import_module("gymnasium")
ENVS, STEPS, SEEN = 32, 64, [0, 2]  # the position and the angle alone


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(2, 32, 2, batch_first=True) if arguments.lstm else MambaStack(2, 24, 2, batch_first=True)
        self.heads = nn.Linear(self.layer.hidden_size, 3)  # two actions' logits and a value

    def forward(self, x, state, starts):
        """(b, l, 2), the state before, (b, l) where episodes begin: the stack resets its state there by itself."""
        if not arguments.lstm:
            y, state = self.layer(x, state, starts)
        else:  # an LSTM has to be stopped, reset and started again
            y = []
            for t in range(x.shape[1]):
                part, state = self.layer(x[:, t : t + 1], state and tuple(s * ~starts[:, t, None] for s in state))
                y.append(part)
            y = torch.cat(y, 1)
        out = self.heads(y)
        return torch.distributions.Categorical(logits=out[..., :2]), out[..., 2], state


torch.manual_seed(0)
envs = gymnasium.make_vec("CartPole-v1", ENVS, "sync", vector_kwargs={"autoreset_mode": "SameStep"})
policy, scale = Policy(), torch.tensor([2.4, 0.21])
optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
seen = torch.tensor(envs.reset(seed=0)[0][:, SEEN]) / scale
starts, state, length, lengths = torch.ones(ENVS, dtype=torch.bool), None, torch.zeros(ENVS), []
for update in range(arguments.updates):
    before, rows = state, []
    optimizer.param_groups[0]["lr"] = 3e-3 * (1 - update / arguments.updates)
    for _ in range(STEPS):
        with torch.no_grad():
            choice, value, state = policy(seen[:, None], state, starts[:, None])
        action = choice.sample()[:, 0]
        new, _, fell, cut, _ = envs.step(action.numpy())
        ended = torch.tensor(fell | cut)
        reward = 1 + 0.99 * value[:, 0] * torch.tensor(cut & ~fell)  # cut is not fallen: more would have come
        rows.append((seen, starts, action, choice.log_prob(action[:, None])[:, 0], value[:, 0], reward, ended))
        lengths += (length[ended] + 1).tolist()
        length, seen, starts = (length + 1) * ~ended, torch.tensor(new[:, SEEN]) / scale, ended
    x, begins, action, old, value, reward, ended = (torch.stack(column, 1) for column in zip(*rows, strict=True))
    after = policy(seen[:, None], state, starts[:, None])[1][:, 0].detach()
    advantage, carried = torch.zeros_like(value), torch.zeros(ENVS)
    for t in reversed(range(STEPS)):  # generalised advantage estimation
        going, following = ~ended[:, t], after if t == STEPS - 1 else value[:, t + 1]
        advantage[:, t] = carried = reward[:, t] + going * (0.99 * following + 0.94 * carried) - value[:, t]
    target, normal = value + advantage, (advantage - advantage.mean()) / advantage.std()
    for some in (part for _ in range(4) for part in torch.randperm(ENVS).chunk(4)):
        choice, guess, _ = policy(x[some], before and tuple(s[:, some].contiguous() for s in before), begins[some])
        ratio = (choice.log_prob(action[some]) - old[some]).exp()
        gain = torch.minimum(ratio * normal[some], ratio.clamp(0.8, 1.2) * normal[some]).mean()
        optimizer.zero_grad()
        (0.005 * (guess - target[some]).square().mean() - gain - 0.01 * choice.entropy().mean()).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
    if lengths and (update + 1) % 10 == 0:
        print(
            f"{(update + 1) * ENVS * STEPS:8,} steps: the last 100 episodes are {sum(lengths[-100:]) / 100:5.1f} long"
        )
