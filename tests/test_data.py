import hashlib
import io
import pickle
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.datasets import CIFAR10

from companion import data, datasets


def test_digits_are_real_images_in_three_disjoint_stratified_parts(digits):
    assert [len(part.labels) for part in (digits.train, digits.val, digits.test)] == [1257, 180, 360]
    for part in (digits.train, digits.val, digits.test):
        assert part.images.shape[1:] == (3, 32, 32)
        assert part.images.dtype == torch.float32
        assert part.labels.dtype == torch.int64
        assert (part.labels.bincount() / len(part.labels)).sub(0.1).abs().max() < 0.01
    pixels = digits.train.images * digits.std + digits.mean
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5
    torch.testing.assert_close(digits.train.images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_split_indices_are_a_partition_that_the_seed_decides():
    labels = torch.arange(10).repeat(30)
    parts = datasets.split_indices(labels, (200, 60, 40), seed=1)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(300))
    assert [labels[part].bincount().tolist() for part in parts] == [[20] * 10, [6] * 10, [4] * 10]
    assert torch.equal(parts[1], datasets.split_indices(labels, (200, 60, 40), seed=1)[1])
    assert not torch.equal(parts[1], datasets.split_indices(labels, (200, 60, 40), seed=2)[1])
    with pytest.raises(ValueError, match="add up to 299, not to 300 labels"):
        datasets.split_indices(labels, (200, 60, 39), seed=1)


def test_cluttered_digits_are_large_reproducible_and_separate(monkeypatch):
    made = []
    clutter = datasets._clutter
    monkeypatch.setattr(
        datasets, "_clutter", lambda digits, *rest: made.append(digits) or clutter(digits, *rest)
    )
    splits = data.load("cluttered_digits")
    assert [len(part.labels) for part in (splits.train, splits.val, splits.test)] == [20_000, 4_000, 10_000]
    again = clutter(datasets._original_digits(0)[1], 4_000, seed=1)
    assert torch.equal(splits.val.labels, again.labels)
    assert torch.equal(splits.val.images, again.images.sub(splits.mean).div(splits.std))
    assert (splits.test.labels.bincount() / 10_000).sub(0.1).abs().max() < 0.02
    sources = [{digit.numpy().tobytes() for digit in part.images} for part in made[:3]]
    assert not sources[0] & sources[2]
    assert not sources[0] & sources[1]


def test_unknown_data_set_is_refused():
    with pytest.raises(
        ValueError, match="unknown dataset 'mnist'; use one of 'digits', 'cluttered_digits', 'cifar10'"
    ):
        data.load("mnist")


@pytest.mark.parametrize("flip", [False, True])
def test_augmented_batches_equal_plain_slices(digits, flip):
    split = data.Split(digits.train.images[:100], digits.train.labels[:100])
    batches = data.Batches(split, 32, augment=data.Augment(2, flip), shuffle=False, seed=5)
    images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    assert torch.equal(labels, split.labels)
    padded = F.pad(split.images, (2,) * 4, mode="replicate")
    seen = set()
    for i in range(100):
        versions = {
            (y, x, mirror): (padded[i].flip(2) if mirror else padded[i])[:, y : y + 32, x : x + 32]
            for mirror in range(1 + flip)
            for y in range(5)
            for x in range(5)
        }
        found = [version for version, pixels in versions.items() if torch.equal(pixels, images[i])]
        assert found
        seen.add(found[0])
    assert len({version[:2] for version in seen}) > 20
    assert len({version[2] for version in seen}) == 1 + flip


def test_an_epoch_holds_each_sample_once_with_its_label():
    split = data.Split(torch.arange(50.0).view(50, 1, 1, 1).expand(50, 3, 8, 8), torch.arange(50))
    batches = data.Batches(split, 16, augment=data.Augment(2))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    assert len(batches) == 4
    images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    assert torch.equal(images[:, 0, 0, 0].long(), labels)
    assert torch.equal(labels.sort().values, torch.arange(50))
    assert [len(labels) for _, labels in data.Batches(split, 16, drop_last=True)] == [16, 16, 16]


