"""The pictures of the page in the documentation: `make screenshots`, after `make demo`.

python -m docs.screenshots [--root .] [--experiment demo]
"""

from __future__ import annotations

from pathlib import Path

import click

from tests.browser import Watched, browser, server

FOLDER = Path(__file__).parent / "screenshots"
TRAIT = "style/formality"
VIEWS = {
    "dynamics": "prompt=1&trait=behavioral/refusal&shown=behavioral/refusal,affect/empathy,style/formality&token=51",
    "layers": f"prompt=6&trait={TRAIT}&token=64&layer=20",
    "lens": "prompt=3&token=46&layer=24",
    "attention": "prompt=1&token=80&layer=20&head=4&measure=largest",
    "vectors": f"trait={TRAIT}",
    "samples": "view=dynamics&set=adhoc&prompt=1.s1&trait=behavioral/refusal&shown=behavioral/refusal",
    "compare": f"trait={TRAIT}&prompt=6&set2=dynamic&average2=1&theme=dark",
}
# docs/screenshots/difference.png is of the example in docs/compare.md.


@click.command()
@click.option("--root", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path("."))
@click.option("--experiment", default="demo", show_default=True)
def main(root: Path, experiment: str) -> None:
    """Write a PNG of each view."""
    FOLDER.mkdir(exist_ok=True)
    with server(root, experiment) as (base, _), browser() as launched:
        context = launched.new_context(viewport={"width": 1280, "height": 860})
        for view, state in VIEWS.items():
            page = Watched(context, base)
            theme = "" if "theme=" in state else "&theme=light"
            page.open(f"view={view}&experiment={experiment}&set=single_trait{theme}&{state}")
            page.page.screenshot(path=FOLDER / f"{view}.png")
            page.page.close()
            if page.wrong:
                raise SystemExit(f"{view}: {page.wrong}")
            click.echo(f"docs/screenshots/{view}.png")


if __name__ == "__main__":
    main()
