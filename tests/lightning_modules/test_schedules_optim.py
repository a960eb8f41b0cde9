"""Schedules against closed forms, LARS against its equation in a loop."""

import itertools
import math

import pytest
import torch
from torch import nn

from lightning_modules.optim import LARS, build_optimizer, parameter_groups
from lightning_modules.schedules import cosine, linear, scaled_learning_rate, warmup_cosine


def test_warmup_never_wastes_a_step_and_meets_the_cosine():
    rates = [warmup_cosine(s, total=100, peak=2.0, final=0.5, warmup=10) for s in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.25)
    assert rates[100] == pytest.approx(0.5)
    assert all(x >= y for x, y in itertools.pairwise(rates[10:]))
    for s in range(10, 101):
        assert rates[s] == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi * (s - 10) / 90)))


def test_ends_of_schedules():
    assert cosine(0, total=10, start=0.99, final=1.0) == pytest.approx(0.99)
    assert cosine(25, total=10, start=0.99, final=1.0) == 1.0
    assert [linear(s, total=4, start=0.0, final=1.0) for s in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert linear(0, total=0, start=0.0, final=1.0) == 1.0


def test_rates_scale_with_the_global_batch():
    assert scaled_learning_rate(0.3, 1024) == pytest.approx(1.2)
    assert scaled_learning_rate(0.3, 64, rule="sqrt") == pytest.approx(0.15)
    assert scaled_learning_rate(0.3, 64, rule="none") == 0.3
    with pytest.raises(ValueError, match="cubic"):
        scaled_learning_rate(0.3, 64, rule="cubic")


def test_lars_is_its_equation():
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    optimizer = build_optimizer("lars", parameter_groups([net], 0.1), learning_rate=0.5, momentum=0.8)
    assert isinstance(optimizer, LARS)
    weights = [p.detach().clone() for p in (net.weight, net.bias)]
    velocities = [torch.zeros_like(w) for w in weights]
    for step in range(3):
        optimizer.zero_grad()
        net(torch.full((2, 4), 1.0 + step)).square().sum().backward()
        for i, p in enumerate((net.weight, net.bias)):
            decay = 0.1 if i == 0 else 0.0
            u = p.grad + decay * weights[i]
            if i == 0:
                u = u * 0.001 * weights[i].norm() / u.norm()
            velocities[i] = 0.8 * velocities[i] + u
            weights[i] = weights[i] - 0.5 * velocities[i]
        optimizer.step()
        torch.testing.assert_close(net.weight.detach(), weights[0])
        torch.testing.assert_close(net.bias.detach(), weights[1])


def test_parameter_groups():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    decayed, plain = parameter_groups([net, net], 0.1)
    assert [p.ndim for p in decayed["params"]] == [4]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    with pytest.raises(ValueError, match="frozen"):
        parameter_groups([net.requires_grad_(False)], 0.1)
    with pytest.raises(ValueError, match="lion"):
        build_optimizer("lion", [decayed], learning_rate=1.0)
