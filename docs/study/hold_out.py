"""Split Fashion-MNIST's training set: python docs/study/hold_out.py FOLDER NEW_FOLDER

NEW_FOLDER gets the first 50,000 images as its training set and the last 10,000 as its test set, in FOLDER's format.
"""

import gzip
import struct
import sys
from pathlib import Path

folder, out = map(Path, sys.argv[1:])
out.mkdir(parents=True, exist_ok=True)
for name, header in (("images-idx3", 16), ("labels-idx1", 8)):
    content = gzip.decompress((folder / f"train-{name}-ubyte.gz").read_bytes())
    magic, count, *sides = struct.unpack(f">{header // 4}I", content[:header])
    size = (len(content) - header) // count
    parts = dict(train=content[header:][: 50_000 * size], t10k=content[header:][50_000 * size :])
    for part, values in parts.items():
        start = struct.pack(f">{header // 4}I", magic, len(values) // size, *sides)
        (out / f"{part}-{name}-ubyte").write_bytes(start + values)
