"""How similar texts are by their words: BM25, and the cosine of TF-IDF vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class BM25:
    """Okapi BM25 (Robertson & Zaragoza, 2009), with the statistics of words from a corpus.

    Σ_words log(1 + (n − d + ½)/(d + ½)) · f (k1 + 1) / (f + k1 (1 − b + b · length/mean length)), where n is the
    number of texts in the corpus, d the number of them that have the word, and f its count in the text that is scored.
    A word that occurs several times in the query is added as often. Words that the corpus lacks count nothing.

    >>> bm25 = BM25(["we won the vote", "they lost the vote", "no tax"])
    >>> bm25(["we won the vote", "no tax"], ["a tax?", "vote"]).round(2)
    array([[0.  , 0.43],
           [1.2 , 0.  ]])

    Args:
        corpus: texts.
        k1: how fast a repeated word saturates.
        b: how much long texts are discounted, in [0, 1].
    """

    def __init__(self, corpus: Sequence[str], k1: float = 1.5, b: float = 0.75):
        from sklearn.feature_extraction.text import CountVectorizer

        self.k1, self.b = k1, b
        self.vectorizer, counts = _fitted(CountVectorizer(), corpus)
        if counts is None:
            return
        self.mean_length = max(float(np.asarray(counts.sum(1)).mean()), 1e-12)
        frequency = np.bincount(counts.indices, minlength=counts.shape[1])
        self.weight = np.log1p((len(corpus) - frequency + 0.5) / (frequency + 0.5))

    def __call__(self, texts: Sequence[str], queries: Sequence[str]) -> np.ndarray:
        """The score of every text for every query, (texts, queries), at least 0."""
        if self.vectorizer is None:
            return np.zeros((len(texts), len(queries)))
        counts = self.vectorizer.transform(texts).astype(np.float64).tocsr()
        lengths = np.asarray(counts.sum(1)).ravel()
        short = self.k1 * (1 - self.b + self.b * lengths / self.mean_length)
        row = np.repeat(np.arange(len(texts)), np.diff(counts.indptr))
        counts.data = self.weight[counts.indices] * counts.data * (self.k1 + 1) / (counts.data + short[row])
        return (counts @ self.vectorizer.transform(queries).T.astype(np.float64)).toarray()


class TFIDF:
    """Cosine of TF-IDF vectors, with document frequencies from a corpus; 0 for a text without a word of the corpus.

    >>> TFIDF(["we won", "they lost"])(["we won", "they lost"], ["won we"]).round(2)
    array([[1.],
           [0.]])

    Args:
        corpus: texts.
    """

    def __init__(self, corpus: Sequence[str]):
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.vectorizer, _ = _fitted(TfidfVectorizer(), corpus)

    def __call__(self, texts: Sequence[str], queries: Sequence[str]) -> np.ndarray:
        """The cosine of every text with every query, (texts, queries), in [0, 1]."""
        if self.vectorizer is None:
            return np.zeros((len(texts), len(queries)))
        return (self.vectorizer.transform(texts) @ self.vectorizer.transform(queries).T).toarray()


def _fitted(vectorizer, corpus: Sequence[str]):
    """The fitted vectorizer and the corpus's vectors; None and None where no text has a word of two letters, which
    scikit-learn refuses."""
    analyze = vectorizer.build_analyzer()
    if not any(analyze(text) for text in corpus):
        return None, None
    return vectorizer, vectorizer.fit_transform(corpus)
