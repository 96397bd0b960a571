"""Training loops as they are found in public code; the class of the optimizer is the only argument."""

import inspect
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

STEPS = 200


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 17, context: int = 8, width: int = 8) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.block, self.ln_f = Block(width), nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight  # tied, as in nanoGPT

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        logits = self.lm_head(self.ln_f(self.block(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, AdamW: Any, lr: float) -> Any:
        params = [param for param in self.parameters() if param.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        extra = {"fused": True} if "fused" in inspect.signature(AdamW).parameters else {}
        return AdamW(groups, lr=lr, betas=(0.9, 0.95), **extra)


def nano_gpt(AdamW: Any, n_steps: int = STEPS) -> list[float]:
    """Two groups, a scaler that is off, gradient accumulation, clipping, and a rate that changes at each step."""
    torch.manual_seed(1337)
    model = GPT()
    optimizer = model.configure_optimizers(AdamW, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for number in range(n_steps):
        lr = 1e-2 * min(1.0, (number + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * number / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = lr
        total = 0.0
        for _ in range(2):
            tokens = (torch.randint(17, (4, 1)) + torch.randint(1, 3, (4, 1)) * torch.arange(9)) % 17
            loss = model(tokens[:, :-1], tokens[:, 1:]) / 2
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return losses


def ppo(Adam: Any, n_steps: int = STEPS) -> list[float]:
    """Small gradients beside eps=1e-5, an annealed rate, clipping, `zero_grad()`; the critic rests at times."""
    torch.manual_seed(1)
    actor = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    critic = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    for layer in (actor[0], actor[2], critic[0], critic[2]):
        nn.init.orthogonal_(layer.weight, 0.01 if layer is actor[2] else math.sqrt(2))
        nn.init.zeros_(layer.bias)
    optimizer = Adam([*actor.parameters(), *critic.parameters()], lr=2.5e-3, eps=1e-5)
    losses = []
    for number in range(n_steps):
        optimizer.param_groups[0]["lr"] = (1 - number / STEPS) * 2.5e-3
        states = torch.randn(32, 4)
        returns = states.sum(1)
        logits = actor(states)
        actions = (states[:, 0] > 0).long()
        log_prob = torch.distributions.Categorical(logits=logits).log_prob(actions)
        advantages = returns - critic(states).squeeze(1).detach()
        loss = -(log_prob * advantages).mean() * 1e-3
        if number % 4:
            loss = loss + 0.5 * (critic(states).squeeze(1) - returns).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(actor.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


def multi_head(Adam: Any, n_steps: int = STEPS) -> list[float]:
    """A shared trunk and heads of which each step uses one; bare `zero_grad()` and weight decay."""
    torch.manual_seed(0)
    trunk = nn.Linear(8, 8)
    heads = nn.ModuleList([nn.Linear(8, 1) for _ in range(3)])
    optimizer = Adam([*trunk.parameters(), *heads.parameters()], lr=1e-2, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses = []
    for number in range(n_steps):
        inputs = torch.randn(16, 8)
        loss = (heads[number % 3](trunk(inputs).tanh()) - inputs[:, number % 3, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses
