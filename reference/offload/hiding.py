"""When fetching a layer hides behind computing with it (the paper's section VI-A).

A layer of W weights takes 2 W operations for each token in flight, and W * bytes_per_weight bytes to fetch. With F
operations and BW bytes a second, and the next layer fetched while this one is computed with,

    slot = max(2 W B S / F, W bytes_per_weight / BW)

so the fetch is hidden if and only if B S >= F bytes_per_weight / (2 BW), whatever W is.
"""


def hiding_tokens(flops_per_s: float, fetched_bytes_per_s: float, bytes_per_weight: float) -> float:
    """Return how many tokens B * S must be in flight for the fetch to be hidden.

    An A6000 on a host link of 20.5 GB/s in 16 bits needs 4.1 thousand: batch 2 of 2048 tokens, where the paper's
    Fig. 9a saturates; from an NVMe disk of 4.8 GB/s 17.5 thousand, batch 9.

        >>> round(hiding_tokens(84e12, 20.5e9, 2)), round(hiding_tokens(84e12, 4.8e9, 2))
        (4098, 17500)
    """
    return flops_per_s * bytes_per_weight / (2 * fetched_bytes_per_s)


def compute_s(weights: int, tokens: int, flops_per_s: float) -> float:
    """Return the seconds of a layer's products: a multiplication and an addition for each weight and token."""
    return 2 * weights * tokens / flops_per_s


def fetch_s(weights: int, fetched_bytes_per_s: float, bytes_per_weight: float) -> float:
    """Return the seconds of fetching a layer."""
    return weights * bytes_per_weight / fetched_bytes_per_s


def step_s(layer_compute_s: float, layer_fetch_s: float, layers: int, *, prefetch: bool) -> float:
    """Return the seconds of a step: all layers' slots, and what nothing can hide.

    With prefetch the first fetch stands alone and so does the last computation:

        >>> step_s(1.0, 2.0, 4, prefetch=False), step_s(1.0, 2.0, 4, prefetch=True)
        (12.0, 9.0)
    """
    if not prefetch:
        return layers * (layer_compute_s + layer_fetch_s)
    return layer_fetch_s + (layers - 1) * max(layer_compute_s, layer_fetch_s) + layer_compute_s


def partitioned_fetch_s(nbytes: float, devices: int, host_bytes_per_s: float, device_bytes_per_s: float) -> float:
    """Return the seconds in which N devices get a layer that each fetches 1/N of, gathered over their own links.

        W / (N host) + (N - 1) / N * W / device

    >>> partitioned_fetch_s(8.0, 1, 1.0, 4.0), partitioned_fetch_s(8.0, 4, 1.0, 4.0)
    (8.0, 3.5)
    """
    return nbytes / (devices * host_bytes_per_s) + (devices - 1) / devices * nbytes / device_bytes_per_s
