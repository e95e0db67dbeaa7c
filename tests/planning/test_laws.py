"""Scaling laws: the tables of the papers, and numbers worked out by hand."""
import math

import pytest

from core.net.weights import build_model
from core.planning import laws
from core.planning.laws import CORRECTED, PUBLISHED, Law
from model import GPTConfig, count_parameters

# Hoffmann et al. 2022, tables 3 and A3: parameters, FLOPs, tokens.
CHINCHILLA = {
    1: [(400e6, 1.92e19, 8.0e9), (1e9, 1.21e20, 20.2e9), (10e9, 1.23e22, 205.1e9),
        (67e9, 5.76e23, 1.5e12)],
    2: [(400e6, 1.84e19, 7.7e9), (1e9, 1.20e20, 20.0e9), (10e9, 1.32e22, 219.5e9),
        (67e9, 6.88e23, 1.7e12)]}


@pytest.mark.parametrize('approach', [1, 2])
def test_chinchillas_tables(approach):
    """Tokens and FLOPs within 5%."""
    for N, flops, tokens in CHINCHILLA[approach]:
        D = laws.tokens_by_table(N, approach)
        assert D == pytest.approx(tokens, rel=0.05) and 6 * N * D == pytest.approx(flops, rel=0.05)


def test_corrected_fit_says_what_its_paper_says():
    """Besiroglu et al. 2024: N grows with C^0.513, and at Chinchilla's budget 20 tokens for each
    parameter are near the best (70 billion parameters and 1.4 trillion tokens were trained)."""
    law = CORRECTED
    assert (law.E, law.A, law.alpha, law.B, law.beta) == (1.8172, 482.01, 0.3478, 2085.43, 0.3658)
    N, D = law.optimum(5.76e23)
    assert law.beta / (law.alpha + law.beta) == pytest.approx(0.513, abs=5e-4)
    assert N == pytest.approx(70e9, rel=0.05) and D == pytest.approx(1.4e12, rel=0.06)
    assert 18 < D / N < 22
    # by hand: G = (0.3478 x 482.01 / (0.3658 x 2085.43))^(1 / 0.7136) = 0.1196; 9.6e22^0.51261
    assert N == pytest.approx(0.1196 * 9.6e22 ** 0.51261, rel=1e-3)


def test_published_constants_contradict_the_other_approaches():
    N, D = PUBLISHED.optimum(5.76e23)
    assert D / N > 60
    assert CORRECTED.optimum(5.76e23)[1] / CORRECTED.optimum(5.76e23)[0] < 22


def test_the_optimum_is_one():
    """No other split of the FLOPs has a lower loss; tokens_of and size_of are on the same line."""
    law = Law(E=1.0, A=100.0, alpha=0.3, B=200.0, beta=0.4)
    for C in (1e12, 1e18, 1e24):
        N, D = law.optimum(C)
        assert 6 * N * D == pytest.approx(C)
        for factor in (0.5, 0.9, 1.1, 2):
            assert law.loss(N * factor, D / factor) > law.loss(N, D)
        assert law.tokens_of(N) == pytest.approx(D) and law.size_of(D) == pytest.approx(N)
        assert law.compute_for(law.loss(N, D)) == pytest.approx(C, rel=1e-6)
        assert law.tokens_for(N, law.loss(N, D)) == pytest.approx(D)
    assert law.compute_for(1.0) == law.tokens_for(1e9, 1.1) == math.inf


def test_loss_by_hand():
    assert Law(1, 8, 1 / 3, 9, 1 / 2).loss(64, 81) == pytest.approx(1 + 8 / 4 + 9 / 9)


def test_repeated_data_by_hand():
    """4 epochs: R = 3, so 100 tokens are worth 100 + 100 x 15.39 x (1 - e^(-3 / 15.39)) = 372.5."""
    assert laws.worth(400, 100, laws.REPEATED_TOKENS) == pytest.approx(
        100 + 1538.7756 * (1 - math.exp(-3 / 15.387756))) == pytest.approx(372.5, abs=0.2)
    assert laws.worth(50, 100, 15) == 50 and laws.worth(1e9, 100, 15) == pytest.approx(1600)
    N, D = CORRECTED.optimum(1e21)
    losses = [laws.loss_repeated(CORRECTED, N, D, D / n) for n in (0.5, 1, 2, 4, 16, 64)]
    assert losses[0] == losses[1] == CORRECTED.loss(N, D) and losses == sorted(losses)
    # "up to 4 epochs of repeated data yields negligible changes to loss" (their abstract)
    assert losses[3] - losses[1] < 0.03 < losses[5] - losses[1]


def test_overtrained():
    """Half of the parameters, the same loss; what is served has then paid for the training."""
    N, D = CORRECTED.optimum(1e23)
    tokens, factor, served = laws.overtrained(CORRECTED, N, D, 0.5)
    assert CORRECTED.loss(N / 2, tokens) == pytest.approx(CORRECTED.loss(N, D))
    assert factor == pytest.approx(N / 2 * tokens / (N * D)) and 1.2 < factor < 1.4
    small, large = 6 * N / 2 * tokens + 2 * N / 2 * served, 6 * N * D + 2 * N * served
    assert small == pytest.approx(large)


def test_values_to_start_from():
    """What DeepSeek LLM took for 7B and 67B parameters (Bi et al. 2024, table 2): 2 trillion tokens
    are 8.4e22 and 8.0e23 FLOP; batches of 2,304 and 4,608 sequences of 4,096 tokens."""
    for C, batch, rate in ((8.4e22, 2304 * 4096, 4.2e-4), (8.04e23, 4608 * 4096, 3.2e-4)):
        assert laws.batch_tokens(C) == pytest.approx(batch, rel=0.05)
        assert laws.learning_rate(C) == pytest.approx(rate, rel=0.05)
    # Tao et al. 2024, section 4.1, by hand: 0.20 x (1e21)^0.42 = 1.33e8 parameters
    assert laws.vocabulary(1e21, 3200) == pytest.approx(0.20 * 10 ** 8.82 / 3200)


# Brown et al. 2020, tables 2.1 and D.1: layers, width, heads, FLOPs of training on 300B tokens.
GPT3 = [(12, 768, 12, 2.25e20), (24, 1024, 16, 6.41e20), (24, 1536, 16, 1.37e21),
        (24, 2048, 16, 2.38e21), (32, 2560, 32, 4.77e21), (32, 4096, 32, 1.20e22),
        (40, 5120, 40, 2.31e22), (96, 12288, 96, 3.14e23)]


@pytest.mark.parametrize('n_layer, n_embd, n_head, flops', GPT3)
def test_flops_of_gpt3(n_layer, n_embd, n_head, flops):
    """6 N D, with N counted in the model that has this shape, within 3%. (The table's 13B model is
    5,140 wide, which 40 heads of 128 are not; 5,120 are meant.)"""
    config = GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head, head_dim=n_embd // n_head,
                       block_size=2048, vocab_size=50_257)
    N = count_parameters(build_model(config, None, 'meta'))
    assert 6 * N * 300e9 == pytest.approx(flops, rel=0.03)
