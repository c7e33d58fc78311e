"""Gates: the quick way to name arguments."""

import inspect
import itertools

import pytest

from diffaccel.pipelines.gates import Gate


class Owner:
    """Methods of all kinds of parameters."""

    def plain(self, output, timestep, sample, eta=0.0, *, generator=None):
        """As schedulers have it."""

    def more(self, output, *rest, timestep, **kwargs):
        """With what takes all others."""


@pytest.mark.parametrize("method", ["plain", "more"])
def test_bind_is_that_of_signatures(method):
    """In all forms of a call, twice each with other values; what does not fit is refused alike."""
    owner = Owner()
    gate, signature = Gate(owner, method), inspect.signature(getattr(owner, method))
    names, refused = ("output", "timestep", "sample", "eta", "generator", "new"), 0
    for count, size in itertools.product(range(5), range(4)):
        for keys in itertools.permutations(names, size):
            for shift in (0, 100):
                args = tuple(range(shift, shift + count))
                kwargs = {key: shift + 50 + place for place, key in enumerate(keys)}
                try:
                    wanted = dict(signature.bind(*args, **kwargs).arguments)
                except TypeError:
                    refused += 1
                    with pytest.raises(TypeError):
                        gate.bind(args, kwargs)
                else:
                    assert gate.bind(args, kwargs) == wanted
    assert refused > 10
