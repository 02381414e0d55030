"""Layers of slot heads written out in float64 numpy; `w` maps the names of a state dict to arrays."""

import numpy as np


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def norm(x, w, name):
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def relu(x):
    return np.maximum(x, 0)


def gru(x, state, w, name):
    """Reset and update gates, and the candidate, of Cho et al. (2014) in PyTorch's order of rows."""
    dim = x.shape[-1]
    of_x = x @ w[f"{name}.weight_ih"].T + w[f"{name}.bias_ih"]
    of_state = state @ w[f"{name}.weight_hh"].T + w[f"{name}.bias_hh"]
    r, z = (1 / (1 + np.exp(-(of_x + of_state)[..., k * dim : (k + 1) * dim])) for k in range(2))
    n = np.tanh(of_x[..., 2 * dim :] + r * of_state[..., 2 * dim :])
    return (1 - z) * n + z * state
