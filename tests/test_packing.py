"""What is packed comes back to the last bit, as small as its values allow; damage is never half-loaded."""

import math

import pytest
import torch
from torch import nn

from companion import low_bits, models, packing, parity, pruning
from companion.packing import PackingError


@pytest.fixture(scope="module")
def small(trained_lenet):
    """LeNet5 with a tenth of its weights, of 4 bits, and biases of half precision."""
    pruned = pruning.permanent(pruning.masked(trained_lenet, 0.9))
    made = low_bits.fixed(low_bits.rounded(pruned, 4, per_channel=False, keep_zeros=True))
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            parameter.data = parameter.data.half().float()
    return made


def entropy_bytes(weight: torch.Tensor) -> float:
    shares = weight.unique(return_counts=True)[1] / weight.numel()
    return float(-(shares * shares.log2()).sum() * weight.numel() / 8)


def test_it_comes_back_to_the_last_bit(trained_lenet, small, tmp_path):
    for number, model in enumerate((trained_lenet, small, models.resnet18())):
        packed = packing.pack(model, tmp_path / str(number))
        assert packed.total_bytes == (tmp_path / str(number)).stat().st_size
        assert packed.total_bytes == packed.head_bytes + sum(packed.by_tensor.values())
        like = type(model)() if isinstance(model, models.LeNet5) else models.resnet18()
        found = packing.unpack(tmp_path / str(number), like)
        assert parity.fingerprint(found) == parity.fingerprint(model)
        assert parity.fingerprint(like) != parity.fingerprint(model), "what it is like is left alone"


def test_it_is_nearly_as_small_as_the_entropy_allows(small, tmp_path):
    packed = packing.pack(small, tmp_path / "packed")
    weights = {name: module.weight.detach() for name, module in pruning.layers(small).items()}
    limit = sum(map(entropy_bytes, weights.values()))
    used = sum(packed.by_tensor[f"{name}.weight"] for name in weights)
    assert limit < used < 1.1 * limit + 100 * len(weights)
    whole = sum(parameter.nbytes for parameter in small.parameters())
    assert whole / packed.total_bytes > 20
    assert packed.head_bytes < 700


def test_values_of_any_size_and_shape(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor([[1.5, -2.0], [0.0, 1.5]]))
            self.b = nn.Parameter(torch.randn(300))
            self.far = nn.Parameter(torch.zeros(2000))
            self.far.data[[0, 254, 509, 510, 1020, 1999]] = 3.0
            self.zeros = nn.Parameter(torch.zeros(600))
            self.signs = nn.Parameter(torch.tensor([0.0, -0.0, float("inf"), float("nan")]).repeat(99))
            self.many = nn.Parameter(torch.arange(256.0).repeat(9))
            self.register_buffer("count", torch.tensor(7))
            self.register_buffer("empty", torch.zeros(0, 3))

    model = Odd()
    packing.pack(model, tmp_path / "odd")
    found = packing.unpack(tmp_path / "odd", Odd())
    assert parity.fingerprint(found) == parity.fingerprint(model)
    assert found.count.shape == ()


@pytest.mark.parametrize("place", [0, 9, 30, 200, 0.5, 0.9, -1])
def test_a_flipped_byte_is_refused(small, tmp_path, place):
    path = tmp_path / "packed"
    packing.pack(small, path)
    whole = bytearray(path.read_bytes())
    at = place if isinstance(place, int) else math.floor(place * len(whole))
    whole[at] ^= 1
    path.write_bytes(whole)
    like = models.LeNet5()
    before = parity.fingerprint(like)
    with pytest.raises(PackingError, match=r"damaged|not a packed model"):
        packing.unpack(path, like)
    assert parity.fingerprint(like) == before


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(small, tmp_path, share):
    path = tmp_path / "packed"
    packing.pack(small, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(PackingError, match=r"damaged|not a packed model"):
        packing.unpack(path, models.LeNet5())


def test_another_model_is_refused(small, tmp_path):
    packing.pack(small, tmp_path / "packed")
    with pytest.raises(PackingError, match="of another model: size mismatch for fc"):
        packing.unpack(tmp_path / "packed", models.LeNet5(nodes_2=10))
    with pytest.raises(PackingError, match="of another model"):
        packing.unpack(tmp_path / "packed", nn.Linear(2, 2))


def test_what_cannot_be_packed_is_refused_and_the_old_file_stays(small, trained_lenet, tmp_path):
    path = tmp_path / "packed"
    packing.pack(small, path)
    before = path.read_bytes()
    with pytest.raises(PackingError, match=r"conv1\.weight_mask is a mask"):
        packing.pack(pruning.masked(trained_lenet, 0.5), path)
    with pytest.raises(PackingError, match="bfloat16"):
        packing.pack(models.LeNet5().bfloat16(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["packed"]
