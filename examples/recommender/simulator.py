"""A shop that exists only here: users, items and clicks whose true probabilities are known.

Every user and item has planted factors; whether a shown item is clicked depends on how well they
match, on the item's popularity and quality, on price against the user's budget, on category against
hour and region, on the place on the page, and on noise that no feature reveals. Because the truth is
planted, a trained ranker can be held against the best score that anyone could reach.

NumPy only. The same seed gives the same shop and the same impressions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Split = Literal["train", "validation", "eval"]

#: Categorical fields in the order of the model's `ids` input, and the largest id of each.
#: Ids count from 1; 0 stands for "unknown" in every field.
FIELDS: dict[str, int] = {
    "user": 2000,
    "item": 2000,
    "category": 20,
    "brand": 100,
    "hour": 24,
    "weekday": 7,
    "device": 4,
    "region": 12,
}

#: Dense features in the order of the model's `dense` input, each with a spread of about 1.
DENSE: tuple[str, ...] = (
    "age",
    "tenure",
    "activity",
    "budget",
    "popularity",
    "item_age",
    "price",
    "rating",
    "reviews",
    "discount",
    "position",
    "session_depth",
    "idle_time",
)

CATEGORIES: tuple[str, ...] = (
    "books", "music", "films", "games", "garden", "kitchen", "lighting", "furniture", "shoes", "coats",
    "sports", "cycling", "camping", "toys", "baby", "pets", "tools", "audio", "phones", "cameras",
)  # fmt: skip

PAGE_PLACES = 20
_FACTORS = 6
_BANDS = 6
_NOISE = 0.5
_SEED = 20


@dataclass(frozen=True)
class Impressions:
    """Items shown to users.

    Attributes:
        dense: float32 [n, 13], columns as in `DENSE`.
        ids: int64 [n, 8], columns as in `FIELDS`.
        planted: float64 [n], the probability of a click given everything but the hidden noise.
        label: int64 [n], 1 where the item was clicked.
    """

    dense: Array
    ids: Array
    planted: Array
    label: Array


@dataclass(frozen=True)
class Shop:
    """The planted truth: per-user arrays [users, …], per-item arrays [items, …] and shared tables."""

    user_factors: Array
    user_dense: Array  # age, tenure, activity, budget
    user_device: Array
    user_region: Array
    user_share: Array
    item_factors: Array
    item_dense: Array  # popularity, item_age, price, rating, reviews
    item_category: Array
    item_brand: Array
    item_quality: Array
    item_share: Array
    band_taste: Array  # [bands of four hours, categories]
    region_taste: Array  # [regions, categories]
    device_bias: Array
    brand_bias: Array
    weekday_bias: Array


@cache
def shop(seed: int = _SEED) -> Shop:
    """The shop of `seed`, made once per process."""
    rng = np.random.default_rng([seed, 0])
    users, items = FIELDS["user"], FIELDS["item"]
    category = rng.integers(0, FIELDS["category"], items)
    category_factors = rng.normal(0, 0.7, (FIELDS["category"], _FACTORS))
    popularity = rng.normal(0, 1, items)
    quality = rng.normal(0, 1, items)
    activity = rng.normal(0, 1, users)
    return Shop(
        user_factors=rng.normal(0, 1, (users, _FACTORS)),
        user_dense=np.stack([rng.normal(0, 1, users), rng.normal(0, 1, users), activity,
                             rng.normal(0, 1, users)], axis=1),
        user_device=rng.integers(0, FIELDS["device"], users),
        user_region=rng.integers(0, FIELDS["region"], users),
        user_share=_shares(0.6 * activity),
        item_factors=category_factors[category] + rng.normal(0, 0.7, (items, _FACTORS)),
        item_dense=np.stack([popularity, rng.normal(0, 1, items), rng.normal(0, 1, items),
                             0.8 * quality + rng.normal(0, 0.6, items),
                             0.7 * popularity + rng.normal(0, 0.7, items)], axis=1),
        item_category=category,
        item_brand=rng.integers(0, FIELDS["brand"], items),
        item_quality=quality,
        item_share=_shares(0.8 * popularity),
        band_taste=rng.normal(0, 0.45, (_BANDS, FIELDS["category"])),
        region_taste=rng.normal(0, 0.35, (FIELDS["region"], FIELDS["category"])),
        device_bias=rng.normal(0, 0.3, FIELDS["device"]),
        brand_bias=rng.normal(0, 0.35, FIELDS["brand"]),
        weekday_bias=rng.normal(0, 0.15, FIELDS["weekday"]),
    )  # fmt: skip


def split_of(user: Array, item: Array) -> Array:
    """The split that a (user, item) pair belongs to: 0 eval, 1 validation, 2 to 9 training.

    A pair lies in one split for good, so that no evaluated pair was ever trained on. The mixing
    steps are those of Steele, Lea and Flood's SplitMix64.
    """
    with np.errstate(over="ignore"):
        mixed = (user.astype(np.uint64) << np.uint64(32)) + item.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(10)).astype(np.int64)


def draw(count: int, split: Split, seed: int = _SEED) -> Impressions:
    """`count` impressions of `split`'s pairs: users by their activity, items by their popularity."""
    world = shop(seed)
    rng = np.random.default_rng([seed, 1 + ("train", "validation", "eval").index(split)])
    users, items, found = [], [], 0
    while found < count:
        user = rng.choice(FIELDS["user"], 2 * count, p=world.user_share)
        item = rng.choice(FIELDS["item"], 2 * count, p=world.item_share)
        part = split_of(user, item)
        mine = part == 0 if split == "eval" else part == 1 if split == "validation" else part > 1
        users.append(user[mine])
        items.append(item[mine])
        found += int(mine.sum())
    user, item = np.concatenate(users)[:count], np.concatenate(items)[:count]
    own_device = rng.random(count) < 0.8
    context = {
        "hour": rng.integers(0, FIELDS["hour"], count),
        "weekday": rng.integers(0, FIELDS["weekday"], count),
        "device": np.where(own_device, world.user_device[user], rng.integers(0, FIELDS["device"], count)),
        "discount": rng.normal(0, 1, count),
        "place": rng.integers(0, PAGE_PLACES, count),
        "session": rng.normal(0, 1, (count, 2)),
    }
    return _shown(world, rng, user, item, context)


