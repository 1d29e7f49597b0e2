"""Random tensors that are the same bits on every machine, with every version of every library."""

import math
import zlib

import numpy as np
import numpy.typing as npt

_ITEM_BYTES = 2
_NUM_STEPS = 2**15  # of a value, from 0 to 1
# Attention averages, so that what the tokens of a text have in common grows from layer to layer. At full scale the
# reference model sends 5.2 times its fair share to a layer's busiest expert (worst layer: 7.4); at this one 2.1 (3.3).
_ATTENTION_SCALE = 0.5


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    """The tensor of a canonical name (see `files.expected_tensors`): it depends on its name, shape and seed only.

    Norms are near one, matrices are scaled so that activations keep their size (what attention adds, half of it), all
    other values have variance one.
    """
    values = _values(f"{seed} {name}", math.prod(shape)).reshape(shape)
    if name.endswith("norm"):
        return values * np.float32(0.1) + np.float32(1)
    if len(shape) == 1:
        return values
    return values * np.float32((_ATTENTION_SCALE if name.endswith(".o") else 1.0) / math.sqrt(shape[1]))


def _values(key: str, num: int) -> npt.NDArray[np.float32]:
    """Uniform, of mean 0 and variance 1, from 65,536 different values.

    Whole numbers, of a generator whose stream numpy has frozen (NEP 19), and single roundings: a normal distribution
    would come with the logarithms and cosines of whatever library and processor computes them.
    """
    data = np.random.RandomState(zlib.crc32(key.encode())).bytes(_ITEM_BYTES * num)
    values = np.frombuffer(data, "<i2").astype(np.float32)
    values += np.float32(0.5)  # from -n to n - 1 to what is the same on both sides of zero
    values *= np.float32(math.sqrt(3) / _NUM_STEPS)
    return values
