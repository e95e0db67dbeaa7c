"""What a classifier has to beat on the SMS Spam Collection: lines of docs/tuning.md beside ours."""
import os

import numpy as np
import pytest
from conftest import note_row

import classify
from core.text.tokenizer import ByteTokenizer


@pytest.mark.skipif('DATA_MIRROR' not in os.environ, reason='needs sms_spam.tsv from DATA_MIRROR')
@pytest.mark.parametrize('seed', [1, 2, 3])
def test_bag_of_words(monkeypatch, seed):
    """Logistic regression on counts of words, its strength chosen on the validation part; majority.
    The same texts in each part as classify.py has with this seed."""
    sklearn = pytest.importorskip('sklearn')
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    for name, value in dict(dataset='sms_spam', seed=seed, pack=False).items():
        monkeypatch.setattr(classify, name, value)
    tokenizer = ByteTokenizer()
    parts, names, _ = classify.class_data(tokenizer, 10_000, [])
    assert names == ['ham', 'spam']
    texts = [[tokenizer.decode(ids[:-1]) for ids in part.ids] for part in parts]
    truth = [np.array([ids[-1] for ids in part.ids]) for part in parts]
    words = CountVectorizer().fit(texts[0])
    counts = [words.transform(part) for part in texts]
    tried = [LogisticRegression(C=c, max_iter=2000).fit(counts[0], truth[0])
             for c in (0.1, 1, 10, 100)]
    best = max(tried, key=lambda found: found.score(counts[1], truth[1]))
    for model, said in (('majority', 0 * truth[2]), ('bag of words', best.predict(counts[2]))):
        accuracy = (said == truth[2]).mean()
        f1 = sklearn.metrics.f1_score(truth[2], said, average='macro')
        note_row('SMS spam: what a classifier has to beat', 'model, seed, accuracy, macro F1',
                 model, seed, f'{accuracy:.4f}', f'{f1:.4f}')
    assert accuracy > 0.97 and f1 > 0.92
