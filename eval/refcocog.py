"""Region captions on RefCOCOg, validation: say what tells an object from the others.

    python -m eval.refcocog --model tap_vit_l_v1_1 --tokenizer tokenizer.model --images train2014 \\
        --data finetune_refcocog_val_captions.json --out glamm.json
    python -m eval.refcocog --protocol refcocog-osprey --data finetune_refcocog_val_with_mask.json --images train2014 …

Download COCO's train2014 and the file of GLaMM or of Osprey (sunshine-lwt/Osprey-ValData). They are two protocols:

    refcocog-glamm    box prompt; all captions of an image record are references for its one region
    refcocog-osprey   mask prompt; every record is an item of its own with one reference

All answers are greedy, while Osprey itself samples at T = 0.2. In both files an image record is one expression, so a
picture is listed several times; it is encoded once. METEOR of ASM and ASMv2 (near 21) comes from another grouping.
Published: GLaMM METEOR 16.2, CIDEr 105.0; Osprey-7B 16.6, 108.3; DynRefer 18.1, 115.3. TAP has published none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .base import Run
from .caption_records import CaptionProtocol
from .command import cli
from .region_captions import caption_command

FOLDERS = ("train2014",)
DETAILED = ("Can you provide me with a detailed description of the region in the picture marked by ", "?")
SHORT = ("Please give me a short description of ", ".")
PROTOCOLS = {
    "refcocog-glamm": CaptionProtocol("refcocog-glamm-v1", DETAILED, folders=FOLDERS, together=True),
    "refcocog-osprey": CaptionProtocol("refcocog-osprey-v1", SHORT, "mask", folders=FOLDERS),
}


def main(arguments: Sequence[str] | None = None) -> Run | None:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    return caption_command("refcocog", __doc__, PROTOCOLS, arguments)


if __name__ == "__main__":
    sys.exit(cli(main))
