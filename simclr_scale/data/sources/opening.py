"""From what the user typed to a source of images."""

import os
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args

from simclr_scale.data.sources.archives import open_archive
from simclr_scale.data.sources.arrays import ChannelAxis
from simclr_scale.data.sources.base import NotOnDisk, Source, held_out_part
from simclr_scale.data.sources.folders import open_folder
from simclr_scale.data.sources.named_splits import NoSuchPart, SplitRequest
from simclr_scale.data.sources.packed import ALL, is_packed, open_packed
from simclr_scale.data.sources.shards import open_shards, refuse_stream
from simclr_scale.errors import InputError

DEFAULT_PATCH_SIZE = 9
Split = Literal["train", "val", "test"]

_KINDS = (
    "a folder of images or arrays, torch/NAME, archive/NAME, hfds/PATH_OR_ID, wds/PATTERN, patches/FILE or textures"
)
_PREFIXES = ("torch/", "archive/", "hfds/", "wds/", "patches/")


def open_source(
    spec: str,
    *,
    root: str | Path | None = None,
    split: Split = "train",
    train_split: str | None = None,
    test_split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    seed: int = 0,
    channels: int = 3,
    arrays: bool = False,
    channel_axis: ChannelAxis | None = None,
    patch_size: int = DEFAULT_PATCH_SIZE,
) -> Source:
    """Open one part of a data set.

    `spec` is one of:

    - a folder of images (`open_folder` says how labels and splits are found); `./NAME` where it could be mistaken
    - a folder that `simclr-scale prepare` has packed
    - `torch/NAME`: a data set of torchvision.datasets below `root`; never downloaded
    - `archive/NAME`: one of `ARCHIVES`, from its archive, unpacked below `root` (`open_archive`)
    - `hfds/PATH_OR_ID`: a folder of parquet files, or a data set of the Hugging Face hub
    - `wds/PATTERN`: WebDataset shards in local files, read by an index (`open_shards`)
    - `patches/FILE`: the patches around the pixels of one scene of many bands (`open_patches`)
    - `textures`: the generated data set

    A data set with splits of its own uses them, `train_split` and `test_split` naming them where they are not called
    train and test (or validation, where there is no test). Any other labelled set is cut 80/20, class by class, by
    `seed`; `split_description` of the result says so. An unlabelled set is all train.

    Args:
        spec: the data set.
        root: where relative folders, `torch/` and `archive/` data sets lie; by default the working directory, but for
            `torch/`.
        split: the part.
        train_split: the data set's name for its train split.
        test_split: the data set's name for its test split.
        image_key: the column of images in a table, their extension in shards, or the variable of .mat files; by default
            found by type.
        label_key: the column of labels in a table, their extension or field in shards, or the variable that labels a
            scene; by default found by type; empty for none.
        seed: of the split of a data set that brings none, and of the textures.
        channels: of pictures: 3 gives RGB, 1 grey. Arrays have those they have; `source.channels` tells.
        arrays: a folder's images are its arrays, .tif among them, where it holds any, and not its pictures.
        channel_axis: which axis of arrays is that of the channels, 0 or -1; None finds it or asks.
        patch_size: side of the patches of `patches/`, in pixels.

    Raises:
        InputError: anything about the data set that the user has to mend, found before any image is decoded.
    """
    if split not in get_args(Split):
        raise InputError(f"split {split!r}: must be one of {', '.join(get_args(Split))}")
    root = os.fspath(root) if root is not None else None
    packed = _packed_folder(spec, root)
    is_scene, is_folder = spec.startswith("patches/"), _is_folder(spec) and packed is None
    has_columns = is_scene or spec.startswith(("hfds/", "wds/"))
    if (label_key and not has_columns) or (image_key and not (has_columns or is_folder)):
        raise InputError(
            f"{spec}: has no columns; image_key and label_key belong to hfds/ and wds/ sources and .mat files"
        )
    if spec == "textures":
        return _textures(split, train_split or test_split, seed, channels)
    request = SplitRequest(split, train_split, test_split)
    if packed is not None:
        return open_packed(spec, packed, request, seed, channels)
    if is_scene:
        from simclr_scale.data.sources.patches import open_patches

        if request.named:
            raise InputError(f"{spec}: has no splits: leave out train_split and test_split")
        path = _in_root(spec.removeprefix("patches/"), root)
        keys = {"image_key": image_key, "label_key": label_key}
        return open_patches(spec, path, split, patch_size=patch_size, channel_axis=channel_axis, seed=seed, **keys)
    source, whole = _open(spec, root, request, image_key, label_key, channels, arrays, channel_axis)
    return held_out_part(source, split, seed) if whole else source