def test_epoch_and_seed_decide_the_order():
    split = data.Split(torch.zeros(64, 3, 4, 4), torch.arange(64))

    def order(seed: int, epoch: int) -> list[int]:
        batches = data.Batches(split, 64, seed=seed)
        batches.set_epoch(epoch)
        return next(iter(batches))[1].tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(*key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4
    assert next(iter(data.Batches(split, 64, shuffle=False)))[1].tolist() == list(range(64))


def test_ranks_share_the_samples_equally_and_see_the_same_augmentation(digits):
    split = data.Split(digits.train.images[:101], torch.arange(101))
    whole = {
        int(y): x
        for xs, ys in data.Batches(split, 16, augment=data.Augment())
        for x, y in zip(xs, ys, strict=True)
    }
    shares = []
    for rank in range(4):
        share = {}
        for xs, ys in data.Batches(split, 16, augment=data.Augment(), rank=rank, world_size=4):
            share |= {int(y): x for x, y in zip(xs, ys, strict=True)}
        shares.append(share)
    assert [len(share) for share in shares] == [25] * 4
    assert len(set().union(*shares)) == 100
    assert all(torch.equal(image, whole[label]) for share in shares for label, image in share.items())


def test_batches_of_a_part_of_a_tensor_are_right():
    images = torch.randn(20, 3, 6, 6)
    part = data.Split(images[5:10], torch.arange(5))
    assert torch.equal(next(iter(data.Batches(part, 5, shuffle=False)))[0], images[5:10])


def test_contradicting_batches_are_refused():
    split = data.Split(torch.zeros(10, 3, 4, 4), torch.zeros(10).long())
    with pytest.raises(ValueError, match="batch_size=0"):
        data.Batches(split, 0)
    with pytest.raises(ValueError, match="batch_size=16 is not between 1 and the 10 samples of a rank"):
        data.Batches(split, 16, drop_last=True)
    for rank, world_size in ((2, 2), (-1, 2), (0, 11)):
        with pytest.raises(
            ValueError, match=f"rank={rank} of world_size={world_size} has no share of 10 samples"
        ):
            data.Batches(split, 4, rank=rank, world_size=world_size)


# CIFAR-10: torchvision's own loader on files in the real format, small, with their checksums in place of the
# real ones.


@pytest.fixture
def archive(monkeypatch) -> bytes:
    """A CIFAR-10 archive of 100 training and 20 test images, whose checksums torchvision is told to
    expect.
    """
    rng, files = np.random.default_rng(0), {}
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        pixels[:, 0] = number
        files[name] = pickle.dumps({"data": pixels, "labels": list(range(10)) * 2})
    files["batches.meta"] = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

    def checksum(content: bytes) -> str:
        return hashlib.md5(content).hexdigest()

    monkeypatch.setattr(CIFAR10, "tgz_md5", checksum(buffer.getvalue()))
    monkeypatch.setattr(
        CIFAR10, "train_list", [[f"data_batch_{i}", checksum(files[f"data_batch_{i}"])] for i in range(1, 6)]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksum(files["test_batch"])]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": checksum(files["batches.meta"])})
    return buffer.getvalue()


def unpack(archive: bytes, folder: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            path = folder / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(member).read())


@pytest.fixture
def downloads(monkeypatch):
    """What a download gives: set `downloads.content`; None, as at first, is a machine without a network."""

    class Response(io.BytesIO):
        pass

    class Network:
        content = None

        def __call__(self, *_, **__):
            if self.content is None:
                raise urllib.error.URLError("no network")
            response = Response(self.content)
            response.url, response.length = None, len(self.content)
            return response

    network = Network()
    monkeypatch.setattr(torchvision.datasets.utils.urllib.request, "urlopen", network)
    return network


def test_cifar10_is_downloaded_checked_and_converted_once(tmp_path, archive, downloads):
    downloads.content = archive
    first = data.load("cifar10", tmp_path / "new" / "folder")
    assert [tuple(part.images.shape) for part in (first.train, first.val, first.test)] == [
        (90, 3, 32, 32),
        (10, 3, 32, 32),
        (20, 3, 32, 32),
    ]
    assert first.classes == tuple(f"class {i}" for i in range(10))
    red = (first.test.images * first.std + first.mean)[:, 0, 0, 0] * 255
    assert red.round().tolist() == [5] * 20  # the first of the red plane of test_batch
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["cifar10.pt"]
    downloads.content = None
    assert torch.equal(data.load("cifar10", tmp_path / "new" / "folder").val.images, first.val.images)


def test_cifar10_that_is_already_there_is_used(tmp_path, archive, downloads):
    (tmp_path / "as archive").mkdir()
    (tmp_path / "as archive" / CIFAR10.filename).write_bytes(archive)
    unpack(archive, tmp_path / "as folder")
    for folder in ("as archive", "as folder"):
        assert len(data.load("cifar10", tmp_path / folder).test.labels) == 20
    assert (tmp_path / "as archive" / CIFAR10.filename).read_bytes() == archive
    assert (tmp_path / "as folder" / CIFAR10.base_folder / "test_batch").exists()


def test_cifar10_offline_says_what_to_do_and_leaves_nothing(tmp_path, archive, downloads):
    with pytest.raises(
        RuntimeError,
        match=r"could not be downloaded \(.*no network.*put cifar-10-python.tar.gz there.*'digits'",
    ):
        data.load("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cifar10_truncated_download_leaves_nothing(tmp_path, archive, downloads):
    downloads.content = archive[:1000]
    with pytest.raises(RuntimeError, match="could not be downloaded"):
        data.load("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cifar10_truncated_archive_is_named(tmp_path, archive, downloads):
    (tmp_path / CIFAR10.filename).write_bytes(archive[:-100])
    with pytest.raises(
        RuntimeError, match=r"cifar-10-python.tar.gz is truncated or corrupt .*: delete it and run again"
    ):
        data.load("cifar10", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CIFAR10.filename]


def test_cifar10_corrupt_folder_is_named(tmp_path, archive, downloads):
    unpack(archive, tmp_path)
    (tmp_path / CIFAR10.base_folder / "data_batch_3").write_bytes(b"garbage")
    with pytest.raises(RuntimeError, match=r"cifar-10-batches-py is incomplete or corrupt: delete it"):
        data.load("cifar10", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CIFAR10.base_folder]


def test_cifar10_damaged_conversion_is_named(tmp_path, archive, downloads):
    downloads.content = archive
    data.load("cifar10", tmp_path)
    converted = tmp_path / "cifar10.pt"
    converted.write_bytes(converted.read_bytes()[:5000])
    with pytest.raises(RuntimeError, match=r"cifar10.pt is damaged .*: delete it and run again"):
        data.load("cifar10", tmp_path)
