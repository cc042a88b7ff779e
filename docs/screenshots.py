"""The pictures of the page in the documentation: `make screenshots`, after `make demo`.

Each view in light, and on one sheet each all views in dark and on a phone.

python -m docs.screenshots [--root .] [--experiment demo] [--only matrix,dark] [--axe]
"""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import click
from PIL import Image

from tests.browser import Watched, browser, server

FOLDER = Path(__file__).parent / "screenshots"
TRAIT = "style/formality"
VIEWS = {
    "overview": "prompt=1",
    "dynamics": "prompt=1&trait=behavioral/refusal&shown=behavioral/refusal,affect/empathy,style/formality&token=51",
    "layers": f"prompt=6&trait={TRAIT}&token=64&layer=20",
    "lens": "prompt=3&token=46&layer=24",
    "attention": "prompt=1&token=80&layer=9&head=0&measure=largest",
    "matrix": "view=attention&mode=matrix&prompt=1&layer=12&fold=1&token=70",
    "heads": "view=attention&mode=heads&prompt=1&measure=distance&layer=20&head=4",
    "internals": "prompt=1&token=60&layer=20",
    "vectors": f"trait={TRAIT}",
    "samples": "view=dynamics&set=adhoc&prompt=1.s1&trait=behavioral/refusal&shown=behavioral/refusal",
    "compare": f"trait={TRAIT}&prompt=6&set2=dynamic&average2=1",
    "difference": "trait=behavioral/refusal&prompt=1&token=60",
    "steered": "view=compare&set=single_trait@steered&trait=behavioral/refusal&prompt=1&set2=single_trait&prompt2=1",
}
MORE = {
    "prompts": f"view=compare&trait={TRAIT}&prompt=6&prompt2=5",
}
SHEETS = {
    "dark": ("dark", (1280, 860), 3, 2),
    "phone": ("light", (390, 1300), 5, 2),
}  # theme, window, columns, shrunk by
ON_SHEETS = [*(view for view in VIEWS if view not in ("samples", "compare", "steered")), *MORE]
TALL = ("matrix", "heads", "internals")  # pictured as a whole
COLOURS = 256  # of a sheet, which makes it a third as large


@click.command()
@click.option("--root", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path("."))
@click.option("--experiment", default="demo", show_default=True)
@click.option("--only", default=",".join([*VIEWS, *SHEETS]), help="Pictures to make, comma-separated.")
@click.option("--axe", is_flag=True, help="Make none, and print what axe-core finds on each view, light and dark.")
def main(root: Path, experiment: str, only: str, axe: bool) -> None:
    """Write a PNG of each view, and the sheets."""
    if axe:
        return _count_violations(root, experiment)
    FOLDER.mkdir(exist_ok=True)
    wanted = only.split(",")
    with server(root, experiment) as (base, _), browser() as launched:
        context = launched.new_context(viewport={"width": 1280, "height": 860})
        for view in (each for each in VIEWS if each in wanted):
            _write(view, _shot(context, base, experiment, view, "light", is_whole=view in TALL))
        for name, (theme, (width, height), columns, shrink) in SHEETS.items():
            if name in wanted:
                context = launched.new_context(viewport={"width": width, "height": height})
                pictures = [_shot(context, base, experiment, each, theme) for each in ON_SHEETS]
                _write(name, _sheet(pictures, columns, shrink))


def _count_violations(root: Path, experiment: str) -> None:
    with server(root, experiment) as (base, _), browser() as launched:
        context = launched.new_context(viewport={"width": 1280, "height": 860})
        for view in [*VIEWS, *MORE]:
            counts = []
            for theme in ("light", "dark"):
                page = _opened(context, base, experiment, view, theme)
                found = Counter(each["impact"] for each in page.violations() for _ in each["nodes"])
                counts.append(f"{theme} {', '.join(f'{n} {impact}' for impact, n in found.items()) or 0}")
                page.page.close()
            click.echo(f"{view}: {'; '.join(counts)}")


def _opened(context: Any, base: str, experiment: str, view: str, theme: str) -> Watched:
    page = Watched(context, base)
    own = MORE.get(view) or VIEWS[view]
    state = own if "view=" in own else f"view={view}&{own}"
    page.open(f"experiment={experiment}&set=single_trait&theme={theme}&{state}")
    page.page.wait_for_selector("text=Reading what stands out", state="detached")
    return page


def _shot(context: Any, base: str, experiment: str, view: str, theme: str, *, is_whole: bool = False) -> Image.Image:
    page = _opened(context, base, experiment, view, theme)
    picture = Image.open(io.BytesIO(page.page.screenshot(full_page=is_whole)))
    page.page.close()
    if page.wrong:
        raise SystemExit(f"{view}: {page.wrong}")
    return picture.convert("RGB")


def _sheet(pictures: list[Image.Image], columns: int, shrink: int) -> Image.Image:
    width, height = (side // shrink for side in pictures[0].size)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 6) - 6, rows * (height + 6) - 6), "#808080")
    for number, picture in enumerate(pictures):
        place = (number % columns * (width + 6), number // columns * (height + 6))
        sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), place)
    return sheet


def _write(name: str, picture: Image.Image) -> None:
    path = FOLDER / f"{name}.png"
    (picture.quantize(COLOURS) if name in SHEETS else picture).save(path, optimize=True)
    click.echo(f"docs/screenshots/{path.name}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
