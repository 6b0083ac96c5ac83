"""Keys and values that wait in host memory until their sequence's next turn (the paper's section IV-C3).

Two devices share a link to the host. If both move the same layer's keys and values at the same time they halve each
other's speed; so devices of odd number move odd layers only, and devices of even number even layers: while one moves,
the other computes a layer that stays.

Here devices are numbers and tiers are dicts: what is where is plain to see.
"""

from collections.abc import Iterable

from ..cache import KVCache


def moves(device: int, layer: int) -> bool:
    """Return whether a device moves this layer's keys and values to the host.

    >>> [[layer for layer in range(4) if moves(device, layer)] for device in (0, 1)]
    [[0, 2], [1, 3]]
    """
    return device % 2 == layer % 2


def moved_layers(device: int, layers: int, bytes_of_layer: int, threshold_bytes: int) -> list[int]:
    """Return the layers that a device moves: of those that it may, the first ones, until the rest fits the threshold.

    With 6 layers of 10 bytes and room for 45, device 0 moves two; with room for 20 it moves all that it may, three:

        >>> moved_layers(0, 6, 10, 45), moved_layers(0, 6, 10, 20)
        ([0, 2], [0, 2, 4])
    """
    surplus = max(0, layers * bytes_of_layer - threshold_bytes)
    needed = -(-surplus // bytes_of_layer)
    return [layer for layer in range(layers) if moves(device, layer)][:needed]


def offload(caches: tuple[KVCache, ...], layers: Iterable[int]) -> tuple[dict[int, KVCache], dict[int, KVCache]]:
    """Return what stays on the device and what lies on the host, by layer."""
    away = set(layers)
    here = {layer: cache for layer, cache in enumerate(caches) if layer not in away}
    return here, {layer: caches[layer] for layer in sorted(away)}


def fetch_back(here: dict[int, KVCache], host: dict[int, KVCache]) -> tuple[KVCache, ...]:
    """Return all layers' caches in order, before the sequence's next turn."""
    whole = {**here, **host}
    return tuple(whole[layer] for layer in range(len(whole)))


def link_use(devices: int, layers: int) -> list[list[int]]:
    """Return, for each layer that all devices compute at the same time, the devices that then use their link.

    Devices 2 p and 2 p + 1 share one. Of each pair only one is in any list:

        >>> link_use(4, 2)
        [[0, 2], [1, 3]]
    """
    return [[device for device in range(devices) if moves(device, layer)] for layer in range(layers)]
