"""The claims of the search on the card's toy, trained shorter; benchmarks/combination_toy.py is in full."""

import pytest
import toy_combination as toy

from diffaccel.distill.checkpoint_files import open_checkpoint
from diffaccel.distill.checkpoint_matrix import CheckpointMatrix
from diffaccel.distill.combination import Combination

RATES = (0.9, 0.97, 0.99, 0.995)


class Search:
    """The checkpoints of one short run, and their scores on 4k fixed samples and on 20k fresh ones."""

    def __init__(self, folder):
        files, self.means = toy.distill(0, folder, 600, 2500, 1200, 30, RATES)
        self.network = toy.network(0)
        self.matrix = CheckpointMatrix([open_checkpoint(file) for file in files])
        self.targets = self.matrix.targets(self.network)
        self.scores = toy.Score(100, 4000), toy.Score(200, 20000)

    def write(self, rows):
        self.matrix.write(rows, self.targets)
        return self.network

    def run(self, method, budget, **options):
        def score(rows, part):
            return self.scores[part](self.write(rows))

        found = Combination(self.matrix.count, score, method, budget=budget, **options)
        found.search()
        return found

    def held_out(self, found):
        network = self.write(found.coefficients)
        return self.scores[1](network), self.scores[1].energy(network)

    def best_average(self):
        """Held-out scores of the true moving average that is best in the search."""
        best = []
        for mean in self.means.values():
            network = toy.network(0).requires_grad_(False)
            for parameter, value in zip(network.parameters(), mean, strict=True):
                parameter.copy_(value)
            best.append((self.scores[0](network), self.scores[1](network), self.scores[1].energy(network)))
        return min(best)[1:]


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    return Search(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def evolved(search):
    return search.run("lcsc-ga", 300)


@pytest.fixture(scope="module")
def genetic(evolved):
    return evolved.winner()


def test_a_combination_beats_the_best_true_moving_average(search, genetic):
    """On noise and data that the search has not seen, in the metric and in one that it has not seen."""
    distance, energy = search.best_average()
    found, other = search.held_out(genetic)
    assert found < 0.93 * distance and other < energy
    assert abs(found / genetic.search - 1) < 0.1  # 5 % with 10k samples


def test_cma_is_better_with_as_many_evaluations(search, evolved):
    found = search.run("lcsc", 300)
    for budget in (100, 300):
        ours, theirs = (search.held_out(one.winner(budget))[0] for one in (found, evolved))
        assert ours < theirs


def test_coefficients_that_must_not_be_negative_are_no_better(search, genetic):
    found = search.run("lcsc-ga", 300, cap=1.0).winner()
    assert (genetic.coefficients < 0).any() and (found.coefficients >= 0).all()
    assert search.held_out(found)[0] >= search.held_out(genetic)[0]
