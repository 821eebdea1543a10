"""Region captions on Visual Genome. Three test files circulate, and CIDEr-D depends on the file.

    python -m eval.vg --model tap_vit_l_v1_1 --tokenizer tokenizer.model --data test.json --images VG --out vg.json
    python -m eval.vg --protocol vg-one --data test_caption.json --images VG --model … --out vg-one.json

Download the pictures of Visual Genome 1.2 (VG_100K and VG_100K_2, side by side or in one folder), and for

    vg-full   VG_preprocessed_annotations/test.json of GRiT: 5,000 images, 232,935 regions (TAP, GRiT, GPT4RoI, ASM)
    vg-one    test_caption.json of GLaMM: one region per image (GLaMM, Groma, Osprey, ControlCap, DynRefer)
    vg-5k     vg_val_5000.json of VideoRefer: 5,000 regions, given as filled boxes (VideoRefer, PixelRefer)

TAP's protocol: two corner points, semantic token 0, greedy, up to 38 new tokens; every region is an item of its own
with one reference. Scored by pycocoevalcap's tokenizer, BLEU, METEOR, ROUGE-L and CIDEr-D, which need Java.
Published on vg-full: TAP-L v1.1 METEOR 17.9, CIDEr 154.7 (here as shares: 0.179, 1.547).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .base import Run
from .caption_records import CaptionProtocol
from .command import cli
from .region_captions import caption_command

FOLDERS = ("VG_100K", "VG_100K_2", "images")
QUESTION = ("Please give me a short description of ", ".")
PROTOCOLS = {
    "vg-full": CaptionProtocol("vg-full-v1", QUESTION, folders=FOLDERS, regions="several"),
    "vg-one": CaptionProtocol("vg-one-v1", QUESTION, folders=FOLDERS, regions="one"),
    "vg-5k": CaptionProtocol("vg-5k-v1", QUESTION, folders=FOLDERS),
}


def main(arguments: Sequence[str] | None = None) -> Run | None:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    return caption_command("vg", __doc__, PROTOCOLS, arguments)


if __name__ == "__main__":
    sys.exit(cli(main))
