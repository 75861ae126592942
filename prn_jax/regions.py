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
    labels, count = ndimage.label(values >= threshold, _NEIGHBOURS)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    kept = [x for x in np.argsort(-areas, kind="stable") if areas[x] >= max(min_area, 1)]
    boxes = ndimage.find_objects(labels)
    peaks = ndimage.maximum(values, labels, kept) if kept else []
    means = ndimage.mean(values.astype(np.float64), labels, kept) if kept else []
    found = []
    for number, peak, mean in zip(kept, peaks, means, strict=True):
        rows, columns = boxes[number - 1]
        found.append(
            {
                "row": rows.start,
                "column": columns.start,
                "height": rows.stop - rows.start,
                "width": columns.stop - columns.start,
                "area": int(areas[number]),
                "peak": round(float(peak), 6),
                "mean": round(float(mean), 6),
            }
        )
    return np.isin(labels, kept), found