def open_parts(
    spec: str,
    *,
    root: str | Path | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    channels: int = 3,
    arrays: bool = False,
) -> dict[str, Source]:
    """All parts of a data set, as for packing: "train", "test" and maybe "val"; or "all" where it is not divided.

    The arguments are those of `open_source`.

    Raises:
        InputError: the data set cannot be opened, or is packed already.
    """
    root = os.fspath(root) if root is not None else None
    if spec == "textures":
        raise InputError("textures: are generated; there is nothing to pack")
    if spec.startswith("patches/"):
        raise InputError(f"{spec}: a scene is read whole, so there is nothing to pack")
    if _packed_folder(spec, root) is not None:
        raise InputError(f"{spec}: is packed already; for another size, pack its source, as every resize costs detail")

    def part(name: str) -> tuple[Source, bool]:
        request = SplitRequest(name, train_split, test_split)
        return _open(spec, root, request, image_key, label_key, channels, arrays)

    train, whole = part("train")
    if whole:
        return {ALL: train}
    parts = {"train": train, "test": part("test")[0]}
    with suppress(NoSuchPart):
        parts["val"] = part("val")[0]
    return parts


def _open(
    spec: str,
    root: str | None,
    request: SplitRequest,
    image_key: str | None,
    label_key: str | None,
    channels: int = 3,
    arrays: bool = False,
    channel_axis: ChannelAxis | None = None,
) -> tuple[Source, bool]:
    """The named split, and whether it is the whole data set, still to be divided."""
    if spec.startswith("torch/"):
        # torchvision takes long to import.
        from simclr_scale.data.sources.torchvision_sets import open_torchvision

        return open_torchvision(spec, spec.removeprefix("torch/"), root, request, channels)
    if spec.startswith("archive/"):
        return open_archive(spec, root, request, channels)
    if spec.startswith("hfds/"):
        from simclr_scale.data.sources.tables import open_table

        return open_table(spec, _table_location(spec, root), request, image_key, label_key, channels)
    if spec.startswith("wds/"):
        pattern = spec.removeprefix("wds/")
        return open_shards(spec, pattern, _in_root("", root), request, image_key, label_key, channels)
    refuse_stream(spec, spec)
    folder = _in_root(spec, root)
    if not os.path.isdir(folder):
        raise NotOnDisk(_why_no_folder(spec, folder))
    return open_folder(
        spec, folder, request, channels=channels, arrays=arrays, channel_axis=channel_axis, image_key=image_key
    )


def _is_folder(spec: str) -> bool:
    return spec != "textures" and not spec.startswith(_PREFIXES)


def _packed_folder(spec: str, root: str | None) -> str | None:
    """The folder, where it is a packed one."""
    path = spec.removeprefix("wds/")
    is_path = spec.startswith("wds/") or _is_folder(spec)
    folder = _in_root(path, root) if path and is_path else ""
    return folder if folder and is_packed(folder) else None


def _textures(split: Split, named_split: str | None, seed: int, channels: int) -> Source:
    from simclr_scale.data.textures import TextureSource

    if named_split is not None:
        raise InputError(f"textures: has no split {named_split!r}: leave out train_split and test_split")
    return TextureSource(split=split, seed=seed, channels=1 if channels == 1 else 3)


def _in_root(path: str, root: str | None) -> str:
    return os.path.abspath(os.path.join(os.path.expanduser(root or ""), os.path.expanduser(path)))


def _table_location(spec: str, root: str | None) -> str:
    """An existing folder, or the id of a data set on the hub, which is NAME or OWNER/NAME."""
    path = spec.removeprefix("hfds/")
    folder = _in_root(path, root)
    if path and os.path.isdir(folder):
        return folder
    if not path or path.startswith(("/", ".", "~")) or path.count("/") > 1 or os.path.exists(folder):
        raise InputError(f"{spec}: no folder {folder}; after hfds/ comes a folder of parquet files or a hub id")
    return path


def _why_no_folder(spec: str, folder: str) -> str:
    place = spec if spec == folder else f"{spec} ({folder})"
    if os.path.exists(folder):
        return f"{place}: is a file; a source is {_KINDS}"
    prefix, slash, rest = spec.partition("/")
    close = (
        get_close_matches(prefix.lower() + slash, _PREFIXES, n=1) if slash else get_close_matches(spec, ["textures"])
    )
    close = [close[0] + rest] if close else _siblings(folder)
    if close:
        return f"{place}: no such folder; did you mean {close[0]}?"
    return f"{place}: no such folder; a source is {_KINDS}"


def _siblings(folder: str) -> list[str]:
    parent, name = os.path.split(folder)
    if not os.path.isdir(parent):
        return []
    close = get_close_matches(name, sorted(os.listdir(parent)), n=1)
    return [path for match in close if os.path.isdir(path := os.path.join(parent, match))]
