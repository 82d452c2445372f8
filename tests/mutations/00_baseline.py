"""Ways to break the vectorised batches."""

from mutating import breaks, labels_one_late

from companion import data


@breaks("same-images")
def windows_too_far(notebook):
    """A window starts one pixel too far in each further row."""
    crops = data.crops

    def wrong(images, augment):
        views, (image, row) = crops(images, augment)
        return views, (image, row + 1)

    data.crops = wrong


@breaks("same-images", "same-training")
def labels_too_late(notebook):
    """Labels are one image behind."""
    labels_one_late()
