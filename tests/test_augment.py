"""Augmentation against torchvision's functional and torchvision's own draws."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache, partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import stats

from jaxhisto import augment, transforms, view_params
from jaxhisto.config import AugmentConfig
from jaxhisto.view_params import ViewParams

torch = pytest.importorskip("torch")
T = pytest.importorskip("torchvision.transforms.v2")
F = pytest.importorskip("torchvision.transforms.v2.functional")

ROWS, HEIGHT, WIDTH, SIDE = 16, 72, 80, 48
EVERYTHING = AugmentConfig(grey_probability=0.2)
FORMS = [augment.views_by_products, augment.views_by_taps]
COLOUR = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
LEVEL = 1 / 255


@cache
def compiled(form, side=SIDE, config=EVERYTHING, dtype=jnp.float32):
    return jax.jit(partial(form, side=side, config=config, dtype=dtype))


@cache
def drawing(config: AugmentConfig, views: int = 2):
    return jax.jit(partial(view_params.draw_views, config=config, views=views))


def tiles(rows: int = ROWS, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth colours, with pure, grey, black and white pixels among them."""
    rng = np.random.default_rng(7)
    coarse = torch.from_numpy(rng.integers(0, 256, (rows, 3, 9, 9)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    pixels = smooth.permute(0, 2, 3, 1).round().numpy().astype(np.uint8)
    special = np.array([[0] * 3, [255] * 3, [128] * 3, [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    pixels[:, 5::7, 3::5] = special[rng.integers(0, 6, pixels[:, 5::7, 3::5].shape[:3])]
    return pixels


def params(rows: int = ROWS, **changes) -> ViewParams:
    """Views that show a middle square as it is, but for `changes` (rows, ...)."""
    plain = ViewParams(
        crop=np.tile([9, 11, SIDE, SIDE], (rows, 1)).astype(np.int32),
        turns=np.zeros(rows, np.int32),
        flip_y=np.zeros(rows, bool),
        flip_x=np.zeros(rows, bool),
        place=np.tile(np.arange(4, dtype=np.int32), (rows, 1)),
        factors=np.tile(np.float32(view_params.NEUTRAL), (rows, 1)),
        grey=np.zeros(rows, bool),
        sigma=np.zeros(rows, np.float32),
    )
    return jax.tree.map(lambda a: a[:, None], plain._replace(**changes))


def torchvision_view(tile: np.ndarray, view: ViewParams, side: int = SIDE) -> np.ndarray:
    """The same view by torchvision, (side, side, 3) in 0..1; leaves without (N, V)."""
    top, left, height, width = (int(a) for a in view.crop)
    image = torch.from_numpy(tile).permute(2, 0, 1).float() / 255
    image = F.resize(image[:, top : top + height, left : left + width], [side, side])
    image = torch.rot90(image, int(view.turns), (1, 2))
    image = F.vertical_flip(image) if view.flip_y else image
    image = F.horizontal_flip(image) if view.flip_x else image
    for operation in np.argsort(view.place):
        image = COLOUR[operation](image, float(view.factors[operation]))
    image = F.rgb_to_grayscale(image, 3) if view.grey else image
    if view.sigma > 0:
        taps = 2 * int(0.1 * side / 2) + 1
        image = F.gaussian_blur(image, [taps, taps], [float(view.sigma)] * 2)
    return image.permute(1, 2, 0).numpy()


def assert_as_torchvision(views, images, drawn: ViewParams, tolerance=2 * LEVEL, side=SIDE):
    views, drawn = np.asarray(views), jax.tree.map(np.asarray, drawn)
    for n, v in np.ndindex(views.shape[:2]):
        view = jax.tree.map(lambda a, n=n, v=v: a[n, v], drawn)
        expected = torchvision_view(images[n], view, side)
        np.testing.assert_allclose(views[n, v], expected, atol=tolerance, rtol=0, err_msg=str(view))


def turned() -> dict[str, np.ndarray]:
    every = np.arange(ROWS)
    return {
        "turns": (every % 4).astype(np.int32),
        "flip_y": every // 4 % 2 == 1,
        "flip_x": every // 8 == 1,
    }


def boxes() -> dict[str, np.ndarray]:
    """Up to 48 times larger, down to 1.7 times smaller, at every edge."""
    some = [(0, 0, 72, 80), (0, 0, 1, 1), (71, 79, 1, 1), (0, 70, 72, 10), (70, 0, 2, 80)]
    rng = np.random.default_rng(3)
    size = rng.integers(4, 73, (ROWS - len(some), 2))
    corner = (rng.random(size.shape) * (np.array([HEIGHT, WIDTH]) - size + 1)).astype(int)
    return {"crop": np.concatenate([some, np.hstack([corner, size])]).astype(np.int32)}


def factors(operation: int, low: float, high: float) -> dict[str, np.ndarray]:
    values = np.tile(np.float32(view_params.NEUTRAL), (ROWS, 1))
    values[:, operation] = np.linspace(low, high, ROWS)
    return {"factors": values}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(boxes(), id="crop and resize"),
        pytest.param(turned(), id="turns and flips"),
        pytest.param(turned() | boxes(), id="all geometry"),
        pytest.param(factors(view_params.BRIGHTNESS, 0.0, 1.8), id="brightness"),
        pytest.param(factors(view_params.CONTRAST, 0.0, 1.8), id="contrast"),
        pytest.param(factors(view_params.SATURATION, 0.0, 1.8), id="saturation"),
        pytest.param(factors(view_params.HUE, -0.5, 0.5), id="hue"),
        pytest.param({"grey": np.ones(ROWS, bool)}, id="grey"),
        pytest.param({"sigma": np.linspace(0.1, 2.0, ROWS, dtype=np.float32)}, id="blur"),
    ],
)
def test_one_transform_is_torchvisions(form, changes):
    images, given = tiles(), params(**changes)
    assert_as_torchvision(compiled(form)(given, images), images, given)


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_chain_is_torchvisions_in_every_order(form):
    images = tiles(16)
    sizes = np.tile(np.int32([HEIGHT, WIDTH]), (16, 1))
    drawn = drawing(EVERYTHING)(jax.random.key(5), sizes)
    orders = np.array(list(permutations(range(4))), np.int32)
    drawn = drawn._replace(place=np.resize(orders, (16, 2, 4)))
    assert_as_torchvision(compiled(form)(drawn, images), images, drawn, tolerance=0.1 * LEVEL)


@pytest.mark.parametrize("form", FORMS)
def test_large_reduction_is_torchvisions(form):
    """From 256 to 24 px a pixel of the view is the mean of some hundred."""
    images = tiles(2, 256, 250)
    crop = np.int32([[0, 0, 256, 250], [30, 40, 200, 111]])
    given = params(2, crop=crop)
    views = compiled(form, side=24)(given, images)
    assert_as_torchvision(views, images, given, tolerance=0.1 * LEVEL, side=24)


@pytest.mark.parametrize(("side", "taps"), [(224, 23), (96, 9)])
def test_blur_has_torchvisions_kernel_and_edges(side, taps):
    sigma = np.float32([[0.0, 0.1, 0.9, 2.0]])
    image = tiles(1, side, side)[0] / np.float32(255)
    planes = np.broadcast_to(image.transpose(2, 0, 1), (1, 4, 3, side, side))
    weights = transforms.blur_weights(jnp.asarray(sigma), side)
    assert weights.shape == (1, 4, taps)
    matrix = transforms.blur_matrix(jnp.asarray(sigma), side)
    by_products = augment.blur(jnp.asarray(planes.swapaxes(2, 3)), matrix).swapaxes(2, 3)
    for i, value in enumerate(sigma[0]):
        expected = torch.from_numpy(planes[0, i].copy())
        if value > 0:
            expected = F.gaussian_blur(expected, [taps, taps], [float(value)] * 2)
        by_taps = augment.blur_taps(jnp.asarray(planes[0, i]), weights[0, i])
        np.testing.assert_allclose(by_taps, expected, atol=1e-5)
        np.testing.assert_allclose(by_products[0, i], expected, atol=1e-5)


def test_bfloat16_products_stay_close():
    images, given = tiles(), params(**turned(), **boxes(), sigma=np.full(ROWS, 1.5, np.float32))
    views = compiled(augment.views_by_products, dtype=jnp.bfloat16)(given, images)
    assert views.dtype == jnp.bfloat16
    assert_as_torchvision(views.astype(jnp.float32), images, given, tolerance=4 * LEVEL)


def test_nothing_switched_on_gives_the_tile_back():
    images = tiles(4, SIDE, SIDE)
    still = AugmentConfig(
        crop_area=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        rot90=False,
        flips=False,
        jitter="none",
        blur_probability=0.0,
    )
    sizes = np.full((4, 2), SIDE, np.int32)
    views = augment.two_views(jax.random.key(0), images, sizes, SIDE, still)
    assert views.shape == (4, 2, SIDE, SIDE, 3)
    for view in (0, 1):
        np.testing.assert_allclose(views[:, view], images / np.float32(255), atol=1e-6)


def test_what_lies_outside_the_tile_never_shows():
    images = tiles(8)
    sizes = np.int32([[20 + 5 * n, 76 - 6 * n] for n in range(8)])
    outside = np.ones(images.shape[:3], bool)
    for n, (height, width) in enumerate(sizes):
        outside[n, :height, :width] = False
    black, white = images.copy(), images.copy()
    black[outside], white[outside] = 0, 255
    drawn = drawing(EVERYTHING)(jax.random.key(2), sizes)
    for form in FORMS:
        views = compiled(form)
        np.testing.assert_array_equal(views(drawn, black), views(drawn, white))


@cache
def draws(config: AugmentConfig, rows: int = 10_000, size=(300, 400)) -> ViewParams:
    sizes = np.tile(np.int32(size), (rows, 1))
    return jax.tree.map(np.asarray, drawing(config)(jax.random.key(11), sizes))


def test_parameters_are_drawn_as_stated():
    drawn = draws(EVERYTHING)
    views = drawn.turns.size
    assert stats.chisquare(np.bincount(drawn.turns.ravel(), minlength=4)).pvalue > 1e-3
    changed = (drawn.factors != np.float32(view_params.NEUTRAL)).any(-1)
    for happened, probability in [
        (drawn.flip_y, 0.5),
        (drawn.flip_x, 0.5),
        (drawn.sigma > 0, 0.5),
        (changed, 0.8),
        (drawn.grey, 0.2),
    ]:
        assert stats.binomtest(int(happened.sum()), views, probability).pvalue > 1e-3
    orders = np.unique(drawn.place.reshape(-1, 4), axis=0, return_counts=True)[1]
    assert len(orders) == 24
    assert stats.chisquare(orders).pvalue > 1e-3
    assert stats.kstest(drawn.sigma[drawn.sigma > 0], stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    for k, (low, width) in enumerate([(0.2, 1.6)] * 3 + [(-0.2, 0.4)]):
        values = drawn.factors[..., k][changed]
        assert stats.kstest(values, stats.uniform(low, width).cdf).pvalue > 1e-3


@pytest.mark.parametrize("area", [(0.01, 1.0), (0.05, 1.0)])
def test_crops_are_distributed_as_torchvisions(area):
    ours = draws(AugmentConfig(crop_area=area), rows=3000).crop.reshape(-1, 4)
    torch.manual_seed(0)
    image = torch.zeros(1, 300, 400)
    draw = T.RandomResizedCrop(8, scale=area)
    drawn = [draw.make_params([image]) for _ in range(len(ours))]
    theirs = np.array([[p[k] for k in ("top", "left", "height", "width")] for p in drawn])
    for measure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    ):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3
    share = ours[:, 2] * ours[:, 3] / (300 * 400)
    assert share.min() > area[0] * 0.95
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= [300, 400]).all()


@pytest.mark.parametrize("size", [(100, 10), (10, 100), (30, 30)])
def test_a_crop_that_cannot_fit_is_torchvisions_middle(size):
    """All of a narrow tile's area has no allowed ratio; a square's has, seldom, or is whole."""
    whole = AugmentConfig(crop_area=(1.0, 1.0))
    ours = draws(whole, rows=4, size=size).crop.reshape(-1, 4)
    given = T.RandomResizedCrop(8, scale=(1.0, 1.0)).make_params([torch.zeros(1, *size)])
    np.testing.assert_array_equal(
        ours, [[given[k] for k in ("top", "left", "height", "width")]] * 8
    )


@pytest.mark.parametrize(
    ("name", "strength", "shift"),
    [("none", 0.0, 0.0), ("light", 0.4, 0.2), ("medium", 0.8, 0.2), ("heavy", 0.8, 0.4)],
)
def test_jitter_presets_have_the_papers_ranges(name, strength, shift):
    values = draws(AugmentConfig(jitter=name, jitter_probability=1.0), rows=500).factors
    low, high = values.min((0, 1)), values.max((0, 1))
    expected = np.array([1 - strength] * 3 + [-shift])
    np.testing.assert_allclose(low, expected, atol=0.02)
    np.testing.assert_allclose(high, [1 + strength] * 3 + [shift], atol=0.02)


def test_parameters_depend_on_key_row_and_view_alone():
    sizes = np.tile(np.int32([60, 70]), (12, 1))
    few = drawing(EVERYTHING)(jax.random.key(1), sizes[:3])
    many = drawing(EVERYTHING)(jax.random.key(1), sizes)
    three = drawing(EVERYTHING, views=3)(jax.random.key(1), sizes[:3])
    other = drawing(EVERYTHING)(jax.random.key(2), sizes)
    for a, b, c in zip(few, many, three, strict=True):
        np.testing.assert_array_equal(a, b[:3])
        np.testing.assert_array_equal(a, c[:, :2])
    flat = np.asarray(many.crop).reshape(24, -1)
    assert len(np.unique(flat, axis=0)) == 24
    assert not (np.asarray(many.crop) == np.asarray(other.crop)).all(-1).any()


@pytest.mark.parametrize(
    ("axis_type", "form"),
    [
        pytest.param(AxisType.Explicit, None, marks=pytest.mark.slow),
        pytest.param(AxisType.Auto, None, marks=pytest.mark.slow),
        (AxisType.Explicit, augment.views_by_products),
    ],
)
def test_four_devices_give_the_same_views_and_send_nothing(axis_type, form, monkeypatch):
    if form is not None:
        monkeypatch.setattr(augment, "_local_views", form)
    images, sizes = tiles(8, 32, 40), np.tile(np.int32([30, 40]), (8, 1))
    views = jax.jit(lambda *batch: augment.two_views(*batch, 24, EVERYTHING))
    alone = views(jax.random.key(4), images, sizes)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        split = jax.device_put((images, sizes), NamedSharding(mesh, P("data")))
        together = views.lower(jax.random.key(4), *split).compile()
        result = together(jax.random.key(4), *split)
    assert result.sharding.spec[0] == "data"
    assert re.findall(r"all-\w+|collective-\w+|reduce-scatter", together.as_text()) == []
    np.testing.assert_allclose(result, alone, atol=1e-6)


def test_a_batch_that_the_mesh_does_not_divide_still_works():
    images, sizes = tiles(3, 32, 32), np.tile(np.int32([32, 32]), (3, 1))
    plain = replace(EVERYTHING, jitter="none", grey_probability=0.0, blur_probability=0.0)
    views = jax.jit(lambda *batch: augment.two_views(*batch, 24, plain))
    alone = views(jax.random.key(4), images, sizes)
    with jax.set_mesh(jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))):
        np.testing.assert_allclose(views(jax.random.key(4), images, sizes), alone, atol=1e-6)
