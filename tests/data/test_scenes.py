"""Procedural scenes: masks are where the objects are, words are true, a seed gives one scene."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tap_llm.data.backgrounds import Backgrounds
from tap_llm.data.scenes import LARGEST, MIN_PIXELS, SMALLEST, Scene, SceneComposer
from tap_llm.data.shapes import SHAPE_COLOURS, SHAPE_NAMES, TEXTURES, draw_shape, shape_alpha
from tap_llm.data.sprites import Sprite, SpriteLibrary
from tap_llm.errors import InputError
from tap_llm.masks import mask_to_box


@pytest.fixture(scope="module")
def library() -> SpriteLibrary:
    return SpriteLibrary.bundled()


@pytest.fixture(scope="module")
def composer(library: SpriteLibrary) -> SceneComposer:
    return SceneComposer(library, shape_share=0.4)


def solid_sprite(name: str = "disc", kind: str = "object") -> Sprite:
    """A magenta disc of 100 pixels, cut in half by transparency."""
    y, x = np.mgrid[:100, :100] - 49.5
    alpha = ((x**2 + y**2 < 49**2) & (x < 20)).astype(np.uint8) * 255
    pixels = np.stack([alpha, 0 * alpha, alpha, alpha], axis=2)
    return Sprite(name, f"a {name}", kind, kind, kind, ("pink",), pixels)


@pytest.fixture
def dark_picture(tmp_path: Path) -> Path:
    Image.new("RGB", (200, 150), (10, 90, 20)).save(tmp_path / "dark.png")
    return tmp_path / "dark.png"


def same(first: Scene, second: Scene) -> bool:
    equal = np.array_equal(first.image, second.image) and np.array_equal(first.masks, second.masks)
    return equal and first.captions == second.captions and first.things == second.things


# Pictures and masks


@pytest.mark.parametrize("form", ["scene", "mosaic"])
def test_a_seed_gives_one_scene(composer: SceneComposer, library: SpriteLibrary, form: str) -> None:
    first = getattr(composer, form)(5)
    getattr(composer, form)(6)
    assert same(first, getattr(composer, form)(5))
    assert same(first, getattr(SceneComposer(library, shape_share=0.4), form)(5))
    assert not same(first, getattr(composer, form)(6))


def test_a_copy_in_another_process_makes_the_same_scenes(library: SpriteLibrary, dark_picture: Path) -> None:
    composer = SceneComposer(library, [dark_picture], drawn_share=0)
    first = composer.scene(3)
    data = pickle.dumps(composer)
    assert same(first, pickle.loads(data).scene(3))
    assert len(data) < 1.1 * sum(sprite.pixels.nbytes for sprite in library.sprites)  # backgrounds stay behind


@pytest.mark.parametrize("size", [(400, 300), (96, 160), (64, 64)])
@pytest.mark.parametrize("form", ["scene", "mosaic"])
def test_masks_are_disjoint_and_visible(composer: SceneComposer, form: str, size: tuple[int, int]) -> None:
    for seed in range(8):
        scene = getattr(composer, form)(seed, size)
        count = len(scene.names)
        assert scene.image.shape == (size[1], size[0], 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (count, size[1], size[0]) and scene.masks.dtype == np.bool_
        assert scene.masks.sum(axis=0).max(initial=0) <= 1
        assert all(mask.sum() >= MIN_PIXELS for mask in scene.masks)
        assert all(0.5 <= share <= 1 for share in scene.visible)
        columns = (scene.captions, scene.things, scene.kinds, scene.attributes, scene.visible)
        assert {len(column) for column in columns} == {count}


def test_masks_lie_exactly_on_the_objects(dark_picture: Path) -> None:
    composer = SceneComposer(SpriteLibrary([solid_sprite()]), [dark_picture], shape_share=0, drawn_share=0)
    overlaps = []
    for seed in range(8):
        scene = composer.scene(seed, (320, 240))
        pink = scene.image[..., 0].astype(int) - scene.image[..., 1] > 90
        union = scene.masks.any(axis=0)
        overlaps.append((pink & union).sum() / (pink | union).sum())
    assert min(overlaps) > 0.93 and np.mean(overlaps) > 0.97


def test_sizes_and_numbers_follow_the_recipe(library: SpriteLibrary) -> None:
    composer = SceneComposer(library, shape_share=0)
    scenes = [composer.scene(seed) for seed in range(40)]
    counts = [len(scene.names) for scene in scenes]
    assert min(counts) >= 1 and max(counts) == 7 and 4.3 < np.mean(counts) < 5.3
    sides = []
    for scene in scenes:
        for mask, share in zip(scene.masks, scene.visible, strict=True):
            x0, y0, x1, y1 = mask_to_box(mask) or (0, 0, 0, 0)
            if share == 1 and x0 > 0 and y0 > 0 and x1 < 400 and y1 < 300:
                sides.append(max(x1 - x0, y1 - y0) / 300)
    assert min(sides) > SMALLEST - 0.03 and max(sides) < LARGEST + 0.05  # turning makes a box a little larger


def test_a_mosaic_has_one_object_in_each_cell(composer: SceneComposer) -> None:
    scene = composer.mosaic(1, (200, 160), grid=4)
    cells = set()
    for mask in scene.masks:
        x0, y0, x1, y1 = mask_to_box(mask) or (0, 0, 0, 0)
        assert (x0 // 50, y0 // 40) == ((x1 - 1) // 50, (y1 - 1) // 40)
        cells.add((x0 // 50, y0 // 40))
    assert len(cells) == len(scene.names) and len(cells) >= 15


def test_shapes_alone_need_no_files() -> None:
    scene = SceneComposer().scene(0)
    assert set(scene.kinds) == {"shape"} and set(scene.names) <= set(SHAPE_NAMES)
    for name, attributes, colours in zip(scene.names, scene.attributes, scene.colours, strict=True):
        assert attributes["shape"] == name and attributes["colour"] == colours[0]
        assert attributes["texture"] in TEXTURES and attributes["size"] in ("small", "medium", "large")


def test_shape_share_is_kept(library: SpriteLibrary) -> None:
    kinds = [kind for seed in range(24) for kind in SceneComposer(library, shape_share=0.25).mosaic(seed).kinds]
    assert 0.19 < kinds.count("shape") / len(kinds) < 0.31


# Shapes


def test_there_are_many_shapes_and_they_differ() -> None:
    assert len(SHAPE_NAMES) >= 20 and all(" " not in name for name in SHAPE_NAMES)
    covers = {name: shape_alpha(name, 64) > 127 for name in SHAPE_NAMES}
    for first in SHAPE_NAMES:
        for second in SHAPE_NAMES:
            a, b = covers[first], covers[second]
            assert first == second or (a & b).sum() < 0.96 * (a | b).sum(), (first, second)


def test_a_shape_has_its_main_colour() -> None:
    from tap_llm.data.colours import name_colours

    rng = np.random.default_rng(0)
    shapes = [draw_shape(rng, 60) for _ in range(150)]
    right = [name_colours(s.pixels[..., :3][s.pixels[..., 3] > 250])[0] == s.colours[0] for s in shapes]
    assert np.mean(right) > 0.93 and {s.colours[0] for s in shapes} == set(SHAPE_COLOURS)


# Words


def test_captions_hold_name_and_colour(composer: SceneComposer) -> None:
    from tap_llm.data.colours import words_in

    coloured = total = 0
    for seed in range(25):
        scene = composer.scene(seed)
        for name, captions, colours in zip(scene.names, scene.captions, scene.colours, strict=True):
            assert len(captions) == 3 and all(name in caption for caption in captions)
            assert all(caption == caption.lower() and caption == " ".join(caption.split()) for caption in captions)
            total += len(captions)
            coloured += sum(bool(set(words_in(caption)) & set(colours)) for caption in captions)
    assert coloured > 0.85 * total


def test_an_object_that_is_hidden_says_by_what(composer: SceneComposer) -> None:
    said = 0
    for seed in range(30):
        scene = composer.scene(seed)
        for captions, share in zip(scene.captions, scene.visible, strict=True):
            hidden = ", partly hidden by " in captions[1]
            assert hidden or share > 0.9  # several objects may each take a little
            assert not hidden or share < 0.97
            said += hidden
    assert said > 10


def test_a_phrase_without_its_name_gets_no_captions(library: SpriteLibrary) -> None:
    from dataclasses import replace

    odd = replace(library.sprites[0], name="person: bald", phrase="a bald person")
    scene = SceneComposer(SpriteLibrary([odd]), shape_share=0).scene(0)
    assert set(scene.names) == {"person: bald"} and not any(scene.captions)


def test_a_scene_becomes_a_sample(composer: SceneComposer) -> None:
    scene = composer.scene(2)
    sample = scene.to_sample()
    sample.check()
    assert np.array_equal(sample.masks(), scene.masks)
    assert [region["category"] for region in sample.regions] == scene.names
    assert sample.regions[0]["attributes"]["phrase"] == scene.phrases[0] and sample.conversations == []


# Backgrounds


def test_backgrounds_from_folder_file_and_json(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("deep/a.png", "b.jpg"):
        Image.new("RGB", (80, 60), "red").save(tmp_path / name)
    (tmp_path / "train.json").write_text('{"images": [{"file_name": "b.jpg"}]}')
    assert len(Backgrounds([tmp_path])) == 2
    assert len(Backgrounds([tmp_path / "train.json"])) == 1
    crop = Backgrounds([tmp_path / "b.jpg"]).crop(np.random.default_rng(0), (50, 90))
    assert crop.size == (50, 90) and crop.getpixel((20, 40))[0] > 240


# Bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shape_share": 1.5}, "shape_share"),
        ({"objects": (5, 2)}, "objects"),
        ({"backgrounds": ["/nowhere"]}, "/nowhere"),
    ],
)
def test_impossible_settings_are_named(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        SceneComposer(**settings)


def test_impossible_scenes_are_named() -> None:
    composer = SceneComposer()
    for call in (
        lambda: composer.scene(-1),
        lambda: composer.scene(0, (16, 400)),
        lambda: composer.scene(0, (10**6, 10**6)),
    ):
        with pytest.raises(InputError):
            call()
    with pytest.raises(InputError, match="1 to 4 cells"):
        composer.mosaic(0, (64, 64), grid=5)
