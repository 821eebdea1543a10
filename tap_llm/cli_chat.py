"""Command line of region chat: `tap-llm chat`, one question or a dialogue."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_quiet import quiet
from .cli_regions import (
    REGION_OPTIONS,
    BoxOption,
    MaskOption,
    PointOption,
    RegionsOption,
    check_inputs,
    given_regions,
    parse_option,
    region_text,
)
from .errors import InputError

if TYPE_CHECKING:
    from .region_llm.session import ChatSession

_HELP = """\
/region box X0,Y0,X1,Y1    point at a box; the next question may speak of it as "region N"
/region point X,Y [X,Y,0]  point at a spot; X,Y,0 lies outside
/region mask FILE          point at the mask of an image file
/image FILE                show another picture; regions are then on it
/save FILE                 write the conversation as JSON
/help                      this list
/quit                      end"""


def chat(
    ctx: typer.Context,
    image: Annotated[Path, typer.Argument(help="Picture file.", show_default=False)],
    question: Annotated[
        str | None, typer.Argument(help="What to ask; without it a dialogue begins.", show_default=False)
    ] = None,
    box: BoxOption = None,
    point: PointOption = None,
    mask: MaskOption = None,
    regions: RegionsOption = None,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Folder of an adapter or of a whole model, hub id, or bundled name.")
    ] = "tap-tiny-chat",
    tap: Annotated[
        str | None, typer.Option(metavar="NAME", help="For an adapter: its TAP, if it lies elsewhere now.")
    ] = None,
    llm: Annotated[
        str | None, typer.Option(metavar="NAME", help="For an adapter: its LLM, if it lies elsewhere now.")
    ] = None,
    four_bit: Annotated[bool, typer.Option("--four-bit", help="For an adapter: load its LLM in 4 bits.")] = False,
    chat_template: Annotated[
        str | None, typer.Option(metavar="NAME", help="plain, chatml or a file, in place of the model's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = 128,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps. [default: the first accelerator]")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON when the answer is complete.")] = False,
) -> None:
    """Ask about regions; they are called region 1, region 2, ... in the order in which they are given.

    Example: tap-llm chat photo.jpg --box 40,30,300,280 --point 120,80 'Is region 1 larger than region 2?'
    """
    if as_json and question is None:
        raise InputError("--json prints one answer: give a question")
    if question is None and "-" in (regions or []):
        raise InputError("--regions - takes up the standard input: give a question, or a file")
    given = given_regions(ctx, box, point, mask, regions)
    check_inputs(image, given)
    if chat_template is not None:
        from .region_llm.templates import load_template

        chat_template = load_template(chat_template)
    quiet()
    from .region_llm.chat_loading import load_chat_model
    from .region_llm.session import ChatSession

    loaded = load_chat_model(model, device, dtype, tap=tap, llm=llm, four_bit=four_bit)
    session = ChatSession(*loaded, chat_template=chat_template, max_new_tokens=max_new_tokens)
    session.add_image(image)
    for region in given:
        session.add_region(region)
    if question is not None:
        _answer_once(session, question, given, as_json)
        return
    print("ask about the picture; /help lists commands", file=sys.stderr)
    for number, region in enumerate(given, 1):
        _announce(number, region)
    _interact(session, _lines())


def _answer_once(session: ChatSession, question: str, regions: list[dict[str, Any]], as_json: bool) -> None:
    if not as_json:
        _ask(session, question)
        return
    answer = session.ask(question)
    numbered = [{"number": number, **region} for number, region in enumerate(regions, 1)]
    print(json.dumps({"question": question, "answer": answer, "regions": numbered}, ensure_ascii=False))


def _ask(session: ChatSession, question: str) -> None:
    """Print an answer while it grows, and end its line even if it is cut off."""
    begun = False

    def show(text: str) -> None:
        nonlocal begun
        begun = True
        print(text, end="", flush=True)

    try:
        session.ask(question, stream=show)
        begun = True
    finally:
        if begun:
            print()


def _lines() -> Iterator[str]:
    """What the user types, until the end of input."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"the input is not {error.encoding}: {error.reason}") from None


def _interact(session: ChatSession, lines: Iterator[str]) -> None:
    """Answer questions and follow commands; what goes wrong is said, and the dialogue goes on."""
    for line in lines:
        name, _, value = line.partition(" ")
        if name == "/quit":
            return
        try:
            if line.startswith("/"):
                _command(session, name, value.strip())
            elif line:
                _ask(session, line)
        except (InputError, OSError) as error:
            print(f"tap-llm: {' '.join(str(error).split())}", file=sys.stderr)
        except KeyboardInterrupt:
            print("tap-llm: stopped; the question is forgotten", file=sys.stderr)


def _command(session: ChatSession, name: str, value: str) -> None:
    commands: dict[str, Callable[[], None]] = {
        "/region": lambda: _add_region(session, value),
        "/image": lambda: _add_image(session, value),
        "/save": lambda: _save(session, value),
        "/help": lambda: print(_HELP),
    }
    if name not in commands:
        raise InputError(f"unknown command {name}; /help lists them")
    commands[name]()


def _add_region(session: ChatSession, value: str) -> None:
    kind, _, text = value.partition(" ")
    if kind not in REGION_OPTIONS or not text.strip():
        raise InputError("/region takes box X0,Y0,X1,Y1 or point X,Y or mask FILE")
    region = parse_option(kind, text.strip())
    _announce(session.add_region(region), region)


def _add_image(session: ChatSession, value: str) -> None:
    if not value:
        raise InputError("/image takes the name of a picture file")
    print(f"image {session.add_image(value) + 1}: {value}")


def _save(session: ChatSession, value: str) -> None:
    if not value:
        raise InputError("/save takes the name of a file to write")
    session.save(value)
    print(f"saved: {value}")


def _announce(number: int, region: dict[str, Any]) -> None:
    """Print what a region is called, such as `region 1: <box 40,30,300,280>`."""
    print(f"region {number}: <{region_text(region)}>")
