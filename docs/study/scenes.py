"""Few scenes for detection, in COCO's format: PYTHONPATH=. python docs/study/scenes.py FOLDER COUNT SPLIT

FOLDER gets COUNT training scenes, each listed 400 / COUNT times so that an epoch always has 400, and 300 scenes for
evaluation, drawn as SPLIT: `val`, or any other name for tuning.
"""

import json
import sys
from pathlib import Path

import coco

folder, count, split = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
(folder / "annotations").mkdir(parents=True)
for part, name, length in (("train", "train", count), ("val", split, 300)):
    (folder / f"{part}2017").mkdir()
    content = coco.write_split(folder / f"{part}2017", name, length, (96, 96))
    images, annotations = content["images"], content["annotations"]
    copies = range(400 // count if part == "train" else 1)
    content["images"] = [some | dict(id=some["id"] + i * length) for i in copies for some in images]
    content["annotations"] = [
        some | dict(id=some["id"] + i * len(annotations), image_id=some["image_id"] + i * length)
        for i in copies
        for some in annotations
    ]
    (folder / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
