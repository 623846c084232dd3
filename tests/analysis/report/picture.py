"""The picture of the explorer that the README shows: made from the demo.

bhlog demo && python -m tests.analysis.report.picture runs/demo/report.html
"""

import base64
import sys
from pathlib import Path

from tests.analysis.report.browser import browser

ROOT = Path(__file__).parents[3]
PICTURE = ROOT / "analysis" / "report" / "explorer.png"
WIDTH = 1000


def draw(page: Path, out: Path = PICTURE) -> None:
    """Draw the explorer of a page at alpha 0.3, from its title to its plots."""
    with browser(WIDTH, 1600) as shown:
        shown.open(page.absolute())
        shown.set("exact_alpha", 0.3)
        box = shown.run(
            "const from = document.querySelector('#explorer').getBoundingClientRect();"
            "const to = document.querySelector('#explorer .tables').getBoundingClientRect();"
            "return [from.x + scrollX, from.y + scrollY, from.width, to.y - from.y]"
        )
        clip = dict(zip(("x", "y", "width", "height"), box, strict=True), scale=1)
        data = shown.command("Page.captureScreenshot", format="png", clip=clip,
                             captureBeyondViewport=True)  # fmt: skip
        out.write_bytes(base64.b64decode(data["data"]))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1000:.0f} kB")
