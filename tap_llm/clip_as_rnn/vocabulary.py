"""Word lists of CaR (arXiv:2312.07661): templates, backgrounds, and the names that its data sets are asked for."""

from __future__ import annotations

ORIGAMI = "a clean origami {}."
_SIZES = ("small", "medium", "large")
TEMPLATES = (
    ORIGAMI,
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    *(f"a photo of a {size} {{}}." for size in _SIZES),
    *(f"This is a photo of a {size} {{}}." for size in _SIZES),
    *(f"There is a {size} {{}} in the scene." for size in _SIZES),
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


BACKGROUND = _words(
    "ground land grass tree building wall sky lake water river sea railway railroad helmet cloud house mountain ocean "
    "road rock street valley bridge"
)
BACKGROUND_TERRESTRIAL = _words(
    "ground land grass tree mountain rock valley earth terrain forest bush hill field pasture meadow plateau cliff "
    "canyon ridge peak plain prairie tundra savanna steppe crag knoll dune glen dale copse thicket"
)
BACKGROUND_AQUATIC = _words(
    "sea ocean lake water river sky cloud pond stream lagoon bay gulf fjord estuary creek brook reservoir pool spring "
    "marsh swamp wetland glacier iceberg atmosphere stratosphere mist fog rain drizzle hail sleet snow thunderstorm "
    "breeze wind gust hurricane tornado monsoon cumulus cirrus stratus nimbus"
)
BACKGROUND_MAN_MADE = _words(
    "building house wall road street railway railroad bridge edifice structure apartment condominium skyscraper "
    "highway boulevard lane alley byway avenue expressway freeway path overpass underpass viaduct tunnel footbridge "
    "crosswalk culvert dam archway causeway plaza square station terminal"
)
BACKGROUND_LARGE = BACKGROUND_TERRESTRIAL + BACKGROUND_AQUATIC + BACKGROUND_MAN_MADE  # of the paper's ablation

VOC_QUERIES = (
    "aeroplane", "bicycle", "bird avian", "boat", "bottle", "bus", "car", "cat", "chair seat", "cow", "diningtable",
    "dog", "horse", "motorbike", "person with clothes,people,human", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor screen",
)  # fmt: skip
# "sknowboard" is what the published numbers were asked with.
COCO_QUERIES = (
    "person with clothes,people,human", "bicycle", "car", "motorbike", "aeroplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird avian", "cat", "dog", "horse",
    "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack,bag", "umbrella,parasol", "handbag,purse",
    "necktie", "suitcase", "frisbee", "skis", "sknowboard", "sports ball", "kite", "baseball bat", "glove",
    "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "dessertspoon", "bowl",
    "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair seat",
    "sofa", "pottedplant", "bed", "diningtable", "toilet", "tvmonitor screen", "laptop", "mouse", "remote control",
    "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase",
    "scissors", "teddy bear", "hairdrier,blowdrier", "toothbrush",
)  # fmt: skip
CONTEXT_STUFF = _words(
    "bedclothes ceiling cloth curtain floor grass ground light mountain platform road sidewalk sky snow wall water "
    "window wood door fence rock"
)

__all__ = [
    "BACKGROUND",
    "BACKGROUND_AQUATIC",
    "BACKGROUND_LARGE",
    "BACKGROUND_MAN_MADE",
    "BACKGROUND_TERRESTRIAL",
    "COCO_QUERIES",
    "CONTEXT_STUFF",
    "ORIGAMI",
    "TEMPLATES",
    "VOC_QUERIES",
]