def candidates(user_id: int, count: int = 500, seed: int = _SEED) -> Impressions:
    """`count` different items that could be shown to one user, all at one moment and in one place.

    Args:
        user_id: 1 to 2000, as in the `ids` input.

    Raises:
        ValueError: no such user, or more items asked for than the shop has.
    """
    if not 1 <= user_id <= FIELDS["user"]:
        raise ValueError(f"there is no user {user_id}: choose one from 1 to {FIELDS['user']}")
    if not 1 <= count <= FIELDS["item"]:
        raise ValueError(f"cannot offer {count} items: choose from 1 to {FIELDS['item']}")
    world = shop(seed)
    rng = np.random.default_rng([seed, 4, user_id])
    item = rng.choice(FIELDS["item"], count, replace=False, p=world.item_share)
    user = np.full(count, user_id - 1)
    context = {
        "hour": np.full(count, rng.integers(0, FIELDS["hour"])),
        "weekday": np.full(count, rng.integers(0, FIELDS["weekday"])),
        "device": world.user_device[user],
        "discount": rng.normal(0, 1, count),
        # Where an item will stand is what the ranking decides, so all are scored for one place.
        "place": np.zeros(count, dtype=np.int64),
        "session": np.repeat(rng.normal(0, 1, (1, 2)), count, axis=0),
    }
    return _shown(world, rng, user, item, context)


def _shown(
    world: Shop, rng: np.random.Generator, user: Array, item: Array, context: dict[str, Array]
) -> Impressions:
    """Features, planted probability and click of items shown to users (both counted from 0)."""
    place = (context["place"] - (PAGE_PLACES - 1) / 2) / (PAGE_PLACES / np.sqrt(12))
    dense = np.column_stack(
        [world.user_dense[user], world.item_dense[item], context["discount"], place, context["session"]]
    )
    category, brand, region = world.item_category[item], world.item_brand[item], world.user_region[user]
    ids = 1 + np.column_stack(
        [user, item, category, brand, context["hour"], context["weekday"], context["device"], region]
    )
    # Only what is rounded is sent over the wire, so the truth is computed from the rounded values.
    dense = np.round(dense, 3).astype(np.float32)
    feature = dict(zip(DENSE, dense.astype(np.float64).T, strict=True))
    logit = (
        -1.6
        + 0.42 * np.einsum("nk,nk->n", world.user_factors[user], world.item_factors[item])
        + 0.45 * feature["popularity"]
        + 0.45 * world.item_quality[item]
        - 0.25 * (feature["price"] - feature["budget"]) ** 2
        + 0.3 * feature["discount"]
        - 0.4 * feature["position"]
        + 0.15 * feature["session_depth"]
        - 0.1 * feature["item_age"] * feature["age"]
        + world.band_taste[context["hour"] * _BANDS // FIELDS["hour"], category]
        + world.region_taste[region, category]
        + world.device_bias[context["device"]]
        + world.brand_bias[brand]
        + world.weekday_bias[context["weekday"]]
    )
    clicked = rng.random(len(user)) < _sigmoid(logit + rng.normal(0, _NOISE, len(user)))
    # The mean of sigmoid(x + N(0, s²)) is close to sigmoid(x / √(1 + πs²/8)) (MacKay 1992).
    planted = _sigmoid(logit / np.sqrt(1 + np.pi * _NOISE**2 / 8))
    return Impressions(dense, ids.astype(np.int64), planted, clicked.astype(np.int64))


def _shares(logits: Array) -> Array:
    weights = np.exp(logits)
    return weights / weights.sum()


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))
