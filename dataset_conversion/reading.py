"""Reading original releases: which files there are, images in all formats, their hashes."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.errors import UserError
from nnunet_ssl.io import check_complete, has_nonfinite_nifti

JUNK = {"desktop.ini", "thumbs.db", "dicomdir", "__macosx"}
MAX_LISTED = 10  # names in one message
# what a path inside the source gives away, in small letters
RELEASES = {
    r"(^|/)lgemri\.nrrd$": "the challenge's release of LA",
    r"(^|/)mri_norm2\.h5$": "the h5 release of LA",
    r"(^|/)patient\d{3}_(4d|frame\d+(_gt)?)\.nii(\.gz)?$": "the challenge's release of ACDC",
    r"(^|/)patient\d{3}_frame\d+(_slice_\d+)?\.h5$": "the h5 release of ACDC",
    r"(^|/)pancreas_\d{4}/": "the TCIA release of PancreasCT",
    r"(^|/)(image\d{4}_norm|\d{4})\.h5$": "an h5 release of PancreasCT",
    r"(^|/)brats[^/]*_(flair|t1|t1ce|t2)\.nii(\.gz)?$": "BraTS",
    r"(^|/)\d{3}_\d?hc(_annotation)?\.png$": "HC18",
    r"(^|/)image_mha/": "PSFHS",
    r"(^|/)case\d+_segmentation\.mhd$": "PROMISE12",
    r"(^|/)task\d{2}_[^/]*/imagestr/|^imagestr/": "a task of MSD, or a data set of nnU-Net",
}


def is_junk(name: str) -> bool:
    """Tell whether a file or folder is left by an operating system: hidden, `desktop.ini`, ..."""
    return name.startswith(".") or name.lower() in JUNK


def files_below(folder: Path, *endings: str) -> list[Path]:
    """List files at any depth, sorted by path; junk is left out, links are followed.

    Args:
        folder: where to look.
        endings: as `.nii.gz`, upper or lower case alike; none means all files.
    """
    found, visited = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in visited else sorted(f for f in folders if not is_junk(f))
        if real in visited:
            continue
        visited.add(real)
        for name in names:
            if not is_junk(name) and (not endings or name.lower().endswith(endings)):
                found.append(Path(root, name))
    return sorted(found)


def describe_folder(folder: Path) -> str:
    """Say in a few words what a folder holds, and which release it looks like; for error messages.

    For example `80 .h5, 2 .list: looks like the h5 release of LA`.
    """
    files = files_below(folder)
    kinds = Counter(_suffix(p.name) for p in files)
    text = ", ".join(f"{n} {k or 'without ending'}" for k, n in kinds.most_common(5)) or "no files"
    paths = [p.relative_to(folder).as_posix().lower() for p in files]
    likely = [name for sign, name in RELEASES.items() if any(re.search(sign, p) for p in paths)]
    return f"{text}: looks like {' and '.join(likely)}" if likely else text


def _suffix(name: str) -> str:
    return ".nii.gz" if name.lower().endswith(".nii.gz") else Path(name).suffix.lower()


def listed(names: Sequence[object]) -> str:
    """Join names for a message, ten at most."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(str, names[:MAX_LISTED])) + more


