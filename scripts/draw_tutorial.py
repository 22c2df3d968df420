"""Draw the pictures of docs/tutorial/first-steps.md to docs/assets: python scripts/draw_tutorial.py DEMO_FOLDER

DEMO_FOLDER is the folder of a finished `gram demo`; each picture shows what is in it.
"""

import json
import sys
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from PIL import Image

from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.report.html.hierarchy import View, task_rows, topic_rows

DEMO, ASSETS = Path(sys.argv[1]), Path(__file__).resolve().parents[1] / "docs" / "assets"

hierarchy = Hierarchy.open(DEMO / "hierarchy")
store = hierarchy.open_store(DEMO / "store")
view = View(hierarchy, store, store.places(DEMO / "world" / "corpus"), seed=1)
pairs = view.random(2).choice(len(store), 8, replace=False)
facts = {
    "pairs": view.images(store.image[pairs], pairs),
    "topics": [topic_rows(view, number, 6) for number in range(4)],
    "task": task_rows(view),
    "curves": [json.loads(line) for line in (DEMO / "meta" / "log.jsonl").read_text(encoding="utf-8").splitlines()],
}
source = Path(__file__).with_name("tutorial.svg.jinja").read_text(encoding="utf-8")
template = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined).from_string(source)
for name in facts:
    (ASSETS / f"tutorial-{name}.svg").write_text(template.render(picture=name, **facts) + "\n", encoding="utf-8")
Image.open(DEMO / "figure_1b_3a_10_epochs.png").save(ASSETS / "tutorial-epochs.webp", lossless=True)
