"""Mutual information by k nearest neighbours, and Variability; no program.

Estimates are in nats, from n independent samples. Where there is little information they scatter
about 0 and may lie below it. With n samples they resolve about ln n and underestimate more.
"""

import math

import numpy as np
import torch


def digamma(n):
    """ψ of a number, or of an array of them."""
    return torch.digamma(torch.as_tensor(n, dtype=torch.float64)).numpy()


def distances(x, rng):
    """Distances (n, n) between samples x (n, d), infinite from a sample to itself.

    They are those of the maximum norm. Each coordinate is standardised and has noise of 1e-10
    added, since ties would bias the estimates.
    """
    x = np.asarray(x, dtype=np.float64)
    spread = x.std(0)
    x = (x - x.mean(0)) / np.where(spread > 0, spread, 1)
    x = torch.from_numpy(x + 1e-10 * rng.standard_normal(x.shape))
    d = torch.cdist(x, x, p=math.inf)
    return d.fill_diagonal_(math.inf).numpy()


def to_neighbour(k, d):
    """The distance (n, 1) to the k-th neighbour of each sample."""
    return np.partition(d, k - 1)[:, k - 1 : k]


def continuous(x, y, k=3):
    """I(X;Y) of x (n, d_x) and y (n, d_y): eq. 8 of Kraskov, Stögbauer and Grassberger (2004).

    It is their first estimator. A coordinate of y may be discrete, as long as the k nearest
    neighbours share its value.
    """
    rng = np.random.default_rng(0)
    x = distances(x, rng)
    y = distances(y, rng)
    reach = to_neighbour(k, np.maximum(x, y))  # in the joint space
    near_x = (x < reach).sum(1) + 1
    near_y = (y < reach).sum(1) + 1
    within = digamma(near_x) + digamma(near_y)
    return float(digamma(k) + digamma(len(x)) - within.mean())


def discrete(x, labels, k=3):
    """I(X;S) of x (n, d) and labels (n,) of a discrete S: eq. 2 of Ross (2014)."""
    d = distances(x, np.random.default_rng(0))
    terms = np.zeros(len(d))
    for label in np.unique(labels):
        own = labels == label
        reach = to_neighbour(k, d[own][:, own])  # among samples of the same label
        terms[own] = digamma(own.sum()) + digamma((d[own] <= reach).sum(1))
    return float(digamma(k) + digamma(len(d)) - terms.mean())


def means(z, labels):
    """The mean of z (n, d_z) over all samples with a sample's own label: (n, d_z)."""
    _, i = np.unique(labels, return_inverse=True)
    columns = [np.bincount(i, column) / np.bincount(i) for column in z.T]
    return np.stack(columns, -1)[i]


def variability(z, s, c):
    """Variability (1/d_z) tr Cov(Z) and its three parts, which sum to it (Theorem A.15).

    The parts are within-context noise E tr Cov(Z|C), within-mode spread E_S tr Cov(E[Z|C] | S) and
    between-mode separation tr Cov(E[Z|S]), each divided by d_z. Covariances are the population's.
    z (n, d_z); s (n,) numbers the mode of a sample and c (n,) its context; a context has one mode.
    """
    z = np.asarray(z, dtype=np.float64)
    of_context = means(z, c)
    of_mode = means(z, s)
    overall = z.mean(0)
    parts = (z - overall, z - of_context, of_context - of_mode, of_mode - overall)
    return tuple(float(np.square(part).mean()) for part in parts)