def read_list(path: Path) -> list[str]:
    """Read one name per line; empty lines and `#` comments do not count.

    Raises:
        UserError: unreadable, empty, or a name stands twice.
    """
    try:
        lines = [x.split("#")[0].strip() for x in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the list {path}: {error}. Check the path.") from error
    names = [line for line in lines if line]
    if not names:
        raise UserError(f"The list {path} names nothing. Write one case per line.")
    doubled = [n for n, times in Counter(names).items() if times > 1]
    if doubled:
        raise UserError(f"{path} names {listed(doubled)} twice. Remove one line.")
    return names


def read_image(path: Path) -> sitk.Image:
    """Read any format of SimpleITK; a folder is read as one DICOM series.

    Returns:
        The image as stored: 2D, 3D or 4D, one or several components, original number type.

    Raises:
        UserError: missing, damaged or cut short, axes not at right angles, NaN or infinite values.
    """
    if path.is_dir():
        image = read_dicom_series(path)
    else:
        try:
            check_complete(path)
            if path.suffix.lower() in (".tif", ".tiff"):
                _check_pages(path)
            image = sitk.ReadImage(str(path))
        except MemoryError:
            raise
        except Exception as error:  # every reader library has its own errors
            raise UserError(f"Cannot read {path}: {_reason(path, error)}") from error
    if "float" in image.GetPixelIDTypeAsString():
        slabs = sitk.GetArrayViewFromImage(image)  # a view: no copy of large scans
        if has_nonfinite_nifti(path) or not all(np.isfinite(slab).all() for slab in slabs):
            raise UserError(f"{path} holds NaN or infinite values. Replace them, e.g. by 0.")
    return image


def _check_pages(path: Path) -> None:
    """Follow the chain of pages in a TIFF file; ITK silently leaves out those cut off."""
    with open(path, "rb") as f:
        head = f.read(8)
        order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
        large = int.from_bytes(head[2:4], order) == 43  # BigTIFF
        count_size, entry_size, place_size = (8, 20, 8) if large else (2, 12, 4)
        place = int.from_bytes(f.read(8) if large else head[4:], order)
        seen = set()
        while place and place not in seen:
            seen.add(place)
            f.seek(place)
            count = f.read(count_size)
            f.seek(int.from_bytes(count, order) * entry_size, os.SEEK_CUR)
            following = f.read(place_size)
            if len(following) < place_size:
                raise OSError(f"page {len(seen)} is cut off")
            place = int.from_bytes(following, order)


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and not path.exists():
        return "there is no such file. Check the name."
    text = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
    fix = "The file is damaged or cut short; copy or export it again."
    if "orthonormal" in text:
        return (
            "its direction matrix (sform or qform, the axes of the voxels) is not orthonormal, "
            "which SimpleITK refuses; the voxels are intact. Where the axes are at right angles "
            "but for rounding, write the nearest right-angled ones, for images and masks alike, "
            "with nibabel: image = nibabel.load(FILE); image.set_qform(image.affine); "
            "image.set_sform(image.get_qform()); nibabel.save(image, NEW_FILE). Where they are "
            "not (tilted gantry), resample the scan to right angles."
        )
    if path.suffix.lower() in (".mhd", ".nhdr", ".hdr"):
        data = [p for p in companion_files(path) if p != path]
        name = data[0].name if data else "its data file"
        absent = bool(data) and not data[0].is_file()
        fix = (
            f"It names {name}, which is not beside it: copy both."
            if absent
            else f"It or {name} is damaged or cut short; copy both again."
        )
    return f"{text}. {fix}"


def read_dicom_series(folder: Path) -> sitk.Image:
    """Read the one series in a folder, slices in the order of their positions, rescaled (HU).

    Raises:
        UserError: no series or several, a slice missing or doubled, unreadable.
    """
    reader = sitk.ImageSeriesReader()
    series = reader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        found = f"{len(series)} DICOM series" if series else "no DICOM series"
        raise UserError(
            f"{folder} holds {found} ({describe_folder(folder)}). Put each series into a folder "
            f"of its own."
        )
    files = reader.GetGDCMSeriesFileNames(str(folder), series[0])
    try:
        _check_slices(folder, files)
        if len(files) == 1:
            return sitk.ReadImage(files[0])
        reader.SetFileNames(files)
        return reader.Execute()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"Cannot read the DICOM series in {folder}: {reason}. A file is damaged; copy the "
            f"folder again."
        ) from error


