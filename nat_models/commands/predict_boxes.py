"""What `nat-models predict` does with a detector: COCO's results, a table of objects, and pictures, in a folder."""

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..training.decoding import Encoded, describe
from ..training.detecting import find, open_detector
from ..training.detections import FIELDS, MASK_FIELDS, coco_results, object_rows, picture_jpeg
from ..training.detectors import DetectorConfig
from ..training.segmenting import check_tile
from ..writing import text_file, write_atomically, writing
from .outputs import check_output, read_pictures, write_below

LEAST_SHOWN = 0.5  # score of what is in pictures and in the table, unless --threshold is given


def predict_boxes(args: argparse.Namespace, chunks: Iterator[Sequence[Encoded]]) -> None:
    """Writes detections.json, images.json, objects.csv and pictures/NAME.jpg into args.output.

    Raises:
        UserError: An image cannot be read or is none of --image-ids, the folder cannot be written, or two images would
            have one picture.
    """
    check_tile(args.tile)
    output = Path("detected") if args.output is None else args.output
    check_output(output, args.sources)
    number = _numbers(args.image_ids)
    network, config = open_detector(Path(args.model), args.device, args.threshold)
    options = dict(tile=args.tile, nms_thresh=config.settings.get("box_nms_thresh", 0.5), precision=args.precision)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    owners, listed, count = {}, [], 0
    with ExitStack() as files:
        write = files.enter_context(_array(output / "detections.json"))
        table = csv.writer(files.enter_context(text_file(output / "objects.csv")), lineterminator="\n")
        table.writerow([*FIELDS, *(MASK_FIELDS if config.masks else ())])
        pictures = read_pictures(chunks, len(config.mean), "picture .jpg", skip_unreadable=args.skip_unreadable)
        for image, stem, picture in pictures:
            image_id = number(image)
            if (other := owners.setdefault(image_id, describe(image))) != describe(image):
                raise UserError(f"{other} and {describe(image)} would both have the image id {image_id}.")
            height, width = picture.shape[1:]
            listed.append(dict(id=image_id, file_name=image.name, height=height, width=width))
            found = find(network, picture, name=describe(image), **options)
            found = found if args.threshold is None else found.above(args.threshold)
            shown = found.above(LEAST_SHOWN) if args.threshold is None else found
            count += len(shown)
            with writing(output):
                write(coco_results(found, image_id, config))
                table.writerows(object_rows(shown, describe(image), image_id, config))
                write_below(output / "pictures" / f"{stem}.jpg", picture_jpeg(picture, shown, config))
        with writing(output):
            write_atomically(output / "images.json", json.dumps(_described(listed, config), indent=1))
    said = f"{count} objects of a score from {LEAST_SHOWN if args.threshold is None else args.threshold} on"
    print(f"look at {output}: detections.json, objects.csv and pictures/ of {len(listed)} images, {said}")


def _described(images: list[dict], config: DetectorConfig) -> dict:
    """What COCO's JSON says of images and categories; annotations are left to the results."""
    categories = [dict(id=i, name=name) for i, name in zip(config.ids(), config.classes, strict=True)]
    return dict(images=images, annotations=[], categories=categories)


@contextmanager
def _array(path: Path) -> Iterator[Callable[[Sequence[dict]], None]]:
    """A function that adds entries to a JSON array, an entry a line; none of them is kept in memory."""
    with text_file(path) as file:
        before = "["

        def write(entries: Sequence[dict]) -> None:
            nonlocal before
            for entry in entries:
                file.write(f"{before}\n{json.dumps(entry)}")
                before = ","

        yield write
        file.write("[]\n" if before == "[" else "\n]\n")


def _numbers(file: Path | None) -> Callable[[Encoded], int]:
    """The id of an image: what a file of COCO's JSON says, or numbers from 1 in the order of the images."""
    if file is None:
        given: dict[str, int] = {}
        return lambda image: given.setdefault(describe(image), len(given) + 1)
    try:
        entries = json.loads(file.read_bytes())["images"]
        ids = {str(entry["file_name"]).replace("\\", "/"): int(entry["id"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as e:
        said = f"it lacks {e}" if isinstance(e, KeyError) else e
        raise UserError(f"--image-ids {file} cannot be read as COCO's JSON with images: {said}.") from None
    last: dict[str, list[int]] = {}
    for name, image_id in ids.items():
        last.setdefault(PurePosixPath(name).name, []).append(image_id)

    def number(image: Encoded) -> int:
        parts = PurePosixPath(image.name).parts
        parts = PurePosixPath(Path(image.path).as_posix()).parts if image.path.endswith(parts[-1]) else parts
        for start in range(len(parts)):
            if (found := ids.get("/".join(parts[start:]))) is not None:
                return found
        of_last = last.get(parts[-1], ())
        if len(of_last) != 1:
            many = (
                f": {len(of_last)} images of {file} have its name" if of_last else f" is none of the images of {file}"
            )
            raise UserError(f"{describe(image)}{many}, where --image-ids finds ids by file_name.")
        return of_last[0]

    return number
