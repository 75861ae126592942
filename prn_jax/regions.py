"""Maps -> masks and regions: where an image is anomalous, as things that can be counted."""

from typing import Any

import numpy as np
from scipy import ndimage

_NEIGHBOURS = np.ones((3, 3))  # a pixel touches all eight around it, as in PRO

Region = dict[str, Any]


def find(
    values: np.ndarray, threshold: float, min_area: int = 1
) -> tuple[np.ndarray, list[Region]]:
    """Cuts a map at a threshold into connected (8-connected) regions.

    Args:
      values: an anomaly map, float32 [h, w].
      threshold: a pixel is anomalous from this value on.
      min_area: smaller regions, in pixels, are left out.

    Returns:
      Where the regions are, bool [h, w], and the regions, the largest first: `row`, `column`,
      `height` and `width` of the box around it and its `area`, in pixels, and the highest (`peak`)
      and the mean value in it.
    """
    labels, _ = ndimage.label(values >= threshold, _NEIGHBOURS)
    mask, found = np.zeros(values.shape, bool), []
    # Each region in its own box, and no copy of its values: large images have large ones.
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[box] == number
        area = int(inside.sum())
        if area < min_area:
            continue
        mask[box] |= inside
        rows, columns = box
        found.append(
            {
                "row": rows.start,
                "column": columns.start,
                "height": rows.stop - rows.start,
                "width": columns.stop - columns.start,
                "area": area,
                "peak": round(float(np.max(values[box], where=inside, initial=-np.inf)), 6),
                "mean": round(float(np.mean(values[box], where=inside, dtype=np.float64)), 6),
            }
        )
    return mask, sorted(found, key=lambda x: -x["area"])