def _check_slices(folder: Path, files: Sequence[str]) -> None:
    """Compare the distances between slices; ITK only warns of a missing one."""
    position = []
    for file in files:
        header = sitk.ImageFileReader()
        header.SetFileName(file)
        header.ReadImageInformation()
        if header.GetDimension() < 3:
            return
        normal = np.array(header.GetDirection()).reshape(3, 3)[:, 2]
        position.append(float(normal @ np.array(header.GetOrigin())))
    gaps = np.diff(position)
    if not len(gaps):
        return
    usual = float(np.median(gaps))
    odd = int(np.argmax(np.abs(gaps - usual)))
    if abs(gaps[odd] - usual) > max(0.05 * abs(usual), 0.01):
        raise UserError(
            f"{folder}: slices {Path(files[odd]).name} and {Path(files[odd + 1]).name} lie "
            f"{abs(gaps[odd]):g} mm apart, others {abs(usual):g} mm. A slice is missing, or the "
            f"folder mixes two series; export the series again."
        )


def split_channels(image: sitk.Image) -> list[sitk.Image]:
    """Split a 4D image (last axis), or one with several components (RGB), into its channels."""
    if image.GetNumberOfComponentsPerPixel() > 1:
        parts = range(image.GetNumberOfComponentsPerPixel())
        return [sitk.VectorIndexSelectionCast(image, i) for i in parts]
    if image.GetDimension() == 4:
        return [image[:, :, :, i] for i in range(image.GetSize()[3])]
    return [image]


def one_plane(image: sitk.Image) -> tuple[sitk.Image, bool]:
    """Make a grey 2D image of one stored in colour, as components or as a volume of 3 slices.

    Returns:
        The image, spacing kept, and whether all planes were equal; if not, it is the mean of red,
        green and blue, rounded.
    """
    planes = split_channels(image)
    if len(planes) == 1 and image.GetDimension() == 3:
        planes = [image[:, :, i] for i in range(image.GetSize()[2])]
    arrays = [sitk.GetArrayViewFromImage(p) for p in planes[:3]]  # no opacity
    if all(np.array_equal(arrays[0], a) for a in arrays[1:]):
        return planes[0], True
    mean = np.rint(np.mean(arrays, axis=0)).astype(arrays[0].dtype)
    return image_from_array(mean, planes[0].GetSpacing()), False


def image_from_array(array: np.ndarray, spacing: Sequence[float]) -> sitk.Image:
    """Make an image from voxels in the order (z, y, x) or (y, x); spacing in mm as x, y(, z)."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in spacing])
    return image


def companion_files(path: Path) -> list[Path]:
    """List the files that one source consists of: a DICOM folder, a header with its data file."""
    if path.is_dir():
        return [p for p in sorted(path.iterdir()) if p.is_file() and not is_junk(p.name)]
    suffix = path.suffix.lower()
    if suffix in (".mhd", ".nhdr") and path.is_file():
        text = path.read_bytes()[:10000].decode("latin-1")
        match = re.search(
            r"^\s*(?:ElementDataFile|data ?file)\s*[=:]\s*(\S.*?)\s*$", text, re.M | re.I
        )
        if match and match[1].upper() not in ("LOCAL", "LIST"):
            return [path, path.with_name(match[1])]
    if suffix == ".hdr":
        return [path, path.with_suffix(".img")]
    return [path]


def hash_source(path: Path) -> str:
    """Return the sha256 of a source; of several files, that of their names and hashes.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    files = companion_files(path)
    hashes = []
    for file in files:
        digest = hashlib.sha256()
        try:
            with open(file, "rb") as f:
                while block := f.read(1 << 22):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"Cannot read {path}: {_reason(path, error)}") from error
        hashes.append(digest.hexdigest())
    if len(files) == 1:
        return hashes[0]
    names = "".join(f"{f.name} {h}\n" for f, h in zip(files, hashes, strict=True))
    return hashlib.sha256(names.encode()).hexdigest()


def published_list(name: str) -> list[str]:
    """Read a list that the literature uses, kept in `dataset_conversion/lists`, in its order."""
    return read_list(Path(__file__).parent / "lists" / name)
