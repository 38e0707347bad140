"""Mutual information by k nearest neighbours, and Variability. No program; numpy alone.

Estimates in nats, from n independent samples. Of little information they scatter about 0, and may be below it; more
than they can resolve with n samples, some ln n, they underestimate.
"""

import numpy as np


def digamma(n):
    """ψ of whole numbers n ≥ 1, an array: the sum of the reciprocals below n, minus Euler's constant."""
    sums = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n.max() + 1))])
    return sums[n - 1] - np.euler_gamma


def distances(x, rng):
    """Distances (n, n) between samples x (n, d), infinite of a sample to itself: maximum norm, each coordinate
    standardised, with 1e-10 of noise against ties."""
    spread = x.std(0)
    x = (x - x.mean(0)) / np.where(spread > 0, spread, 1) + 1e-10 * rng.standard_normal(x.shape)
    d = np.zeros((len(x), len(x)))
    for column in x.T:
        np.maximum(d, np.abs(column[:, None] - column), out=d)
    np.fill_diagonal(d, np.inf)
    return d


def continuous(x, y, k=3):
    """I(X;Y), x (n, d_x) and y (n, d_y): the first estimator of Kraskov, Stögbauer and Grassberger (2004), their eq. 8.
    A discrete coordinate of y is no harm, as long as the k nearest neighbours share its value."""
    rng = np.random.default_rng(0)
    x, y = (distances(np.asarray(v, dtype=np.float64), rng) for v in (x, y))
    reach = np.partition(np.maximum(x, y), k - 1)[:, k - 1 : k]  # to the k-th neighbour in the joint space, (n, 1)
    within = digamma((x < reach).sum(1) + 1) + digamma((y < reach).sum(1) + 1)
    return float(digamma(np.array(k)) + digamma(np.array(len(x))) - within.mean())


def discrete(x, labels, k=3):
    """I(X;S), x (n, d), labels (n,) of the discrete S: Ross (2014), eq. 2."""
    x, terms = distances(np.asarray(x, dtype=np.float64), np.random.default_rng(0)), np.zeros(len(x))
    for label in np.unique(labels):
        own = labels == label
        reach = np.partition(x[own][:, own], k - 1)[:, k - 1 : k]  # to the k-th neighbour of the same label
        terms[own] = digamma(own.sum()) + digamma((x[own] <= reach).sum(1))
    return float(digamma(np.array(k)) + digamma(np.array(len(x))) - terms.mean())


def variability(z, s, c):
    """Variability 1/d_z tr Cov(Z), and its three parts, which sum to it (Theorem A.15): within-context noise
    E tr Cov(Z|C), within-mode spread E_S tr Cov(E[Z|C] | S), between-mode separation tr Cov(E[Z|S]), each over d_z.

    z (n, d_z), labels s (n,) of the mode and c (n,) of the context, which tells the mode. Population covariances.
    """
    z = np.asarray(z, dtype=np.float64)

    def means(labels):
        _, i = np.unique(labels, return_inverse=True)
        return np.stack([np.bincount(i, column) / np.bincount(i) for column in z.T], -1)[i]  # (n, d_z), a row's own

    by_context, by_mode, overall = means(c), means(s), z.mean(0)
    parts = (z - overall, z - by_context, by_context - by_mode, by_mode - overall)
    return tuple(float(np.square(part).mean()) for part in parts)
